"""The one way to write a file: aside, flushed to the disk, and then under its name in one step.

Whoever looks sees the file as it was or as it will be. The last step creates: a file that somebody else made meanwhile
is not lost, unless it is to be replaced; and then mode and owner stay as they were.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import ExistsError, FileError

PREFIX, SUFFIX = ".rcc-", ".tmp"
OLD_SECONDS = 3600.0
"""Age from which on a temporary file that no process holds was left by one that was killed."""


@contextlib.contextmanager
def writing(path: str | Path, replace: bool = True, private: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write, which gets its name (symbolic links followed) when it is complete and on the disk.

    Args:
        path: the file's name; its folder exists.
        replace: whether a file of that name is replaced; it passes on its mode and, where permitted, its owner.
        private: a new file is for its owner alone.

    Raises:
        ExistsError: there is a file of that name, and it is not to be replaced.
        FileError: what has the name is no regular file.
        OSError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    before = _replaced(target, path, replace)
    remove_left_overs(target.parent)
    temporary = target.with_name(f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}")  # any name can be too long already
    try:
        mode = 0o600 if private or before is not None else 0o666  # what was private is so from its first byte
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(handle, "w+b") as file:
            with contextlib.suppress(OSError):  # not every file system can; then age alone tells
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            if before is not None:
                _pass_on(before, file.fileno())
            os.fsync(file.fileno())
            if replace:
                os.replace(temporary, target)
            else:
                _create(temporary, target, path)
        _flush_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, replace: bool = True, private: bool = False) -> None:
    """Write a text in UTF-8, as :func:`writing` does; half a character becomes a question mark."""
    with writing(path, replace, private) as file:
        file.write(text.encode("utf-8", "replace"))


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to fill, which gets its name, of nothing or an empty folder, when it is complete.

    Raises:
        OSError: it cannot be made, or the name is taken.
    """
    target = Path(path)
    remove_left_overs(target.parent)
    work = target.with_name(f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}")
    work.mkdir()
    handle = os.open(work, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield work
        os.rename(work, target)
        _flush_folder(target.parent)
    finally:
        os.close(handle)
        shutil.rmtree(work, ignore_errors=True)


def private_folder(path: Path) -> None:
    """Make a folder for its owner alone, where there is none; folders above it are ordinary ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def remove_left_overs(folder: Path) -> None:
    """Remove temporary files and folders that killed processes left in a folder: old ones that nobody holds."""
    try:
        with os.scandir(folder) as entries:
            left_overs = [e for e in entries if e.name.startswith(PREFIX) and e.name.endswith(SUFFIX)]
    except OSError:
        return
    for entry in left_overs:
        with contextlib.suppress(OSError):
            if time.time() - entry.stat(follow_symlinks=False).st_mtime >= OLD_SECONDS and not _is_held(entry):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _is_held(entry: os.DirEntry[str]) -> bool:
    if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
        return True  # no such thing was made here
    handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _replaced(target: Path, name: str | Path, replace: bool) -> os.stat_result | None:
    """Return the status of the file that will be replaced; None where there is none."""
    if not target.name:
        raise FileError(f"{str(name)!r} cannot be written: it does not name a file.")
    try:
        before = os.stat(target)
    except FileNotFoundError:
        return None
    if not replace:
        raise _exists(name)
    if not stat.S_ISREG(before.st_mode):
        raise FileError(f"{name} cannot be written: it is not a regular file.")
    return before


def _exists(name: str | Path) -> ExistsError:
    return ExistsError(f"{name} exists and is not replaced: name another file, or set replace=True.")


def _pass_on(before: os.stat_result, handle: int) -> None:
    mode, mine = stat.S_IMODE(before.st_mode), os.fstat(handle)
    if (mine.st_uid, mine.st_gid) != (before.st_uid, before.st_gid):
        try:
            os.fchown(handle, before.st_uid, before.st_gid)
        except OSError:
            try:
                os.fchown(handle, -1, before.st_gid)
            except OSError:
                mode &= ~0o070  # which were for another group
    os.fchmod(handle, mode)


def _create(temporary: Path, target: Path, name: str | Path) -> None:
    """Give a file its name, unless that is taken."""
    try:
        os.link(temporary, target)
        return
    except FileExistsError:
        raise _exists(name) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
            raise
    try:  # a file system without links: an empty file takes the name, and is replaced at once
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise _exists(name) from None
    os.replace(temporary, target)


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some folders cannot be opened for it
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
