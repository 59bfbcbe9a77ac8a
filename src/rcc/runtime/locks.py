"""Folders that one process works in, or makes: the others are told, or wait. A dead process holds nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import FileError

NAME = ".rcc-lock"
_guard = threading.Lock()
_held: dict[str, tuple[int, int]] = {}
"""Folders that this process works in: a handle, and how many times."""


def make_once(folder: Path, is_made: Callable[[], bool], make: Callable[[Path], None], lock: Path) -> None:
    """Make a folder, unless it is there: in one process, while others that want it wait. It appears by one rename.

    Args:
        folder: its parent exists. What lies there and is not whole is removed first.
        is_made: whether the folder is there and whole; asked under the lock.
        make: fills an empty folder, which then gets the name.
        lock: a file for the lock, which the system releases when its holder is killed.

    Raises:
        OSError: something cannot be written; and whatever `make` raises, after which no folder is left.
    """
    with FileLock(lock):
        if is_made():
            return
        for left_over in folder.parent.glob(f".{folder.name}-*"):  # of a killed process: nobody else makes one now
            shutil.rmtree(left_over, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        work = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
        work.mkdir()
        try:
            make(work)
            os.rename(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


class FolderLock:
    """A folder for this process alone, from when this is made until :meth:`release`, or until the process ends.

    The system lets go of it whichever way the process ends. Within the process the folder can be taken again.

    Args:
        folder: is made if there is none; and removed on release, if it is still empty.

    Raises:
        FileError: another process works there, which the message names; or the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder, self._key, self._made, self._open = folder, os.path.realpath(folder), False, False
        try:
            self._made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            with _guard:
                handle, count = _held.get(self._key, (-1, 0))
                _held[self._key] = (handle if count else self._take(), count + 1)
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"{folder} cannot be written: {error.strerror or error}.") from error
        self._open = True

    def _take(self) -> int:
        path = os.path.join(self._key, NAME)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(handle)
                os.close(handle)
                raise FileError(f"{self.folder} is in use by {holder}: wait for it, or name another folder.") from None
            except OSError:
                pass  # a file system without locks: nothing can be known there
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:  # else its holder has just removed it
                    break
            os.close(handle)
        os.ftruncate(handle, 0)
        about = {"process": os.getpid(), "machine": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(handle, json.dumps(about).encode(), 0)
        return handle

    def release(self) -> None:
        """Let others work in the folder."""
        with _guard:
            if not self._open or self._key not in _held:
                return
            self._open = False
            handle, count = _held[self._key]
            if count > 1:
                _held[self._key] = handle, count - 1
                return
            del _held[self._key]
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._key, NAME))
        os.close(handle)
        if self._made:
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(self._key)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _holder(handle: int) -> str:
    try:
        about: Any = json.loads(os.pread(handle, 1000, 0))
        return f"process {int(about['process'])} on {str(about['machine'])[:80]!r} (since {str(about['since'])[:30]!r})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
