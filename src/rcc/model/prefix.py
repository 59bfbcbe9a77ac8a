"""States in, cache out: the two ways in which encoder states become the decoder's KV cache.

`ResidualPrefix` (the paper, section 3): at a prefix position, the encoder's states pass their maps and are added to the
decoder's residual stream, which runs through its blocks.

`DirectPrefix`: at prefix position j, what enters decoder block i is P_i · h_i[j], the encoder's state before its block
i. Of it the block's input norm and its key and value projections are computed, and nothing else: no query, no
feed-forward layer, no other position. So what is kept does not depend on its place in the context; keys are stored
before their rotation and rotated when the decoder's cache is made (:func:`as_cache`): after the sink, one learnt
position that attention can rest on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..context.cache import SPARE, KVBlocks, block_layers, new_cache
from ..context.context import CompressedContext
from . import backbones
from .decoder import BlockHook, Residuals, hook_arguments
from .positions import count_real
from .projection import Projections

PASS_POSITIONS = 512
"""Positions that a residual prefix's pass takes at once: what a CPU's encoder reads in one pass, in tokens. With fewer
the decoder's weights are read more often than they are worth, and with more their states take memory: 36 KB a position
of the small model (31 states of 576 numbers in bfloat16), 102 KB of Pythia-1.4B."""


class BlockInputs(Protocol):
    """What enters each decoder block at the positions of a direct prefix."""

    def block_input(self, i: int) -> Tensor:
        """Return the input of block i (from 0), [B, n, H]."""
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
        """Return P_i · h_i, [B, n, H]."""
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
        """Return the recorded input of block i, [B, n, H]."""
        return self.states[i]


class SinkAndStates:
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
        """Return the prefix's input of block i, [B, 1 + n, H]."""
        first = self.sink[i].expand(self.batch, 1, -1)
        if self.source is None:
            return first
        states = self.source.block_input(i)
        return torch.cat([first.to(states.dtype), states], 1)

    def enter(self, i: int, hidden: Tensor) -> Tensor:
        """Return `hidden` [B, T, H] with its first positions replaced."""
        prefix = self.block_input(i).to(hidden.dtype)
        return torch.cat([prefix, hidden[:, prefix.shape[1] :]], 1)


States = dict[int, Tensor] | RecordedStates
"""{encoder state number: [B, n, H_encoder]}; or what the decoder recorded of a text that it read itself."""


def any_state(states: States) -> Tensor:
    """Return one of the states, [B, n, H], for its shape and device."""
    return next(iter(states.values() if isinstance(states, dict) else states.states.values()))


class PrefixMaker(Protocol):
    """One of the two ways in which encoder states become a prefix of the decoder: states in, cache out.

    Attributes:
        sink_positions: positions that stand in the decoder's cache before all others.
        rotated: whether a context's keys are rotated to their positions.
        pass_positions: how many positions :meth:`append` should be given at once, all texts together.
    """

    sink_positions: int
    rotated: bool
    pass_positions: int

    def append(self, cache: Cache, states: States, mask: Tensor | None, order: Tensor) -> None:
        """Append prefix positions to a cache.

        Args:
            cache: layers of [B, KV heads, past, head dim].
            states: of the n positions to append.
            mask: [B, past + n], which positions are real (None: all).
            order: [B or 1, n], numbers of the new positions.
        """
        ...

    def training_inputs(self, states: dict[int, Tensor]) -> tuple[BlockHook, Tensor]:
        """Return what changes the inputs of the decoder's blocks in a training pass, and the input of the first one.

        The latter is [B, sink_positions + n, H].
        """
        ...


Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, KV heads, n, head dim]."""


class ResidualPrefix:
    """The paper's prefix (section 3): a pass of the decoder, with the projected states added to its residual stream.

    Args:
        body: the decoder's base model, prepared by :func:`rcc.model.decoder.accept_prefix`.
        projections: P_0, P_1, …
    """

    sink_positions = 0
    rotated = True
    pass_positions = PASS_POSITIONS

    def __init__(self, body: PreTrainedModel, projections: Projections):
        self.body, self.projections = body, projections

    def append(self, cache: Cache, states: States, mask: Tensor | None, order: Tensor) -> None:
        """Append prefix positions to a cache by a pass through the decoder; see :class:`PrefixMaker`."""
        assert isinstance(states, dict)
        residuals = Residuals(self.projections, states)
        self.body(
            inputs_embeds=residuals.inputs(),
            attention_mask=mask,
            position_ids=order,
            **{backbones.CACHE: cache},
            use_cache=True,
            **hook_arguments(residuals),
        )

    def training_inputs(self, states: dict[int, Tensor]) -> tuple[BlockHook, Tensor]:
        """Return the residuals, and the first block's input [B, n, H]."""
        residuals = Residuals(self.projections, states)
        return residuals, residuals.inputs()


