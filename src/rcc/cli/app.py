"""`rcc`: its verbs, and where the process begins."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .console import out
from .contexts import ask, chat, compress, contexts, inspect, join, reconstruct
from .evaluation import app as evaluation
from .harness import harness
from .models import convert_checkpoint, models, plan
from .process import run
from .report import report
from .training import train

app = typer.Typer(
    name="rcc",
    help="Compress a long text once, keep it in a file, ask it anything.",
    epilog='For instance: rcc compress book.txt -o book.rcc, then rcc ask book.rcc "Who is the heroine?"',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"rcc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.add_typer(evaluation, name="eval")
evaluation.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(harness)
for verb in (
    compress,
    join,
    ask,
    chat,
    reconstruct,
    inspect,
    contexts,
    train,
    models,
    plan,
    report,
    convert_checkpoint,
):
    app.command()(verb)


def main() -> None:
    """Run the command line."""
    run(app)
