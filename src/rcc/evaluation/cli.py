"""`rcc eval`: one thin function a task."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..console import Json, out, print_json

app = typer.Typer(
    help="Measure a model, or compare two measurements.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A folder that `rcc eval` wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same task.")],
    as_json: Json = False,
) -> None:
    """Put two evaluations side by side: the differences, sample by sample, with their intervals."""
    from . import compare as comparing

    found, notes = comparing.compare(a, b)
    if as_json:
        print_json({"differences": [asdict(d) for d in found], "notes": notes})
        return
    out.print(comparing.table(found, a.name or str(a), b.name or str(b)), markup=False)
    for note in notes:
        out.print(note, markup=False)
