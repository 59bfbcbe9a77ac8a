"""Encoding and prefixing apart give what compressing gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import MakeBatch, MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, FAMILIES, LENGTHS, one, prompt_logits, same_bits
from rcc import (
    CompressedVectors,
)


@pytest.mark.parametrize("states", ["all", "last"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_encode_then_prefix_equals_compress(
    tiny: MakeModel,
    expected: MakeExpected,
    tokens: MakeTokens,
    batch: MakeBatch,
    tmp_path: Path,
    family: str,
    share: bool,
    states: str,
) -> None:
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
def test_encode_then_prefix_of_a_batch(tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch, family: str) -> None:
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


def test_vectors_of_another_precision(tiny: MakeModel, tokens: MakeTokens) -> None:
    """Vectors can be kept in another precision and cast back by the projections."""
    model = tiny("llama")
    vectors = model.encode(one(tokens(37)))
    half = vectors.to(dtype=torch.bfloat16)
    assert half.states.dtype == torch.bfloat16
    exact = prompt_logits(model, model.prefix(vectors), tokens(6, 1))
    rough = prompt_logits(model, model.prefix(half), tokens(6, 1))
    assert 0 < (exact - rough).abs().mean() < 0.1 * exact.std()
