"""The file that a verb writes: refused before the work is done, not after."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ExistsError, FileError


@contextlib.contextmanager
def creating(output: Path) -> Iterator[None]:
    """Refuse in the same words what has appeared since :func:`check_output` looked."""
    try:
        yield
    except ExistsError:
        raise FileError(f"{output} exists: use --force to replace it.") from None


def check_output(output: Path, force: bool, inputs: Iterable[str | Path] = (), called: str = "inputs") -> Path:
    """Refuse an output that cannot be written, before the work is done; return the file, symbolic links followed.

    Args:
        output: as the user named it.
        force: whether an existing file may be replaced.
        inputs: files that are read, which the output may not be.
        called: what a message calls them.
    """
    target = Path(os.path.realpath(output))
    if taken := next((source for source in inputs if _is_same(source, target)), None):
        raise FileError(f"{output} is one of the {called}, {taken}: name another file for the output.")
    if os.path.isdir(target):
        raise FileError(f"{output} is a folder: name a file in it.")
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileError(f"{output} is not a regular file: name one to write.")  # a device must not be replaced
    if os.path.exists(target) and not force:
        raise FileError(f"{output} exists: use --force to replace it.")
    if not os.path.isdir(target.parent):
        what = "is not a folder" if os.path.exists(target.parent) else "does not exist"
        raise FileError(f"{output} cannot be written: {output.parent} {what}.")
    try:  # permissions do not tell everything
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name that is too long
        with tempfile.NamedTemporaryFile(prefix=".rcc-", suffix=".tmp", dir=target.parent):
            pass
    except OSError as error:
        raise FileError(f"{output} cannot be written: {error.strerror or error}.") from None
    return target


def _is_same(source: str | Path, target: Path) -> bool:
    try:
        return os.path.samefile(source, target)
    except OSError:  # reading it will say what is wrong
        return False
