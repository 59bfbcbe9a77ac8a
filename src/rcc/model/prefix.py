"""The direct prefix: the decoder's keys and values, made of encoder states without a pass through the decoder.

At prefix position j, what enters decoder block i is P_i · h_i[j], the encoder's state before its block i. Of it the
block's input norm and its key and value projections are computed, and nothing else: no query, no feed-forward layer, no
other position. So what is kept does not depend on where it stands; keys are stored before their rotation and rotated
when a context is placed: after the sink, one learnt position that attention can rest on. (The paper's prefix is in
`decoder.py`: its terms are added to the residual stream.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ..context.context import BlockLayer, CompressedContext
from . import backbones
from .decoder import prefix_arguments
from .projection import Projections


class BlockInputs(Protocol):
    """What enters each decoder block at prefix positions."""

    def block_input(self, i: int) -> Tensor:
        """The input of block i (from 0), [B, n, H]."""
        ...


class ProjectedStates:
    """The encoder's states through their maps, one block at a time.

    Args:
        projections: P_0, P_1, …
        states: {encoder state number: [B, n, H_encoder]}.
    """

    def __init__(self, projections: Projections, states: dict[int, Tensor]):
        self.projections, self.states = projections, states

    def block_input(self, i: int) -> Tensor:
        """P_i · h_i, [B, n, H]."""
        return self.projections.project(i, self.states)


class RecordedStates:
    """The decoder's own states in a forward pass, which it leaves as it is: what rate 1 keeps."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}

    def enter(self, i: int, hidden: Tensor) -> Tensor:
        """Record the input of block i."""
        self.states[i] = hidden
        return hidden

    def block_input(self, i: int) -> Tensor:
        """The recorded input of block i, [B, n, H]."""
        return self.states[i]


class DirectPrefix:
    """A direct prefix in a training pass: the sink and the projected states replace what enters each block.

    What the blocks make of the prefix positions is replaced again before the next one, so it reaches nothing.

    Args:
        sink: [L, H].
        inputs: of the positions after the sink; None: there are none.
        batch: texts.
    """

    def __init__(self, sink: Tensor, inputs: BlockInputs | None, batch: int):
        self.sink, self.source, self.batch = sink, inputs, batch

    def block_input(self, i: int) -> Tensor:
        """The prefix's input of block i, [B, 1 + n, H]."""
        first = self.sink[i].expand(self.batch, 1, -1)
        if self.source is None:
            return first
        states = self.source.block_input(i)
        return torch.cat([first.to(states.dtype), states], 1)

    def enter(self, i: int, hidden: Tensor) -> Tensor:
        """`hidden` [B, T, H] with its first positions replaced."""
        prefix = self.block_input(i).to(hidden.dtype)
        return torch.cat([prefix, hidden[:, prefix.shape[1] :]], 1)


class _Stored(Exception):
    """A block has handed over its keys and values: the rest of it need not run."""


class _Store:
    """Takes a block's keys and values where its cache would, and stops it there."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> NoReturn:
        self.cache.layers[layer].update(keys, values)
        raise _Stored


def store(body: PreTrainedModel, inputs: BlockInputs, cache: Cache) -> None:
    """Append to a cache the keys, before rotation, and values that a decoder's blocks make of their inputs.

    Args:
        body: the decoder's base model.
        cache: layers of [B, KV heads, n, head dim].
    """
    name = backbones.BLOCK_CACHE.get(body.config.model_type, backbones.CACHE)
    tables = backbones.rotary(body, torch.zeros(1, 1, dtype=torch.long, device=body.device))
    for i, block in enumerate(backbones.blocks(body)):
        hidden = inputs.block_input(i)
        cos, sin = (table.expand(1, hidden.shape[1], -1) for table in tables[i])
        unrotated = torch.ones_like(cos), torch.zeros_like(sin)
        try:
            block(hidden, attention_mask=None, position_embeddings=unrotated, use_cache=True, **{name: _Store(cache)})
        except _Stored:
            continue
        raise AssertionError(f"block {i} of {body.config.model_type} does not ask its cache")


def rotate(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [B, KV heads, n, head dim] at their positions; cos and sin are [B or 1, n, rotary dimensions].

    Computed in the order and precision of transformers' models, so that the same keys have the same bits.
    """
    size = cos.shape[-1]
    turned, rest = keys[..., :size], keys[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def sink_layers(body: PreTrainedModel, sink: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys, before rotation, and values of the sink in each layer, [1, KV heads, 1, head dim].

    Args:
        body: the decoder's base model.
        sink: [L, H].
    """
    cache = Cache(layers=[DynamicLayer() for _ in sink])
    store(body, DirectPrefix(sink.to(body.dtype), None, 1), cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def place(
    body: PreTrainedModel, sink: Tensor, context: CompressedContext, mask: Tensor | None, spare: int
) -> list[tuple[Tensor, Tensor]]:
    """The decoder's cache of a context: the sink, then keys rotated to their positions, and values.

    Args:
        body: the decoder's base model.
        sink: [L, H].
        context: with keys before rotation, on the decoder's device and in its precision.
        mask: [B, 1 + n], which positions are real, the sink's first; None: all.
        spare: positions to leave free at the end.

    Returns:
        For each layer keys and values, [B, KV heads, 1 + n + spare, head dim].
    """
    n = 1 + len(context)
    order = torch.arange(n, device=body.device)[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    firsts, layers = sink_layers(body, sink), []
    for i, (cos, sin) in enumerate(backbones.rotary(body, order)):
        placed = []
        for entries, first in zip(context.layer(i), firsts[i], strict=True):
            new = entries.new_empty(*entries.shape[:2], n + spare, entries.shape[-1])
            new[:, :, :1], new[:, :, 1:n] = first, entries
            placed.append(new)
        placed[0][:, :, :n] = rotate(placed[0][:, :, :n], cos, sin)
        layers.append((placed[0], placed[1]))
        context.blocks.release()
    return layers


def read_exactly(
    body: PreTrainedModel, sink: Tensor, rows: list[Tensor], step: int
) -> Iterator[tuple[RecordedStates, Tensor | None, int]]:
    """What enters a decoder's blocks at each token of texts that it reads itself, after the sink.

    Args:
        body: the decoder's base model.
        sink: [L, H].
        rows: B texts, [T] token ids each.
        step: tokens to read at once, all texts together.

    Yields:
        The states of the next m tokens of every text, which of them are real [B, m] (None: all), and how many tokens
        have been read so far.
    """
    lengths = torch.tensor([len(row) for row in rows], device=body.device)
    ids = pad_sequence(rows, batch_first=True)  # padding stands after each text, so no token of it sees any
    width = max(1, step // len(rows))
    tables = backbones.rotary(body, torch.zeros(1, 1, dtype=torch.long, device=body.device))
    cache = Cache(layers=[BlockLayer(1 + ids.shape[1]) for _ in sink])
    for layer, (keys, values), (cos, sin) in zip(cache.layers, sink_layers(body, sink), tables, strict=True):
        layer.update(rotate(keys, cos, sin).expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1))
    for start in range(0, ids.shape[1], width):
        part, recorded = ids[:, start : start + width], RecordedStates()
        order = torch.arange(1 + start, 1 + start + part.shape[1], device=body.device)[None]
        body(
            input_ids=part,
            position_ids=order,
            **{backbones.CACHE: cache},
            use_cache=True,
            **prefix_arguments(recorded),
        )
        real = lengths[:, None] >= order
        yield recorded, None if bool(real.all()) else real, int(lengths.clamp(max=start + part.shape[1]).sum())
