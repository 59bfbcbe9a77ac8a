"""Attention after a KV cache in two parts is torch's own with a mask, and is used where there is no gap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import sdpa_mask

from conftest import MakeModel, MakeTokens
from equality import CLOSE, one
from rcc.model import attention


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize(("batch", "past", "new"), [(1, 50, 7), (3, 1, 2), (2, 200, 65), (2, 30, 1), (2, 5, 65)])
def test_two_parts_are_the_whole(heads: int, groups: int, batch: int, past: int, new: int) -> None:
    """Past and self, joined, equal one call with a mask, at any scale, in float32 and, to its rounding, bfloat16."""
    generator = torch.Generator().manual_seed(past)
    query = torch.randn(batch, heads, new, 16, generator=generator)
    key, value = torch.randn(2, batch, groups, past + new, 16, generator=generator)
    wide_key, wide_value = [states.repeat_interleave(heads // groups, 1) for states in (key, value)]
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    for scale in (None, 0.7):
        want = scaled_dot_product_attention(query, wide_key, wide_value, attn_mask=mask, scale=scale).transpose(1, 2)
        got, _ = attention._attend(torch.nn.Module(), query, key, value, attention.AFTER_CACHE, scaling=scale)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        exact = query.double(), key.double(), value.double()
        double, _ = attention._attend(torch.nn.Module(), *exact, attention.AFTER_CACHE, scaling=scale)
        assert double.dtype == torch.float64
        low = query.bfloat16(), key.bfloat16(), value.bfloat16()
        near, _ = attention._attend(torch.nn.Module(), *low, attention.AFTER_CACHE, scaling=scale)
        torch.testing.assert_close(near.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mistral", "qwen2", "qwen3"])
def test_the_decoder_uses_it(
    fresh: MakeModel, tokens: MakeTokens, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question after a context is attended so, and each token of the answer, with the logits of the masked pass."""
    model = fresh(family)
    assert model.decoder.config._attn_implementation == attention.NAME
    assert model.encoder.config._attn_implementation == "sdpa"
    context, prompt = model.compress(one(tokens(40)), rate=4), one(tokens(6, 1))
    masks, make = [], sdpa_mask
    monkeypatch.setattr(attention, "sdpa_mask", lambda **arguments: masks.append(arguments) or make(**arguments))
    got = model(prompt, context=context).logits
    assert not masks
    written = model.generate(prompt, context=context, max_new_tokens=4, do_sample=False)
    assert not masks
    model.decoder.set_attn_implementation("sdpa")
    torch.testing.assert_close(got, model(prompt, context=context).logits, **CLOSE)
    assert torch.equal(written, model.generate(prompt, context=context, max_new_tokens=4, do_sample=False))


def test_sliding_windows_are_left_alone(fresh: MakeModel) -> None:
    """A decoder with sliding windows keeps torch's attention, and one that was asked for another keeps that."""
    assert fresh("gemma3_text").decoder.config._attn_implementation == "sdpa"
    assert fresh("llama", attn="eager").decoder.config._attn_implementation == "eager"


def test_gaps_keep_their_mask(tiny: MakeModel, tokens: MakeTokens) -> None:
    """In a batch of different lengths every text is read as alone."""
    model = tiny()
    rows, prompt = [tokens(40), tokens(23, 2)], one(tokens(6, 1))
    contexts = [model.compress(one(row), rate=4) for row in rows]
    both = type(contexts[0]).stack(contexts)
    assert both.mask is not None
    got = model(prompt.expand(2, -1), context=both).logits
    for i, context in enumerate(contexts):
        torch.testing.assert_close(got[i : i + 1], model(prompt, context=context).logits, **CLOSE)


def test_gradients_pass(tiny: MakeModel, tokens: MakeTokens) -> None:
    """With gradients the masked attention is used, which has them."""
    query = torch.randn(1, 4, 3, 8, requires_grad=True)
    key, value = torch.randn(2, 1, 2, 9, 8)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 2
    out, _ = attention._attend(module, query, key, value, attention.AFTER_CACHE)
    out.sum().backward()
    assert query.grad is not None
