"""Passes through a model whose cache holds keys before their rotation, and in which a rule sees queries and keys.

The model's blocks are told that nothing is rotated, so their caches receive keys as they are before rotation; the
attention, one of our own by transformers' `AttentionInterface`, rotates queries and keys to where they stand. So what
is kept can move to other positions at no cost. All this is on a copy of the base model's modules around the very same
weights: the model that generates stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from ...context.cache import block_layers
from .. import backbones
from ..attention import attend_to_past
from ..prefix import Layers, rotate
from .rules import FUTURE, Seen

_ATTENTION = "rcc_reading"
_KEY = "rcc_reading"  # travels through the model's keyword arguments to the attention
QUERIES = 512
"""Queries whose mask is in memory at once."""

Watch = Callable[[Seen], None]


class Reader:
    """A model's base, for reading.

    Args:
        body: a decoder's base model; its weights are shared, nothing of it is changed.
    """

    def __init__(self, body: PreTrainedModel):
        shared = {id(tensor): tensor for tensor in (*body.parameters(), *body.buffers())}
        self.body = copy.deepcopy(body, memo=shared)
        self.body.config._attn_implementation = _ATTENTION
        self.sliding = backbones.sliding_layers(body.config)
        self.window = backbones.window(body.config)
        blocks = backbones.blocks(self.body)
        for block in blocks:
            block.register_forward_pre_hook(_without_rotation, with_kwargs=True)
        blocks[-1].mlp = nn.Identity()  # what comes out of the last block is not used: its keys and values are

    @torch.no_grad()
    def read(
        self,
        ids: Tensor,
        cache: Cache,
        header: int,
        gaps: Sequence[Sequence[int]] | None = None,
        *,
        watch: Watch | None = None,
        **seen: int,
    ) -> None:
        """Read tokens after what a cache holds; their keys, before rotation, and values are appended to it.

        Where that is more than the window, the pairs after the header give way, the oldest first.

        Args:
            ids: [T].
            cache: layers of [1, KV heads, n, head dim].
            header: pairs at the front that are always seen.
            gaps: for each layer and KV head, how many pairs after the header it does not see; None: it sees all.
            watch: is shown each layer.
            seen: goes into what `watch` is shown: `start`, `stop`, `keep`, `chunk`.
        """
        n = cache.get_seq_length() + len(ids)
        positions = torch.arange(min(n + FUTURE, self.window), device=ids.device)[None]
        tables = backbones.rotary(self.body, positions)
        self.body(
            input_ids=ids[None],
            position_ids=positions[:, : len(ids)],  # of no account: see _Pass
            use_cache=True,
            **{backbones.CACHE: cache, _KEY: _Pass(tables, self.sliding, self.window, header, gaps, watch, seen)},
        )


class _Pass:
    """The attention of one pass.

    Args:
        tables: for each layer cos and sin [1, m, rotary dimensions] of positions from 0.
        sliding: for each layer its window, or None.
        window: pairs that are attended to at most.
        header: pairs that are never left out.
        gaps: for each layer and KV head, how many pairs after the header it does not see; None: it sees all.
    """

    def __init__(
        self,
        tables: Layers,
        sliding: list[int | None],
        window: int,
        header: int,
        gaps: Sequence[Sequence[int]] | None,
        watch: Watch | None,
        seen: dict[str, int],
    ):
        self.tables, self.sliding, self.window, self.header, self.gaps = tables, sliding, window, header, gaps
        self.watch, self.seen = watch, seen

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Return what queries [1, heads, T, head dim] read of pairs [1, KV heads, n, head dim].

        The last T pairs are the queries' own.
        """
        left_out = keys.shape[2] - self.window
        if left_out > 0:
            first = self.header
            keys, values = (torch.cat([t[:, :, :first], t[:, :, first + left_out :]], 2) for t in (keys, values))
        cos, sin = (table.to(keys.device) for table in self.tables[layer])
        n, past = keys.shape[2], keys.shape[2] - queries.shape[2]
        rotated = rotate(queries, cos[:, past:n], sin[:, past:n]), rotate(keys, cos[:, :n], sin[:, :n])
        sums = None
        gaps = [] if self.gaps is None else [max(0, gap - max(0, left_out)) for gap in self.gaps[layer]]
        if any(gaps):
            out = self._by_head(*rotated, values, scaling, gaps)
        elif past and self.sliding[layer] is None and keys.device.type == "cpu":
            out, sums = attend_to_past(*rotated, values, scaling)
        else:
            out = _attention(*rotated, values, scaling, self.sliding[layer])
        if self.watch is not None:
            moved = {k: v - max(0, left_out) * (k in ("start", "stop")) for k, v in self.seen.items()}
            pairs = {"queries": queries[0], "keys": keys[0], "values": values[0], "cos": cos[0], "sin": sin[0]}
            own = None if sums is None else sums[0]
            self.watch(Seen(layer=layer, scaling=scaling, sums=own, **pairs, **moved))  # type: ignore[arg-type]
        return out

    def _by_head(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float, gaps: list[int]) -> Tensor:
        """Attend as :meth:`attend` does, each KV head to the pairs that it sees."""
        outputs, first = [], self.header
        for h, (own, gap) in enumerate(zip(queries.chunk(len(gaps), 1), gaps, strict=True)):
            head = [torch.cat([t[:, h, :first], t[:, h, first + gap :]], 1)[:, None] for t in (keys, values)]
            outputs.append(_attention(own, head[0], head[1], scaling, None))
        return torch.cat(outputs, 1)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, scaling: float, sliding: int | None) -> Tensor:
    """Causal attention of rotated queries [1, heads, T, head dim]: as transformers', a block of queries at a time."""
    n, past = keys.shape[2], keys.shape[2] - queries.shape[2]
    settings: dict[str, Any] = {"scale": scaling, "enable_gqa": queries.shape[1] != keys.shape[1]}
    if not past and (sliding is None or n <= sliding):
        return scaled_dot_product_attention(queries, keys, values, is_causal=True, **settings)
    order, parts = torch.arange(n, device=keys.device), []
    for first in range(past, n, QUERIES):
        end = min(n, first + QUERIES)
        asking = order[first:end, None]
        visible = order[:end] <= asking
        if sliding is not None:
            visible &= order[:end] > asking - sliding
        block = queries[:, :, first - past : end - past]
        parts.append(
            scaled_dot_product_attention(block, keys[:, :, :end], values[:, :, :end], attn_mask=visible, **settings)
        )
    return torch.cat(parts, 2)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as the pass does: this is the attention that transformers' modules call."""
    out = kwargs[_KEY].attend(module.layer_idx, query, key, value, kwargs["scaling"])
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)


def _without_rotation(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell a block that nothing is rotated."""
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


class _Beside(DynamicLayer):
    """Pairs of a cache, and after them those of one pass, which are forgotten.

    Args:
        parts: keys and values [1, KV heads, n, head dim] each.
    """

    def __init__(self, parts: Layers):
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts = parts
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the pairs with new ones after them."""
        keys, values = zip(*self.parts, strict=True)
        return torch.cat([*keys, key_states], 2), torch.cat([*values, value_states], 2)

    def get_seq_length(self) -> int:
        """Return the number of pairs."""
        return sum(keys.shape[2] for keys, _ in self.parts)


def beside(cache: Cache, header: int, start: int) -> Cache:
    """Return a cache of another's header and its pairs from `start` on; what is read after them is not kept."""
    layers = []
    for layer in block_layers(cache):
        keys, values = layer.entries
        layers.append(
            _Beside([(keys[:, :, :header], values[:, :, :header]), (keys[:, :, start:], values[:, :, start:])])
        )
    return Cache(layers=[*layers])
