"""`rcc eval harness`."""

from __future__ import annotations

import importlib
import sys
import traceback

import typer

from ..errors import InputError
from .console import status


def harness(context: typer.Context) -> None:
    """Run lm-eval, the lm-evaluation-harness, which then knows `--model rcc`.

    All arguments are its own: --model rcc --model_args model=…,rate=8 --tasks …; `run --help` shows them.
    """
    from ..evaluation.results import need

    need("lm_eval", extra="harness")
    with status("loading torch and transformers"):
        importlib.import_module("rcc.integrations.lm_eval")  # which registers the model
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("lm_eval."):
            raise  # but what lm-eval itself raises is how it refuses its arguments
        message = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"lm-eval: {message}.") from error
