"""One file format for contexts and vectors: safetensors with a manifest, a digest over every byte, written whole.

The file is an ordinary safetensors file, which any safetensors reader opens. Its metadata hold `rcc` (the manifest
as JSON) and `sha256`: the SHA-256 of the whole file with those 64 digits replaced by zeros. It is not written by the
safetensors library, because that one wants every tensor contiguous in memory at once, which would double a large
context (weights are written here for the same reason); nor read by it, because it opens the file anew, which may by
then be another one than the one checked.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError, FileError, InputError
from ..runtime import atomic

VERSION = 2
"""The newest format: 2 is a context in 8 bits. What an older reader can read is written as 1."""
_ZEROS = "0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
}

_NAMES = {name: dtype for dtype, name in _DTYPES.items()}

Lazy = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]


def lazy(tensor: Tensor) -> Lazy:
    """Describe a tensor that is to be written, and made contiguous only when its turn comes."""
    return tensor.dtype, tuple(tensor.shape), lambda: tensor


def write(
    path: Path,
    kind: str,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    replace: bool = True,
    private: bool = False,
) -> None:
    """Write tensors and their manifest, one tensor in memory at a time; the file appears whole or not at all.

    Args:
        path: the file; its folder exists.
        kind: `"context"` or `"vectors"`.
        manifest: what JSON can hold; :func:`read` returns it.
        tensors: by name, in the order in which they are written.
        replace: whether a file of that name is replaced, as for :func:`rcc.runtime.atomic.writing`.
        private: a new file is for its owner alone.

    Raises:
        ExistsError: there is a file of that name, and it is not to be replaced.
        FileError: the folder does not exist or cannot be written, or the disk is full.
    """
    version = VERSION if manifest.get("eight_bits") else 1
    metadata = {"format": f"rcc-{kind}", "version": str(version), "sha256": _ZEROS, "rcc": json.dumps(manifest)}
    header = _header(metadata, tensors)
    match = _DIGEST.search(header)
    assert match is not None
    digest = hashlib.sha256()
    try:
        with atomic.writing(path, replace, private) as file:

            def put(data: bytes | memoryview) -> None:
                digest.update(data)
                file.write(data)

            _put(header, tensors, put)
            file.seek(match.start(1))
            file.write(digest.hexdigest().encode())
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}.") from error


def write_weights(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write a model's weights as transformers reads them, one tensor in memory at a time, whole or not at all.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full.
    """
    with atomic.writing(path) as file:
        _put(_header({"format": "pt"}, tensors), tensors, file.write)


def _header(metadata: dict[str, str], tensors: Mapping[str, Lazy]) -> bytes:
    """Return what a safetensors file begins with: a length, and JSON of that length."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return struct.pack("<Q", len(text)) + text


def _put(header: bytes, tensors: Mapping[str, Lazy], put: Callable[[bytes | memoryview], Any]) -> None:
    put(header)
    for _, _, get in tensors.values():
        # in one expression, so that a tensor is let go before the next one is made
        put(get().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read(path: Path, kind: str, verify: str) -> tuple[dict[str, Any], dict[str, Tensor], Callable[[], None]]:
    """Open a file that :func:`write` wrote.

    Args:
        path: the file.
        kind: `"context"` or `"vectors"`; a file of another kind is refused.
        verify: `"full"` checks the digest over every byte first; `"header"` only the header and the sizes.

    Returns:
        Its manifest; its tensors by name, mapped: they are read when they are used; and what to call when they have
        been copied, so that they no longer take memory until they are used again.

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
    match = _DIGEST.search(text)
    if match is None:
        raise ContextError(f"{damaged} (it has no digest).")
    release = partial(_release, data)
    if verify == "full":
        if _digest(data, 8 + match.start(1)) != match[1]:
            raise ContextError(f"{damaged} (its content does not match its digest).")
        release()
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
        return manifest, {name: _tensor(data, 8 + size, entry) for name, entry in header.items()}, release
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        raise ContextError(f"{damaged} (a tensor cannot be read: {error}).") from None


def _release(data: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        data.madvise(mmap.MADV_DONTNEED)


def _tensor(data: mmap.mmap, start: int, entry: dict[str, Any]) -> Tensor:
    dtype, shape = _NAMES[entry["dtype"]], torch.Size(entry["shape"])
    low, high = entry["data_offsets"]
    if min(shape, default=1) < 1 or low < 0 or high - low != shape.numel() * dtype.itemsize:
        raise ValueError("its size does not fit its shape")
    return torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=start + low).view(shape)


def _digest(data: mmap.mmap, at: int) -> bytes:
    """Return the SHA-256 of a mapped file with the 64 bytes at `at` replaced by zeros."""
    digest = hashlib.sha256()
    with memoryview(data) as view:
        digest.update(view[:at])
        digest.update(_ZEROS.encode())
        digest.update(view[at + 64 :])
    return digest.hexdigest().encode()
