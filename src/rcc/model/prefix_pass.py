"""Prefix positions, chunk by chunk, into the decoder's cache: the second half of `compress`."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from transformers.cache_utils import Cache

from .positions import mask_and_order
from .prefix import PrefixMaker, States, any_state

Chunks = Iterable[tuple[States, Tensor | None]]
"""States of prefix positions, a batch at a time, and which of them are real, [B, m] (None: all)."""


def prefix_pass(maker: PrefixMaker, cache: Cache, mask: Tensor | None, chunks: Chunks) -> Tensor | None:
    """Append prefix positions to a cache, chunk by chunk.

    Args:
        maker: of this kind of prefix.
        cache: layers of [B, KV heads, past, head dim].
        mask: [B, past], which of its entries are real (None: all).
        chunks: states of the positions to append.

    Returns:
        The mask [B, n] of all entries (None: no gaps).
    """
    for states, valid in chunks:
        like = any_state(states)
        full, order = mask_and_order(cache.get_seq_length(), mask, like.shape[1], valid, like)
        maker.append(cache, states, full, order)
        mask = None if full is None else full.bool()
        del states, valid, like  # before the next batch is read
    return mask
