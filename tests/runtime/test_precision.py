"""The precision that a CPU computes in."""

from __future__ import annotations

import pytest
import torch

from rcc.runtime import precision


@pytest.mark.parametrize(
    ("cpu", "onednn", "avx512", "avx512_bf16", "wanted"),
    [
        ("AVX2", False, False, False, False),
        ("AVX-512 without bfloat16: oneDNN emulates it", True, True, False, False),
        ("AVX-512 with it", True, True, True, True),
        ("ARM with it", True, False, False, True),
    ],
)
def test_bfloat16_counts_where_it_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, cpu: str, onednn: bool, avx512: bool, avx512_bf16: bool, wanted: bool
) -> None:
    """What torch says of each kind of CPU."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert precision.has_bfloat16() is wanted, cpu
