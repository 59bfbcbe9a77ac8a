"""Hashes of weights."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from conftest import MakeModel, MakeTokens
from rcc import checkpoints
from rcc.checkpoints import hashing
from rcc.errors import ModelError


def test_weights_sha256(tmp_path: Path) -> None:
    """The hash is of names, types, shapes and bytes, however they are spread over files."""
    v, w = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.int64)
    save_file({"w": w, "v": v}, tmp_path / "model.safetensors")
    first = checkpoints.weights_sha256(tmp_path)
    plain = b"v torch.float32 (2, 3)\n" + v.tobytes() + b"w torch.int64 (3,)\n" + w.tobytes()
    assert first == hashlib.sha256(plain).hexdigest()

    (tmp_path / "adapter").mkdir()
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "adapter")
    (tmp_path / "notes.txt").write_text("not weights")
    assert checkpoints.weights_sha256(tmp_path) == first

    save_file({"w": w}, tmp_path / "model.safetensors", metadata={"written": "by another library"})
    save_file({"v": v}, tmp_path / "model-2.safetensors")
    assert checkpoints.weights_sha256(tmp_path) == first

    save_file({"v": v + 1}, tmp_path / "model-2.safetensors")
    changed = checkpoints.weights_sha256(tmp_path)
    save_file({"v": v.reshape(3, 2)}, tmp_path / "model-2.safetensors")
    assert len({first, changed, checkpoints.weights_sha256(tmp_path)}) == 3

    (tmp_path / "model-2.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="damaged"):
        checkpoints.weights_sha256(tmp_path)


def test_weights_sha256_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no \*.safetensors file"):
        checkpoints.weights_sha256(tmp_path)


def test_begun_ahead(tmp_path: Path) -> None:
    """A hash that was begun is the one of the files as they are now, though they have changed since."""
    w = np.ones(3, np.int64)
    save_file({"w": w}, tmp_path / "model.safetensors")
    want = checkpoints.weights_sha256(tmp_path)
    hashing.begin_sha256(tmp_path)
    assert checkpoints.weights_sha256(tmp_path) == want
    hashing.begin_sha256(tmp_path)
    save_file({"w": w, "v": w}, tmp_path / "model.safetensors")
    assert checkpoints.weights_sha256(tmp_path) != want
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    hashing.begin_sha256(tmp_path)
    with pytest.raises(ModelError, match="damaged"):
        checkpoints.weights_sha256(tmp_path)


@pytest.mark.parametrize("made", [None, "context"])
def test_hash_ahead(tiny: MakeModel, tokens: MakeTokens, tmp_path: Path, made: str | None) -> None:
    """The weights of a model and its base are hashed before it is loaded; of what is not there, nothing is said."""
    model = tiny()
    model.save_pretrained(tmp_path / "model", full=True)
    context = tmp_path / "context.rcc"
    replace(model.compress(torch.tensor([tokens(20)])), model_name=str(tmp_path / "model")).save(context)
    checkpoints.hash_ahead(None if made else str(tmp_path / "model"), context if made else None)
    folders = {tmp_path / "model", tmp_path / "model" / "decoder"}
    assert folders <= set(hashing._begun)
    assert all(checkpoints.weights_sha256(folder) == hashing._weights_sha256(folder) for folder in folders)
    checkpoints.hash_ahead(str(tmp_path / "nothing"), None)
    checkpoints.hash_ahead(None, tmp_path / "nothing")
