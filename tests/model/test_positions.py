"""The window is respected, and positions count real entries only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conftest import MakeBatch, MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, LENGTHS, new_tokens, one, run_training_pass, same_bits, sides
from rcc import (
    WindowError,
)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@sides
def test_texts_of_different_lengths(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch, sides: dict[str, Any], attn: str
) -> None:
    """Texts of every kind of length in one batch, padded on either side, before ragged prompts padded on either side
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


def test_window(tiny: MakeModel, tokens: MakeTokens) -> None:
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
        run_training_pass(model, input_ids=one(tokens(20)), context_ids=one(tokens(84)))
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


def test_window_counts_each_text_by_itself(tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch) -> None:
    """A batch in which every text fits is accepted, though the longest parts together would not."""
    model = tiny("llama", window=40)
    context = model.compress(*batch([tokens(120), tokens(8, 2)]))
    longer = model.compress(*batch([tokens(8, 3), tokens(120, 4)]), context=context)
    assert longer.lengths == [32, 32]
    ids, mask = batch([tokens(3, 5), tokens(8, 6)], "left")
    uneven = model.compress(*batch([tokens(136), tokens(80, 2)]))
    assert model(input_ids=ids, attention_mask=mask, context=uneven).logits.isfinite().all()
