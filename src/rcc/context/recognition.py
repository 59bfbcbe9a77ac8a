"""Which files are contexts: what a verb asks before it imports torch."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def is_context(path: str | Path) -> bool:
    """Return whether a file is a context or is called one: a damaged one should not be taken for a strange text."""
    return str(path).endswith(".rcc") or (str(path) != "-" and is_ours(Path(path), "context"))


def is_ours(path: Path, kind: str) -> bool:
    """Return whether a file says of itself that it is an rcc file of this kind; it may still be damaged.

    What can be read only once, such as a pipe, is none, and is not looked into.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return f'"format":"rcc-{kind}"'.encode() in file.read(512)
    except OSError:
        return False
