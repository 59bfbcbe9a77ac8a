"""Models without storage: what a model is made of, and the bytes of its parts, before its weights are here.

Models are made on torch's meta device, shapes without storage, and passes run there: figures come from the code that
would run, not from a formula of their own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import RCCConfig
from ..context.cache import block_layers, new_cache
from ..errors import ModelError, RCCError, brief
from ..model import backbones
from ..model.prefix_pass import prefix_pass
from ..model.projection import layer_map
from ..model.rcc import RCCForCausalLM

TRACED = 3
"""Blocks of a side that are run to learn what one of them keeps: the first, one between two others, the last."""


@dataclass(frozen=True)
class Blueprint:
    """Describe what a model is made of, where its weights are not at hand.

    Attributes:
        config: of which nothing is left open.
        decoder, encoder: of the backbones; encoder None: the decoder's base is shared.
        dtype: of the backbones' weights.
        attention: `"eager"`, or another that keeps no scores.
    """

    config: RCCConfig
    decoder: PreTrainedConfig
    encoder: PreTrainedConfig | None = None
    dtype: torch.dtype = torch.bfloat16
    attention: str = "sdpa"

    def build(self, device: str = "meta") -> RCCForCausalLM:
        """Return the model with random weights; on the meta device, with none.

        Raises:
            ModelError: a family that is not supported on its side, or a shape of which no model can be made.
            InputError: a segment that the encoder cannot address.
        """
        backbones.check_family(self.decoder, "decoder")
        if self.encoder is not None:
            backbones.check_family(self.encoder, "encoder")
        with torch.device(device):
            try:
                decoder = self.build_base()
                encoder = None if self.encoder is None else self._side(AutoModel, self.encoder)
                return RCCForCausalLM(self.config, encoder, decoder)
            except (RCCError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever impossible sizes lead to
                raise ModelError(f"no model can be made of this shape ({brief(error)}).") from error

    def build_base(self) -> PreTrainedModel:
        """Return the decoder's base alone, on torch's present device."""
        return self._side(AutoModelForCausalLM, self.decoder)

    def _side(self, auto: Any, shape: PreTrainedConfig) -> PreTrainedModel:
        attention = None
        if shape.model_type not in backbones.STATE_SPACE:  # there is no attention to implement
            attention = "eager" if self.attention == "eager" else "sdpa"
        # the model writes into its configuration
        model: PreTrainedModel = auto.from_config(
            copy.deepcopy(shape), dtype=self.dtype, attn_implementation=attention, trust_remote_code=False
        )
        return model

    def shallow(self) -> Blueprint:
        """Return the same with at most :data:`TRACED` blocks a side, of every kind that there is."""

        def cut(shape: PreTrainedConfig) -> PreTrainedConfig:
            shape = copy.deepcopy(shape)
            blocks = min(TRACED, shape.num_hidden_layers)
            if "layer_types" in vars(shape):  # in some families it follows from the number
                kinds = shape.layer_types
                others = [kind for kind in dict.fromkeys(kinds) if kind not in kinds[:blocks]]
                shape.layer_types = [*kinds[: blocks - len(others)], *others]
            shape.num_hidden_layers = blocks
            return shape

        return replace(self, decoder=cut(self.decoder), encoder=None if self.encoder is None else cut(self.encoder))

    @property
    def states(self) -> list[int]:
        """Encoder states that are read; the last one is also the number of encoder blocks that run."""
        encoder_layers = (self.encoder or self.decoder).num_hidden_layers
        return sorted(
            {k for source in layer_map(encoder_layers, self.decoder.num_hidden_layers, self.config) for k in source}
        )


@torch.no_grad()
def position_bytes(model: RCCForCausalLM) -> int:
    """Return the bytes of a position in the decoder's KV cache: what `compress` allocates, in the model's dtype."""
    cache = new_cache(len(backbones.blocks(backbones.body(model.decoder))), 1)
    one = torch.empty(1, 1, model.encoder.config.hidden_size, dtype=model.dtype, device=model.device)
    prefix_pass(model.prefix_maker, cache, None, [(dict.fromkeys(model.projections.states, one), None)])
    return sum(tensor.nbytes for layer in block_layers(cache) for tensor in layer.block)


def stored_bytes(model: nn.Module, adapters: bool = True) -> int:
    """Return the bytes of a model's weights, shared ones once; with LoRA's or without."""
    return sum(p.nbytes for name, p in model.named_parameters() if adapters or ".lora_" not in name)


def learning_bytes(model: nn.Module) -> int:
    """Return the bytes of weights, gradients and AdamW's state; what learns has all of them in float32."""
    return sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())
