"""A selection keeps the pairs that a computation of the test's own keeps, and at rate 1 is the model's own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

import conftest
from conftest import MakeBackbone, MakeBatch, MakeTokens
from rcc import CompressedContext, ContextError, InputError, ModelError, WindowError
from rcc.model import attention
from rcc.model.backbones import CACHE
from rcc.model.selection.rules import RULES, Seen, highest_attention
from rcc.model.selection.selection import Selection
from word_tokens import word_tokenizer

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
FAMILIES = conftest.DECODERS
ROTARY = {"gpt_neox": 6}
"""Dimensions of a head that are rotated, where that is not all of them."""


def select(base: PreTrainedModel, rule: str = "repeat", chunk: int = 2048) -> Selection:
    return Selection(base, word_tokenizer(), "tiny", rule, chunk)


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def own_cache(base: PreTrainedModel, ids: list[int]) -> DynamicCache:
    cache = DynamicCache()
    base(one(ids), use_cache=True, **{CACHE: cache})
    return cache


def moved(keys: Tensor, start: Tensor, end: Tensor, size: int, theta: float) -> Tensor:
    """Keys [heads, n, head dim] that were rotated to some positions [heads, n], rotated to others: as complex numbers,
    in float64."""
    half = size // 2
    angles = (end - start).double()[..., None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    numbers = torch.complex(keys[..., :half].double(), keys[..., half:size].double())
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([numbers.real, numbers.imag, keys[..., size:].double()], -1).float()


def same_bits(a: CompressedContext, b: CompressedContext) -> bool:
    pairs = [zip(a.layer(i), b.layer(i), strict=True) for i in range(len(a.blocks.layers))]
    return len(a) == len(b) and all(torch.equal(x, y) for layer in pairs for x, y in layer)


# ---------------------------------------------------------------- what it computes
@pytest.mark.parametrize("family", FAMILIES)
def test_rate_1_is_the_models_own_cache(backbone: MakeBackbone, tokens: MakeTokens, family: str) -> None:
    """In one chunk and in several; and what is written after it is what the model writes after the text."""
    base = backbone(family)
    ids, prompt = tokens(40), tokens(6, 1)
    for chunk in (64, 16):
        model = select(base, chunk=chunk)
        header = model.header.tolist()
        want = own_cache(base, [*header, *ids])
        context = model.compress(one(ids), rate=1)
        placed = model.as_cache(context)
        assert len(placed) == len(header) + len(context) == len(header) + 40
        for i, layer in enumerate(placed.blocks.layers):
            for got, own in zip(layer, (want.layers[i].keys, want.layers[i].values), strict=True):
                torch.testing.assert_close(got[:, :, : len(placed)], own, **CLOSE)
        out = model.generate(one(prompt), context=context, max_new_tokens=4, do_sample=False)[0, 6:]
        whole = one([*header, *ids, *prompt])
        generator: Any = base
        plain = generator.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=4, do_sample=False)[0]
        plain = plain[whole.shape[1] :]
        assert torch.equal(out, plain)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3_text"])
def test_repeat_keeps_what_brute_force_keeps(backbone: MakeBackbone, tokens: MakeTokens, family: str) -> None:
    """Of transformers' own attention weights of header, text, request and text again, the highest of each head; keys
    stand where they are moved to."""
    base, eager = backbone(family), backbone(family, attn="eager")
    model = select(base)
    ids, rate = tokens(37), 4
    header, asking = model.header.tolist(), model.asking.tolist()
    context = model.compress(one(ids), rate=rate)
    assert len(context) == 10
    out = eager(one([*header, *ids, *asking, *ids]), output_attentions=True)
    cache = own_cache(base, [*header, *ids])
    h = len(header)
    placed = model.as_cache(context)
    for i, weights in enumerate(out.attentions):
        paid = weights[0, :, h + 37 :, h : h + 37].amax(1)
        keys, values = cache.layers[i].keys[0], cache.layers[i].values[0]
        best = paid.view(keys.shape[0], -1, 37).amax(1).topk(10).indices.sort(-1).values
        got_keys, got_values = (t[0, :, h : h + 10] for t in placed.blocks.layers[i])
        take = (best + h)[..., None].expand(-1, -1, keys.shape[-1])
        torch.testing.assert_close(got_values, values.gather(1, take), **CLOSE)
        to = torch.arange(h, h + 10).expand_as(best)
        theta = base.config.rope_parameters["rope_theta"]
        want = moved(keys.gather(1, take), best + h, to, ROTARY.get(family, keys.shape[-1]), theta)
        torch.testing.assert_close(got_keys, want, **CLOSE)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_the_highest_attention_of_large_products(dtype: torch.dtype, near: float) -> None:
    """It is that of a softmax in float64, with the attention's sums and without, where products are far larger than
    their differences, as some models' are."""
    generator = torch.Generator().manual_seed(0)
    heads, groups, past, new, size = 4, 2, 30, 20, 16
    queries = torch.randn(heads, new, size, generator=generator) + 8
    keys, values = torch.randn(2, groups, past + new, size, generator=generator) + 8
    queries, keys, values = (states.to(dtype) for states in (queries, keys, values))
    unmoved = torch.ones(past + new, size, dtype=dtype), torch.zeros(past + new, size, dtype=dtype)
    products = torch.matmul(queries.double(), keys.double().repeat_interleave(2, 0).transpose(1, 2)) / 4
    assert products.mean() > 20 * products.std()
    causal = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    want = products.masked_fill(~causal, -torch.inf).softmax(-1)[..., 5:past].view(groups, 2, new, -1).amax((1, 2))
    sums = attention.attend_to_past(queries[None], keys[None], values[None], 0.25)[1][0]
    for given in (None, sums):
        seen = Seen(0, 0, queries, keys, values, 5, past, 3, *unmoved, 0.25, given)
        got = highest_attention(seen)
        assert got.shape == (groups, 25)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=near, atol=near)


