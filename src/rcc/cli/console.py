"""What the verbs of the command line share: consoles, options, reading a text, loading a model, progress."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import checkpoints
from ..context.store import default_store
from ..errors import InputError
from ..runtime.quiet import import_transformers
from ..runtime.terminal import CONTROL, Console, shown

if TYPE_CHECKING:
    from ..engine import Engine

PASSKEY_MODEL = "rcc-smollm2-135m-passkey"

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Model = Annotated[str | None, typer.Option("--model", help="A shipped model (`rcc models`), a folder, or a hub id.")]
Budget = Annotated[
    int, typer.Option(min=1, help="Positions that --rate auto lets a context take, if a trained rate allows it.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to compute: cpu, cuda, …; auto: all GPUs, for selections (default: a GPU if there is one)."
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16, float32 (default: as stored; float32 on a CPU without bfloat16)."),
]
AllowSpecial = Annotated[
    bool,
    typer.Option("--allow-special", help="Read chat marks such as <|im_end|> in texts and questions as special ones."),
]
CompressorName = Annotated[
    str | None,
    typer.Option(
        "--compressor",
        help="rcc, or selection (of a model's own KV pairs, also of an RCC model's base), selection-expected, …"
        " (default: as the model is).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


KEPT = ("bfloat16", "float16", "float32", "int8")
Kept = Annotated[
    str | None,
    typer.Option(
        "--kv",
        help="Precision of the keys and values that are kept; int8: half of bfloat16's bytes (default: the model's).",
    ),
]


def check_kept(kv: str | None) -> None:
    """Refuse a precision that contexts are not kept in, before a model is loaded."""
    if kv is not None and kv not in KEPT:
        raise InputError(f"--kv {kv} is unknown: use one of {', '.join(KEPT)}.")


def load_engine(
    model: str | None,
    device: str | None,
    dtype: str | None,
    allow_special: bool = False,
    made: str | Path | None = None,
    compressor: str | None = None,
    adapters: str = "merged",
) -> Engine:
    """Load the model that is named, or that made the context file `made`, or the default one, with the user's store."""
    checkpoints.hash_ahead(model, made)
    with loading("loading the model") as say:
        from ..engine import Engine

        return Engine.load(
            model,
            device,
            dtype,
            default_store(),
            allow_special,
            adapters=adapters,
            compressor=compressor,
            made=made,
            progress=say,
        )


@contextlib.contextmanager
def loading(message: str = "loading torch and transformers") -> Iterator[Callable[[str], None]]:
    """Show a line while libraries and models are loaded, and nothing that transformers would say."""
    with status(message) as say:
        import_transformers()
        yield say


def write(text: str) -> None:
    """Write a piece of what a model says, escaped."""
    sys.stdout.write(shown(text, lines=True))
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Print JSON; in ASCII where the stream lacks one of its characters, and would print another in its place."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(value, indent=2)
    else:  # JSON itself escapes only the lowest ones
        text = CONTROL.sub(lambda m: m[0] if m[0] == "\n" else f"\\u{ord(m[0]):04x}", text)
    sys.stdout.write(text + "\n")


@contextlib.contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Show a line that says what is being done; phases that take long stay visible, silent unless on a terminal."""
    if not sys.stderr.isatty():  # FORCE_COLOR makes rich's is_terminal true in a pipe
        yield lambda phase: None
        return
    with err.status(message) as status:

        def say(phase: str) -> None:
            status.stop()  # pip draws a bar of its own
            err.print(f"{phase} …", markup=False)

        yield say


@contextlib.contextmanager
def progress(message: str, total: int, unit: str = "tokens") -> Iterator[Callable[..., None]]:
    """Show a bar with speed and time left on a terminal; silent otherwise."""
    if not sys.stderr.isatty():
        yield lambda done, total=None: None
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Pace(ProgressColumn):
        def render(self, task: Task) -> Text:
            if not task.completed or not task.elapsed:
                return Text("")
            pace = task.completed / task.elapsed
            left = timedelta(seconds=round(((task.total or 0) - task.completed) / pace))
            return Text(f"{pace:,.{0 if pace > 10 else 1}f} {unit}/s, {left} left")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,}"),
        Pace(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(shown(message), total=total)
        yield lambda done, total=None: bar.update(task, completed=done, **({"total": total} if total else {}))
