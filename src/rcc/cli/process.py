"""`rcc` as a process: signals, streams, exit codes."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from ..errors import RCCError
from ..runtime import allocator
from ..runtime.terminal import shown
from .console import err


def run(app: Callable[..., Any]) -> NoReturn:
    """Run the command line as a process: errors become one sentence, and an exit code."""
    allocator.configure()  # before torch allocates anything
    logging.basicConfig(format="rcc: %(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Escaped("rcc: %(message)s"))
    logging.getLogger("rcc").setLevel(logging.INFO if os.environ.get("RCC_VERBOSE") else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # a killed process cleans up as an interrupted one does; so does one whose terminal is closed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup asks for that
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    _prepare_streams()
    code: Any = 0
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # what cannot be written shows here, not when Python ends
        if code == 130:  # typer's answer to Ctrl-C
            _say_interrupted()
    except RCCError as error:
        code = refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _say_interrupted()
        code = 130
    except SystemExit as stop:  # 1 is typer's and rich's for a reader that went away: `rcc … | head`
        code = 141 if stop.code == 1 else stop.code
    except BrokenPipeError:
        code = 141
    except OSError as error:
        code = refuse(re.sub(r"^\[Errno \d+\] ", "", str(error)).partition("\n")[0].rstrip(".") + ".")
    except Exception as error:
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "allocate memory" in str(error)
        ):
            code = refuse("out of memory: use a higher --rate, or a shorter text.")
        elif hasattr(error, "format_message"):  # typer's own, of wrong usage
            code = _usage(error)
        else:
            raise
    if code not in (0, None):
        _drop_output()
    sys.exit(code or 0)


class _Escaped(logging.Formatter):
    """What is logged holds names that somebody else gave."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=True)


def _say_interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again while Python ends, it would be another exit status
    err.print("rcc: interrupted.")


def refuse(message: str) -> int:
    """Print an error's sentence, and return the exit code that goes with it."""
    err.print(f"rcc: {shown(message)}", markup=False)
    return 2


def _usage(error: Any) -> int:
    message = error.format_message()
    if "\n" in message:  # no command: this is the help
        error.show()
        return int(error.exit_code)
    return refuse(f"{message.rstrip('.')} (see {error.ctx.command_path if error.ctx else 'rcc'} --help).")


def _prepare_streams() -> None:
    """Keep streams that are closed, or cannot show or hold every character, from ending the command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if name == "stdin" else "replace")


def _drop_output() -> None:
    """Forget what could not be written: Python would try again when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
