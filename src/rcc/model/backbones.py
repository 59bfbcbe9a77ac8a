"""The transformers families that work as encoder and decoder, and what rcc needs to know of each.

A family is listed when the equality tests pass for it: those of `tests/model/` on `conftest.SIDES`, and of an encoder
alone, `test_backbones.py`.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from ..errors import ModelError

BLOCKS = {
    "gemma3_text": "layers",
    "gpt_neox": "layers",
    "llama": "layers",
    "mamba": "layers",
    "mamba2": "layers",
    "mistral": "layers",
    "qwen2": "layers",
    "qwen3": "layers",
}
"""model_type → attribute of the base model that holds its blocks, in order."""

STATE_SPACE = {"mamba": ("in_proj",), "mamba2": ("in_proj",)}
"""Encoders only: they have no attention, no positions and no KV cache. model_type → the linear layers for LoRA: the
mixer, or its fused kernel, reads the weights of the others itself and would bypass the adapter."""

_generation = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _generation else "past_key_values"
"""What models and their `generate` call the KV cache: transformers 5.24 renamed it, and warns of the old name."""


BLOCK_CACHE = {"gpt_neox": "layer_past"}
"""model_type → what the family's blocks call the KV cache, where that is not :data:`CACHE`."""


def check_family(config: PreTrainedConfig, side: str) -> None:
    """Raise ModelError unless the family is supported as this side, `"encoder"` or `"decoder"`."""
    family = config.model_type
    names = ", ".join(sorted(f for f in BLOCKS if side == "encoder" or f not in STATE_SPACE))
    if family not in BLOCKS:
        raise ModelError(f"backbone family {family!r} is not supported: use one of {names}.")
    if side == "decoder" and family in STATE_SPACE:
        raise ModelError(
            f"backbone family {family!r} has no KV cache and can only be the encoder: use one of {names} as decoder."
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError("the backbone attends in both directions (use_bidirectional_attention): use a causal one.")
    sliding = sliding_window(config)
    if side == "decoder" and sliding is not None and sliding < window(config) and not has_full_attention(config):
        raise ModelError(
            f"every layer of the backbone attends to its last {sliding} positions only (sliding_window), and a prefix"
            " must stay visible: use one that has layers with full attention as decoder."
        )


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Return how many positions the sliding layers attend to, their own included; None where no layer slides."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None


def has_full_attention(config: PreTrainedConfig) -> bool:
    """Return whether some layer attends to everything before it."""
    return sliding_window(config) is None or "full_attention" in (getattr(config, "layer_types", None) or ())


def sliding_layers(config: PreTrainedConfig) -> list[int | None]:
    """Return for each layer how many positions it attends to, its own included; None: all before it."""
    size, kinds = sliding_window(config), getattr(config, "layer_types", None)
    if size is None or size >= window(config):
        return [None] * config.num_hidden_layers
    return [
        size if kind == "sliding_attention" else None
        for kind in kinds or ["sliding_attention"] * config.num_hidden_layers
    ]


def blocks(body: PreTrainedModel) -> Any:
    """Return the blocks of a base model (without head), a ModuleList in order."""
    return getattr(body, BLOCKS[body.config.model_type])


def body(decoder: PreTrainedModel) -> PreTrainedModel:
    """Return the base model of a causal language model: all but its head."""
    return cast("PreTrainedModel", decoder.base_model)  # which transformers calls a module only


def embeddings(model: PreTrainedModel) -> nn.Embedding:
    """Return the table of token embeddings; its `weight` is [vocabulary, H]."""
    return cast("nn.Embedding", model.get_input_embeddings())


def linear_names(body: PreTrainedModel, depth: int | None = None) -> list[str]:
    """Return the names, within a base model, of the linear layers that LoRA goes on.

    They are all of those in its blocks, but see :data:`STATE_SPACE`; with a depth, in as many first blocks.
    """
    family = body.config.model_type
    ends = STATE_SPACE.get(family, ("",))
    linear = [name for name, m in blocks(body)[:depth].named_modules() if isinstance(m, nn.Linear)]
    return [f"{BLOCKS[family]}.{name}" for name in linear if name.endswith(ends)]


def window(config: PreTrainedConfig) -> int:
    """Return the number of positions that a backbone can address; without positions, no limit."""
    return sys.maxsize if config.model_type in STATE_SPACE else config.max_position_embeddings


def rotary(body: PreTrainedModel, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the cosines and sines that a decoder's blocks rotate keys with at some positions.

    Args:
        body: the decoder's base model.
        positions: [B, T] or [1, T].

    Returns:
        For each block cos and sin, [B or 1, T, rotary dimensions] each, in the model's precision.
    """
    like = torch.empty(0, device=positions.device, dtype=body.dtype)
    rotary_emb: Any = body.rotary_emb
    if body.config.model_type != "gemma3_text":
        return [rotary_emb(like, positions)] * len(blocks(body))
    kinds = body.config.layer_types
    tables = {kind: rotary_emb(like, positions, kind) for kind in set(kinds)}
    return [tables[kind] for kind in kinds]
