"""What stays of a chunk, and texts after one another."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...context.cache import SPARE, block_layers
from ...context.context import CompressedContext
from ...context.pieces import Piece


class Heads(Protocol):
    """What KV heads keep while a text is read: as many pairs each (:class:`EvenHeads`), or sharing a budget."""

    def gaps(self) -> list[list[int]] | None:
        """Return for each layer how many pairs after the header each head does not see; None: it sees all."""
        ...

    def keep_all(self, size: int) -> None:
        """Hold the last `size` pairs of a cache."""

    def keep_best(self, cache: Cache, scores: dict[int, Tensor], keep: int, start: int, header: int) -> None:
        """Leave in a cache, of the pairs from `start` on, those with the highest scores, in order.

        Args:
            cache: layers of [1, KV heads, n, head dim], as :func:`rcc.context.cache.new_cache` makes them.
            scores: {layer: [KV heads, n - start]}; a layer without keeps the latest of all pairs after the header.
            keep: how many, for each head.
            start: the first of the pairs that have scores.
            header: pairs at the front that stay.
        """

    def gather(self, i: int, entries: Tensor) -> Tensor:
        """Copy what a context keeps of layer i's keys or values [1, KV heads, n, head dim] after the header."""
        ...

    def record(self, piece: Piece) -> Piece:
        """Return a text's record, which says how many pairs each head has where they differ."""
        ...


class EvenHeads:
    """Heads that keep as many pairs each; see :class:`Heads`."""

    def gaps(self) -> None:
        """Return None: every head sees all that a cache holds."""

    def keep_all(self, size: int) -> None:
        """Do nothing: what a cache holds is held."""

    def keep_best(self, cache: Cache, scores: dict[int, Tensor], keep: int, start: int, header: int) -> None:
        """Leave the pairs with the highest scores of each head."""
        for i, layer in enumerate(block_layers(cache)):
            n = layer.length
            if i in scores:
                chosen = scores[i].topk(keep, dim=-1).indices.sort(-1).values  # [KV heads, keep]
                keys, values = (take(entries[:, :, start:], chosen) for entries in layer.entries)
                layer.crop(start - n)
            else:
                latest = start - header + keep
                keys, values = (entries[:, :, n - latest :].clone() for entries in layer.entries)
                layer.crop(header - n)
            layer.update(keys, values)

    def gather(self, i: int, entries: Tensor) -> Tensor:
        """Copy all of them."""
        return entries.clone()

    def record(self, piece: Piece) -> Piece:
        """Return the record as it is."""
        return piece


def take(states: Tensor, chosen: Tensor) -> Tensor:
    """Return chosen positions [KV heads, keep] of states [1, KV heads, n, head dim], each head its own."""
    return states.gather(2, chosen[None, :, :, None].expand(-1, -1, -1, states.shape[-1]))


def append(context: CompressedContext, new: CompressedContext) -> CompressedContext:
    """Return a context with another of as many texts after it."""
    mask = None
    if context.mask is not None or new.mask is not None:
        mask = torch.cat([context.real(), new.real()], 1)
    with context.borrow(len(new), SPARE) as cache:
        for i, layer in enumerate(block_layers(cache)):
            layer.update(*new.layer(i))
        rows = tuple((*row, *more) for row, more in zip(context.pieces, new.pieces, strict=True))
        return context.grown(cache, rows, mask)