def test_expected_keeps_what_its_formula_keeps(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """The mean over sampled queries of exp(q·k), by the formula in float64 and one rotation after another."""
    base = backbone("llama")
    model, ids, rate = select(base, "expected"), tokens(37), 4
    queries: list[Tensor] = []
    for layer in base.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: queries.append(out[0].double()))
    header, size = model.header.tolist(), 12
    cache = own_cache(base, [*header, *ids])
    context, h = model.compress(one(ids), rate=rate), len(header)
    future = range(h + 37, 512 if h + 37 + 512 > 512 else h + 37 + 512)
    for i in range(3):
        q = queries[i][h:].view(37, 4, size).transpose(0, 1)
        mean, spread = q.mean(1), q - q.mean(1, keepdim=True)
        scores = torch.zeros(2, 37, dtype=torch.float64)
        keys, values = cache.layers[i].keys[0, :, h:].double(), cache.layers[i].values[0, :, h:]
        for head in range(4):
            covariance = spread[head].T @ spread[head] / 37
            turn = torch.zeros(size, size, dtype=torch.float64)
            for p in future:
                at = torch.full((size,), p)
                turn += moved(torch.eye(size)[None], torch.zeros(1, size), at[None], size, 1000.0)[0] / len(future)
            mu, sigma = mean[head] @ turn, turn.T @ covariance @ turn
            k = keys[head // 2] / size**0.5
            scores[head // 2] += ((k @ mu) + ((k @ sigma) * k).sum(-1) / 2).softmax(-1) / 2
        best = (scores * values.double().norm(dim=-1)).topk(10).indices.sort(-1).values
        torch.testing.assert_close(
            context.layer(i)[1][0], values.gather(1, best[..., None].expand(-1, -1, size)), **CLOSE
        )


def test_a_chunk_is_read_after_what_was_kept(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """The second chunk's pairs are those that the model makes of it after the first one's context."""
    base = backbone("qwen2")
    model, ids = select(base, "stride", chunk=16), tokens(32)
    first, both = model.compress(one(ids[:16]), rate=4), model.compress(one(ids), rate=4)
    assert same_bits(both.take(torch.arange(4)), first)
    placed = model.as_cache(first)
    with placed.borrow(16) as cache:
        base(one(ids[16:]), use_cache=True, **{CACHE: cache})
        for i, layer in enumerate(cache.layers):
            own = layer.values[:, :, len(placed) :]
            torch.testing.assert_close(both.layer(i)[1][:, :, 4:], own[:, :, 3::4], **CLOSE)


@pytest.mark.parametrize(
    ("family", "rule"),
    # a model with sliding layers cannot share budgets
    [(f, r) for f in ("llama", "qwen2", "mistral", "gemma3_text") for r in RULES if "shared" not in r or f == "llama"],
)
def test_one_chunk_is_the_whole(backbone: MakeBackbone, tokens: MakeTokens, family: str, rule: str) -> None:
    """A chunk longer than the text changes nothing; every rule keeps ceil(tokens / rate) pairs, the same each time."""
    base, ids = backbone(family), one(tokens(37))
    exact, longer = select(base, rule, 37), select(base, rule, 64)
    for rate in (1, 2, 5):
        context = exact.compress(ids, rate=rate)
        assert len(context) == -(-37 // rate)
        assert same_bits(context, longer.compress(ids, rate=rate))
    assert len(select(base, rule, 16).compress(ids, rate=5)) == 4 + 4 + 1


def test_a_sliding_layer_keeps_the_latest(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    base = backbone("gemma3_text")
    model, ids = select(base, chunk=16), tokens(40)
    cache = own_cache(base, [*model.header.tolist(), *ids])
    context = model.compress(one(ids), rate=2)
    # the first chunk alone is read as the model itself would, and one layer is enough to tell
    first = model.compress(one(ids[:16]), rate=2)
    h = len(model.header)
    torch.testing.assert_close(first.layer(0)[1], cache.layers[0].values[:, :, h + 8 : h + 16], **CLOSE)
    torch.testing.assert_close(context.layer(0)[1], cache.layers[0].values[:, :, -20:], **CLOSE)


def test_the_header_stays_in_front(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """Whatever is compressed, joined or cut, the cache begins with the model's own pairs of the header."""
    base = backbone("llama")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w1 w2 {{ m['content'] }} w3 {% endfor %}w4"
    model = Selection(base, tokenizer, "tiny")
    header = model.header.tolist()
    assert header == [1, 2, *[0] * 5, 3, 1, 2]  # a system message of five words that the tokenizer does not know
    want = own_cache(base, header)
    context = model.compress(one(tokens(37)), rate=4)
    for made in (context, CompressedContext.join([context, context]), context.take(torch.arange(3))):
        placed = model.as_cache(made)
        for i, layer in enumerate(placed.blocks.layers):
            for got, own in zip(layer, (want.layers[i].keys, want.layers[i].values), strict=True):
                torch.testing.assert_close(got[:, :, : len(header)], own, **CLOSE)


# ---------------------------------------------------------------- texts after one another
def test_texts_are_independent(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """An append is what joining makes, in any order; each text can be taken out again."""
    model = select(backbone("mistral"), chunk=16)
    texts = [tokens(37), tokens(21, 2), tokens(9, 3)]
    parts = [model.compress(one(text), rate=rate) for text, rate in zip(texts, (4, 2, 1), strict=True)]
    appended = parts[0]
    for text, rate in zip(texts[1:], (2, 1), strict=True):
        appended = model.compress(one(text), rate=rate, context=appended)
    joined = CompressedContext.join(parts)
    assert joined.pieces == appended.pieces
    assert same_bits(joined, appended)
    assert [segment.stop - segment.start for segment in joined.segments] == [len(part) for part in parts]
    assert same_bits(joined.select([2, 0]), CompressedContext.join([parts[2], parts[0]]))
    assert same_bits(joined.select([1]), parts[1])


def test_batches_of_different_lengths(backbone: MakeBackbone, tokens: MakeTokens, batch: MakeBatch) -> None:
    """Each text of a batch is compressed, appended to and answered as if it were alone."""
    model = select(backbone("gemma3_text"), chunk=16)
    rows, more = [tokens(37), tokens(9, 2)], [tokens(5, 4), tokens(20, 5)]
    prompts = [tokens(5, 6), tokens(3, 7)]
    together = model.compress(*batch(rows), rate=4)
    together = model.compress(*batch(more), rate=2, context=together)
    asked, mask = batch(prompts, side="left")
    out = model.generate(asked, mask, context=together, max_new_tokens=4, do_sample=False)[:, 5:]
    for b in range(2):
        alone = model.compress(one(rows[b]), rate=4)
        alone = model.compress(one(more[b]), rate=2, context=alone)
        assert same_bits(together[b], alone)
        single = model.generate(one(prompts[b]), context=alone, max_new_tokens=4, do_sample=False)
        assert torch.equal(out[b], single[0, len(prompts[b]) :])


def test_a_text_as_long_as_window_times_rate(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """The window holds what is kept; while a text's end is read, the oldest of it give way."""
    model = select(backbone("llama", window=64), chunk=24)
    room = model.window - len(model.header)
    longest = room // 6 * 24
    for rule in ("repeat", "expected"):
        model = select(backbone("llama", window=64), rule, chunk=24)
        context = model.compress(one(tokens(longest)), rate=4)
        assert len(model.as_cache(context)) <= 64
        assert same_bits(context.take(torch.arange(6)), model.compress(one(tokens(longest)[:24]), rate=4))
    with pytest.raises(WindowError, match=r"chat header and .* new prefix positions"):
        model.compress(one(tokens(longest + 24)), rate=4)
    with pytest.raises(WindowError, match="highest rate of auto, 8"):
        model.fitting_rate([64 * 8])
    assert model.fitting_rate([30]) == 1
    assert model.fitting_rate([30], budget=16) == 2


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_8_bits(backbone: MakeBackbone, tokens: MakeTokens, tmp_path: Path, family: str) -> None:
    """Keys are rounded before their rotation: what is asked, appended, joined and cut is that of the rounded pairs."""
    model, prompt = select(backbone(family), chunk=16), one(tokens(5, 1))
    context = model.compress(one(tokens(37)), rate=2).to(dtype=torch.bfloat16)
    small = context.to(dtype="int8")
    assert (small.dtype, small.rotated, small.compressor) == (torch.int8, False, "selection, rule repeat")
    assert small.nbytes < 0.6 * context.nbytes
    for i in range(3):
        for keys, rounded in zip(context.layer(i), small.layer(i), strict=True):
            assert float((keys - rounded).float().norm() / keys.float().norm()) < 0.02
    back = small.to(dtype=model.dtype)
    small.save(tmp_path / "small.rcc")
    loaded = CompressedContext.load(tmp_path / "small.rcc", model=model)
    assert CompressedContext.load(tmp_path / "small.rcc").compressor == small.compressor
    assert same_bits(loaded, back)
    want = model.generate(prompt, context=back, max_new_tokens=4, do_sample=False)
    for same in (small, loaded, CompressedContext.load(tmp_path / "small.rcc", verify="header")):
        assert torch.equal(model.generate(prompt, context=same, max_new_tokens=4, do_sample=False), want)
    for batch in (small.expand(2), back.expand(2)):
        out = model.generate(prompt.expand(2, -1), context=batch, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, want.expand(2, -1))
    more = one(tokens(9, 2))
    appended = model.compress(more, rate=1, context=small)
    assert same_bits(appended, model.compress(more, rate=1, context=back))
    assert same_bits(
        CompressedContext.join([small, small]),
        CompressedContext.join([back, back]).to(dtype=small.blocks.like.dtype),
    )
    assert same_bits(appended.to(dtype="int8").select([1]), appended.to(dtype="int8").to(dtype=model.dtype).select([1]))


# ---------------------------------------------------------------- whose it is
def test_a_fingerprint_names_model_and_settings(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    base, other = backbone("llama"), backbone("llama", seed=1)
    names = {select(base).fingerprint, select(base, "expected").fingerprint, select(base, chunk=16).fingerprint}
    assert len(names | {select(other).fingerprint}) == 4
    assert select(base).fingerprint == select(backbone("llama")).fingerprint
    context = select(base).compress(one(tokens(20)))
    assert (context.rate, context.compressor) == (2, "selection, rule repeat")
    with pytest.raises(ContextError, match=r"tiny \(selection, rule expected\)"):
        select(base, "expected").generate(one([1]), context=context)


def test_the_model_stays_as_it_is(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """Its logits are the same after a text was compressed, it attends as others do, and its weights are there once."""
    base = backbone("qwen3")
    before = base(one(tokens(20))).logits
    model = select(base)
    model.compress(one(tokens(37)), rate=4)
    assert base.config._attn_implementation == attention.NAME
    assert torch.equal(base(one(tokens(20))).logits, before)
    assert {id(p) for p in model.reader.body.parameters()} <= {id(p) for p in base.parameters()}


# ---------------------------------------------------------------- what is refused
def test_arguments_are_checked(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    model = select(backbone("llama"), chunk=16)
    for rate in (0, 17, 2.0, True, "4"):
        with pytest.raises(InputError, match="rate="):
            model.compress(one(tokens(5)), rate=rate)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rule 'best' is unknown"):
        select(backbone("llama"), "best")
    with pytest.raises(InputError, match="chunk_length"):
        select(backbone("llama"), chunk=0)
    with pytest.raises(InputError, match="empty text"):
        model.compress(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match='"human"'):
        model.prompt("what?", "compress")
    with pytest.raises(InputError, match="question is empty"):
        model.prompt(" ", "human")
    with pytest.raises(ModelError, match="too small"):
        select(backbone("llama", window=32))


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("mamba", {}, "state-space"),
        ("qwen3_next", {}, "state-space"),
        ("deepseek_v3", {}, "latent attention"),
        ("gpt2", {}, "no rotary positions"),
        ("opt", {}, "no rotary positions"),
        ("phi3", {}, "not supported"),
        ("mistral", {"sliding_window": 16, "max_position_embeddings": 64}, "last 16 positions"),
    ],
)
def test_other_families_are_refused(family: str, settings: dict[str, Any], words: str) -> None:
    """With one sentence, from the configuration alone."""
    from transformers import AutoConfig

    from rcc.model.selection.families import check_family

    with pytest.raises(ModelError, match=words):
        check_family(AutoConfig.for_model(family, **settings))
