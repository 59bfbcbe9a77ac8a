"""What reading a text holds in memory: `compress`, and the base's own pass over a plain text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..context.cache import SPARE, block_layers, new_cache
from ..model import backbones
from ..model.encoder import Additions, read_segments
from ..model.prefix_pass import prefix_pass
from ..model.rcc import RCCForCausalLM
from ..model.segments import positions as positions_of
from .blueprint import Blueprint
from .live import LiveBytes


class Reading:
    """A model without storage that reads a text up to its end, where it holds most.

    The passes are `compress`'s own and the base's, on tensors whose sizes are counted. A state-space encoder's kernels
    cannot run so: what one of its blocks holds is estimated at 34 bytes · width a token, as in
    :func:`rcc.planning.activations.activations`.
    """

    def __init__(self, blueprint: Blueprint):
        self.blueprint, self.live = blueprint, LiveBytes()

    @cached_property
    def model(self) -> RCCForCausalLM:
        """The RCC model."""
        model = self.blueprint.build()
        self.live.adopt(model)
        return model

    @cached_property
    def base(self) -> PreTrainedModel:
        """The decoder's base alone."""
        with torch.device("meta"):
            base = self.blueprint.build_base()
        base.eval()
        self.live.adopt(base)
        return base

    @torch.no_grad()
    def position_bytes(self) -> int:
        """Return the bytes of a position's keys and values."""
        cache = self._cache(1)
        with self.live:
            ids = torch.zeros(1, 1, dtype=torch.long)
            self.base(input_ids=ids, position_ids=ids, **{backbones.CACHE: cache}, use_cache=True, logits_to_keep=1)
        return sum(tensor.nbytes for layer in block_layers(cache) for tensor in layer.block)

    @torch.no_grad()
    def compress(self, tokens: int, rate: int, batch_tokens: int) -> int:
        """Return the bytes that `compress` holds at most beside the weights: the KV cache with spare room, a batch."""
        config, model = self.blueprint.config, self.model
        length = min(tokens, config.segment_length)
        each, n = positions_of(length, rate, config), positions_of(tokens, rate, config)
        new = min(n, each * max(1, batch_tokens // config.segment_length))
        last = min(n, -(-model.prefix_maker.pass_positions // new) * new)  # what is gathered for the last pass
        cache = self._cache(n + SPARE)
        scans = model.encoder.config.model_type in backbones.STATE_SPACE
        width = model.encoder.config.hidden_size

        def chunks(positions: int) -> Iterator[tuple[dict[int, Tensor], None]]:
            for start in range(0, positions, new):
                batch = min(new, positions - start)
                segments = -(-batch // each) if positions == last else 0  # where the cache is only made
                if scans or not segments:
                    torch.empty(34 * width * segments * length, dtype=torch.uint8)
                    states = {k: torch.empty(1, batch, width, dtype=model.dtype) for k in model.projections.states}
                else:
                    ids = [torch.zeros(length, dtype=torch.long)] * segments
                    additions = Additions(model.memory, sink=config.sink_token)
                    read, _ = read_segments(model.encoder, ids, rate, model.projections.states, additions)
                    states = {k: h.reshape(1, -1, width)[:, :batch] for k, h in read.items()}
                yield states, None
                del states

        with self.live:
            for positions in self._ends(cache, last, n):
                prefix_pass(model.prefix_maker, cache, None, chunks(positions))
        return self.live.peak

    @torch.no_grad()
    def prefill(self, tokens: int, batch_tokens: int) -> int:
        """Return the bytes that the base holds at most beside its weights when it reads a text batch by batch."""
        new = min(tokens, batch_tokens)
        cache = self._cache(tokens)
        with self.live:
            for batch in self._ends(cache, new, tokens):
                past = cache.get_seq_length()
                order = torch.arange(past, past + batch)[None]
                ids = torch.zeros(1, batch, dtype=torch.long)
                self.base(
                    input_ids=ids, position_ids=order, **{backbones.CACHE: cache}, use_cache=True, logits_to_keep=1
                )
        return self.live.peak

    def _cache(self, capacity: int) -> Cache:
        self.live.peak = self.live.now
        return new_cache(len(backbones.blocks(backbones.body(self.base))), capacity)

    @staticmethod
    def _ends(cache: Cache, new: int, n: int) -> Iterator[int]:
        """Yield the positions of the last batch, `new` of them, with the cache as if all others had been read."""
        if n > new:
            yield 1  # which makes the cache
            for layer in block_layers(cache):
                layer.resize(n - new)
        yield new