class DirectPrefix:
    """Keys, before rotation, and values made of the projected states, without a pass through the decoder.

    Args:
        body: the decoder's base model, prepared by :func:`rcc.model.decoder.accept_prefix`.
        projections: P_0, P_1, …
        sink: [L, H].
    """

    sink_positions = 1
    rotated = False
    pass_positions = 1

    def __init__(self, body: PreTrainedModel, projections: Projections, sink: Tensor):
        self.body, self.projections, self.sink = body, projections, sink

    def append(self, cache: Cache, states: States, mask: Tensor | None, order: Tensor) -> None:
        """Append prefix positions to a cache; see :class:`PrefixMaker`."""
        inputs: BlockInputs = ProjectedStates(self.projections, states) if isinstance(states, dict) else states
        store(self.body, inputs, cache)

    def training_inputs(self, states: dict[int, Tensor]) -> tuple[BlockHook, Tensor]:
        """Return the sink and the states, and the first block's input [B, 1 + n, H]."""
        prefix = SinkAndStates(self.sink, ProjectedStates(self.projections, states), len(any_state(states)))
        return prefix, prefix.block_input(0)


# ---------------------------------------------------------------- keys and values of a direct prefix
class _Stored(Exception):  # noqa: N818  # no error: the block ends here
    """A block has handed over its keys and values: the rest of it need not run."""


