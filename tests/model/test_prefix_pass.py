"""Chunks of prefix states are gathered to passes worth their call, and the context is the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import SIDES, MakeBatch, MakeModel, MakeTokens
from equality import CLOSE, one
from rcc.model import prefix, prefix_pass
from rcc.model.prefix import DirectPrefix, ResidualPrefix


def passes(
    monkeypatch: pytest.MonkeyPatch, maker: type[ResidualPrefix | DirectPrefix], positions: int | None = None
) -> list[int]:
    """What each call of a kind of prefix takes, in positions of all texts; `positions`: how many it asks for."""
    sizes: list[int] = []
    append: Any = maker.append

    def noted(self: Any, cache: Any, states: prefix.States, mask: Any, order: Any) -> None:
        sizes.append(prefix.any_state(states).shape[:2].numel())
        append(self, cache, states, mask, order)

    if positions is not None:
        monkeypatch.setattr(maker, "pass_positions", positions)
    monkeypatch.setattr(maker, "append", noted)
    return sizes


@pytest.mark.parametrize("sides", ["llama-shared", "gpt_neox-mamba", "gemma3_text-shared"])
@pytest.mark.parametrize("lengths", [(150,), (75, 20, 64)])
def test_gathered_chunks_make_the_same_context(
    fresh: MakeModel,
    tokens: MakeTokens,
    batch: MakeBatch,
    monkeypatch: pytest.MonkeyPatch,
    sides: str,
    lengths: tuple[int, ...],
) -> None:
    """Of one text and of several with gaps, appended to, whatever a pass takes: the same entries, gaps and answers."""
    model, many = fresh(**SIDES[sides]), len(lengths)
    rows = [tokens(length, i) for i, length in enumerate(lengths)]
    contexts, taken = [], []
    for positions in (1, 9, 24, 10_000):
        with monkeypatch.context() as patch:
            taken.append(passes(patch, ResidualPrefix, positions * many))
            context = model.compress(*batch(rows), rate=4, batch_tokens=16 * many)
            more = batch([row[:21] for row in reversed(rows)])
            contexts.append(model.compress(*more, rate=2, context=context, batch_tokens=16 * many))
    each, nine, some, all_at_once = map(len, taken)
    assert each > nine > some >= all_at_once == 2  # a text and what is appended
    assert max(taken[1]) < (9 + 8) * many  # 8 positions are what a batch gives at most
    prompt = one(tokens(5, 9)).expand(many, -1)
    apart, *others = contexts
    want = model(prompt, context=apart).logits
    for context in others:
        assert context.pieces == apart.pieces
        assert (context.mask is None) == (apart.mask is None) == (many == 1)
        assert context.mask is None or torch.equal(context.mask, apart.mask)
        for i in range(len(context.blocks.layers)):
            for a, b in zip(context.layer(i), apart.layer(i), strict=True):
                if context.mask is not None:
                    a, b = (entries * context.mask[:, None, :, None] for entries in (a, b))
                torch.testing.assert_close(a, b, **CLOSE)
        torch.testing.assert_close(model(prompt, context=context).logits, want, **CLOSE)


def test_no_more_states_are_held_than_a_pass_takes() -> None:
    """While the next chunk is made fewer positions than a pass takes are held; what was handed over is let go."""
    alive: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def chunks() -> Iterator[tuple[prefix.States, Tensor | None]]:
        for count in (4, 4, 4, 1, 20, 3):
            gc.collect()
            held.append(sum(state.shape[1] for ref in alive if (state := ref()) is not None))
            states = {0: torch.zeros(1, count, 2), 3: torch.zeros(1, count, 2)}
            alive.append(weakref.ref(states[0]))
            yield states, None
            del states

    sizes = []
    for states, valid in prefix_pass.gathered(chunks(), 10):
        sizes.append(prefix.any_state(states).shape[1])
        assert isinstance(states, dict)
        assert sorted(states) == [0, 3]
        assert valid is None
        del states
    assert sizes == [12, 21, 3]
    assert held == [0, 4, 8, 0, 1, 0]


def test_gaps_stay_where_they_were() -> None:
    """Chunks with gaps and without; states stand in order."""
    real = torch.tensor([[True, True], [True, False]])
    parts = [torch.arange(2 * m, dtype=torch.float32).view(2, m, 1) for m in (3, 2, 1)]
    chunks: list[tuple[prefix.States, Tensor | None]] = [
        ({1: part}, valid) for part, valid in zip(parts, (None, real, None), strict=True)
    ]
    ((states, valid),) = prefix_pass.gathered(chunks, 1000)
    assert isinstance(states, dict)
    assert torch.equal(states[1], torch.cat(parts, 1))
    assert valid is not None
    assert valid.tolist() == [[True] * 6, [True] * 4 + [False, True]]


def test_a_direct_prefix_takes_what_a_batch_gives(
    fresh: MakeModel, tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathering would change the last bits of contexts that are there, and its positions have no pass to fill."""
    model = fresh("llama", prefix="direct")
    sizes = passes(monkeypatch, DirectPrefix)
    model.compress(one(tokens(70)), rate=4, batch_tokens=32)
    assert sizes == [8, 8, 2]
