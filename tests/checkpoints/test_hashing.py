"""Hashes of weights."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rcc import checkpoints
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
