"""What the verbs of the command line share: consoles, options, reading a text, loading a model, progress."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FileError, InputError, ModelError
from ..runtime.terminal import CONTROL, Console, shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..model.rcc import RCCForCausalLM

DEFAULT_MODEL = "rcc-qwen2.5-0.5b"
PASSKEY_MODEL = "rcc-smollm2-135m-passkey"
BUDGET = 4096
"""Positions that a context takes at most where the rate is chosen for it: a first token within a second or so."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Model = Annotated[str | None, typer.Option("--model", help="A shipped model (`rcc models`), a folder, or a hub id.")]
Budget = Annotated[
    int, typer.Option(min=1, help="Positions that --rate auto lets a context take, if a trained rate allows it.")
]
Device = Annotated[str | None, typer.Option(help="Where to compute: cpu, cuda, … (default: a GPU if there is one).")]
Dtype = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16, float32 (default: as stored; float32 on a CPU without bfloat16)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_text(source: str) -> str:
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except FileNotFoundError:
        raise FileError(f"{source} does not exist.") from None
    except IsADirectoryError:
        raise FileError(f"{source} is a folder: name a text file.") from None
    except OSError as error:
        raise FileError(f"{source} cannot be read: {error.strerror or error}.") from None
    if b"\0" in data[: 1 << 20]:
        raise InputError(f"{name} is not a text but a binary file: give it as UTF-8 text.")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text (byte {data[error.start]:#04x} at position {error.start:,}):"
            " convert it, for instance with iconv."
        ) from None
    if not text.strip():
        raise InputError(f"{name} is empty: there is nothing to compress.")
    return text


def load_model(
    name: str | None, device: str | None, dtype: str | None, made_by: dict[str, Any] | None = None
) -> tuple[RCCForCausalLM, PreTrainedTokenizerBase]:
    """The model that is named, or the one that made the context, or the default one; and its tokenizer."""
    from .. import checkpoints

    if name is None and made_by is not None:
        name = str(made_by.get("model"))
        if name not in checkpoints.shipped_models():
            raise ModelError(f"the context was made by {name}: name that model's folder with --model.")
    with status("loading the model") as say:
        from transformers.utils import logging as quiet

        from ..model.rcc import RCCForCausalLM
        from ..runtime.precision import computing

        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        device, kind = check_device(device), check_dtype(dtype)
        name = default_model() if name is None else name
        rcc = RCCForCausalLM.from_pretrained(name, device=device, dtype=kind, progress=say)
        if kind is None:
            rcc.to(computing(rcc.dtype, device))
        return rcc, checkpoints.load_tokenizer(name)


def default_model() -> str:
    """The model that is used where none is named: $RCC_MODEL, else :data:`DEFAULT_MODEL`."""
    return os.environ.get("RCC_MODEL") or DEFAULT_MODEL


def check_device(name: str | None) -> str:
    """The device of that name, or for None a GPU if there is one.

    Raises:
        InputError: it is unknown, or cannot be used here.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device} is unknown: use cpu, cuda or mps.") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"--device {device} cannot be used here ({reason}): use cpu.") from None
    return device


def check_dtype(name: str | None) -> torch.dtype | None:
    """The precision of that name; None for None.

    Raises:
        InputError: it is none for weights.
    """
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise InputError(f"--dtype {name} is unknown: use bfloat16, float16 or float32.")
    return dtype


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
    """A line that says what is being done; phases that take long stay visible, silent unless on a terminal."""
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
    """A bar with speed and time left on a terminal; silent otherwise."""
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
