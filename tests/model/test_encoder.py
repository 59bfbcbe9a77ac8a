"""Segments are read in any batches, what repeats once, and no more is held than is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rcc.model.encoder
from conftest import MakeBatch, MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, one, run_training_pass, segments_read
from rcc.model.backbones import CACHE, blocks, body


@pytest.mark.parametrize("batch_tokens", [1, 16, 33, 10_000])
def test_chunking_does_not_change_the_result(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch, batch_tokens: int
) -> None:
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


def test_progress_ends_after_the_last_pass(fresh: MakeModel, tokens: MakeTokens) -> None:
    """All is read only once the decoder has made keys and values of what was gathered last."""
    model, events = fresh("llama"), []
    blocks(body(model.decoder))[0].register_forward_hook(lambda *_: events.append("decoder"))
    model.compress(one(tokens(75)), batch_tokens=16, progress=lambda done, total: events.append(f"{done} of {total}"))
    assert events[-2:] == ["decoder", "75 of 75"]
    assert events.count("75 of 75") == 1


def test_equal_segments_are_read_once(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch
) -> None:
    """What repeats within a batch is read once, and the result is the reference's of reading it each time; also for
    equal segments of different rows and for an equal, shorter end, cached and with gradients."""
    model = tiny("llama")
    filler, key, prompt = tokens(16), tokens(21, 1), tokens(5, 2)
    rows = [filler * 3 + key + filler * 2, filler * 2 + filler[:5], filler * 3 + filler[:5]]
    ids, mask = batch(rows)
    with segments_read(model) as read:
        context = model.compress(ids, mask)
        trained = run_training_pass(model, one(prompt).expand(3, -1), context_ids=ids, context_mask=mask).logits
    assert read == [6, 6]  # the filler, its short end, and after the key every segment is shifted
    cached = model(one(prompt).expand(3, -1), context=context).logits
    for b, row in enumerate(rows):
        want = expected(model).logits([row], prompt)
        torch.testing.assert_close(cached[b], want, **CLOSE)
        torch.testing.assert_close(trained[b], want, **CLOSE)


def test_segments_that_repeat_are_kept_for_the_next_batch(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens
) -> None:
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


def test_filler_is_remembered_from_text_to_text(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens) -> None:
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


@pytest.mark.parametrize("lengths", [(64,), (37,), (16,), (10,), (64, 37, 5), (16, 16)])
@pytest.mark.parametrize("rate", [2, 4, 16])
def test_encoding_keeps_no_dropped_positions(
    tiny: MakeModel, tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch, rate: int, lengths: list[int]
) -> None:
    """What the encoder's hooks keep, and what encoding yields, occupies memory for the kept positions only: no tensor
    is a view of all positions, and none of a state that no projection reads is kept."""
    model = tiny("llama")
    rows: list[tuple[Tensor, ...]] = [(torch.tensor(tokens(length)),) for length in lengths]
    wanted = model.projections.states
    held: list[Tensor] = []
    take = rcc.model.encoder._Capture.take

    def watch(self: Any, i: int, hidden: Tensor) -> None:
        try:
            take(self, i, hidden)
        finally:
            held.extend(self.states.values())

    monkeypatch.setattr(rcc.model.encoder._Capture, "take", watch)
    with torch.no_grad():
        for states, _, _ in rcc.model.encoder.encode(model.encoder, rows, rate, model.config, wanted, 32):
            assert sorted(states) == wanted
            held.extend(states.values())
    assert held
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_compressing_holds_one_batch_of_segments(tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch) -> None:
    """The encoder never reads more than `batch_tokens` at once (or one segment of each text), reads every segment once,
    never runs blocks that feed nothing; the KV prefix is allocated once and written in place."""
    model = tiny("llama", window=4096)
    sizes, blocks, last = [], [], []
    encoder: Any = model.encoder
    hooks = [
        model.encoder.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].numel()), with_kwargs=True),
        encoder.layers[2].self_attn.register_forward_pre_hook(lambda *_: last.append(1)),
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
