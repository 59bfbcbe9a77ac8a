"""rcc computes what the paper defines: everything is compared with tests/reference.py, or with the same thing done
one by one, by hand or in float64. Each test says what it proves."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicCache, DynamicLayer

import conftest
import rcc.model.encoder
import reference as ref
from rcc import (
    CompressedContext,
    CompressedVectors,
    ContextError,
    FileError,
    InputError,
    ModelError,
    RCCConfig,
    RCCError,
    RCCForCausalLM,
    WindowError,
)
from rcc.context.context import BlockLayer
from rcc.model.backbones import CACHE

FAMILIES = conftest.FAMILIES
sides = pytest.mark.parametrize("sides", conftest.SIDES.values(), ids=conftest.SIDES)
LENGTHS = [3, 10, 16, 37, 48]
"""Shorter than a group, partial group, one segment, partial segment and group, several segments."""
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def prompt_logits(model: RCCForCausalLM, context: CompressedContext, prompt: list[int]) -> Tensor:
    return model(input_ids=one(prompt), context=context).logits[0]


def new_tokens(out: Tensor, prompt_length: int) -> list[list[int]]:
    return out[:, prompt_length:].tolist()


def same_bits(a: CompressedContext, b: CompressedContext) -> bool:
    """Whether two contexts hold the same keys and values."""
    pairs = zip(range(len(a.blocks.layers)), range(len(b.blocks.layers)), strict=True)
    return len(a) == len(b) and all(
        torch.equal(x, y) for i, j in pairs for x, y in zip(a.layer(i), b.layer(j), strict=True)
    )


# ---------------------------------------------------------------- the tests can see a fault
@sides
def test_every_part_of_the_tiny_models_matters(tiny, expected, tokens, sides):
    """Zeroing any one projection, swapping two segments, dropping the encoder's LoRA or changing one token of the
    last, partial group moves the prompt's logits by more than 1e-2: a fault in any of them cannot hide."""
    model = tiny(**sides)
    ids, prompt = tokens(39), tokens(6, 1)
    want = expected(model).logits([ids], prompt)
    assert len(model.projections) == 3
    for i in range(len(model.projections)):
        damaged = copy.deepcopy(model)
        torch.nn.init.zeros_(damaged.projections[i].weight)
        assert (expected(damaged).logits([ids], prompt) - want).abs().max() > 1e-2, f"P_{i}"
    swapped = ids[16:32] + ids[:16] + ids[32:]
    assert (expected(model).logits([swapped], prompt) - want).abs().max() > 1e-2
    changed = [*ids[:-1], ids[-1] % 96 + 1]
    assert (expected(model).logits([changed], prompt) - want).abs().max() > 1e-2
    if sides.get("share", True):
        damaged = copy.deepcopy(model)
        for name, parameter in damaged.encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
        assert (expected(damaged).logits([ids], prompt) - want).abs().max() > 1e-2


