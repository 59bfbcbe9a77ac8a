"""Prefix positions, chunk by chunk, into the decoder's cache: the second half of `compress`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .positions import mask_and_order
from .prefix import PrefixMaker, States, any_state

Chunks = Iterable[tuple[States, Tensor | None]]
"""States of prefix positions, a batch at a time, and which of them are real, [B, m] (None: all)."""


def prefix_pass(maker: PrefixMaker, cache: Cache, mask: Tensor | None, chunks: Chunks) -> Tensor | None:
    """Append prefix positions to a cache, chunk by chunk.

    Chunks that are too small for the maker are gathered first. So the states of fewer than `maker.pass_positions`
    positions are held while the next chunk is made.

    Args:
        maker: of this kind of prefix.
        cache: layers of [B, KV heads, past, head dim].
        mask: [B, past], which of its entries are real (None: all).
        chunks: states of the positions to append.

    Returns:
        The mask [B, n] of all entries (None: no gaps).
    """
    for states, valid in gathered(chunks, maker.pass_positions):
        like = any_state(states)
        full, order = mask_and_order(cache.get_seq_length(), mask, like.shape[1], valid, like)
        maker.append(cache, states, full, order)
        mask = None if full is None else full.bool()
        del states, valid, like  # before the next batch is read
    return mask


def gathered(chunks: Chunks, positions: int) -> Iterator[tuple[States, Tensor | None]]:
    """Join chunks until they have enough positions; the last one has what is left.

    Args:
        chunks: of states of the same texts.
        positions: enough of them, all texts together.

    Yields:
        What `chunks` gave, joined: gaps stay where they were.
    """
    parts: list[tuple[States, Tensor | None]] = []
    held = 0
    for states, valid in chunks:
        parts.append((states, valid))
        held += any_state(states).shape[:2].numel()
        del states, valid  # `parts` has them until they are joined
        if held >= positions:
            yield _joined(parts)
            held = 0
    if parts:
        yield _joined(parts)


def _joined(parts: list[tuple[States, Tensor | None]]) -> tuple[States, Tensor | None]:
    """Join chunks and empty the list: what was joined is let go, state by state."""
    if len(parts) == 1:
        return parts.pop()
    masks = None
    if any(valid is not None for _, valid in parts):
        masks = [
            torch.ones_like(any_state(states)[..., 0], dtype=torch.bool) if valid is None else valid
            for states, valid in parts
        ]
    chunks = [states for states, _ in parts if isinstance(states, dict)]
    assert len(chunks) == len(parts)  # what the decoder reads itself goes to a direct prefix, which gathers nothing
    parts.clear()
    states = {number: torch.cat([chunk.pop(number) for chunk in chunks], 1) for number in list(chunks[0])}
    return states, None if masks is None else torch.cat(masks, 1)
