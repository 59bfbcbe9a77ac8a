"""In which precision to compute."""

from __future__ import annotations

from typing import Any

import torch


def computing(stored: torch.dtype, device: Any) -> torch.dtype:
    """The precision to compute in where weights are stored in `stored`.

    That one, but float32 for bfloat16 on a CPU that has no instructions for it: torch then takes some six times as long
    as in float32 (`python benchmarks/precision.py`).
    """
    if stored != torch.bfloat16 or torch.device(device).type != "cpu" or has_bfloat16():
        return stored
    return torch.float32


def has_bfloat16() -> bool:
    """Whether this CPU's matrix library works in bfloat16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
