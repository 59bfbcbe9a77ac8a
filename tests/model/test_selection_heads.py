"""Heads that share their budgets keep what a computation of the test's own keeps, and see nothing but that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from conftest import MakeBatch
from rcc import CompressedContext, ContextError, ModelError, WindowError
from rcc.context.pieces import Piece, longest_head, pieces_from
from rcc.model.backbones import CACHE
from rcc.model.selection.selection import Selection
from word_tokens import word_tokenizer

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
RULES = ("shared", "expected-shared")


def select(base: PreTrainedModel, rule: str = "shared", chunk: int = 2048) -> Selection:
    return Selection(base, word_tokenizer(), "tiny", rule, chunk)


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def same_bits(a: CompressedContext, b: CompressedContext) -> bool:
    pairs = [zip(a.layer(i), b.layer(i), strict=True) for i in range(len(a.blocks.layers))]
    return a.pieces == b.pieces and all(torch.equal(x, y) for layer in pairs for x, y in layer)


def written(model: Selection, prompt: list[int], context: CompressedContext, **more: Any) -> list[int]:
    return model.generate(one(prompt), context=context, max_new_tokens=6, do_sample=False, **more)[0].tolist()


# ---------------------------------------------------------------- what it computes
def test_the_best_pairs_of_all_heads_stay(backbone: Any, tokens: Any) -> None:
    """By transformers' own attention weights; a head's pairs are the last ones of the decoder's cache."""
    base, eager = backbone("llama"), backbone("llama", attn="eager")
    model, ids = select(base), tokens(37)
    header, asking = model.header.tolist(), model.asking.tolist()
    context = model.compress(one(ids), rate=4)
    counts = context.pieces[0][0].heads
    assert len(context) == 10
    assert [sum(layer) for layer in counts] == [20, 20, 20]
    assert len({count for layer in counts for count in layer}) > 1
    out = eager(one([*header, *ids, *asking, *ids]), output_attentions=True)
    cache, h = DynamicCache(), len(header)
    base(one([*header, *ids]), use_cache=True, **{CACHE: cache})
    placed = model.as_cache(context)
    assert len(placed) == h + longest_head(context.pieces[0]) == h + max(map(max, counts))
    for i, weights in enumerate(out.attentions):
        paid = weights[0, :, h + 37 :, h : h + 37].amax(1).view(2, 2, 37).amax(1)
        least = paid.flatten().sort(descending=True).values[19]
        for head in range(2):
            best = (paid[head] >= least).nonzero()[:, 0]
            assert len(best) == counts[i][head]
            got = placed.blocks.layers[i][1][0, head, : len(placed)]
            torch.testing.assert_close(
                got[len(placed) - len(best) :], cache.layers[i].values[0, head, best + h], **CLOSE
            )
            torch.testing.assert_close(got[:h], cache.layers[i].values[0, head, :h], **CLOSE)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_head_sees_no_pair_of_another_budget(backbone: Any, tokens: Any, family: str, attn: str) -> None:
    """Whatever lies in the gaps, the answer and its logits are the same."""
    base = backbone(family, attn=attn)
    model, prompt = select(base), tokens(6, 1)
    context = model.compress(one(tokens(37)), rate=4)
    said: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    options = {"context": context, "max_new_tokens": 5, "do_sample": False, **said}
    before = model.generate(one(prompt), **options)
    placed, h = model.as_cache(context), len(model.header)
    for (keys, values), counts in zip(placed.blocks.layers, context.pieces[0][0].heads, strict=True):
        for head, count in enumerate(counts):
            keys[:, head, h : len(placed) - count] = 7.0
            values[:, head, h : len(placed) - count] = 1000.0
    after = model.generate(one(prompt), **options)
    assert torch.equal(before.sequences, after.sequences)
    for a, b in zip(before.logits, after.logits, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    whole = model.compress(one(tokens(37)), rate=1)  # and at rate 1 heads are even
    assert whole.pieces[0][0].heads == ()
    assert same_bits(whole, select(base, "repeat").compress(one(tokens(37)), rate=1))


@pytest.mark.parametrize("rule", RULES)
def test_a_chunk_is_read_after_what_each_head_kept(backbone: Any, tokens: Any, rule: str) -> None:
    """The second chunk's pairs are those that the model makes of it after the first one's context, as it is asked."""
    base = backbone("qwen2")
    model, ids = select(base, rule, chunk=16), tokens(32)
    first, both = model.compress(one(ids[:16]), rate=4), model.compress(one(ids), rate=4)
    placed = model.as_cache(first)
    with placed.borrow(16) as cache:
        base(one(ids[16:]), use_cache=True, **{CACHE: cache})
        own = [layer.values[0, :, len(placed) :].clone() for layer in cache.layers]
    after = model.as_cache(both).blocks.layers
    for i in range(3):
        for head in range(2):
            before, count = first.pieces[0][0].heads[i][head], both.pieces[0][0].heads[i][head]
            end = len(model.as_cache(both))
            pairs = after[i][1][0, head, end - count : end]
            torch.testing.assert_close(pairs[:before], first_pairs(model, first, i, head), **CLOSE)
            distances = (pairs[before:, None] - own[i][head]).abs().amax(-1)
            assert bool((distances.amin(1) < 1e-4).all())
            if i:  # a token that comes twice has the same value in the first layer
                assert distances.argmin(1).tolist() == sorted(set(distances.argmin(1).tolist()))


def first_pairs(model: Selection, context: CompressedContext, layer: int, head: int) -> Tensor:
    count, end = context.pieces[0][0].heads[layer][head], len(model.as_cache(context))
    return model.as_cache(context).blocks.layers[layer][1][0, head, end - count : end]


# ---------------------------------------------------------------- a context as any other
@pytest.mark.parametrize("rule", RULES)
def test_joined_appended_cut_and_kept(backbone: Any, tokens: Any, tmp_path: Path, rule: str) -> None:
    model, prompt = select(backbone("mistral"), rule, chunk=16), tokens(5, 9)
    texts = [(tokens(37), 4), (tokens(21, 2), 2), (tokens(9, 3), 1)]
    parts = [model.compress(one(text), rate=rate) for text, rate in texts]
    appended = parts[0]
    for text, rate in texts[1:]:
        appended = model.compress(one(text), rate=rate, context=appended)
    joined = CompressedContext.join(parts)
    assert same_bits(joined, appended)
    assert same_bits(joined.select([2, 0]), CompressedContext.join([parts[2], parts[0]]))
    assert same_bits(joined.select([1]), parts[1])
    answer = written(model, prompt, joined)
    joined.save(tmp_path / "joined.rcc")
    for verify in ("full", "header"):
        loaded = CompressedContext.load(tmp_path / "joined.rcc", model=model, verify=verify)
        assert same_bits(loaded, joined)
        assert written(model, prompt, loaded) == answer
    assert joined.nbytes == sum(part.nbytes for part in parts)
    small = joined.to(dtype="int8")
    small.save(tmp_path / "small.rcc")
    rounded = CompressedContext.load(tmp_path / "small.rcc", model=model)
    assert same_bits(rounded, small.to(dtype=model.dtype))
    assert written(model, prompt, small) == written(model, prompt, rounded)
    many = model.generate(one(prompt).expand(3, -1), context=joined.expand(3), max_new_tokens=6, do_sample=False)
    assert many.tolist() == [answer] * 3
    with pytest.raises(ContextError, match="different numbers of pairs"):
        joined.take(torch.arange(3))


def test_batches_and_beams(backbone: Any, tokens: Any, batch: MakeBatch) -> None:
    """Each text of a batch is compressed, appended to and answered as if it were alone."""
    model = select(backbone("llama"), chunk=16)
    rows, more, prompts = [tokens(37), tokens(9, 2)], [tokens(5, 4), tokens(20, 5)], [tokens(5, 6), tokens(3, 7)]
    together = model.compress(*batch(more), rate=2, context=model.compress(*batch(rows), rate=4))
    asked, mask = batch(prompts, side="left")
    for beams in (1, 2):
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        out = model.generate(asked, mask, context=together, **options)[:, 5:]
        for b in range(2):
            alone = model.compress(one(rows[b]), rate=4)
            alone = model.compress(one(more[b]), rate=2, context=alone)
            assert same_bits(together[b], alone)
            single = model.generate(one(prompts[b]), context=alone, **options)[0, len(prompts[b]) :]
            assert torch.equal(out[b], single)


# ---------------------------------------------------------------- what is refused
def test_the_window_is_that_of_the_longest_head(backbone: Any, tokens: Any) -> None:
    """A head may keep a whole chunk: what all heads may keep together must fit."""
    model = select(backbone("llama", window=64), chunk=24)
    room = model.window - len(model.header)
    context = model.compress(one(tokens(room)), rate=4)
    assert len(model.as_cache(context)) <= 64
    with pytest.raises(WindowError, match="new prefix positions"):
        model.compress(one(tokens(room + 24)), rate=2)
    longer = model.compress(one(tokens(96)), rate=8)  # two heads of 12 pairs each keep 24 at most
    assert len(model.as_cache(longer)) <= len(model.header) + 24
    assert model.fitting_rate([30], budget=10, reserve=8) == 4
    with pytest.raises(WindowError):
        model.generate(one(tokens(64 - len(model.header))), context=context, max_new_tokens=1)


def test_models_that_cannot(backbone: Any) -> None:
    with pytest.raises(ModelError, match="sliding window"):
        select(backbone("gemma3_text"))
    base = backbone("llama")
    base.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="flash_attention_2"):
        select(base)


def test_damaged_counts_are_refused(backbone: Any, tokens: Any, tmp_path: Path) -> None:
    piece = Piece(8, 4, 2, "x", (1,), heads=((3, 5), (4, 4)))
    assert pieces_from([piece.as_dict()]) == [piece]
    for heads in (((3, 4),), ((-1, 9),), ((True, 7),), ((3.0, 5),), 5, (5,)):
        with pytest.raises(TypeError):
            pieces_from([{**piece.as_dict(), "heads": heads}])
    model = select(backbone("llama"))
    context = model.compress(one(tokens(20)), rate=4)
    wrong: list[tuple[tuple[int, ...], ...]] = [((5, 5),), ((5,),) * 3, ((5, 5, 5),) * 3]
    for counts in wrong:
        other = replace(context, pieces=((replace(context.pieces[0][0], heads=counts),),))
        other.save(tmp_path / "other.rcc")
        with pytest.raises(ContextError, match="damaged"):
            CompressedContext.load(tmp_path / "other.rcc")
    assert "heads" not in Piece(8, 4, 2, "x", (1,)).as_dict()
