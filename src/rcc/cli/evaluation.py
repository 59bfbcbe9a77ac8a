"""`rcc eval`: every kind of evaluation is a dataclass of options, measured and printed by one function."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Json, err, out, print_json, progress
from .evaluation_options import (
    EvaluationOptions,
    PasskeyOptions,
    QAOptions,
    ReconstructionOptions,
    ResourcesOptions,
)

KINDS: dict[str, type[EvaluationOptions]] = {
    "reconstruction": ReconstructionOptions,
    "passkey": PasskeyOptions,
    "qa": QAOptions,
    "resources": ResourcesOptions,
}
"""The verbs of `rcc eval` that measure."""
LAST = ("output", "device", "dtype", "as_json")
"""The options that the help shows last."""

app = typer.Typer(
    help="Measure a model, or compare two measurements.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def measure(options: EvaluationOptions) -> None:
    """Measure what the options ask for, write its folder, and print its table with notes, or its figures as JSON."""
    from ..evaluation.evaluation import evaluate, finish
    from ..evaluation.results import need

    output = options.output
    need(*options.packages, *(["matplotlib"] if output is not None else []))  # before anything is loaded
    evaluation = options.evaluation()
    with progress(evaluation.verb, evaluation.work(len(evaluation)), evaluation.unit) as advance:
        results = evaluate(evaluation, output, advance)
    report = finish(evaluation, results)
    if options.as_json:
        print_json(results.summary(evaluation.by, report.more()))
        return
    out.print("\n".join([report.table(), *(f"{note}\n" for note in results.notes)]), end="", markup=False)
    if output is not None:
        err.print(f"{output}: results.json, samples.jsonl, table.md and plots", markup=False)


def verb(kind: type[EvaluationOptions]) -> Callable[..., None]:
    """Return the function of a verb: its parameters are the options' fields, its help their docstring."""
    types = typing.get_type_hints(kind, include_extras=True)

    def run(**values: Any) -> None:
        measure(kind(**values))

    parameters = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]
        )
        for field in sorted(fields(kind), key=lambda field: field.name in LAST)
    ]
    run.__doc__, run.__signature__ = kind.__doc__, inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


for name, options in KINDS.items():
    app.command(name)(verb(options))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A folder that `rcc eval` wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same task.")],
    as_json: Json = False,
) -> None:
    """Put two evaluations side by side: the differences, sample by sample, with their intervals."""
    from ..evaluation import compare as comparing

    differences, notes = comparing.compare(a, b)
    if as_json:
        print_json({"differences": [asdict(difference) for difference in differences], "notes": notes})
        return
    out.print(comparing.table(differences, a.name or str(a), b.name or str(b)), markup=False)
    for note in notes:
        out.print(note, markup=False)
