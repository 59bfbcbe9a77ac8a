"""`generate` after a context gives what transformers gives after a plain cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import MakeBatch, MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, FAMILIES, new_tokens, one, plain_cache, prompt_logits
from rcc.model import answering
from rcc.model.backbones import CACHE
from rcc.text import prompting


def test_without_context_no_token_is_padding(tiny: MakeModel, tokens: MakeTokens) -> None:
    """Token 0, named as padding, in a prompt without a context is read like any other."""
    model = tiny("llama")
    prompt = [0, *tokens(5), 0]
    out = model.generate(one(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0)
    want = list(prompt)
    for _ in range(4):
        want.append(int(model(one(want)).logits[0, -1].argmax()))
    assert out[0].tolist() == want


@pytest.mark.parametrize("family", FAMILIES)
def test_one_context_many_questions(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch, family: str
) -> None:
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


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_reads_contiguous_states(fresh: MakeModel, tokens: MakeTokens, rows: int) -> None:
    """What the head gets of a prompt's last position has the strides of a tensor of its own: the reason is speed."""
    model = fresh("llama")
    seen: list[Tensor] = []
    model.decoder.get_output_embeddings().register_forward_pre_hook(lambda head, args: seen.append(args[0]))
    model.generate(
        one(tokens(9)).expand(rows, -1), context=model.compress(one(tokens(40))).expand(rows), max_new_tokens=2
    )
    assert [states.shape[:2] for states in seen] == [(rows, 1), (rows, 1)]
    assert all(states.stride() == torch.empty(states.shape).stride() for states in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, family: str) -> None:
    """Sampling with a fixed seed repeats itself and equals sampling over transformers' own concatenating cache, with
    one and with several returned sequences; with top_k=1 it is the reference's greedy answer."""
    model = tiny(family)
    text, prompt = tokens(37), tokens(6, 1)
    context = model.compress(one(text))

    def sample(cached: bool = True, **kwargs: Any) -> list[list[int]]:
        torch.manual_seed(3)
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, **kwargs}
        if cached:
            return new_tokens(model.generate(input_ids=one(prompt), context=context, **settings), 6)
        cache = plain_cache(context)
        copies = kwargs.get("num_return_sequences", 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        mask = torch.ones(1, len(context) + 6, dtype=torch.long)
        decoder: Any = model.decoder
        out = decoder.generate(one(prompt), attention_mask=mask, **{CACHE: cache}, **settings)
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
def test_beams(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch, family: str) -> None:
    """Beam search over a batch of different texts and ragged prompts gives the beams of a search written by hand over
    forward passes without a cache, all returned sequences in order; settings given as a GenerationConfig too."""
    model = tiny(family)
    want = expected(model)
    texts = [tokens(37), tokens(10, 2)]
    prompts = [tokens(6, 1), tokens(3, 2)]
    context = model.compress(*batch(texts))
    ids, mask = batch(prompts, "left")
    settings: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
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


def test_streamer(tiny: MakeModel, tokens: MakeTokens) -> None:
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


def test_generation_stops_at_the_end_token(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch
) -> None:
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


def test_an_end_mark_that_the_tokenizer_drops_ends_nothing(tiny: MakeModel, tokens: MakeTokens) -> None:
    """A vocabulary of two characters makes no tokens of it: the answer has its full length."""
    model = tiny("llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"w": 5, "1": 6}, [])))
    written = answering.generate(model, tokenizer, one(tokens(9)), None, prompting.build("w1", "human"), 4)
    assert [len(row) for row in written] == [4]
