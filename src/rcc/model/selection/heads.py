"""KV heads that share a layer's budget: the best pairs stay, whichever heads they are of (after KVzip and AdaKV).

While a text is read, and in the decoder's cache, a layer is as long as the head of any layer that has most pairs; each
head's own are the last ones, and between the header and them is a gap that the head does not see. A context has no
gaps: of each text a layer's pairs lie head by head in as many positions as every head has on average, and
:attr:`rcc.context.pieces.Piece.heads` says whose they are. So its file, joins and appends are those of any selection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ...context.cache import KVBlocks, block_layers
from ...context.context import CompressedContext
from ...context.pieces import Piece, longest_head
from ...errors import ModelError
from .. import backbones
from ..prefix import Layers, as_cache
from .keeping import take

MASKED = ("sdpa", "eager", "rcc_after_cache")
"""Attentions that take a mask for each head."""


def check_heads(config: PreTrainedConfig) -> None:
    """Raise ModelError unless heads of a model may have different numbers of pairs."""
    if any(size is not None for size in backbones.sliding_layers(config)):
        raise ModelError(
            f"{config.model_type!r} has layers with a sliding window, where every head keeps the latest pairs: use"
            " another model, or a rule without shared."
        )
    if config._attn_implementation not in MASKED:
        raise ModelError(f"the attention {config._attn_implementation} takes no mask for each head: use sdpa.")


def kv_heads(config: PreTrainedConfig) -> int:
    """Return how many KV heads a layer has."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


class SharedHeads:
    """Heads of which one may keep more pairs than another; see :class:`rcc.model.selection.keeping.Heads`.

    Args:
        header: keys and values of the header in each layer, [1, KV heads, m, head dim].

    Attributes:
        held: for each layer [KV heads, n] bool, of the last n pairs of a cache.
    """

    def __init__(self, header: Layers):
        self.held = [keys.new_zeros(keys.shape[1], 0, dtype=torch.bool) for keys, _ in header]

    def gaps(self) -> list[list[int]]:
        """Return for each layer how many pairs after the header each head does not see: others have so many more."""
        return [(~held).sum(1).tolist() for held in self.held]

    def keep_all(self, size: int) -> None:
        """Hold a whole chunk of so many pairs."""
        self.held = [pad(held, (0, size), value=True) for held in self.held]

    def keep_best(self, cache: Cache, scores: dict[int, Tensor], keep: int, start: int, header: int) -> None:
        """Leave what was held, and of the pairs from `start` on those with the highest scores of a layer's heads."""
        for i, before in enumerate(self.held):
            best = scores[i].flatten().topk(scores[i].shape[0] * keep).indices
            chosen = torch.zeros_like(scores[i], dtype=torch.bool).flatten().index_fill(0, best, True)
            self.held[i] = torch.cat([before, chosen.view_as(scores[i])], 1)
        longest = max(int(held.sum(1).max()) for held in self.held)
        for i, layer in enumerate(block_layers(cache)):
            # what is held comes last, in order
            last = self.held[i].int().argsort(dim=1, stable=True)[:, -longest:]
            keys, values = (take(entries[:, :, header:], last) for entries in layer.entries)
            layer.crop(header - layer.length)
            layer.update(keys, values)
            self.held[i] = self.held[i].gather(1, last)

    def gather(self, i: int, entries: Tensor) -> Tensor:
        """Copy what heads hold, one head after the other, [1, KV heads, pairs / KV heads, head dim]."""
        return entries[:, self.held[i]].view(1, entries.shape[1], -1, entries.shape[-1])

    def record(self, piece: Piece) -> Piece:
        """Return a text's record with how many pairs each head has, unless all have as many."""
        counts = tuple(tuple(held.sum(1).tolist()) for held in self.held)
        even = all(count == piece.positions for layer in counts for count in layer)
        return piece if even else replace(piece, heads=counts)


# ---------------------------------------------------------------- a context → what the decoder reads
def as_cache_with_gaps(
    body: PreTrainedModel, firsts: Callable[[], Layers], context: CompressedContext
) -> CompressedContext:
    """Return a context whose heads share their budgets as the decoder's cache; see `rcc.model.prefix.as_cache`."""
    if context.repeats is not None:
        return as_cache_with_gaps(body, firsts, context.repeats).expand(context.batch_size)
    if context.decoder_cache is not None:
        return context.decoder_cache
    apart = _of_each_head(context)
    cache = as_cache(body, firsts, apart)
    cache.blocks.visible = _visible(context, len(cache) - len(apart), len(apart))
    return context.keep_decoder_cache(cache.blocks, len(cache), cache.mask)


