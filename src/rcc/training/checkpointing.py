"""Checkpoints that are there whole or not at all: written aside, flushed to the disk, listed, then renamed.

What a run puts into one are its state, Trainer's, and a description for people and programs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import TrainerState

from ..checkpoints.hashing import file_sha256
from ..errors import FileError, brief

logger = logging.getLogger(__name__)

STATE, TRAINER_STATE, ABOUT = "state.pt", "trainer_state.json", "about.json"
LISTING = "files.json"
"""Written last: the size and SHA-256 of every file beside it."""


def write(folder: Path, step: int, files: dict[str, Callable[[Path], Any]], keep: int) -> Path:
    """Write `folder/checkpoint-STEP` and remove all but the newest `keep`.

    Args:
        folder: of the stage; is made where there is none.
        step: optimizer steps taken.
        files: {name: what writes that file}.
        keep: how many checkpoints the folder may hold afterwards.

    Raises:
        FileError: it cannot be written; what was there stays.
    """
    temporary, target = folder / f".checkpoint-{step}.tmp", folder / f"checkpoint-{step}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".checkpoint-*.tmp"):  # of a process that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        temporary.mkdir()
        for name, writer in files.items():
            writer(temporary / name)
            _flush(temporary / name)
        listing = {name: _described(temporary / name) for name in files}
        (temporary / LISTING).write_text(json.dumps(listing, indent=2), encoding="utf-8")
        _flush(temporary / LISTING)
        _flush(temporary)
        shutil.rmtree(target, ignore_errors=True)  # the same step again, after resuming from an earlier one
        os.rename(temporary, target)
        _flush(folder)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or _no_room(temporary) or str(error).partition("\n")[0]
        shutil.rmtree(temporary, ignore_errors=True)
        raise FileError(f"{target} cannot be written: {reason}.") from error
    present = _all(folder)
    for old in set(present) - set(present[present.index(target) :][:keep]):  # those of later steps were passed over
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in a folder; others are named in a warning and passed over."""
    return next(whole(folder), None)


def whole(folder: Path) -> Iterator[Path]:
    """Yield the whole checkpoints in a folder, the newest first; others are named in a warning and passed over."""
    for checkpoint in _all(folder):
        if (fault := _fault(checkpoint)) is None:
            yield checkpoint
        else:
            logger.warning("%s is passed over: %s.", checkpoint, fault)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's tensors and numbers, on the CPU.

    Raises:
        FileError: it cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
        return state
    except Exception as error:  # a damaged file ends in whatever its bytes look like to the unpickler
        raise FileError(f"{checkpoint / STATE} is damaged or cannot be read ({brief(error)}).") from error


def load_about(checkpoint: Path) -> dict[str, Any]:
    """Return what `about.json` says of a checkpoint; what transformers reads beside it is checked as well.

    Raises:
        FileError: one of the two is damaged or cannot be read.
    """
    name = ABOUT
    try:
        about = json.loads((checkpoint / ABOUT).read_text(encoding="utf-8"))
        if type(about["batch"]) is not int or (about.get("over") and not isinstance(about["held_out"], dict)):
            raise TypeError("it lacks what a run goes on from")
        name = TRAINER_STATE
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        steps = (state.global_step, state.logging_steps, state.eval_steps, state.save_steps)
        counts = (*steps, state.train_batch_size)
        if not all(isinstance(count, (int, float)) and math.isfinite(count) for count in counts):
            raise TypeError("it counts no steps")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{checkpoint / name} is damaged or cannot be read ({brief(error)}).") from error
    return cast("dict[str, Any]", about)


def random_state() -> dict[str, Any]:
    """Return the states of all sources of random numbers, as plain data and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all sources of random numbers into the states that :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    numbered = [(int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def _fault(checkpoint: Path) -> str | None:
    try:
        listing = json.loads((checkpoint / LISTING).read_text(encoding="utf-8"))
        for name, known in listing.items():
            known = known if isinstance(known, dict) else {"bytes": known}  # one of before there were digests
            if (got := (checkpoint / name).stat().st_size) != known["bytes"]:
                return f"{name} has {got:,} bytes instead of {known['bytes']:,}"
            if "sha256" in known and known["sha256"] != file_sha256(checkpoint / name):
                return f"the content of {name} does not match its digest"
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        return f"it was cut short ({getattr(error, 'strerror', None) or error})"
    return None


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _no_room(folder: Path) -> str | None:
    """Return why nothing more can be written to a folder, which torch.save does not tell; None if it can."""
    try:
        with (folder / "trial").open("wb") as file:
            file.write(bytes(1 << 20))
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


def _flush(path: Path) -> None:
    """Have the system put a file, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
