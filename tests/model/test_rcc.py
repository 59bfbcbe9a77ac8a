"""Compressing, appending and asking compute what the paper defines. Each test says what it proves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from conftest import MakeBatch, MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, FAMILIES, LENGTHS, new_tokens, one, prompt_logits, same_bits, sides
from rcc import (
    CompressedContext,
)
from rcc.model import attention


@pytest.mark.parametrize("rate", [1, 4, 16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("states", ["all", "last"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_compress_then_forward_and_generate(
    tiny: MakeModel,
    expected: MakeExpected,
    tokens: MakeTokens,
    family: str,
    share: bool,
    states: str,
    attn: str,
    rate: int,
) -> None:
    """Compress-then-forward gives the logits, and compress-then-generate the greedy tokens, of one full forward pass
    without any cache, for every kind of length, and one position per `rate` tokens or part of that."""
    model = tiny(family, share=share, states=states, attn=attn)
    assert model.decoder.config._attn_implementation == (attention.NAME if attn == "sdpa" else attn)
    assert model.encoder.config._attn_implementation == attn
    want = expected(model)
    prompt = tokens(7, 1)
    for length in LENGTHS:
        ids = tokens(length)
        context = model.compress(one(ids), rate=rate)
        assert len(context) == -(-length // rate)
        got = prompt_logits(model, context, prompt)
        torch.testing.assert_close(got, want.logits([ids], prompt, rate), **CLOSE)
        if length in (10, 37):
            out = model.generate(input_ids=one(prompt), context=context, max_new_tokens=5, do_sample=False)
            assert out[0, :7].tolist() == prompt
            assert new_tokens(out, 7)[0] == want.greedy([ids], prompt, 5, rate)


@pytest.mark.parametrize(("states", "attn"), [("all", "sdpa"), ("all", "eager"), ("last", "sdpa")])
@sides
def test_bfloat16(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, sides: dict[str, Any], states: str, attn: str
) -> None:
    """In bfloat16 the logits stay within rounding of the float32 reference on the same weights: correlation above
    0.99, nearly all argmaxes equal, and the mean deviation far below the logits' own spread."""
    model = tiny(**sides, states=states, attn=attn, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    same, total = 0, 0
    for length in LENGTHS:
        prompt = tokens(20, length)
        context = model.compress(one(tokens(length)))
        assert context.dtype == torch.bfloat16
        got = prompt_logits(model, context, prompt)
        assert got.dtype == torch.bfloat16
        want = expected(exact).logits([tokens(length)], prompt)
        got = got.float()
        assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.99
        assert (got - want).abs().mean() < 0.1 * want.std()
        same += int((got.argmax(-1) == want.argmax(-1)).sum())
        total += 20
    assert same >= 0.85 * total


def test_without_context_it_is_the_plain_decoder(tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch) -> None:
    """No context: the decoder's own logits and tokens, with padding on either side."""
    model = tiny("llama")
    rows = [tokens(9, 1), tokens(4, 2)]
    for side in ("left", "right"):
        ids, mask = batch(rows, side)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for b, row in enumerate(rows):
            want = model.decoder(input_ids=one(row), use_cache=False).logits[0]
            torch.testing.assert_close(logits[b][mask[b].bool()], want, **CLOSE)
    ids, mask = batch(rows, "left")
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
    decoder: Any = model.decoder
    for b, row in enumerate(rows):
        assert new_tokens(out, 9)[b] == new_tokens(decoder.generate(one(row), max_new_tokens=4), len(row))[0]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_appending(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, family: str, share: bool) -> None:
    """Appending once, twice and at another rate is what the definition says: a new segment starts and an earlier
    partial one stays; positions = Σ ceil(Tᵢ / rate)."""
    model = tiny(family, share=share)
    want, prompt = expected(model), tokens(6, 1)
    for lengths, rates in [((10, 21), (4, 4)), ((37, 3, 16), (4, 4, 4)), ((16, 37, 5), (4, 2, 16)), ((1, 1), (16, 1))]:
        texts = [tokens(length, 10 + i) for i, length in enumerate(lengths)]
        context = None
        for text, rate in zip(texts, rates, strict=True):
            context = model.compress(one(text), rate=rate, context=context)
        assert len(context) == sum(-(-n // r) for n, r in zip(lengths, rates, strict=True))
        assert context.source_tokens == sum(lengths)
        got = prompt_logits(model, context, prompt)
        torch.testing.assert_close(got, want.logits(texts, prompt, list(rates)), **CLOSE)
        out = model.generate(input_ids=one(prompt), context=context, max_new_tokens=4)
        assert new_tokens(out, 6)[0] == want.greedy(texts, prompt, 4, list(rates))


@pytest.mark.parametrize("family", FAMILIES)
def test_appending_leaves_earlier_contexts_alone(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, family: str
) -> None:
    """Two appends to the same parent, and an append to one of them: every one of the four contexts gives its own
    reference logits, in any order and after generation from the others; the parent's bits and answers do not change."""
    model = tiny(family)
    want, prompt = expected(model), tokens(6, 1)
    a, b, c, d = tokens(21), tokens(10, 2), tokens(17, 3), tokens(5, 4)
    parent = model.compress(one(a))
    bits = [(k.clone(), v.clone()) for k, v in (parent.layer(i) for i in range(3))]
    answer = model.generate(input_ids=one(prompt), context=parent, max_new_tokens=5)
    first = model.compress(one(b), context=parent)
    second = model.compress(one(c), context=parent)
    third = model.compress(one(d), context=first)
    cases = [(parent, [a]), (first, [a, b]), (second, [a, c]), (third, [a, b, d])]
    for _ in range(2):
        for context, texts in cases:
            torch.testing.assert_close(prompt_logits(model, context, prompt), want.logits(texts, prompt), **CLOSE)
            model.generate(input_ids=one(prompt), context=context, max_new_tokens=3)
    for i, (keys, values) in enumerate(bits):
        assert torch.equal(parent.layer(i)[0], keys)
        assert torch.equal(parent.layer(i)[1], values)
    assert torch.equal(model.generate(input_ids=one(prompt), context=parent, max_new_tokens=5), answer)


@sides
def test_appending_to_a_batch(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch, sides: dict[str, Any]
) -> None:
    """Appending texts of different lengths to a batch of texts of different lengths (gaps after gaps), twice."""
    model = tiny(**sides)
    want, prompt = expected(model), tokens(6, 1)
    steps = [[tokens(37, 1), tokens(5, 2)], [tokens(3, 3), tokens(30, 4)], [tokens(16, 5), tokens(9, 6)]]
    context = None
    for step in steps:
        context = model.compress(*batch(step), context=context)
    assert context.lengths == [10 + 1 + 4, 2 + 8 + 3]
    got = model(input_ids=one(prompt).expand(2, -1), context=context).logits
    for b in range(2):
        texts = [step[b] for step in steps]
        torch.testing.assert_close(got[b], want.logits(texts, prompt), **CLOSE)
        torch.testing.assert_close(prompt_logits(model, context[b], prompt), want.logits(texts, prompt), **CLOSE)


def test_appending_beyond_the_spare_capacity(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens) -> None:
    """An append that finds no room copies; both contexts then give their reference logits."""
    model = tiny("llama", segment_length=64, rates=(1,), window=4096)
    want, prompt = expected(model), tokens(4, 1)
    a, b = tokens(64), tokens(600, 2)
    parent = model.compress(one(a))
    child = model.compress(one(b), context=parent)
    torch.testing.assert_close(prompt_logits(model, child, prompt), want.logits([a, b], prompt), **CLOSE)
    torch.testing.assert_close(prompt_logits(model, parent, prompt), want.logits([a], prompt), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_stack_and_getitem(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch, family: str
) -> None:
    """Contexts compressed on their own (one appended to, another rate) and stacked give the same as one by one; and
    taking each out of the stack gives back its very bits."""
    model = tiny(family)
    want = expected(model)
    texts = [[tokens(5)], [tokens(37, 2), tokens(6, 3)], [tokens(16, 4)]]
    rates = [[4], [4, 2], [16]]
    contexts = []
    for parts, rate in zip(texts, rates, strict=True):
        context = None
        for part, r in zip(parts, rate, strict=True):
            context = model.compress(one(part), rate=r, context=context)
        contexts.append(context)
    stacked = CompressedContext.stack(contexts)
    assert stacked.lengths == [2, 13, 1]
    prompts = [tokens(length, 1) for length in (3, 8, 5)]
    ids, mask = batch(prompts, "left")
    logits = model(input_ids=ids, attention_mask=mask, context=stacked).logits
    out = model.generate(input_ids=ids, attention_mask=mask, context=stacked, max_new_tokens=4)
    longer = model.compress(one(tokens(7, 9)).expand(3, -1), context=stacked)
    for b, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[b][mask[b].bool()], want.logits(texts[b], prompt, rates[b]), **CLOSE)
        assert new_tokens(out, 8)[b] == want.greedy(texts[b], prompt, 4, rates[b])
        assert same_bits(stacked[b], contexts[b])
        torch.testing.assert_close(
            prompt_logits(model, longer[b], prompt),
            want.logits([*texts[b], tokens(7, 9)], prompt, [*rates[b], 4]),
            **CLOSE,
        )
    again = CompressedContext.stack([stacked, contexts[1]])
    assert again.lengths == [2, 13, 1, 13]
    assert same_bits(again[1], again[3])
