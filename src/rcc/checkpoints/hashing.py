"""Hashes of files and of weights, however the weights are spread over files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FileError, ModelError, brief

if TYPE_CHECKING:  # torch takes seconds to import: each function imports what it needs
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 over the tensors that a folder's weights are loaded from (:func:`weight_files`).

    Of every tensor, in name order: its name, type and shape, and its bytes. So the same weights have the same hash
    in however many files, and whatever library wrote them.

    Raises:
        ModelError: the folder has no such file, or one is damaged.
        FileError: one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    home_of: dict[str, Path] = {}
    try:
        for file in weight_files(Path(folder)):
            with safe_open(file, framework="pt") as opened:
                home_of |= dict.fromkeys(opened.keys(), file)
        for name in sorted(home_of):
            add_tensor(digest, name, read_tensor(home_of[name], name))
    except SafetensorError as error:
        raise ModelError(f"the weights in {folder} are damaged ({brief(str(error))}): get them again.") from error
    except OSError as error:
        raise FileError(f"the weights in {folder} cannot be read ({brief(error)}).") from error
    return digest.hexdigest()


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
