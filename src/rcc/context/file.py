"""One file format for contexts and vectors: safetensors with a manifest, a digest over every byte, written whole.

The file is an ordinary safetensors file, which any safetensors reader opens. Its metadata hold `rcc` (the manifest
as JSON) and `sha256`: the SHA-256 of the whole file with those 64 digits replaced by zeros. It is not written by the
safetensors library, because that one wants every tensor contiguous in memory at once, which would double a large
context (weights are written here for the same reason). It is read by :mod:`.container`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FileError
from ..runtime import atomic
from .container import DIGEST, DTYPES, NO_DIGEST, VERSION, Container

_NAMES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in DTYPES.items()}
_DTYPES = {dtype: name for name, dtype in _NAMES.items()}

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
        manifest: what JSON can hold; :func:`rcc.context.container.read` returns it.
        tensors: by name, in the order in which they are written.
        replace: whether a file of that name is replaced, as for :func:`rcc.runtime.atomic.writing`.
        private: a new file is for its owner alone.

    Raises:
        ExistsError: there is a file of that name, and it is not to be replaced.
        FileError: the folder does not exist or cannot be written, or the disk is full.
    """
    version = VERSION if manifest.get("eight_bits") else 1
    metadata = {"format": f"rcc-{kind}", "version": str(version), "sha256": NO_DIGEST, "rcc": json.dumps(manifest)}
    header = _header(metadata, tensors)
    match = DIGEST.search(header)
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


def tensors_of(container: Container) -> dict[str, Tensor]:
    """Return a file's tensors by name, mapped: they are read when they are used."""
    return {
        name: torch.frombuffer(
            container.data, dtype=_NAMES[entry.dtype], count=math.prod(entry.shape), offset=entry.start
        ).view(entry.shape)
        for name, entry in container.entries.items()
    }
