"""`rcc train`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .console import err, loading, out


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML: see recipes/ and docs/training.md.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: stages.0.max_tokens=1e6. May be repeated.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="A trained model to start from: a shipped one, a folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and a sample of every task only.")] = False,
) -> None:
    """Train a model by a recipe; under torchrun, in several processes."""
    first = os.environ.get("RANK", "0") == "0"
    err.quiet = not first  # the others would say the same
    with loading():
        from ..training.recipe import Recipe
    settings = Recipe.load(recipe, overrides)
    if dry_run:
        from ..training.plan import plan

        plan(settings, init or settings.init, out)
        return
    if output is None:
        raise InputError("--output is missing: name a folder for the run, or use --dry-run.")
    from ..training.run import Run
    from ..training.trainer import Interrupted

    try:
        Run(settings, output, resume, init).go()
    except Interrupted as stop:
        again = shlex.join(["rcc", "train", str(output / "recipe.yaml"), "--output", str(output), "--resume"])
        err.print(f"rcc: interrupted; {again} goes on.", markup=False)
        sys.exit(128 + stop.number)
