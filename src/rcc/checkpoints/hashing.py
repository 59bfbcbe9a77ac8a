"""Hashes of files and of weights, however the weights are spread over files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import threading
from concurrent.futures import Future
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FileError, ModelError, brief
from .gguf_models import is_gguf

if TYPE_CHECKING:  # torch takes seconds to import: each function imports what it needs
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""What safetensors calls a type, and torch's name for it, which is hashed."""
_CHUNK = 1 << 20
"""Bytes that are read at once."""


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 over the tensors that a folder's weights are loaded from (:func:`weight_files`).

    Of every tensor, in name order: its name, type and shape, and its bytes. So the same weights have the same hash
    in however many files, and whatever library wrote them. Where :func:`begin_sha256` has begun, its result is taken.
    Of a GGUF file it is the hash of the file.

    Raises:
        ModelError: the folder has no such file, or one is damaged.
        FileError: one cannot be read.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return file_sha256(folder)
    with _lock:
        stamp, begun = _begun.pop(folder.absolute(), (None, None))
    return _weights_sha256(folder) if begun is None or stamp != _stamp(folder) else begun.result()


def begin_sha256(folder: Path) -> None:
    """Begin :func:`weights_sha256` in a thread of its own, to be ready when it is asked for.

    It needs no torch, which takes seconds to import.
    """
    future: Future[str] = Future()

    def work() -> None:
        try:
            future.set_result(_weights_sha256(folder))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    with _lock:
        _begun[folder.absolute()] = _stamp(folder), future
    threading.Thread(target=work, daemon=True).start()


_Stamp = list[tuple[str, int, int]]
_begun: dict[Path, tuple[_Stamp, Future[str]]] = {}
_lock = threading.Lock()


def _stamp(folder: Path) -> _Stamp:
    """Return what changes with a folder's weights: the names, sizes and times of their files."""
    stats = [(file.name, file.stat()) for file in weight_files(folder)]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _weights_sha256(folder: Path) -> str:
    from safetensors import SafetensorError

    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    tensors: dict[str, tuple[Path, int, int, str]] = {}
    try:
        for file in weight_files(folder):
            tensors |= _tensors_of(file)
        with contextlib.ExitStack() as stack:
            opened = {file: stack.enter_context(file.open("rb", buffering=0)) for file, *_ in tensors.values()}
            for name, (file, start, end, kind) in sorted(tensors.items()):
                digest.update(f"{name} {kind}\n".encode())
                _add_bytes(digest, opened[file], start, end, buffer)
    except SafetensorError as error:
        raise ModelError(f"the weights in {folder} are damaged ({brief(str(error))}): get them again.") from error
    except OSError as error:
        raise FileError(f"the weights in {folder} cannot be read ({brief(error)}).") from error
    return digest.hexdigest()


def _tensors_of(file: Path) -> dict[str, tuple[Path, int, int, str]]:
    """Return the tensors of a safetensors file: name → file, first byte and end, type and shape as they are hashed."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy"):  # checks the header
        pass
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(size))
    tensors = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        if tensor["dtype"] not in _TYPES:
            raise ModelError(f"{file} holds {name} as {tensor['dtype']}, which is not supported: get them in bfloat16.")
        start, end = (8 + size + offset for offset in tensor["data_offsets"])
        tensors[name] = file, start, end, f"torch.{_TYPES[tensor['dtype']]} {tuple(tensor['shape'])}"
    return tensors


def _add_bytes(digest: hashlib._Hash, file: RawIOBase, start: int, end: int, buffer: memoryview) -> None:
    """Hash the bytes of a file from `start` to `end`, as many at once as the buffer holds."""
    file.seek(start)
    while start < end:
        count = file.readinto(buffer[: end - start])
        if not count:
            raise OSError("it ends before its last tensor")
        digest.update(buffer[:count])
        start += count


def read_tensor(file: Path, name: str) -> Tensor:
    """Return one tensor of a safetensors file, mapped.

    The file is opened for it alone: otherwise all that has been read of it would count as memory in use until the last
    tensor is let go.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def add_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Hash a tensor: its name, type and shape, and its bytes."""
    import torch

    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differs(expected: str, got: str) -> str:
    """Return what a message says of two hashes that should be equal: the beginnings of both."""
    return f"SHA-256 expected {expected[:12]}, got {got[:12]}"


def weight_files(folder: Path) -> list[Path]:
    """Return the files that a folder's weights are loaded from, in order: all `*.safetensors` directly in it.

    Where a tensor stands in several, the last one counts.

    Raises:
        ModelError: there is none, or an index names files that are not among them.
    """
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if not files:
        raise ModelError(f"{folder} is not a model folder: it has no *.safetensors file.")
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        _check_index(folder / INDEX, {file.name for file in files})
    return files


def _check_index(index: Path, there: set[str]) -> None:
    try:
        names = sorted(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read ({brief(error)}): get it again.") from None
    for name in names:
        if name not in there:
            raise ModelError(f"{index} names {name!r}, which is no *.safetensors file beside it: get the model again.")