# ---------------------------------------------------------------- (a) compress, forward, generate
@pytest.mark.parametrize("rate", [1, 4, 16])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("states", ["all", "last"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_compress_then_forward_and_generate(tiny, expected, tokens, family, share, states, attn, rate):
    """Compress-then-forward gives the logits, and compress-then-generate the greedy tokens, of one full forward pass
    without any cache, for every kind of length, and one position per `rate` tokens or part of that."""
    model = tiny(family, share=share, states=states, attn=attn)
    assert model.decoder.config._attn_implementation == attn
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


def test_rate_by_hand_of_every_divisor(tiny, expected, tokens):
    """Every divisor of the segment works, whether in `rates` or not, and a prompt of one token too."""
    model = tiny("llama", segment_length=12, rates=(3,))
    for rate in (1, 2, 3, 4, 6, 12):
        context = model.compress(one(tokens(29)), rate=rate)
        got = prompt_logits(model, context, [5])
        torch.testing.assert_close(got, expected(model).logits([tokens(29)], [5], rate), **CLOSE)


@pytest.mark.parametrize("batch_tokens", [1, 16, 33, 10_000])
def test_chunking_does_not_change_the_result(tiny, expected, tokens, batch, batch_tokens):
    """However many segments the encoder reads at once, the result is the reference's; progress ends at the total."""
    model = tiny("gpt_neox")
    rows = [tokens(75), tokens(20, 2), tokens(64, 3)]
    ids, mask = batch(rows)
    seen: list[tuple[int, int]] = []
    context = model.compress(ids, mask, batch_tokens=batch_tokens, progress=lambda *step: seen.append(step))
    assert seen[-1] == (159, 159)
    assert seen == sorted(seen)
    prompt = tokens(5, 1)
    got = model(input_ids=one(prompt).expand(3, -1), context=context).logits
    for b, row in enumerate(rows):
        torch.testing.assert_close(got[b], expected(model).logits([row], prompt), **CLOSE)


@contextlib.contextmanager
def segments_read(model):
    """How many segments each pass of the encoder takes."""
    read = []
    handle = model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield read
    finally:
        handle.remove()


def test_equal_segments_are_read_once(tiny, expected, tokens, batch):
    """What repeats within a batch is read once, and the result is the reference's of reading it each time; also for
    equal segments of different rows and for an equal, shorter end, cached and with gradients."""
    model = tiny("llama")
    filler, key, prompt = tokens(16), tokens(21, 1), tokens(5, 2)
    rows = [filler * 3 + key + filler * 2, filler * 2 + filler[:5], filler * 3 + filler[:5]]
    ids, mask = batch(rows)
    with segments_read(model) as read:
        context = model.compress(ids, mask)
        trained = model(one(prompt).expand(3, -1), context_ids=ids, context_mask=mask).logits
    assert read == [6, 6]  # the filler, its short end, and behind the key every segment is shifted
    cached = model(one(prompt).expand(3, -1), context=context).logits
    for b, row in enumerate(rows):
        want = expected(model).logits([row], prompt)
        torch.testing.assert_close(cached[b], want, **CLOSE)
        torch.testing.assert_close(trained[b], want, **CLOSE)


def test_segments_that_repeat_are_kept_for_the_next_batch(tiny, expected, tokens):
    """Filler is read once in a whole text, whatever the batch; where nothing repeats, nothing is kept."""
    model = tiny("llama")
    filler, key, prompt = tokens(16), tokens(21, 1), tokens(5, 2)
    row = filler * 9 + key + filler * 6 + filler[:3]
    with segments_read(model) as read:
        context = model.compress(one(row), batch_tokens=64)
        model.compress(one(tokens(16 * 9, 3)), batch_tokens=64)
    # the filler; nothing new; the key, its end, and shifted filler; that again, as it had stood there once; the end
    assert read == [1, 3, 1, 1, 4, 4, 1]
    got = model(input_ids=one(prompt), context=context).logits[0]
    torch.testing.assert_close(got, expected(model).logits([row], prompt), **CLOSE)


def test_filler_is_remembered_from_text_to_text(tiny, expected, tokens):
    """While remembering, what repeats in a text is not read again in the next, at each rate; afterwards it is."""
    model = tiny("llama")
    filler, prompt = tokens(16), tokens(5, 2)
    texts = [filler * 3 + tokens(16, 1), tokens(16, 3) + filler + tokens(16, 4), filler * 3 + tokens(7, 5)]
    with segments_read(model) as read:
        with rcc.model.encoder.remembering():
            contexts = [model.compress(one(text)) for text in texts]
            model.compress(one(texts[0]), rate=8)
            model.compress(one(texts[0]))
        model.compress(one(texts[1]))
    assert read == [2, 2, 1, 2, 1, 3]  # what stands once in its text is read each time
    for text, context in zip(texts, contexts, strict=True):
        got = model(input_ids=one(prompt), context=context).logits[0]
        torch.testing.assert_close(got, expected(model).logits([text], prompt), **CLOSE)


@pytest.mark.parametrize(("states", "attn"), [("all", "sdpa"), ("all", "eager"), ("last", "sdpa")])
@sides
def test_bfloat16(tiny, expected, tokens, sides, states, attn):
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


@pytest.mark.parametrize("layer_map", ["duplicate", "average"])
@pytest.mark.parametrize("layers", [(2, 4), (4, 2), (3, 4), (5, 3)])
@pytest.mark.parametrize(("encoder", "family"), [("gpt_neox", "llama"), ("llama", "gpt_neox")])
def test_unequal_depth_and_width(tiny, expected, tokens, encoder, family, layers, layer_map):
    """Separate backbones of another family, depth and width follow the rules of `layer_map`, against the reference's
    own derivation of them; the vectors carry every encoder state."""
    model = tiny(family, encoder=encoder, share=False, layers=layers, hidden=(32, 48), layer_map=layer_map)
    ids, prompt = tokens(37), tokens(6, 1)
    want = expected(model)
    context = model.compress(one(ids))
    torch.testing.assert_close(prompt_logits(model, context, prompt), want.logits([ids], prompt), **CLOSE)
    out = model.generate(input_ids=one(prompt), context=context, max_new_tokens=4)
    assert new_tokens(out, 6)[0] == want.greedy([ids], prompt, 4)
    states = model.encode(one(ids)).states
    assert states.shape == (1, 10, layers[0] + 1, 32)
    torch.testing.assert_close(states[0], want.vectors([ids]), **CLOSE)


@pytest.mark.parametrize("layers", [(3, 3), (2, 4), (4, 2), (3, 5), (30, 24)])
def test_layer_map_by_hand(layers):
    """The map of encoder states, written down from the definition in exact arithmetic; equal depths are the paper's."""
    from rcc.model.projection import layer_map

    depth_e, depth_d = layers
    marks = torch.arange(depth_e + 1, dtype=torch.float64)[None, :, None]
    for kind in ("duplicate", "average"):
        sources = layer_map(depth_e, depth_d, RCCConfig(layer_map=kind))
        got = [sum(source) / len(source) for source in sources]
        reads = ref.decoder_inputs(marks, depth_d, kind)
        assert got == pytest.approx([float(read) for read in reads[:depth_d]])
        if depth_e == depth_d:
            assert got == list(range(depth_d))
    assert layer_map(depth_e, depth_d, RCCConfig(states="last")) == [[depth_e]]


@pytest.mark.parametrize("length", [1, 3, 4, 8, 15, 16, 17, 20, 31, 32, 37, 48])
def test_repeat_to_fill(tiny, expected, tokens, length):
    """`segment_padding="repeat"` follows the published rule, without its two faults: a length that divides the segment
    (1, 4, 8) repeats tokens, and an exact multiple (16, 32, 48) gains no segment. Appending fills each text itself."""
    model = tiny("gpt_neox", segment_padding="repeat")
    want, prompt = expected(model), tokens(6, 1)
    ids, more = tokens(length), tokens(19, 2)
    context = model.compress(one(ids))
    assert len(context) == -(-length // 16) * 4
    torch.testing.assert_close(prompt_logits(model, context, prompt), want.logits([ids], prompt), **CLOSE)
    longer = model.compress(one(more), context=context)
    got = prompt_logits(model, longer, prompt)
    torch.testing.assert_close(got, want.logits([ids, more], prompt), **CLOSE)


def test_backbones_given_as_modules_are_left_alone(backbone, tokens):
    """The reference on the original modules, which rcc never touched, gives the same: nothing of rcc is in them."""
    lower, upper = backbone("llama", seed=5), backbone("gpt_neox", seed=6)
    before = [{k: v.clone() for k, v in side.state_dict().items()} for side in (lower, upper)]
    config = RCCConfig(segment_length=16, rates=[4])
    model = RCCForCausalLM.from_base(upper, lower, config=config)
    with torch.no_grad():
        for linear in model.projections:
            linear.weight.normal_(0, 0.1)
    projections = [linear.weight for linear in model.projections]
    ids, prompt = tokens(37), tokens(6, 1)
    want, _ = ref.reference(upper.gpt_neox, lower, projections, [ids], prompt, segment=16, rate=4)
    got = prompt_logits(model, model.compress(one(ids)), prompt)
    torch.testing.assert_close(got, want, **CLOSE)
    for side, weights in zip((lower, upper), before, strict=True):
        assert not any(m._forward_pre_hooks for m in side.modules())
        assert all(torch.equal(v, weights[k]) for k, v in side.state_dict().items())


def test_without_context_it_is_the_plain_decoder(tiny, tokens, batch):
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
    for b, row in enumerate(rows):
        assert new_tokens(out, 9)[b] == new_tokens(model.decoder.generate(one(row), max_new_tokens=4), len(row))[0]


# ---------------------------------------------------------------- (b) appending
def test_without_context_no_token_is_padding(tiny, tokens):
    """Token 0, named as padding, in a prompt without a context is read like any other."""
    model = tiny("llama")
    prompt = [0, *tokens(5), 0]
    out = model.generate(one(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0)
    want = list(prompt)
    for _ in range(4):
        want.append(int(model(one(want)).logits[0, -1].argmax()))
    assert out[0].tolist() == want


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_appending(tiny, expected, tokens, family, share):
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
def test_appending_leaves_earlier_contexts_alone(tiny, expected, tokens, family):
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
def test_appending_to_a_batch(tiny, expected, tokens, batch, sides):
    """Appending texts of different lengths to a batch of texts of different lengths (gaps behind gaps), twice."""
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


def test_appending_beyond_the_spare_capacity(tiny, expected, tokens):
    """An append that finds no room copies; both contexts then give their reference logits."""
    model = tiny("llama", segment_length=64, rates=(1,), window=4096)
    want, prompt = expected(model), tokens(4, 1)
    a, b = tokens(64), tokens(600, 2)
    parent = model.compress(one(a))
    child = model.compress(one(b), context=parent)
    torch.testing.assert_close(prompt_logits(model, child, prompt), want.logits([a, b], prompt), **CLOSE)
    torch.testing.assert_close(prompt_logits(model, parent, prompt), want.logits([a], prompt), **CLOSE)


# ---------------------------------------------------------------- (c) batches equal one by one
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@sides
def test_texts_of_different_lengths(tiny, expected, tokens, batch, sides, attn):
    """Texts of every kind of length in one batch, padded on either side, behind ragged prompts padded on either side
    (forward) or on the left (generate): each row is the reference's of that text and prompt alone."""
    model = tiny(**sides, attn=attn)
    want = expected(model)
    texts = [tokens(length, length) for length in LENGTHS]
    prompts = [tokens(length, 1) for length in (6, 1, 9, 4, 9)]
    contexts = [model.compress(*batch(texts, side)) for side in ("left", "right")]
    assert same_bits(*contexts)
    context = contexts[0]
    assert context.lengths == [1, 3, 4, 10, 12]
    for side in ("left", "right"):
        ids, mask = batch(prompts, side)
        logits = model(input_ids=ids, attention_mask=mask, context=context).logits
        assert logits.isfinite().all()
        for b, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            got = logits[b][mask[b].bool()]
            torch.testing.assert_close(got, want.logits([text], prompt), **CLOSE)
    ids, mask = batch(prompts, "left")
    out = model.generate(input_ids=ids, attention_mask=mask, context=context, max_new_tokens=5)
    for b, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        assert new_tokens(out, 9)[b] == want.greedy([text], prompt, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_stack_and_getitem(tiny, expected, tokens, batch, family):
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


@pytest.mark.parametrize("family", FAMILIES)
def test_one_context_many_questions(tiny, expected, tokens, batch, family):
    """One context expanded to many questions of different lengths answers each like alone, appending to it included."""
    model = tiny(family)
    want = expected(model)
    text = tokens(37)
    context = model.compress(one(text))
    prompts = [tokens(length, 1) for length in (2, 9, 5, 5)]
    many = context.expand(4)
    assert many.batch_size == 4
    ids, mask = batch(prompts, "left")
    logits = model(input_ids=ids, attention_mask=mask, context=many).logits
    out = model.generate(input_ids=ids, attention_mask=mask, context=many, max_new_tokens=5)
    asked = model.compress(*batch(prompts), context=many)
    for b, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[b][mask[b].bool()], want.logits([text], prompt), **CLOSE)
        assert new_tokens(out, 9)[b] == want.greedy([text], prompt, 5)
        torch.testing.assert_close(prompt_logits(model, asked[b], [7]), want.logits([text, prompt], [7]), **CLOSE)
    torch.testing.assert_close(prompt_logits(model, context, [7]), want.logits([text], [7]), **CLOSE)


def plain_cache(context: CompressedContext) -> DynamicCache:
    """A transformers cache with copies of a context's keys and values: none of rcc's cache code."""
    layers = []
    for i in range(len(context.blocks.layers)):
        keys, values = (t.clone() for t in context.layer(i))
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    cache = DynamicCache()
    cache.layers = layers
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling(tiny, expected, tokens, family):
    """Sampling with a fixed seed repeats itself and equals sampling over transformers' own concatenating cache, with
    one and with several returned sequences; with top_k=1 it is the reference's greedy answer."""
    model = tiny(family)
    text, prompt = tokens(37), tokens(6, 1)
    context = model.compress(one(text))

    def sample(cached: bool = True, **kwargs) -> list[list[int]]:
        torch.manual_seed(3)
        settings = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, **kwargs}
        if cached:
            return new_tokens(model.generate(input_ids=one(prompt), context=context, **settings), 6)
        cache = plain_cache(context)
        copies = kwargs.get("num_return_sequences", 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        mask = torch.ones(1, len(context) + 6, dtype=torch.long)
        out = model.decoder.generate(one(prompt), attention_mask=mask, **{CACHE: cache}, **settings)
        return new_tokens(out, 6)

    assert sample() == sample() == sample(cached=False)
    three = sample(num_return_sequences=3)
    assert len(three) == 3
    assert len({tuple(row) for row in three}) > 1
    assert three == sample(cached=False, num_return_sequences=3)
    torch.manual_seed(3)
    expanded = model.generate(
        input_ids=one(prompt).expand(3, -1),
        context=context.expand(3),
        max_new_tokens=8,
        do_sample=True,
        temperature=1.5,
    )
    assert three == new_tokens(expanded, 6)
    assert sample(top_k=1)[0] == expected(model).greedy([text], prompt, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(tiny, expected, tokens, batch, family):
    """Beam search over a batch of different texts and ragged prompts gives the beams of a search written by hand over
    forward passes without a cache, all returned sequences in order; settings given as a GenerationConfig too."""
    model = tiny(family)
    want = expected(model)
    texts = [tokens(37), tokens(10, 2)]
    prompts = [tokens(6, 1), tokens(3, 2)]
    context = model.compress(*batch(texts))
    ids, mask = batch(prompts, "left")
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    out = model.generate(input_ids=ids, attention_mask=mask, context=context, num_return_sequences=3, **settings)
    rows = new_tokens(out, 6)
    best = model.generate(input_ids=ids, attention_mask=mask, context=context, **settings)
    config = copy.deepcopy(model.decoder.generation_config)
    config.update(**settings)
    same = model.generate(input_ids=ids, attention_mask=mask, context=context, generation_config=config)
    assert torch.equal(best, same)
    for b in range(2):
        beams = want.beams([texts[b]], prompts[b], 5, 3)
        assert rows[3 * b : 3 * b + 3] == beams
        assert new_tokens(best, 6)[b] == beams[0]
        alone = model.generate(input_ids=one(prompts[b]), context=context[b], num_return_sequences=3, **settings)
        assert new_tokens(alone, len(prompts[b])) == beams
    greedy = model.generate(input_ids=one(prompts[0]), context=context[0], max_new_tokens=5)
    assert new_tokens(greedy, 6)[0] == want.greedy([texts[0]], prompts[0], 5)  # beams left nothing behind


def test_streamer(tiny, tokens):
    """A streamer sees the prompt, then every token as it comes, and its end."""
    model = tiny("llama")
    context = model.compress(one(tokens(37)))
    seen: list[int] = []
    ended: list[bool] = []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            ended.append(True)

    out = model.generate(input_ids=one(tokens(6, 1)), context=context, max_new_tokens=5, streamer=Streamer())
    assert seen == out[0].tolist()
    assert ended == [True]


def test_generation_stops_at_the_end_token(tiny, expected, tokens, batch):
    """A row that reaches the end token is padded while the other goes on, as without a context."""
    model = tiny("llama")
    texts, prompts = [tokens(37), tokens(10, 2)], [tokens(6, 1), tokens(3, 2)]
    answers = [expected(model).greedy([t], p, 6) for t, p in zip(texts, prompts, strict=True)]
    end = next(token for token in answers[0] if token not in answers[1])
    at = answers[0].index(end)
    ids, mask = batch(prompts, "left")
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        context=model.compress(*batch(texts)),
        max_new_tokens=6,
        eos_token_id=end,
        pad_token_id=0,
    )
    assert new_tokens(out, 6) == [answers[0][: at + 1] + [0] * (5 - at), answers[1]]


# ---------------------------------------------------------------- (d) training
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@sides
def test_training_forward_equals_cached(tiny, expected, tokens, batch, sides, attn):
    """One pass with `context_ids` gives the logits of the reference and of the cached context, in a batch of different
    texts and ragged prompts; the loss is the mean of -log p over labelled targets, computed by hand."""
    model = tiny(**sides, attn=attn)
    want = expected(model)
    texts = [tokens(length, length) for length in LENGTHS]
    prompts = [tokens(length, 1) for length in (6, 2, 9, 4, 9)]
    ids, mask = batch(texts)
    for side in ("left", "right"):
        prompt_ids, prompt_mask = batch(prompts, side)
        labels = prompt_ids.masked_fill(prompt_mask == 0, -100)
        labels[:, 5] = -100
        labels[torch.arange(5), prompt_mask.argmax(1)] = -100  # nothing real stands before the first token
        arguments = {"input_ids": prompt_ids, "attention_mask": prompt_mask, "labels": labels}
        out = model(**arguments, context_ids=ids, context_mask=mask)
        cached = model(**arguments, context=model.compress(ids, mask))
        assert out.logits.requires_grad
        assert not cached.logits.requires_grad
        losses = []
        for b in range(5):
            real = prompt_mask[b].bool()
            logits = want.logits([texts[b]], prompts[b])
            torch.testing.assert_close(out.logits[b][real], logits, **CLOSE)
            torch.testing.assert_close(cached.logits[b][real], logits, **CLOSE)
            targets = labels[b][real]
            for place in range(1, len(prompts[b])):
                if targets[place] != -100:
                    losses.append(-logits[place - 1].double().log_softmax(-1)[targets[place]])
        assert len(losses) == int((labels != -100).sum())
        assert out.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert cached.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)


def test_loss_by_hand(tiny, expected, tokens):
    """Without padding: the mean of -log p(next token) in float64 over the labelled positions, at any rate."""
    model = tiny("llama")
    text, target = tokens(37), tokens(12, 1)
    labels = torch.tensor([[-100] * 4 + target[4:]])
    for rate in (2, 16):
        got = model(input_ids=one(target), context_ids=one(text), rate=rate, labels=labels).loss.item()
        logits = expected(model).logits([text], target, rate).double()
        want = -sum(logits[i - 1].log_softmax(-1)[target[i]].item() for i in range(4, 12)) / 8
        assert got == pytest.approx(want, rel=1e-5)
    plain = model(input_ids=one(target), labels=labels)
    assert plain.loss.item() == pytest.approx(
        F.cross_entropy(plain.logits[0, 3:-1].double(), torch.tensor(target[4:])).item(), rel=1e-5
    )


def test_predictions_are_read_in_place_of_tokens(fresh, tokens, batch):
    """Loss and gradients are those of the pass that is given the decoder's likeliest tokens, also those of a second
    pass; under autocast, too, which keeps the weights that it has converted for the next pass."""
    model = fresh("llama", lora=4)
    ids, mask = batch([tokens(37), tokens(21, 1)])
    targets = torch.tensor([tokens(12, 2), tokens(12, 3)])
    kept = torch.arange(2, 11)
    predicted = torch.zeros_like(targets)
    predicted[0, 3:], predicted[1, [3, 7]] = 1, 1
    for dtype in (torch.float32, torch.bfloat16):

        def go(read: Tensor, keep: Tensor | None, predicted: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # noqa: B023 - called here
                out = model(
                    input_ids=read,
                    context_ids=ids,
                    context_mask=mask,
                    labels=targets,
                    logits_to_keep=keep,
                    predicted=predicted,
                )
            out.loss.backward()
            return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        logits, plain = go(targets, None, None)
        own = torch.where(predicted.bool(), logits.argmax(-1).roll(1, 1), targets)
        assert (own != targets).sum() > 6
        # in the first row of two passes, in the second of one
        twice = predicted * torch.tensor([[2], [1]])
        again = own.clone()
        again[0] = torch.where(predicted[0].bool(), go(own, None, None)[0].argmax(-1).roll(1, 1)[0], targets[0])
        assert not torch.equal(own, again)
        for keep in (None, kept):
            nowhere = torch.zeros_like(targets)
            for read, asked, name in ((own, predicted, "own"), (again, twice, "twice"), (targets, nowhere, "none")):
                want, got = go(read, keep, None), go(targets, keep, asked)
                assert torch.equal(want[0], got[0]), name
                assert want[1].keys() == got[1].keys() == plain.keys(), name
                for parameter in plain:
                    assert torch.equal(want[1][parameter], got[1][parameter]), (name, parameter)


def gradients(model: RCCForCausalLM, tokens, batch, seed: int = 0) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    texts = [tokens(37, seed), tokens(21, seed + 1)]
    targets = one(tokens(9, seed + 2)).expand(2, -1)
    ids, mask = batch(texts)
    model(input_ids=targets, context_ids=ids, context_mask=mask, labels=targets).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_central_difference(model: RCCForCausalLM, parameter: Tensor, tokens, batch) -> None:
    """What :func:`gradients` left in a float64 model's parameter is the central difference of the same loss, computed
    from logits, along a random direction."""
    gradient = parameter.grad
    ids, mask = batch([tokens(37), tokens(21, 1)])
    target = one(tokens(9, 2)).expand(2, -1)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            parameter.add_(direction, alpha=step)
            logits = model(input_ids=target, context_ids=ids, context_mask=mask).logits[:, :-1]
            values.append(F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()).item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("states", ["all", "last"])
@pytest.mark.parametrize(("share", "lora"), [(True, 4), (False, 0), (False, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_everything_that_is_trained(fresh, tokens, batch, family, share, lora, states):
    """Every trainable parameter gets a gradient that is not zero and every frozen one none; what is trained is what
    should be: LoRA alone where there is LoRA, else everything but what reaches no loss (with all states, the encoder's
    last block and final norm)."""
    model = fresh(family, share=share, lora=lora, states=states)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = gradients(model, tokens, batch)
    for name, gradient in found.items():
        if name in trained:
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name
        else:
            assert gradient is None, name

    def reaches_no_loss(name: str) -> bool:
        parts = ("encoder.layers.2.", "encoder.norm.", "encoder.final_layer_norm.")
        return states == "all" and name.startswith(parts)

    def wanted(name: str) -> bool:
        own = name.startswith("projections.") or ".lora_" in name or not lora
        return own and not reaches_no_loss(name)

    assert trained == {name for name in found if wanted(name)}
    assert any(name.startswith("encoder.layers.0.") for name in trained)
    assert any(name.startswith("decoder.") for name in trained)


def test_a_shared_base_is_shared(fresh):
    """The encoder's base weights are the decoder's very tensors, in any precision; LoRA is each side's own."""
    for model in (fresh("llama"), fresh("gpt_neox").to(torch.bfloat16)):
        decoder = {id(p) for p in model.decoder.parameters()}
        for name, parameter in model.encoder.named_parameters():
            assert (id(parameter) in decoder) == (".lora_" not in name), name


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 1.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_scale(tiny, family, alpha, scale):
    """Every linear layer of every block on both sides computes W x + b + (alpha / rank) · B A x; alpha defaults to the
    rank."""
    model = tiny(family, lora_alpha=alpha)
    for body in (model.encoder, model.decoder.base_model):
        for block in body.layers:
            layers = [m for m in block.modules() if hasattr(m, "base_layer")]
            assert len(layers) == {"llama": 7, "gpt_neox": 4}[family]
            for layer in layers:
                x = torch.linspace(-1, 1, layer.in_features)[None]
                low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                want = F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + scale * x @ low.T @ high.T
                torch.testing.assert_close(layer(x), want, **CLOSE)


def exact_in_float64(model: RCCForCausalLM) -> RCCForCausalLM:
    """The model in float64 throughout: norms by the root mean square compute in float32 otherwise."""
    model.double()
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Gemma3RMSNorm":  # its weights are what is added to one
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], 1 + m.weight, m.eps)
        elif kind.endswith("RMSNorm"):
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    return model


@sides
def test_gradients_agree_with_finite_differences(fresh, tokens, batch, sides):
    """In float64 the derivative of the loss along a random direction, in encoder, projections and decoder parameters
    each, equals the central difference to 1e-5 relative (1e-2 in Mamba, whose scan computes in float32 whatever the
    precision), for a batch with gaps and ragged prompts; LoRA is trained where the base is shared, else everything."""
    model = exact_in_float64(fresh(**sides))
    ids, mask = batch([tokens(37), tokens(21, 2)])
    prompt, prompt_mask = batch([tokens(9, 3), tokens(6, 4)])
    targets = prompt[:, 1:].masked_fill(prompt_mask[:, 1:] == 0, -100)

    def loss() -> Tensor:
        out = model(input_ids=prompt, attention_mask=prompt_mask, context_ids=ids, context_mask=mask)
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets.flatten())

    model.zero_grad()
    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for side in ("encoder.", "projections.", "decoder."):
        parameters = [p for n, p in model.named_parameters() if n.startswith(side) and p.requires_grad]
        assert parameters
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True))
        rough = side == "encoder." and sides.get("encoder") in conftest.STATE_SPACE
        step, values = 1e-5 if rough else 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * step)
                values.append(loss().item())
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
        numeric = (values[0] - values[1]) / (2 * step)
        assert abs(slope) > 1e-3
        assert numeric == pytest.approx(slope, rel=1e-2 if rough else 1e-5), side


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("share", "lora"), [(True, 4), (False, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(fresh, tokens, batch, family, share, lora, reentrant):
    """Recomputing activations gives the same gradients, whichever way torch does it."""
    model = fresh(family, share=share, lora=lora).train()
    want = {k: None if v is None else v.clone() for k, v in gradients(model, tokens, batch).items()}
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    calls = []
    block = model.encoder.layers[1]
    inner = block.self_attn if family == "llama" else block.attention
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(model, tokens, batch)
    assert len(calls) == 2  # recomputed
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            assert got[name] is not None, name
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_training_step_lowers_the_loss_and_renames_the_model(fresh, tokens, batch):
    """Five steps of Adam lower the loss; the model's fingerprint follows its weights, so old contexts are refused."""
    model = fresh("llama").train()
    before = model.fingerprint
    context = model.compress(one(tokens(20)))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        target = one(tokens(9, 1))
        loss = model(input_ids=target, context_ids=one(tokens(37)), labels=target).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.fingerprint != before
    with pytest.raises(ContextError, match="made by another model"):
        model(input_ids=one([1]), context=context)


# ---------------------------------------------------------------- (e) encode + prefix
@pytest.mark.parametrize("states", ["all", "last"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_encode_then_prefix_equals_compress(tiny, expected, tokens, batch, tmp_path, family, share, states):
    """The two halves give the whole, bit for bit where one chunk holds the text; the vectors are the reference's; saved
    and loaded they are the same bits and make the same context."""
    model = tiny(family, share=share, states=states)
    for length in LENGTHS:
        ids = tokens(length)
        vectors = model.encode(one(ids))
        want = expected(model).vectors([ids])
        want = want if states == "all" else want[:, -1:]
        torch.testing.assert_close(vectors.states[0], want, **CLOSE)
        assert vectors.lengths.tolist() == [-(-length // 4)]
        assert (vectors.rate, vectors.segment) == (4, 16)
        whole = model.compress(one(ids))
        assert vectors.source_sha256 == whole.source_sha256
        context = model.prefix(vectors)
        assert same_bits(context, whole)
        assert context.pieces == whole.pieces
        vectors.save(tmp_path / "v")
        loaded = CompressedVectors.load(tmp_path / "v")
        assert torch.equal(loaded.states, vectors.states)
        assert loaded.pieces == vectors.pieces
        assert same_bits(model.prefix(loaded), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_then_prefix_of_a_batch(tiny, tokens, batch, family):
    """Different lengths, several chunks, another rate and an append through the two halves: as compress."""
    model = tiny(family)
    ids, mask = batch([tokens(75), tokens(20, 2), tokens(33, 3)])
    more, more_mask = batch([tokens(5, 4), tokens(40, 5), tokens(16, 6)])
    vectors = model.encode(ids, mask, rate=2, batch_tokens=16)
    assert vectors.lengths.tolist() == [38, 10, 17]
    for b, length in enumerate([38, 10, 17]):
        assert not vectors.states[b, length:].any()
        assert vectors.states[b, :length].abs().amax((1, 2)).min() > 0
    context = model.prefix(model.encode(more, more_mask), context=model.prefix(vectors))
    whole = model.compress(more, more_mask, context=model.compress(ids, mask, rate=2))
    assert context.lengths == whole.lengths
    for b in range(3):
        for i in range(3):
            for x, y in zip(context[b].layer(i), whole[b].layer(i), strict=True):
                torch.testing.assert_close(x, y, **CLOSE)


def test_vectors_of_another_precision(tiny, tokens):
    """Vectors can be kept in another precision and cast back by the projections."""
    model = tiny("llama")
    vectors = model.encode(one(tokens(37)))
    half = vectors.to(dtype=torch.bfloat16)
    assert half.states.dtype == torch.bfloat16
    exact = prompt_logits(model, model.prefix(vectors), tokens(6, 1))
    rough = prompt_logits(model, model.prefix(half), tokens(6, 1))
    assert 0 < (exact - rough).abs().mean() < 0.1 * exact.std()


# ---------------------------------------------------------------- (f) saving and loading the model
def save_base(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


CASES = [
    ("llama", True, 4, torch.float32),
    ("llama", True, 4, torch.bfloat16),
    ("gpt_neox", True, 4, torch.float32),
    ("llama", False, 0, torch.float32),
    ("gpt_neox", False, 0, torch.bfloat16),
    ("gpt_neox", False, 4, torch.bfloat16),
]


def assert_same_model(model: RCCForCausalLM, loaded: RCCForCausalLM, tokens) -> None:
    """Bit-equal weights, states, contexts, logits and answers."""
    own, other = model.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    assert loaded.fingerprint == model.fingerprint
    context, again = model.compress(one(tokens(37))), loaded.compress(one(tokens(37)))
    assert same_bits(context, again)
    prompt = tokens(6, 1)
    assert torch.equal(prompt_logits(model, context, prompt), prompt_logits(loaded, again, prompt))
    answer = model.generate(input_ids=one(prompt), context=context, max_new_tokens=6)
    assert torch.equal(answer, loaded.generate(input_ids=one(prompt), context=again, max_new_tokens=6))
    assert torch.equal(answer, loaded.generate(input_ids=one(prompt), context=context, max_new_tokens=6))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("family", "share", "lora", "dtype"), CASES)
def test_save_and_load(backbone, tokens, tmp_path, family, share, lora, dtype, full):
    """save_pretrained → from_pretrained gives the same model bit for bit, twice in a row, with bases written along or
    referred to, shared or separate, and in the precision it was saved in; a reference writes no base, `full` makes the
    folder complete; weights at most once."""
    lower = save_base(backbone(family, seed=1).to(dtype), tmp_path / "lower")
    upper = save_base(backbone(family, layers=2, hidden=32, seed=2).to(dtype), tmp_path / "upper")
    config = RCCConfig(segment_length=16, rates=[4], encoder_lora_rank=lora, decoder_lora_rank=lora)
    model = RCCForCausalLM.from_base(*([lower] if share else [upper, lower]), config=config)
    conftest.randomise(model)
    assert model.dtype == dtype
    folder = tmp_path / "model"
    model.save_pretrained(folder, full=full)
    has_base = full or not lora
    assert (folder / "decoder").exists() == has_base
    assert (folder / "encoder").exists() == (has_base and not share)
    if has_base:
        shutil.rmtree(lower)
        shutil.rmtree(upper)
        written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        unique = {p.data_ptr(): p.nbytes for p in model.parameters()}
        assert written < sum(unique.values()) + 100_000
    loaded = RCCForCausalLM.from_pretrained(folder)
    assert_same_model(model, loaded, tokens)
    moved = tmp_path / "elsewhere" / "model"
    loaded.save_pretrained(moved, full=full)
    shutil.rmtree(folder)
    assert_same_model(model, RCCForCausalLM.from_pretrained(moved), tokens)


@sides
def test_save_and_load_of_a_model_made_of_modules(fresh, tokens, tmp_path, sides):
    """Bases that came as modules have no folder to refer to: they are written without being asked for."""
    model = fresh(**sides)
    model.save_pretrained(tmp_path / "model")
    assert_same_model(model, RCCForCausalLM.from_pretrained(tmp_path / "model"), tokens)


@pytest.mark.parametrize("share", [True, False])
def test_a_model_cast_with_to_is_saved_in_that_precision(fresh, backbone, tokens, tmp_path, share):
    """`.to(bfloat16)`, save, load: the same model bit for bit."""
    base = save_base(backbone("llama", seed=1), tmp_path / "base")
    config = RCCConfig(segment_length=16, rates=[4], share_base=share)
    model = conftest.randomise(RCCForCausalLM.from_base(base, config=config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", full=True)
    assert_same_model(model, RCCForCausalLM.from_pretrained(tmp_path / "model"), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cast_leaves_positions_exact(fresh, family):
    """`.to(bfloat16)` casts weights, not the rotary frequencies: rounded, position 2,000 would be turned by radians."""
    model, cast = fresh(family), fresh(family).to(torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    frequencies = [(name, b) for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert len(frequencies) >= 2
    for name, buffer in frequencies:
        assert torch.equal(dict(cast.named_buffers())[name].float(), buffer), name


def test_a_reference_to_a_relative_folder_survives_a_change_of_folder(backbone, tokens, tmp_path, monkeypatch):
    """A base named by a relative path is found again from another working folder."""
    save_base(backbone("llama"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = RCCForCausalLM.from_base("base", config=RCCConfig(segment_length=16, rates=[4]))
    model.save_pretrained("out/model")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert loaded.fingerprint == model.fingerprint


def test_settings_survive(fresh, tmp_path):
    """Every setting comes back from config.json; encoder and decoder rules too."""
    config = {
        "states": "all",
        "layer_map": "average",
        "segment_padding": "repeat",
        "lora_alpha": 6.0,
        "name": "a name",
        "segment_length": 24,
        "rates": (3, 8),
    }
    model = fresh("llama", share=False, layers=(2, 3), lora=2, **config)
    model.save_pretrained(tmp_path / "m")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "m").config
    for key, value in config.items():
        assert getattr(loaded, key) == (list(value) if key == "rates" else value)
    assert loaded.encoder_lora_rank == 2


def test_fingerprint(fresh, tokens, tmp_path):
    """The fingerprint stays through save, load and any precision of loading; it changes with any weight (projection,
    LoRA, base), also in place, and with any setting that changes contexts, but not with the model's name."""
    model = fresh("llama")
    name = model.fingerprint
    assert fresh("llama").fingerprint == name
    assert fresh("llama", name="another").fingerprint == name
    assert copy.deepcopy(model).fingerprint == name
    model.save_pretrained(tmp_path / "m")
    for dtype in (None, torch.float32, torch.bfloat16, "float16"):
        loaded = RCCForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
        assert loaded.fingerprint == name
        if dtype is not None:
            assert loaded.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    loaded.save_pretrained(tmp_path / "n")
    assert json.loads((tmp_path / "n" / "config.json").read_text())["fingerprint"] == name
    names = {name}
    for part in ("projections.1.weight", "encoder.layers.0.", "decoder.model.layers.2.", "decoder.model.embed"):
        other = RCCForCausalLM.from_pretrained(tmp_path / "m")
        parameter = next(p for n, p in other.named_parameters() if n.startswith(part))
        with torch.no_grad():
            parameter.view(-1)[3] += 0.01
        names.add(other.fingerprint)
    settings = [
        {"segment_length": 32},
        {"states": "last"},
        {"layer_map": "average"},
        {"segment_padding": "repeat"},
        {"lora_alpha": 3.0},
    ]
    names |= {fresh("llama", **setting).fingerprint for setting in settings}
    assert len(names) == 1 + 4 + len(settings)


def test_loading_in_another_precision(fresh, expected, tokens, tmp_path):
    """A float32 model loaded in bfloat16 reads a float32 context of its own, and the other way round."""
    model = fresh("llama")
    model.save_pretrained(tmp_path / "m")
    half = RCCForCausalLM.from_pretrained(tmp_path / "m", dtype="bfloat16")
    prompt = tokens(6, 1)
    want = expected(model).logits([tokens(37)], prompt)
    for maker, reader in ((model, half), (half, model), (half, half)):
        got = prompt_logits(reader, maker.compress(one(tokens(37))), prompt).float()
        assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.98


# ---------------------------------------------------------------- (g) bad input
def bad(model: RCCForCausalLM, tokens) -> dict[str, tuple]:
    """Calls that must fail, by name: the call, the error's class, and what its message must say."""
    text, context = one(tokens(20)), model.compress(one(tokens(20)))
    prompt = one(tokens(5))
    three = prompt.expand(3, -1)
    empty = torch.zeros(1, 0, dtype=torch.long)
    far = one([1, 97, 2])
    calls = {
        "rate does not divide": (lambda: model.compress(text, rate=3), InputError, "rate=3.*divide.*16"),
        "rate too large": (lambda: model.compress(text, rate=32), InputError, "rate=32"),
        "rate zero": (lambda: model.compress(text, rate=0), InputError, "rate=0"),
        "rate negative": (lambda: model.encode(text, rate=-4), InputError, "rate=-4"),
        "rate no number": (lambda: model.compress(text, rate="4"), InputError, "rate='4'"),
        "rate in training": (lambda: model(input_ids=prompt, context_ids=text, rate=5), InputError, "rate=5"),
        "empty text": (lambda: model.compress(empty), InputError, "input_ids.*empty"),
        "no texts": (lambda: model.compress(torch.zeros(0, 5, dtype=torch.long)), InputError, "input_ids"),
        "one empty row": (
            lambda: model.compress(three, torch.tensor([[1] * 5, [0] * 5, [1] * 5])),
            InputError,
            "input_ids.*empty",
        ),
        "empty prompt": (lambda: model(input_ids=empty, context=context), InputError, "input_ids.*empty"),
        "empty prompt, generate": (lambda: model.generate(empty, context=context), InputError, "input_ids"),
        "empty context_ids": (lambda: model(input_ids=prompt, context_ids=empty), InputError, "context_ids"),
        "id too large": (lambda: model.compress(far), InputError, "input_ids.*97.*vocabulary of 97"),
        "id negative": (lambda: model.encode(one([1, -2])), InputError, "input_ids.*-2"),
        "id in prompt": (lambda: model(input_ids=far, context=context), InputError, "input_ids.*97"),
        "id in generate": (lambda: model.generate(far, context=context), InputError, "input_ids.*97"),
        "id in context_ids": (lambda: model(input_ids=prompt, context_ids=far), InputError, "context_ids.*97"),
        "not a tensor": (lambda: model.compress([[1, 2]]), InputError, "input_ids"),
        "one dimension": (lambda: model.compress(text[0]), InputError, "input_ids"),
        "floating ids": (lambda: model.compress(text.float()), InputError, "input_ids"),
        "mask of another length": (
            lambda: model.compress(text, torch.ones(1, 5, dtype=torch.long)),
            InputError,
            "mask.*input_ids",
        ),
        "prompt's mask of another length": (
            lambda: model(input_ids=prompt, context=context, attention_mask=torch.ones(1, 10, dtype=torch.long)),
            InputError,
            "attention_mask",
        ),
        "prompt's mask of another length, generate": (
            lambda: model.generate(prompt, torch.ones(1, 10, dtype=torch.long), context),
            InputError,
            "attention_mask",
        ),
        "prompt's mask of another batch": (
            lambda: model(input_ids=prompt, context_ids=text, attention_mask=torch.ones(3, 5, dtype=torch.long)),
            InputError,
            "attention_mask",
        ),
        "labels of another length": (
            lambda: model(input_ids=prompt, context_ids=text, labels=one([1, 2])),
            InputError,
            "labels",
        ),
        "batch of prompts": (lambda: model(input_ids=three, context=context), InputError, "1 texts?.*3.*expand"),
        "batch of prompts, generate": (lambda: model.generate(three, context=context), InputError, "expand"),
        "batch to append": (lambda: model.compress(three, context=context), InputError, "context.*3"),
        "batch of contexts": (
            lambda: model.compress(text, context=context.expand(2)),
            InputError,
            "context holds 2 texts.*1",
        ),
        "batch in training": (
            lambda: model(input_ids=three, context_ids=text),
            InputError,
            "context_ids.*1.*input_ids.*3",
        ),
        "context and context_ids": (
            lambda: model(input_ids=prompt, context=context, context_ids=text),
            InputError,
            "context or context_ids",
        ),
        "predictions outside training": (
            lambda: model(input_ids=prompt, context=context, predicted=torch.ones_like(prompt)),
            InputError,
            "predicted.*context_ids",
        ),
        "predictions of another shape": (
            lambda: model(input_ids=prompt, context_ids=text, predicted=one([1, 1])),
            InputError,
            "predicted has shape",
        ),
        "padding on the right": (
            lambda: model.generate(prompt, torch.tensor([[1, 1, 1, 1, 0]]), context),
            InputError,
            "attention_mask.*right.*left",
        ),
        "padding on the right, no context": (
            lambda: model.generate(prompt, torch.tensor([[1, 1, 1, 1, 0]])),
            InputError,
            "attention_mask.*right",
        ),
        "an empty prompt of a batch": (
            lambda: model.generate(prompt.expand(2, -1), torch.tensor([[1] * 5, [0] * 5]), context.expand(2)),
            InputError,
            "attention_mask|input_ids",
        ),
    }
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_input(tiny, tokens, family):
    """Each unusable argument is refused with the right class and a one-line message that names the argument."""
    model = tiny(family)
    wrong = []
    for name, (call, kind, words) in bad(model, tokens).items():
        try:
            call()
            wrong.append(f"{name}: accepted")
        except Exception as error:
            message = str(error)
            if not isinstance(error, kind) or not re.search(words, message) or "\n" in message:
                wrong.append(f"{name}: {type(error).__name__}: {message.splitlines()[0][:150] if message else ''}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_window(tiny, tokens):
    """More positions than the decoder has are refused before anything is computed, wherever they come from: the text,
    an append, the prompt, the answer, vectors, training; exactly as many are accepted."""
    model = tiny("llama", window=40)
    calls = []
    hook = model.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(WindowError, match=r"41 new prefix positions.*window of 40"):
        model.compress(one(tokens(161)))
    assert not calls
    hook.remove()
    with pytest.raises(WindowError, match="window of 40"):
        model(input_ids=one(tokens(20)), context_ids=one(tokens(84)))
    full = model.compress(one(tokens(160)))
    assert len(full) == 40
    with pytest.raises(WindowError, match="40 positions of the context and 1 tokens"):
        model(input_ids=one([1]), context=full)
    with pytest.raises(WindowError, match="40 positions of the context"):
        model.compress(one([1]), context=full)
    with pytest.raises(WindowError, match="window of 40"):
        model.prefix(model.encode(one(tokens(161))))
    part = model.compress(one(tokens(120)))
    assert model(input_ids=one(tokens(10)), context=part).logits.shape == (1, 10, 97)
    assert model.generate(one(tokens(5)), context=part, max_new_tokens=5).shape == (1, 10)
    with pytest.raises(WindowError, match="30 positions of the context and 11 tokens of prompt and answer"):
        model.generate(one(tokens(5)), context=part, max_new_tokens=6)
    with pytest.raises(WindowError, match="window of 40"):
        model.generate(one(tokens(5)), max_new_tokens=36)
    with pytest.raises(WindowError, match="window of 40"):
        model(input_ids=one(tokens(41)))
    assert issubclass(WindowError, ValueError)


def test_window_counts_each_text_by_itself(tiny, tokens, batch):
    """A batch in which every text fits is accepted, though the longest parts together would not."""
    model = tiny("llama", window=40)
    context = model.compress(*batch([tokens(120), tokens(8, 2)]))
    longer = model.compress(*batch([tokens(8, 3), tokens(120, 4)]), context=context)
    assert longer.lengths == [32, 32]
    ids, mask = batch([tokens(3, 5), tokens(8, 6)], "left")
    uneven = model.compress(*batch([tokens(136), tokens(80, 2)]))
    assert model(input_ids=ids, attention_mask=mask, context=uneven).logits.isfinite().all()


def test_untrained_rate_warns(tiny, tokens, caplog):
    """A rate that divides the segment but was not trained works and says so, once; a trained one is silent."""
    model = tiny("llama", rates=(4, 8))
    with caplog.at_level(logging.WARNING, "rcc"):
        model.compress(one(tokens(20)))
        model.compress(one(tokens(20)), rate=8)
        assert not caplog.records
        model.compress(one(tokens(20)), rate=2)
        model.compress(one(tokens(20)), rate=2)
    assert caplog.text.count("not trained at rate 2") == 1
    assert "4, 8" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rates": [3]}, "rate=3.*16"),
        ({"rates": []}, "rates"),
        ({"segment_length": 0}, "segment_length"),
        ({"segment_length": 4.0}, "segment_length"),
        ({"states": "some"}, "states='some'.*all, last"),
        ({"readout": "memory"}, "readout='memory'"),
        ({"layer_map": "x"}, "layer_map='x'"),
        ({"segment_padding": "left"}, "segment_padding='left'"),
        ({"encoder_lora_rank": -1}, "encoder_lora_rank"),
    ],
)
def test_bad_settings(settings, words):
    """A configuration is checked where it is made."""
    with pytest.raises(InputError, match=words):
        RCCConfig(**{"segment_length": 16, "rates": [4], **settings})


def test_unsupported_family(backbone, tmp_path):
    """A family without a test is refused by name, as a module, as a folder and on either side."""
    other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=32))
    folder = save_base(other, tmp_path / "gpt2")
    for sides in ([other], [other, backbone("llama")], [backbone("llama"), other], [folder], [str(folder)]):
        with pytest.raises(ModelError, match=r"'gpt2'.*not supported.*llama"):
            RCCForCausalLM.from_base(*sides)


def test_contradicting_bases(backbone):
    """A shared base and a decoder of its own contradict each other."""
    with pytest.raises(InputError, match="share_base"):
        RCCForCausalLM.from_base(backbone("llama"), backbone("llama"), config=RCCConfig(share_base=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A complete model folder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    conftest.make_model("llama").save_pretrained(folder, full=True)
    return folder


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def edit(file: Path, **changes) -> None:
    data = json.loads(file.read_text())
    data.update(changes)
    file.write_text(json.dumps(data))


DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "no weights of the base": (lambda f: (f / "decoder" / "model.safetensors").unlink(), "decoder"),
    "no base": (lambda f: shutil.rmtree(f / "decoder"), "decoder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "no config of the base": (lambda f: (f / "decoder" / "config.json").unlink(), "decoder"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not an RCC model"),
    "a newer format": (lambda f: edit(f / "config.json", format_version=99), "format version 99.*update rcc"),
    "an unknown setting": (lambda f: edit(f / "config.json", taste="sweet"), "taste"),
    "a plain model": (lambda f: edit(f / "config.json", model_type="llama"), "not an RCC model.*from_base"),
    "rates of another type": (lambda f: edit(f / "config.json", rates=4), r"config\.json|rates"),
    "base of another type": (lambda f: edit(f / "config.json", base=[1]), r"config\.json|base"),
    "base incomplete": (
        lambda f: edit(f / "config.json", base={"decoder": {"source": "decoder"}}),
        r"config\.json|base",
    ),
    "names no base": (lambda f: edit(f / "config.json", base={}), "no base for the decoder"),
    "another rank": (lambda f: edit(f / "config.json", encoder_lora_rank=8), "shape"),
    "another side": (lambda f: edit(f / "config.json", encoder_lora_rank=0), "unknown tensor"),
    "weights changed": (lambda f: flip(f / "model.safetensors", -1), "damaged|changed"),
    "weights' header changed": (lambda f: flip(f / "model.safetensors", 20), "damaged|changed"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "damaged|changed"),
    "weights empty": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged|changed"),
    "base changed": (lambda f: flip(f / "decoder" / "model.safetensors", -1), "SHA-256|trained on|damaged"),
    "base cut": (lambda f: os.truncate(f / "decoder" / "model.safetensors", 5000), "SHA-256|trained on|damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_folder(saved, tmp_path, damage):
    """Every way in which a model's folder can be incomplete, damaged or of another version is refused in one line."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(RCCError, match=words) as caught:
        RCCForCausalLM.from_pretrained(folder)
    assert isinstance(caught.value, (ModelError, InputError))
    assert "\n" not in str(caught.value)


def test_missing_model(tmp_path):
    """A folder that is not there, an empty one, and a file in its place."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(ModelError, match=path.name):
            RCCForCausalLM.from_pretrained(path)
        with pytest.raises(ModelError, match=path.name):
            RCCForCausalLM.from_base(path)


def test_model_folder_that_cannot_be_written(tiny, tmp_path):
    """Saving a model below a file says which folder cannot be written."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="cannot be written"):
        tiny("llama").save_pretrained(tmp_path / "file" / "model")


def test_context_of_another_model(tiny, tokens):
    """A context or vectors that another model made are refused in every place where they can be given."""
    model, other = tiny("llama"), tiny("llama", seed=9)
    context, prompt = other.compress(one(tokens(20))), one(tokens(5))
    calls = [
        lambda: model(input_ids=prompt, context=context),
        lambda: model.generate(prompt, context=context),
        lambda: model.compress(prompt, context=context),
        lambda: model.prefix(other.encode(prompt)),
        lambda: model.prefix(model.encode(prompt), context=context),
    ]
    for call in calls:
        with pytest.raises(ContextError, match="made by another model"):
            call()
    with pytest.raises(ContextError, match="different models"):
        CompressedContext.stack([context, model.compress(prompt)])


# ---------------------------------------------------------------- (h) memory
@pytest.mark.parametrize("lengths", [(64,), (37,), (16,), (10,), (64, 37, 5), (16, 16)])
@pytest.mark.parametrize("rate", [2, 4, 16])
def test_encoding_keeps_no_dropped_positions(tiny, tokens, monkeypatch, rate, lengths):
    """What the encoder's hooks keep, and what encoding yields, occupies memory for the kept positions only: no tensor
    is a view of all positions, and none of a state that no projection reads is kept."""
    model = tiny("llama")
    rows = [(torch.tensor(tokens(length)),) for length in lengths]
    wanted = model.projections.states
    kept: list[Tensor] = []
    take = rcc.model.encoder._Capture.take

    def watch(self, i: int, hidden: Tensor) -> None:
        try:
            take(self, i, hidden)
        finally:
            kept.extend(self.states.values())

    monkeypatch.setattr(rcc.model.encoder._Capture, "take", watch)
    with torch.no_grad():
        for states, _, _ in rcc.model.encoder.encode(model.encoder, rows, rate, model.config, wanted, 32, None):
            assert sorted(states) == wanted
            kept.extend(states.values())
    assert kept
    for tensor in kept:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_compressing_holds_one_batch_of_segments(tiny, tokens, batch):
    """The encoder never reads more than `batch_tokens` at once (or one segment of each text), reads every segment once,
    never runs blocks that feed nothing; the KV prefix is allocated once and written in place."""
    model = tiny("llama", window=4096)
    sizes, blocks, last = [], [], []
    hooks = [
        model.encoder.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].numel()), with_kwargs=True),
        model.encoder.layers[2].self_attn.register_forward_pre_hook(lambda *_: last.append(1)),
        model.decoder.model.register_forward_hook(
            lambda m, a, k, o: blocks.append(k[CACHE].layers[0].block[0].data_ptr()), with_kwargs=True
        ),
    ]
    context = model.compress(one(tokens(800)), batch_tokens=64)
    assert sum(sizes) == 800
    assert max(sizes) == 64
    assert len(set(blocks)) == 1
    assert context.layer(0)[0].data_ptr() == blocks[0]
    assert not last
    sizes.clear()
    model.compress(*batch([tokens(90), tokens(33, 2)]), batch_tokens=32)
    assert max(sizes) == 32
    for hook in hooks:
        hook.remove()
    spare = context.blocks.layers[0][0].untyped_storage().nbytes()
    assert spare <= context.layer(0)[0].nbytes * (len(context) + 512) / len(context) + 64


def test_generation_writes_behind_the_prefix(tiny, tokens, monkeypatch):
    """generate and forward after compress write into the spare capacity: the block stays where it is and no tensor of
    the prefix's size is made; the prefix itself does not change."""
    model = tiny("llama")
    context = model.compress(one(tokens(64)))
    keys = context.blocks.layers[0][0]
    before = keys[:, :, : len(context)].clone()
    pointers = set()
    monkeypatch.setattr(CompressedContext, "_copy", lambda *_: pytest.fail("the prefix was copied"))
    inner = model.decoder.model.layers[0]
    hook = inner.register_forward_pre_hook(
        lambda m, a, k: pointers.add(k[CACHE].layers[0].block[0].data_ptr()), with_kwargs=True
    )
    model.generate(input_ids=one(tokens(6, 1)), context=context, max_new_tokens=9)
    model(input_ids=one(tokens(6, 1)), context=context)
    hook.remove()
    assert pointers == {keys.data_ptr()}
    assert context.blocks.layers[0][0] is keys
    assert torch.equal(keys[:, :, : len(context)], before)
    assert keys[:, :, len(context) : len(context) + 14].abs().min() > 0  # the question and its answer


def test_borrowing(tiny, tokens):
    """One borrower writes in place, a second at the same time gets a copy, afterwards it is free again; room that is
    not there is copied; an error inside gives it back."""
    model = tiny("llama")
    context = model.compress(one(tokens(64)))
    own = context.blocks.layers[0][0].data_ptr()

    def where(cache) -> int:
        return cache.layers[0].block[0].data_ptr()

    with context.borrow(8) as first, context.borrow(8) as second:
        assert where(first) == own
        assert where(second) != own
        assert second.layers[0].capacity >= len(context) + 8
        assert torch.equal(first.layers[0].keys, second.layers[0].keys)
        assert first.get_seq_length() == second.get_seq_length() == len(context)
    with pytest.raises(KeyError), context.borrow(8):
        raise KeyError
    with context.borrow(8) as third:
        assert where(third) == own
    capacity = context.blocks.capacity
    with context.borrow(capacity - len(context)) as all_of_it:
        assert where(all_of_it) == own
    with context.borrow(capacity - len(context) + 1) as too_much:
        assert where(too_much) != own
    child = model.compress(one(tokens(5)), context=context)
    with context.borrow(1) as behind_a_child, child.borrow(1) as of_the_child:
        assert where(behind_a_child) != own
        assert where(of_the_child) == own
    for other in (context.expand(2), context[0]):
        with other.borrow(1) as copied:
            assert where(copied) != own


def test_an_append_shares_memory(tiny, tokens):
    """An append writes behind its parent in the same memory; a second one to the same parent does not."""
    model = tiny("llama")
    parent = model.compress(one(tokens(64)))
    first = model.compress(one(tokens(10)), context=parent)
    second = model.compress(one(tokens(10, 2)), context=parent)
    third = model.compress(one(tokens(10, 3)), context=first)
    start = [c.layer(0)[0].data_ptr() for c in (parent, first, second, third)]
    assert start[0] == start[1] == start[3] != start[2]
    assert torch.equal(parent.layer(2)[1], third.layer(2)[1][:, :, : len(parent)])


def test_a_failed_append_leaves_the_parent_usable(tiny, tokens, expected):
    """An append that breaks off half-way (an error in a progress callback) changes nothing and can be repeated."""
    model = tiny("llama")
    parent = model.compress(one(tokens(20)))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(one(tokens(40, 2)), context=parent, batch_tokens=16, progress=stop)
    child = model.compress(one(tokens(40, 3)), context=parent)
    assert child.layer(0)[0].data_ptr() == parent.layer(0)[0].data_ptr()
    want = expected(model)
    got = prompt_logits(model, child, [5, 6])
    torch.testing.assert_close(got, want.logits([tokens(20), tokens(40, 3)], [5, 6]), **CLOSE)
    got = prompt_logits(model, parent, [5, 6])
    torch.testing.assert_close(got, want.logits([tokens(20)], [5, 6]), **CLOSE)


def test_threads(tiny, tokens, expected):
    """Eight threads ask and append to one context at once: each gets its own reference answer."""
    model = tiny("llama")
    want = expected(model)
    text = tokens(37)
    context = model.compress(one(text))
    prompts = [tokens(5, seed) for seed in range(8)]
    answers = [want.greedy([text], prompt, 4) for prompt in prompts]
    longer = [want.logits([text, prompt], [3]) for prompt in prompts]
    wrong: list[str] = []

    def ask(i: int) -> None:
        try:
            for _ in range(3):
                out = model.generate(input_ids=one(prompts[i]), context=context, max_new_tokens=4)
                if new_tokens(out, 5)[0] != answers[i]:
                    wrong.append(f"answer {i}")
                child = model.compress(one(prompts[i]), context=context)
                if not torch.allclose(prompt_logits(model, child, [3]), longer[i], atol=1e-4, rtol=1e-4):
                    wrong.append(f"append {i}")
        except Exception as error:
            wrong.append(f"{i}: {error!r}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def layers_of_both_kinds() -> tuple[BlockLayer, DynamicLayer]:
    """The block layer and transformers' own, holding the same."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 5, 4, generator=generator) for _ in range(2))
    block, plain = BlockLayer(8), DynamicLayer()
    for layer in (block, plain):
        layer.update(keys.clone(), values.clone())
    return block, plain


ACTIONS = {
    "update in place": lambda layer: layer.update(torch.ones(3, 2, 2, 4), torch.ones(3, 2, 2, 4)),
    "update beyond": lambda layer: layer.update(torch.ones(3, 2, 9, 4), torch.ones(3, 2, 9, 4)),
    "crop": lambda layer: layer.crop(-2),
    "crop nothing": lambda layer: layer.crop(0),
    "crop everything": lambda layer: layer.crop(-5),
    "crop more than there is": lambda layer: layer.crop(-7),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_block_layer_behaves_like_dynamic_layer(action):
    """Each operation of a cache layer, then a write, leaves what transformers' own layer would hold."""
    block, plain = layers_of_both_kinds()
    for layer in (block, plain):
        ACTIONS[action](layer)
    assert block.get_seq_length() == plain.get_seq_length()
    assert block.get_mask_sizes(3) == plain.get_mask_sizes(3)
    rows = plain.keys.shape[0] if plain.is_initialized else 3
    if plain.is_initialized and plain.keys.numel():
        assert torch.equal(block.keys, plain.keys)
        assert torch.equal(block.values, plain.values)
    more = torch.full((rows, 2, 3, 4), 7.0)
    for got, want in zip(block.update(more, more), plain.update(more, more), strict=True):
        assert torch.equal(got, want)
    assert block.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("action", ["reorder", "repeat", "select", "crop", "reset"])
def test_empty_block_layer_behaves_like_dynamic_layer(action):
    """The same on a layer that holds nothing yet: nothing happens."""
    block, plain = BlockLayer(8), DynamicLayer()
    for layer in (plain, block):
        ACTIONS[action](layer)
        assert layer.get_seq_length() == 0


def test_block_layer_refuses_what_dynamic_layer_refuses():
    """A positive crop (the old meaning) would show memory that was never written: it is refused."""
    block, plain = layers_of_both_kinds()
    for layer in (plain, block):
        with pytest.raises(ValueError, match="crop"):
            layer.crop(2)


def test_block_layer_does_not_copy():
    """Writing within the capacity moves nothing; what is shown is a view of the block."""
    block, _ = layers_of_both_kinds()
    assert block.capacity == 8
    pointer = block.keys.data_ptr()
    keys, values = block.update(torch.ones(3, 2, 3, 4), torch.ones(3, 2, 3, 4))
    assert keys.data_ptr() == pointer
    assert block.values.data_ptr() == values.data_ptr()
    block.crop(-3)
    assert block.keys.data_ptr() == pointer
    block.update(torch.ones(3, 2, 4, 4), torch.ones(3, 2, 4, 4))
    assert block.keys.data_ptr() != pointer
    assert block.capacity > 9


def test_an_ordinary_cache_takes_a_context(tiny, tokens, expected):
    """A context is an ordinary KV cache: transformers' own caches continue from its keys and values."""
    model = tiny("gpt_neox")
    text, prompt = tokens(37), tokens(6, 1)
    context = model.compress(one(text))
    want = expected(model).logits([text], prompt)
    places = torch.arange(10, 16)[None]
    got = model.decoder(one(prompt), **{CACHE: plain_cache(context)}, position_ids=places).logits[0]
    torch.testing.assert_close(got, want, **CLOSE)
    static = StaticCache(config=model.decoder.config, max_cache_len=32)
    for i in range(3):
        static.update(*context.layer(i), i)
    mask = torch.ones(1, 16, dtype=torch.long)
    got = model.decoder(one(prompt), **{CACHE: static}, position_ids=places, attention_mask=mask).logits[0]
    torch.testing.assert_close(got, want, **CLOSE)
