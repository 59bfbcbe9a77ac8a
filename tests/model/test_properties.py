"""Properties that hold for every length, rate, segment, cut and batch; hypothesis looks for one where they do not."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import VOCABULARY, MakeExpected, MakeModel, batch
from equality import run_training_pass
from rcc import CompressedContext

CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
quick = settings(max_examples=40, deadline=None, derandomize=True)

families = st.sampled_from(["llama", "gpt_neox"])
segment_lengths = st.sampled_from([1, 4, 6, 12, 16])
texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)
prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@quick
@given(data=st.data(), family=families, segment=segment_lengths, states=st.sampled_from(["all", "last"]))
def test_any_appends_equal_the_definition(
    tiny: MakeModel, expected: MakeExpected, data: st.DataObject, family: str, segment: int, states: str
) -> None:
    """Any texts, each appended at any rate: positions = Σ ceil(Tᵢ / rateᵢ), and the prompt's logits are those of the
    definition; whichever number of tokens the encoder reads at once."""
    model = tiny(family, segment_length=segment, rates=(1,), states=states)
    pieces = data.draw(st.lists(st.tuples(texts, st.sampled_from(divisors(segment))), min_size=1, max_size=3))
    prompt = data.draw(prompts)
    context = None
    for ids, rate in pieces:
        at_once = data.draw(st.integers(1, 64))
        context = model.compress(torch.tensor([ids]), rate=rate, context=context, batch_tokens=at_once)
    assert len(context) == sum(-(-len(ids) // rate) for ids, rate in pieces)
    got = model(input_ids=torch.tensor([prompt]), context=context).logits[0]
    want = expected(model).logits([ids for ids, _ in pieces], prompt, [rate for _, rate in pieces])
    torch.testing.assert_close(got, want, **CLOSE)


@quick
@given(data=st.data(), family=families, segment=segment_lengths, padding=st.sampled_from(["none", "repeat"]))
def test_any_batch_equals_one_by_one(
    tiny: MakeModel, expected: MakeExpected, data: st.DataObject, family: str, segment: int, padding: str
) -> None:
    """Any batch of texts, padded on either side, with an append or not, asked ragged prompts: each row's logits are
    those of the definition for that row alone, cached and in one training pass."""
    model = tiny(family, segment_length=segment, rates=(1,), segment_padding=padding)
    rows = data.draw(st.integers(1, 4))
    rate = data.draw(st.sampled_from(divisors(segment)))
    steps = data.draw(st.lists(st.lists(texts, min_size=rows, max_size=rows), min_size=1, max_size=2))
    asked = data.draw(st.lists(prompts, min_size=rows, max_size=rows))
    side = data.draw(st.sampled_from(["left", "right"]))
    context = None
    for step in steps:
        context = model.compress(*batch(step, side), rate=rate, context=context)
    ids, mask = batch(asked, side)
    logits = [model(input_ids=ids, attention_mask=mask, context=context).logits]
    if len(steps) == 1:
        text, text_mask = batch(steps[0], side)
        with torch.no_grad():
            trained = run_training_pass(
                model, input_ids=ids, attention_mask=mask, context_ids=text, context_mask=text_mask, rate=rate
            )
        logits.append(trained.logits)
    for b in range(rows):
        own = [step[b] for step in steps]
        want = expected(model).logits(own, asked[b], rate)
        real = slice(0, len(asked[b])) if side == "right" else slice(ids.shape[1] - len(asked[b]), None)
        for got in logits:
            torch.testing.assert_close(got[b, real], want, **CLOSE)
        assert context[b].source_tokens == sum(map(len, own))
        assert len(context[b]) == context.lengths[b]


@quick
@given(data=st.data(), family=families, segment=segment_lengths, ids=texts)
def test_cuts_at_segments_change_nothing(
    tiny: MakeModel, data: st.DataObject, family: str, segment: int, ids: list[int]
) -> None:
    """A text cut anywhere between segments and appended piece by piece makes the context of the whole text; the two
    halves, encode and prefix, make it too."""
    model = tiny(family, segment_length=segment, rates=(1,))
    rate = data.draw(st.sampled_from(divisors(segment)))
    borders = list(range(segment, len(ids), segment))
    cuts = sorted(data.draw(st.sets(st.sampled_from(borders), max_size=3))) if borders else []
    whole = model.compress(torch.tensor([ids]), rate=rate)
    cut, halves = None, None
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        part = torch.tensor([ids[start:end]])
        cut = model.compress(part, rate=rate, context=cut)
        halves = model.prefix(model.encode(part, rate=rate), context=halves)
    assert len(cut) == len(halves) == len(whole)
    assert cut.pieces == halves.pieces
    for i in range(3):
        for a, b, c in zip(whole.layer(i), cut.layer(i), halves.layer(i), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
            torch.testing.assert_close(a, c, **CLOSE)


@quick
@given(data=st.data(), family=families)
def test_stack_and_take_apart(tiny: MakeModel, data: st.DataObject, family: str) -> None:
    """Any contexts, stacked in any order and taken apart again, are what they were, bit for bit."""
    model = tiny(family)
    rows = data.draw(st.lists(texts, min_size=1, max_size=4))
    contexts = [model.compress(torch.tensor([row])) for row in rows]
    groups = data.draw(st.integers(1, len(rows)))
    stacked = CompressedContext.stack([CompressedContext.stack(contexts[:groups]), *contexts[groups:]])
    assert stacked.lengths == [len(c) for c in contexts]
    for b, context in enumerate(contexts):
        for i in range(3):
            for x, y in zip(stacked[b].layer(i), context.layer(i), strict=True):
                assert torch.equal(x, y)
        assert stacked[b].pieces == context.pieces