class _Store:
    """Takes a block's keys and values where its cache would, and stops it there."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> NoReturn:
        cast("CacheLayerMixin", self.cache.layers[layer]).update(keys, values)  # of keys and values, as all here
        raise _Stored


def store(body: PreTrainedModel, inputs: BlockInputs, cache: Cache) -> None:
    """Append to a cache the keys, before rotation, and values that a decoder's blocks make of their inputs.

    Args:
        body: the decoder's base model.
        inputs: what enters each block.
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
    """Rotate keys [B, KV heads, n, head dim] to their positions; cos and sin are [B or 1, n, rotary dimensions].

    Computed in the order and precision of transformers' models, so that the same keys have the same bits.
    """
    size = cos.shape[-1]
    turned, rest = keys[..., :size], keys[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


@torch.no_grad()
def new_sink(body: PreTrainedModel, token: int | None) -> Tensor:
    """Return what enters each of the decoder's blocks at the first token of a text, [L, H]: attention rests there."""
    if body.device.type == "meta":  # a plan: shapes alone, and transformers' masks look at values
        return torch.empty(len(backbones.blocks(body)), body.config.hidden_size, dtype=body.dtype, device=body.device)
    recorded = RecordedStates()
    ids = torch.tensor([[token]], device=body.device)
    body(input_ids=ids, use_cache=False, **hook_arguments(recorded))
    return torch.cat([recorded.states[i][0] for i in range(len(recorded.states))]).clone()


def sink_layers(body: PreTrainedModel, sink: Tensor) -> Layers:
    """Return keys, before rotation, and values of the sink in each layer, [1, KV heads, 1, head dim].

    Args:
        body: the decoder's base model.
        sink: [L, H].
    """
    layers = [DynamicLayer() for _ in sink]
    store(body, SinkAndStates(sink.to(body.dtype), None, 1), Cache(layers=[*layers]))
    return [cast("tuple[Tensor, Tensor]", (layer.keys, layer.values)) for layer in layers]


@torch.no_grad()
def as_cache(body: PreTrainedModel, firsts: Callable[[], Layers], context: CompressedContext) -> CompressedContext:
    """Return a context whose keys are not rotated as the decoder's cache: rotated keys, and values, after `firsts`.

    The result is kept with the context, so that further questions have it.

    Args:
        body: the decoder's base model.
        firsts: gives, for each layer, keys before rotation and values [1, KV heads, m, head dim] of the positions
            before all others.
        context: with keys before rotation, on the decoder's device and in its precision.
    """
    if context.repeats is not None:
        return as_cache(body, firsts, context.repeats).expand(context.batch_size)
    if context.decoder_cache is not None:
        return context.decoder_cache
    first_layers, layers = firsts(), []
    m = first_layers[0][0].shape[2]
    n = m + len(context)
    mask = None if context.mask is None else torch.nn.functional.pad(context.mask, (m, 0), value=True)
    order = torch.arange(n, device=body.device)[None] if mask is None else count_real(mask)
    for i, (cos, sin) in enumerate(backbones.rotary(body, order)):
        blocks = []
        for entries, first in zip(context.layer(i), first_layers[i], strict=True):
            shape = (*entries.shape[:2], n + SPARE, entries.shape[-1])
            block = entries.new_empty(shape, device=first.device)  # where the layer computes
            block[:, :, :m], block[:, :, m:n] = first, entries
            blocks.append(block)
        cos, sin = cos.to(blocks[0].device), sin.to(blocks[0].device)
        blocks[0][:, :, :n] = rotate(blocks[0][:, :, :n], cos, sin)
        layers.append((blocks[0], blocks[1]))
        context.blocks.release()
    return context.keep_decoder_cache(KVBlocks(layers, n, writable=True), n, mask)


# ---------------------------------------------------------------- texts that the decoder reads itself, at rate 1
def read_with_decoder(
    body: PreTrainedModel, sink: Tensor, rows: list[Tensor], step: int
) -> Iterator[tuple[RecordedStates, Tensor | None, int]]:
    """Yield what enters a decoder's blocks at each token of texts that it reads itself, after the sink.

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
    ids = pad_sequence(rows, batch_first=True)  # padding follows each text, so no token of it sees any
    width = max(1, step // len(rows))
    tables = backbones.rotary(body, torch.zeros(1, 1, dtype=torch.long, device=body.device))
    cache = new_cache(len(sink), 1 + ids.shape[1])
    for layer, (keys, values), (cos, sin) in zip(block_layers(cache), sink_layers(body, sink), tables, strict=True):
        layer.update(rotate(keys, cos, sin).expand(len(rows), -1, -1, -1), values.expand(len(rows), -1, -1, -1))
    for start in range(0, ids.shape[1], width):
        part, recorded = ids[:, start : start + width], RecordedStates()
        order = torch.arange(1 + start, 1 + start + part.shape[1], device=body.device)[None]
        body(
            input_ids=part,
            position_ids=order,
            **{backbones.CACHE: cache},
            use_cache=True,
            **hook_arguments(recorded),
        )
        real = lengths[:, None] >= order
        yield recorded, None if bool(real.all()) else real, int(lengths.clamp(max=start + part.shape[1]).sum())


def text_inputs(sink: Tensor, texts: Tensor, lengths: list[int]) -> tuple[BlockHook, Tensor, Tensor | None]:
    """Return what a training pass has before the prompts where the decoder reads the texts itself.

    Args:
        sink: [L, H].
        texts: [B, T, H] embeddings of the texts, padded on the right.
        lengths: tokens of each.

    Returns:
        What changes the inputs of the blocks, the first one's input [B, 1 + T, H], and which of it are real,
        [B, 1 + T] (None: all).
    """
    hook = SinkAndStates(sink, None, len(texts))
    inputs = torch.cat([hook.block_input(0).to(texts.dtype), texts], 1)
    if min(lengths) == texts.shape[1]:
        return hook, inputs, None
    ends = torch.tensor(lengths, device=texts.device)[:, None]
    return hook, inputs, torch.arange(inputs.shape[1], device=texts.device) <= ends
