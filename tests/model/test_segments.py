"""Segment boundaries and padding."""

from __future__ import annotations

import pytest
import torch

from conftest import MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, one, prompt_logits


def test_rate_by_hand_of_every_divisor(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens) -> None:
    """Every divisor of the segment works, whether in `rates` or not, and a prompt of one token too."""
    model = tiny("llama", segment_length=12, rates=(3,))
    for rate in (1, 2, 3, 4, 6, 12):
        context = model.compress(one(tokens(29)), rate=rate)
        got = prompt_logits(model, context, [5])
        torch.testing.assert_close(got, expected(model).logits([tokens(29)], [5], rate), **CLOSE)


@pytest.mark.parametrize("length", [1, 3, 4, 8, 15, 16, 17, 20, 31, 32, 37, 48])
def test_repeat_to_fill(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, length: int) -> None:
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
