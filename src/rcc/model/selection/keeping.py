"""What stays of a chunk, and texts after one another."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...context.cache import SPARE
from ...context.context import CompressedContext


def keep_best(cache: Cache, scores: dict[int, Tensor], keep: int, start: int, header: int) -> None:
    """Leave in a cache, of the pairs from `start` on, those with the highest scores, in order.

    Args:
        cache: layers of [1, KV heads, n, head dim].
        scores: {layer: [KV heads, n - start]}; a layer without keeps the latest of all pairs after the header.
        keep: how many, for each head.
        header: pairs at the front that stay.
    """
    for i, layer in enumerate(cache.layers):
        n = layer.keys.shape[2]
        if i in scores:
            chosen = scores[i].topk(keep, dim=-1).indices.sort(-1).values  # [KV heads, keep]
            keys, values = (_take(t[:, :, start:], chosen) for t in (layer.keys, layer.values))
            layer.crop(start - n)
        else:
            kept = start - header + keep
            keys, values = (t[:, :, n - kept :].clone() for t in (layer.keys, layer.values))
            layer.crop(header - n)
        layer.update(keys, values)


def _take(states: Tensor, chosen: Tensor) -> Tensor:
    """Return chosen positions [KV heads, keep] of states [1, KV heads, n, head dim], each head its own."""
    return states.gather(2, chosen[None, :, :, None].expand(-1, -1, -1, states.shape[-1]))


def append(context: CompressedContext, new: CompressedContext) -> CompressedContext:
    """Return a context with another of as many texts after it."""
    masks = [c.mask for c in (context, new)]
    mask = None
    if any(m is not None for m in masks):
        full = [c.device for c in (context, new)]
        sized = [(context.batch_size, len(context)), (new.batch_size, len(new))]
        mask = torch.cat(
            [
                torch.ones(size, dtype=torch.bool, device=device) if m is None else m
                for m, size, device in zip(masks, sized, full, strict=True)
            ],
            1,
        )
    with context.borrow(len(new), SPARE) as cache:
        for i, layer in enumerate(cache.layers):
            layer.update(*new.layer(i))
        rows = tuple((*row, *more) for row, more in zip(context.pieces, new.pieces, strict=True))
        return context.grown(cache, rows, mask)
