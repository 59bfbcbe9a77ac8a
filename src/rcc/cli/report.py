"""`rcc report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import err
from .files import check_output, creating


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `rcc eval` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")],
    samples: Annotated[int, typer.Option(min=0, help="Samples of each figure, at most; 0: none.")] = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
) -> None:
    """Make one HTML page of evaluations: charts, tables, and the samples of every figure."""
    from ..evaluation.html import page as reporting

    target = check_output(output, force, [file for folder in folders if folder.is_dir() for file in folder.iterdir()])
    with creating(output):
        reporting.write(target, reporting.page(folders, samples), replace=force)
    counted = f"{len(folders)} evaluation{'s' * (len(folders) > 1)}"
    err.print(f"{output}: {counted}, {target.stat().st_size / 1e6:.1f} MB", markup=False)