def _of_each_head(context: CompressedContext) -> CompressedContext:
    """Return a context with each head's pairs on their own, the last ones."""
    lengths = [longest_head(row) for row in context.pieces]
    longest, layers = max(lengths), []
    real = [row.nonzero()[:, 0] for row in context.real()]  # no gaps between the texts of a batch
    for i in range(len(context.blocks.layers)):
        keys, values = (
            torch.stack([_apart(t[b, :, real[b]], row, i, longest) for b, row in enumerate(context.pieces)])
            for t in context.layer(i)
        )
        layers.append((keys, values))
        context.blocks.release()
    filled = torch.tensor(lengths, device=context.device)[:, None]
    mask = torch.arange(longest, device=context.device) >= longest - filled
    blocks = KVBlocks(layers, longest, writable=False)
    return replace(context, blocks=blocks, length=longest, mask=None if bool(mask.all()) else mask)


def _apart(entries: Tensor, pieces: Sequence[Piece], layer: int, longest: int) -> Tensor:
    """Return the pairs of each head [KV heads, longest, head dim], its last ones, of those that lie head by head."""
    heads: list[list[Tensor]] = [[] for _ in entries]
    for piece, own in zip(pieces, entries.split([piece.positions for piece in pieces], 1), strict=True):
        counts = _counts(piece, layer, len(heads))
        for head, part in zip(heads, own.flatten(0, 1).split(counts), strict=True):
            head.append(part)
    joined = [torch.cat(head) for head in heads]
    return torch.stack([pad(head, (0, 0, longest - len(head), 0)) for head in joined])


def _counts(piece: Piece, layer: int, heads: int) -> list[int]:
    return list(piece.heads[layer]) if piece.heads else [piece.positions] * heads


def _visible(context: CompressedContext, header: int, longest: int) -> list[Tensor]:
    """Return for each layer which positions of the decoder's cache each head sees, [B, KV heads, header + longest]."""
    heads, layers = context.layer(0)[0].shape[1], len(context.blocks.layers)
    order = torch.arange(-header, longest, device=context.device)
    seen = []
    for i in range(layers):
        rows = [torch.tensor([_counts(piece, i, heads) for piece in row]).sum(0) for row in context.pieces]
        first = longest - torch.stack(rows).to(context.device)[..., None]
        seen.append((order < 0) | (order >= first))
    return seen


# ---------------------------------------------------------------- the decoder's attention
def hide_gaps(body: PreTrainedModel) -> None:
    """Make every block of a decoder's base model look at what its heads see of a cache.

    Stateless: what they see is said by the cache (:attr:`rcc.context.cache.BlockLayer.visible`).
    """
    name = backbones.BLOCK_CACHE.get(body.config.model_type, backbones.CACHE)
    for i, block in enumerate(backbones.blocks(body)):

        def hide(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], i: int = i
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            layers = getattr(kwargs.get(name), "layers", ())
            seen = getattr(layers[i], "visible", None) if i < len(layers) else None
            if seen is None:
                return None
            hidden = args[0]
            past = layers[i].get_seq_length()
            own = pad(seen.to(hidden.device), (0, past + hidden.shape[1] - seen.shape[2]), value=True)[:, :, None]
            own = own.repeat_interleave(body.config.num_attention_heads // own.shape[1], 1)
            return args, {**kwargs, "attention_mask": _both(kwargs.get("attention_mask"), own, past, hidden)}

        block.register_forward_pre_hook(hide, with_kwargs=True)


def _both(mask: Tensor | None, own: Tensor, past: int, hidden: Tensor) -> Tensor:
    """Return a mask of both: a pass's own, and what heads see [B, heads, 1, past + T]."""
    if mask is None or mask.ndim != 4:  # all of the past, and of the new ones what came before
        order = torch.arange(own.shape[-1], device=own.device)
        mask = (order <= order[past:, None])[None, None]
    if mask.dtype == torch.bool:
        return mask & own
    return mask.masked_fill(~own, torch.finfo(hidden.dtype).min)
