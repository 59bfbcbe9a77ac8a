"""One file format for contexts and vectors: safetensors with a manifest, a digest over every byte, written whole.

The file is an ordinary safetensors file, which any safetensors reader opens. Its metadata hold `rcc` (the manifest
as JSON) and `sha256`: the SHA-256 of the whole file with those 64 digits replaced by zeros. It is written here,
not by the safetensors library, because that one wants every tensor contiguous in memory at once, which would
double a large context; it is read by the library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ContextError, FileError

VERSION = 1
_ZEROS = "0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}

Lazy = tuple[torch.dtype, tuple[int, ...], Callable[[], Tensor]]
Reader = tuple[dict[str, Any], Callable[[str], Tensor]]


def lazy(tensor: Tensor) -> Lazy:
    """A tensor to be written, made contiguous only when its turn comes."""
    return tensor.dtype, tuple(tensor.shape), lambda: tensor


def write(path: Path, kind: str, manifest: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> None:
    """Write tensors and their manifest, one tensor in memory at a time; the file appears whole or not at all.

    Raises:
        FileError: the folder does not exist or cannot be written, or the disk is full.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "format": f"rcc-{kind}",
            "version": str(VERSION),
            "sha256": _ZEROS,
            "rcc": json.dumps(manifest),
        }
    }
    offset = 0
    for name, (dtype, shape, _) in tensors.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                for chunk in (struct.pack("<Q", len(text)), text):
                    digest.update(chunk)
                    file.write(chunk)
                for _, _, get in tensors.values():
                    data = get().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                    digest.update(data)
                    file.write(data)
                match = _DIGEST.search(text)
                assert match is not None
                file.seek(8 + match.start(1))
                file.write(digest.hexdigest().encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise FileError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_ours(path: Path, kind: str) -> bool:
    """Whether a file says of itself that it is an rcc file of this kind; it may still be damaged."""
    try:
        with open(path, "rb") as file:
            return f'"format":"rcc-{kind}"'.encode() in file.read(512)
    except OSError:
        return False


@contextlib.contextmanager
def read(path: Path, kind: str, verify: str) -> Iterator[Reader]:
    """Open a file that :func:`write` wrote: its manifest, and a function from tensor name to mapped tensor.

    Args:
        verify: `"full"` checks the digest over every byte first; `"header"` only the header and the sizes.

    Raises:
        FileError: it is not there or cannot be read.
        ContextError: it is damaged, truncated, of a newer format, or not a file of this kind.
    """
    from safetensors import SafetensorError, safe_open

    damaged = f"{path} is damaged or not an rcc {kind} file: make it again"
    manifest = _read_manifest(path, kind, verify, damaged)
    try:
        with safe_open(path, framework="pt") as file:

            def get(name: str) -> Tensor:
                try:
                    return file.get_tensor(name)
                except SafetensorError as error:
                    raise ContextError(f"{damaged} ({error}).") from None

            yield manifest, get
    except SafetensorError as error:
        raise ContextError(f"{damaged} ({error}).") from None


def _read_manifest(path: Path, kind: str, verify: str, damaged: str) -> dict[str, Any]:
    if verify not in ("full", "header"):
        raise ContextError(f'verify={verify!r} is unknown: use "full" or "header".')
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            size = int.from_bytes(data[:8], "little")
            if len(data) < 8 or not 2 <= size <= len(data) - 8:
                raise ContextError(f"{damaged} (its header is cut short).")
            text = data[8 : 8 + size]
            match = _DIGEST.search(text)
            if match is None:
                raise ContextError(f"{damaged} (it has no digest).")
            if verify == "full" and _digest(data, 8 + match.start(1)) != match[1]:
                raise ContextError(f"{damaged} (its content does not match its digest).")
            total = len(data)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # an empty file cannot be mapped
        if isinstance(error, ContextError):
            raise
        raise ContextError(f"{path} is empty.") from None
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        version, found = int(metadata["version"]), metadata["format"]
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ContextError(f"{damaged} (its header cannot be read).") from None
    if found != f"rcc-{kind}":
        raise ContextError(f"{path} holds {found!r}, not an rcc {kind} file.")
    if version > VERSION:
        raise ContextError(f"{path} has format version {version}, this rcc reads up to {VERSION}: update rcc.")
    if total != 8 + size + end:
        raise ContextError(f"{damaged} (it has {total} bytes instead of {8 + size + end}).")
    try:
        manifest = json.loads(metadata["rcc"])
    except (ValueError, KeyError, TypeError):
        manifest = None
    if not isinstance(manifest, dict):
        raise ContextError(f"{damaged} (its manifest cannot be read).")
    return manifest


def _digest(data: mmap.mmap, at: int) -> bytes:
    """SHA-256 of a mapped file with the 64 bytes at `at` replaced by zeros (the digit)."""
    digest = hashlib.sha256()
    with memoryview(data) as view:
        digest.update(view[:at])
        digest.update(_ZEROS.encode())
        digest.update(view[at + 64 :])
    return digest.hexdigest().encode()
