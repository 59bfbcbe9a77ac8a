"""In which precision to compute."""

from __future__ import annotations

from typing import Any

import torch


def computing(stored: torch.dtype, device: Any) -> torch.dtype:
    """The precision to compute in where weights are stored in `stored`.

    That one, but float32 for bfloat16 on a CPU that has no instructions for it: torch then takes three to six times as
    long as in float32 (`python benchmarks/precision.py`).
    """
    if stored != torch.bfloat16 or torch.device(device).type != "cpu" or has_bfloat16():
        return stored
    return torch.float32


def has_bfloat16() -> bool:
    """Whether this CPU's matrix library works in bfloat16.

    oneDNN says so of every CPU with AVX-512, and emulates it on those without AVX512_BF16 (Skylake to Ice Lake, virtual
    machines that hide it), where it takes several times as long as float32.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx512_supported()
