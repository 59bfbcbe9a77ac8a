"""A file of ours before its tensors are made: its bytes, mapped and checked, and what its header says of them.

Nothing here needs torch, for whose import `rcc inspect` and `rcc contexts` need not wait. The file is not read by the
safetensors library, because that one opens it anew, when it may be another one than the one checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ContextError, FileError, InputError

VERSION = 2
"""The newest format: 2 is a context in 8 bits. What an older reader can read is written as 1."""
NO_DIGEST = "0" * 64
"""Stands in the header for the digest while that is computed."""
DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of types, and torch's."""
DTYPES = {**FLOATS, "I64": "int64", "I8": "int8"}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I8": 1}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: safetensors' name, one of :data:`DTYPES`.
        shape: of the tensor.
        start: where its bytes begin in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class Container:
    """A file that was read.

    Attributes:
        path: the file.
        manifest: what was written beside the tensors.
        entries: the tensors by name.
        data: the file's bytes, in a mapping of this process alone.
    """

    path: Path
    manifest: dict[str, Any]
    entries: Mapping[str, Entry]
    data: mmap.mmap

    def release(self) -> None:
        """Let go of what was read of the bytes: they take no memory until they are used again."""
        _release(self.data)


def read(path: Path, kind: str, verify: str) -> Container:
    """Open a file that :func:`rcc.context.file.write` wrote.

    Args:
        path: the file.
        kind: `"context"` or `"vectors"`; a file of another kind is refused.
        verify: `"full"` checks the digest over every byte first; `"header"` only the header and the sizes.

    Raises:
        InputError: an unknown `verify`.
        FileError: the file is not there or cannot be read.
        ContextError: it is damaged, truncated, of a newer format, or not a file of this kind.
    """
    if verify not in ("full", "header"):
        raise InputError(f'verify={verify!r} is unknown: use "full" or "header".')
    damaged = f"{path} is damaged or not an rcc {kind} file: make it again"
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ContextError(f"{path} is empty.")
            # a private mapping: what is checked here is what the tensors show, and nothing is written back
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= len(data) - 8:
        raise ContextError(f"{damaged} (its header is cut short).")
    text = data[8 : 8 + size]
    match = DIGEST.search(text)
    if match is None:
        raise ContextError(f"{damaged} (it has no digest).")
    if verify == "full":
        if _digest(data, 8 + match.start(1)) != match[1]:
            raise ContextError(f"{damaged} (its content does not match its digest).")
        _release(data)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        version, kind_inside, manifest = int(metadata["version"]), metadata["format"], json.loads(metadata["rcc"])
        total = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise ContextError(f"{damaged} (its header cannot be read).") from None
    if kind_inside != f"rcc-{kind}":
        raise ContextError(f"{path} holds {kind_inside!r}, not an rcc {kind} file.")
    if version > VERSION:
        raise ContextError(f"{path} has format version {version}, this rcc reads up to {VERSION}: update rcc.")
    if not isinstance(manifest, dict):
        raise ContextError(f"{damaged} (its manifest cannot be read).")
    if len(data) != total:
        raise ContextError(f"{damaged} (it has {len(data)} bytes instead of {total}).")
    try:
        entries = {name: _entry(8 + size, **entry) for name, entry in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ContextError(f"{damaged} (a tensor cannot be read: {error}).") from None
    return Container(path, manifest, entries, data)


def _entry(start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    """Return what a header says of a tensor; its bytes are counted from `start` on."""
    low, high = data_offsets
    if not all(type(n) is int for n in (*shape, low, high)):
        raise TypeError("its shape or its place is no list of numbers")
    entry = Entry(dtype, tuple(shape), start + low)
    if min(shape, default=1) < 1 or low < 0 or high - low != entry.nbytes:
        raise ValueError("its size does not fit its shape")
    return entry


def _release(data: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        data.madvise(mmap.MADV_DONTNEED)


def _digest(data: mmap.mmap, at: int) -> bytes:
    """Return the SHA-256 of a mapped file with the 64 bytes at `at` replaced by zeros."""
    digest = hashlib.sha256()
    with memoryview(data) as view:
        digest.update(view[:at])
        digest.update(NO_DIGEST.encode())
        digest.update(view[at + 64 :])
    return digest.hexdigest().encode()
