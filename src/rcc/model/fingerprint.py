"""The name of a model by what it computes: a digest of its settings and all its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import checkpoints
from ..config import RCCConfig


def fingerprint_of(config: RCCConfig, state: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 that names a model.

    Args:
        config: whose :meth:`RCCConfig.method` is hashed first.
        state: what the model's `state_dict` holds, by name in order, one tensor in memory at a time if need be.
        dtype: that the weights are taken in; None: their own.
    """
    digest = hashlib.sha256(repr(sorted(config.method().items())).encode())
    for name, tensor in state:
        checkpoints.add_tensor(digest, name, tensor.to(dtype=dtype))
    return digest.hexdigest()
