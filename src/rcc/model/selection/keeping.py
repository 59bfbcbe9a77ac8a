"""What stays of a chunk, and texts after one another."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...context.cache import SPARE, block_layers
from ...context.context import CompressedContext


def keep_best(cache: Cache, scores: dict[int, Tensor], keep: int, start: int, header: int) -> None:
    """Leave in a cache, of the pairs from `start` on, those with the highest scores, in order.

    Args:
        cache: layers of [1, KV heads, n, head dim], as :func:`rcc.context.cache.new_cache` makes them.
        scores: {layer: [KV heads, n - start]}; a layer without keeps the latest of all pairs after the header.
        keep: how many, for each head.
        start: the first of the pairs that have scores.
        header: pairs at the front that stay.
    """
    for i, layer in enumerate(block_layers(cache)):
        n = layer.length
        if i in scores:
            chosen = scores[i].topk(keep, dim=-1).indices.sort(-1).values  # [KV heads, keep]
            keys, values = (_take(entries[:, :, start:], chosen) for entries in layer.entries)
            layer.crop(start - n)
        else:
            latest = start - header + keep
            keys, values = (entries[:, :, n - latest :].clone() for entries in layer.entries)
            layer.crop(header - n)
        layer.update(keys, values)


def _take(states: Tensor, chosen: Tensor) -> Tensor:
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
