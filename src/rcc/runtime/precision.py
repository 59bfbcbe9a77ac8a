"""In which precision, and on which device, to compute."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError


def computing(stored: torch.dtype, device: Any) -> torch.dtype:
    """Return the precision to compute in where weights are stored in `stored`.

    That one, but float32 for bfloat16 on a CPU that has no instructions for it: torch then takes three to six times as
    long as in float32 (`python benchmarks/precision.py`).
    """
    if stored != torch.bfloat16 or torch.device(device).type != "cpu" or has_bfloat16():
        return stored
    return torch.float32


def has_bfloat16() -> bool:
    """Return whether this CPU's matrix library works in bfloat16.

    oneDNN says so of every CPU with AVX-512, and emulates it on those without AVX512_BF16 (Skylake to Ice Lake, virtual
    machines that hide it), where it takes several times as long as float32.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx512_supported()


FOR_WEIGHTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What :func:`parse_dtype` accepts."""


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the precision of that name; None for None.

    Raises:
        InputError: it is none for weights.
    """
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or dtype not in FOR_WEIGHTS:
        raise InputError(f"dtype {name} is unknown: use bfloat16, float16 or float32.")
    return dtype


def kept_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the precision that a context is to be kept in, by its name or as it is.

    Raises:
        InputError: it is none for a context.
    """
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if wanted not in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8):
        raise InputError(f"dtype {dtype} is none for a context: use bfloat16, float16, float32 or int8.")
    return wanted


def parse_device(name: str | None) -> str:
    """Return the device of that name, which can be used here; for None a GPU if there is one.

    Raises:
        InputError: it is unknown, or cannot be used here.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise InputError(f"device {device} is unknown: use cpu, cuda or mps.") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"device {device} cannot be used here ({reason}): use cpu.") from None
    return device
