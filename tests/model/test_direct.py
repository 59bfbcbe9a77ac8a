"""The direct prefix computes what `tests/reference.py` defines, and contexts are sums of independent pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import conftest
import reference as ref
from conftest import MakeBackbone, MakeBatch, MakeModel, MakeTokens
from equality import run_training_pass
from rcc import CompressedContext, CompressedVectors, ContextError, InputError, RCCConfig, RCCForCausalLM, WindowError
from rcc.model.backbones import CACHE

sides = pytest.mark.parametrize("sides", conftest.SIDES.values(), ids=conftest.SIDES)
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
LENGTHS = [3, 37, 48]
"""Shorter than a group, a partial segment and group, whole segments."""


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def same_bits(a: CompressedContext, b: CompressedContext) -> bool:
    pairs = [zip(a.layer(i), b.layer(i), strict=True) for i in range(len(a.blocks.layers))]
    return len(a) == len(b) and all(torch.equal(x, y) for layer in pairs for x, y in layer)


# ---------------------------------------------------------------- what it computes
@pytest.mark.parametrize("rate", [1, 4, 16])
@sides
def test_direct_equals_the_reference(tiny: MakeModel, tokens: MakeTokens, sides: dict[str, Any], rate: int) -> None:
    """Compress-then-forward, one training pass, and compress-then-generate give the reference's logits and tokens, for
    every family on both sides and every kind of length."""
    model = tiny(**sides, prefix="direct")
    prompt = tokens(7, 1)
    for length in LENGTHS:
        ids = tokens(length)
        want = ref.direct(model, [ids], [rate], prompt)
        context = model.compress(one(ids), rate=rate)
        assert len(context) == -(-length // rate)
        torch.testing.assert_close(model(one(prompt), context=context).logits[0], want, **CLOSE)
        trained = run_training_pass(model, one(prompt), context_ids=one(ids), rate=rate).logits[0]
        torch.testing.assert_close(trained, want, **CLOSE)
    out = model.generate(one(prompt), context=context, max_new_tokens=2, do_sample=False)[0, 7:].tolist()
    for k, token in enumerate(out):
        assert int(ref.direct(model, [ids], [rate], [*prompt, *out[:k]])[-1].argmax()) == token


@pytest.mark.parametrize("family", conftest.DECODERS)
def test_direct_untrained_at_1x_is_the_cache_of_the_base(
    backbone: MakeBackbone, tokens: MakeTokens, family: str
) -> None:
    """Before training, a context at rate 1 is the base's own KV cache of the sink token and the text; and so is, in one
    segment, what the encoder's path makes of every token's state."""
    base = backbone(family)
    config = RCCConfig(segment_length=64, rates=[4, 1], prefix="direct", sink_token=5)
    model = RCCForCausalLM.from_base(base, config=config)
    ids, prompt = tokens(40), tokens(6, 1)
    cache = DynamicCache(config=base.config)
    base(one([5, *ids]), use_cache=True, **{CACHE: cache})
    placed = model.as_cache(model.compress(one(ids), rate=1, batch_tokens=16))
    for i, layer in enumerate(placed.blocks.layers):
        if family == "gemma3_text" and not i % 2:
            continue  # the base's own cache of a sliding layer keeps its window only
        for got, want in zip(layer, (cache.layers[i].keys, cache.layers[i].values), strict=True):
            torch.testing.assert_close(got[:, :, :41], want, **CLOSE)
    plain = base(one([5, *ids, *prompt])).logits[0, 41:]
    torch.testing.assert_close(model(one(prompt), context=placed).logits[0], plain, **CLOSE)


def test_direct_untrained_encoder_keeps_the_states_of_the_base(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """At 4x the kept positions are every fourth of the base's own cache, before their rotation."""
    base = backbone("llama")
    model = RCCForCausalLM.from_base(
        base, config=RCCConfig(segment_length=64, rates=[4], prefix="direct", sink_token=5)
    )
    ids = tokens(40)
    whole, thinned = model.compress(one(ids), rate=1), model.compress(one(ids), rate=4)
    for i in range(len(whole.blocks.layers)):
        for every, fourth in zip(whole.layer(i), thinned.layer(i), strict=True):
            torch.testing.assert_close(every[:, :, 3::4], fourth, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_direct_batches_of_different_lengths(
    tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch, family: str
) -> None:
    """Each text of a batch is answered as if it were alone: compressed, stacked, expanded and in training."""
    model = tiny(family, prefix="direct", rate_embeddings=True)
    rows, prompts = [tokens(37), tokens(9, 2), tokens(20, 3)], [tokens(5, 4), tokens(3, 5), tokens(5, 6)]
    ids, mask = batch(rows)
    asked, asked_mask = batch(prompts, side="left")
    for rate in (1, 4):
        want = [ref.direct(model, [row], [rate], prompt) for row, prompt in zip(rows, prompts, strict=True)]
        together = model.compress(ids, mask, rate=rate)
        stacked = CompressedContext.stack([model.compress(one(row), rate=rate) for row in rows])
        for context in (together, stacked):
            got = model(asked, asked_mask, context=context).logits
            for b, logits in enumerate(want):
                torch.testing.assert_close(got[b, -len(logits) :], logits, **CLOSE)
        trained = run_training_pass(model, asked, asked_mask, context_ids=ids, context_mask=mask, rate=rate).logits
        for b, logits in enumerate(want):
            torch.testing.assert_close(trained[b, -len(logits) :], logits, **CLOSE)
        three = model(one(prompts[0]).expand(3, -1), context=together[0].expand(3)).logits
        torch.testing.assert_close(three[2], want[0], **CLOSE)


def test_direct_vectors_make_the_same_context(tiny: MakeModel, tokens: MakeTokens, tmp_path: Path) -> None:
    """Encoder and decoder apart, with a file between them, give what `compress` gives."""
    model = tiny(prefix="direct")
    vectors = model.encode(one(tokens(37)), rate=4)
    vectors.save(tmp_path / "v.safetensors")
    assert same_bits(
        model.prefix(CompressedVectors.load(tmp_path / "v.safetensors")), model.compress(one(tokens(37)), rate=4)
    )
    with pytest.raises(InputError, match="rate=1 is read by the decoder itself"):
        model.encode(one(tokens(37)), rate=1)


# ---------------------------------------------------------------- training
@pytest.mark.parametrize("rate", [1, 4])
def test_direct_gradients_reach_everything_that_is_used(fresh: MakeModel, tokens: MakeTokens, rate: int) -> None:
    """Gradients of a training pass are the reference's: of the sink, projections and LoRA of both sides."""
    model = fresh(prefix="direct", rate_embeddings=True)
    ids, prompt = tokens(32), tokens(12, 1)
    labels = one(prompt)
    run_training_pass(model, one(prompt), context_ids=one(ids), rate=rate, labels=labels).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert got["sink"].abs().sum() > 0
    assert all((got[f"projections.{i}.weight"] is not None) == (rate > 1) for i in range(3))
    model.zero_grad()
    logits = ref.direct(model, [ids], [rate], prompt)
    torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            ours = torch.zeros_like(parameter) if got[name] is None else got[name]
            torch.testing.assert_close(ours, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


# ---------------------------------------------------------------- sums of pieces
def test_join_equals_compressing_in_that_order(tiny: MakeModel, tokens: MakeTokens, tmp_path: Path) -> None:
    """Joined contexts, from memory and from files, have the bits of one text where the cut is a segment boundary, of
    appending elsewhere, and read as the reference does, at rates of their own."""
    model = tiny(prefix="direct", rate_embeddings=True)
    texts, prompt = [tokens(32), tokens(21, 2), tokens(9, 3)], tokens(5, 1)
    parts = [model.compress(one(text), rate=4) for text in texts]
    assert same_bits(CompressedContext.join(parts[:2]), model.compress(one(texts[0] + texts[1]), rate=4))
    appended = model.compress(one(texts[0]), rate=4)
    for text in texts[1:]:
        appended = model.compress(one(text), rate=4, context=appended)
    joined = CompressedContext.join(parts)
    assert same_bits(joined, appended)
    assert joined.pieces == appended.pieces
    for k, part in enumerate(parts):
        part.save(tmp_path / f"{k}.rcc")
    loaded = [CompressedContext.load(tmp_path / f"{k}.rcc") for k in range(3)]
    assert same_bits(CompressedContext.join(loaded), joined)
    rates = [1, 8, 4]
    mixed = CompressedContext.join([model.compress(one(t), rate=r) for t, r in zip(texts, rates, strict=True)])
    want = ref.direct(model, texts, rates, prompt)
    torch.testing.assert_close(model(one(prompt), context=mixed).logits[0], want, **CLOSE)


def test_select_any_segments_in_any_order(tiny: MakeModel, tokens: MakeTokens) -> None:
    """Chosen segments have the bits of compressing them in that order; a whole text at rate 1 is one segment."""
    model = tiny(prefix="direct")
    ids = tokens(55)
    context = model.compress(one(ids), rate=4, batch_tokens=16)  # a pass for each: padding may change the last bits
    assert [(s.start, s.stop) for s in context.segments] == [(0, 4), (4, 8), (8, 12), (12, 14)]
    picked = context.select([2, 0])
    assert same_bits(picked, model.compress(one(ids[32:48] + ids[:16]), rate=4))
    assert picked.source_tokens == 32
    assert same_bits(context.select([3]), model.compress(one(ids[48:]), rate=4))
    assert context.select(range(4)).pieces == context.pieces
    exact = model.compress(one(tokens(40, 2)), rate=1, context=context)
    assert len(exact.segments) == 5
    assert same_bits(exact.select([4]), model.compress(one(tokens(40, 2)), rate=1))
    for wrong in ([], [4], [-1], [True, "0"]):
        with pytest.raises(InputError, match="segments"):
            context.select(wrong)  # type: ignore[arg-type]


def test_many_contexts_are_joined(tiny: MakeModel, tokens: MakeTokens) -> None:
    """64 contexts are one, each where its turn is (`benchmarks/join.py` says how fast)."""
    model = tiny(prefix="direct")
    parts = [model.compress(one(tokens(500, seed)), rate=4) for seed in range(8)] * 8
    joined = CompressedContext.join(parts)
    assert len(joined) == 64 * 125
    assert same_bits(joined.select(range(32 * 9, 32 * 10)), parts[1])


def test_residual_contexts_cannot_be_joined(tiny: MakeModel, tokens: MakeTokens) -> None:
    """Their positions depend on one another: the message says what can be."""
    context = tiny().compress(one(tokens(20)), rate=4)
    with pytest.raises(ContextError, match='prefix="direct"'):
        CompressedContext.join([context, context])
    with pytest.raises(ContextError, match="cannot be cut"):
        context.select([0])
    with pytest.raises(InputError, match="contexts is empty"):
        CompressedContext.join([])
    models = tiny(prefix="direct"), tiny("gpt_neox", prefix="direct")
    different = [model.compress(one(tokens(8)), rate=4) for model in models]
    with pytest.raises(ContextError, match="different models"):
        CompressedContext.join(different)


# ---------------------------------------------------------------- files, windows, settings
def test_direct_model_and_context_files(fresh: MakeModel, tokens: MakeTokens, tmp_path: Path) -> None:
    """A saved model is the same one, and a saved context is answered the same, with and without a model at hand."""
    model = fresh(prefix="direct", rate_embeddings=True)
    prompt = tokens(5, 1)
    context = model.compress(one(tokens(37)), rate=4)
    want = model(one(prompt), context=context).logits
    context.save(tmp_path / "c.rcc")
    model.save_pretrained(tmp_path / "model", full=True)
    again = RCCForCausalLM.from_pretrained(tmp_path / "model")
    assert again.fingerprint == model.fingerprint
    assert again.config.prefix == "direct"
    assert again.config.sink_token == model.config.sink_token
    for loaded in (CompressedContext.load(tmp_path / "c.rcc"), CompressedContext.load(tmp_path / "c.rcc", model=again)):
        assert not loaded.rotated
        assert torch.equal(again(one(prompt), context=loaded).logits, want)
    mapped = CompressedContext.load(tmp_path / "c.rcc", verify="header")
    assert torch.equal(again(one(prompt), context=mapped).logits, want)


def test_a_residual_folder_says_nothing_of_prefixes(fresh: MakeModel, tmp_path: Path) -> None:
    """So an earlier rcc reads it, and its fingerprint is what it was."""
    model = fresh()
    model.save_pretrained(tmp_path, full=True)
    text = (tmp_path / "config.json").read_text()
    assert "prefix" not in text
    assert "sink" not in text
    assert "prefix" not in model.config.method()


def test_questions_share_the_placed_cache(tiny: MakeModel, tokens: MakeTokens) -> None:
    """The decoder's cache is made once for all questions, and no question leaves anything in it."""
    model = tiny(prefix="direct")
    context, prompt = model.compress(one(tokens(37)), rate=4), tokens(5, 1)
    first = model(one(prompt), context=context).logits
    placed = context.decoder_cache
    assert placed is not None
    model.generate(one(tokens(9, 2)), context=context, max_new_tokens=3, do_sample=False)
    assert context.decoder_cache is placed
    assert torch.equal(model(one(prompt), context=context).logits, first)


def test_the_window_counts_the_sink(tiny: MakeModel, tokens: MakeTokens) -> None:
    """A context and prompt that leave no position for the sink are refused, and one less is not."""
    model = tiny(prefix="direct", window=64)
    context = model.compress(one(tokens(200)), rate=4)
    model(one(tokens(13, 1)), context=context)
    with pytest.raises(WindowError, match="window of 64"):
        model(one(tokens(14, 1)), context=context)
    with pytest.raises(WindowError):
        model.compress(one(tokens(256)), rate=4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"prefix": "indirect"}, "prefix"),
        ({"prefix": "direct", "states": "last"}, "states"),
        ({"prefix": "direct", "readout": "memory_tokens"}, "readout"),
        ({"prefix": "direct", "segment_padding": "repeat"}, "segment_padding"),
        ({"sink_token": 3}, "sink_token"),
        ({"prefix": "direct", "sink_token": -1}, "sink_token"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], named: str) -> None:
    """Each is refused with a sentence that begins with the argument."""
    with pytest.raises(InputError, match=f"^{named}"):
        RCCConfig(**settings)
