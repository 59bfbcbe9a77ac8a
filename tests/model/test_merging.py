"""Adapters merged for inference: the same model, computed with fewer products, whose encoder is read at first use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MakeModel, MakeTokens
from equality import one
from rcc import InputError, ModelError, RCCConfig, RCCForCausalLM, checkpoints

MERGED: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
"""Float32: sums in another order."""
CASES = [
    ("llama", True, "residual"),
    ("llama", True, "direct"),
    ("gpt_neox", True, "residual"),
    ("gpt_neox", False, "residual"),
    ("gemma3_text", True, "direct"),
]


@pytest.fixture
def saved(fresh: MakeModel, tmp_path: Path) -> Callable[..., Path]:
    """A random model's folder, its bases written along."""

    def save(family: str = "llama", share: bool = True, prefix: str = "residual", **more: Any) -> Path:
        model = fresh(family, share=share, lora=4, prefix=prefix, **more)
        model.save_pretrained(tmp_path / "model", full=True)
        return tmp_path / "model"

    return save


@pytest.mark.parametrize(("family", "share", "prefix"), CASES)
def test_merged_equals_separate(
    saved: Callable[..., Path], tokens: MakeTokens, family: str, share: bool, prefix: str
) -> None:
    """Contexts and answers are those of separate adapters to rounding, and either reads the other's contexts."""
    folder = (
        saved(family, share, prefix, rate_embeddings=True, lora_alpha=6.0) if share else saved(family, share, prefix)
    )
    apart = RCCForCausalLM.from_pretrained(folder)
    merged = RCCForCausalLM.from_pretrained(folder, adapters="merged")
    assert merged.fingerprint == apart.fingerprint
    ids, prompt = one(tokens(41)), one(tokens(7, 1))
    contexts = [model.compress(ids, rate=4) for model in (apart, merged)]
    for i in range(len(contexts[0].blocks.layers)):
        for ours, theirs in zip(contexts[1].layer(i), contexts[0].layer(i), strict=True):
            torch.testing.assert_close(ours, theirs, **MERGED)
    for context in contexts:
        logits = [model(prompt, context=context).logits for model in (apart, merged)]
        torch.testing.assert_close(*reversed(logits), **MERGED)
    assert merged.fingerprint == apart.fingerprint  # also with the encoder read


def test_asking_reads_no_encoder(saved: Callable[..., Path], tokens: MakeTokens) -> None:
    """A stored context is asked without the encoder; compressing reads it, once though two threads need it."""
    folder = saved()
    context = RCCForCausalLM.from_pretrained(folder).compress(one(tokens(20)), rate=4)
    model = RCCForCausalLM.from_pretrained(folder, adapters="merged")
    prompt = one(tokens(5, 1))
    model.generate(prompt, context=context, max_new_tokens=3, do_sample=False)
    assert "encoder" not in model._modules
    encoders = []
    threads = [threading.Thread(target=lambda: encoders.append(model.encoder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert encoders[0] is encoders[1]
    assert not any(".lora_" in name for name in model.state_dict())


@pytest.mark.parametrize("prefix", ["residual", "direct"])
def test_sides_share_what_they_can(saved: Callable[..., Path], prefix: str) -> None:
    """The embeddings of a shared base are there once, and each side's merged weights are its own."""
    model = RCCForCausalLM.from_pretrained(saved(prefix=prefix), adapters="merged")
    table = model.decoder.get_input_embeddings().weight
    assert model.encoder.get_input_embeddings().weight is table
    sides: list[Any] = [model.encoder, model.decoder.base_model]
    ours, theirs = (side.layers[0].mlp.up_proj.weight for side in sides)
    assert not torch.equal(ours, theirs)


def test_bfloat16(saved: Callable[..., Path], tokens: MakeTokens) -> None:
    """In bfloat16 a merged weight is rounded once more: logits stay within what bfloat16 tells apart."""
    folder = saved(dtype=torch.bfloat16)
    apart = RCCForCausalLM.from_pretrained(folder, dtype="bfloat16")
    merged = RCCForCausalLM.from_pretrained(folder, dtype="bfloat16", adapters="merged")
    exact = RCCForCausalLM.from_pretrained(folder, dtype="float32")
    ids, prompt = one(tokens(41)), one(tokens(7, 1))
    want, near, got = (m(prompt, context=m.compress(ids, rate=4)).logits.float() for m in (exact, apart, merged))
    assert float((got - want).square().mean()) < 2 * float((near - want).square().mean())


def test_default_precision(saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a precision, a CPU without bfloat16 computes in float32; contexts say what the base is stored in."""
    folder = saved(dtype=torch.bfloat16)
    monkeypatch.setattr("rcc.runtime.precision.has_bfloat16", lambda: False)
    model = RCCForCausalLM.from_pretrained(folder, adapters="merged")
    assert model.dtype == model.encoder.dtype == torch.float32
    assert model.decoder.config.dtype == torch.bfloat16
    assert RCCForCausalLM.from_pretrained(folder, adapters="merged", dtype="bfloat16").dtype == torch.bfloat16


def test_refusals(saved: Callable[..., Path], tmp_path: Path) -> None:
    """Merged adapters cannot be saved; weights that do not fit are named; so is an unknown word."""
    folder = saved()
    with pytest.raises(InputError, match="merged adapters"):
        RCCForCausalLM.from_pretrained(folder, adapters="merged").save_pretrained(tmp_path / "again")
    with pytest.raises(InputError, match="adapters='joined' is unknown"):
        RCCForCausalLM.from_pretrained(folder, adapters="joined")
    state = load_file(folder / "model.safetensors")
    lost = next(name for name in state if name.startswith("decoder.") and ".lora_B" in name)
    cut = next(name for name in state if name.startswith("decoder.") and ".lora_A" in name)
    for changed, message in (
        ({k: v for k, v in state.items() if k != lost}, "lack"),
        ({**state, cut: state[cut][:, :-1].contiguous()}, "does not fit its weights"),
    ):
        save_file(changed, folder / "model.safetensors")
        config = RCCConfig.load(folder)
        config.weights_sha256 = checkpoints.weights_sha256(folder)
        config.save(folder)
        with pytest.raises(ModelError, match=message):
            RCCForCausalLM.from_pretrained(folder, adapters="merged")
