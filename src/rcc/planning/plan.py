"""What an RCC model on a backbone would cost: parameters, bytes of context, memory to serve and to train."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import RCCConfig, SideConfig
from ..model import backbones
from ..model.freezing import freeze
from ..model.rcc import RCCForCausalLM
from ..model.segments import positions as positions_of
from . import shapes
from .activations import Batch, activations
from .blueprint import Blueprint, learning_bytes, position_bytes, stored_bytes

TEXTS = (32_768, 131_072, 1_048_576)
"""Tokens of text that a plan gives the memory to serve for: 32k, 128k, 1M."""
SHORT, LONG, TARGET = 2_048, 16_384, 512
"""The paper's lengths: context tokens of its first and second stage, and decoder tokens (section 4)."""


def plan(
    decoder: str | Path,
    encoder: str | Path | None = None,
    rates: Collection[int] = (8, 32),
    segment_length: int = 2048,
    lora_rank: int | None = None,
    full: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    prefix: str = "residual",
) -> dict[str, Any]:
    """Return what an RCC model on a backbone would cost, as plain data; sizes in bytes.

    Args:
        decoder: see :func:`rcc.planning.shapes.find`.
        encoder: the same; None: the decoder's base reads as well.
        rates: tokens a prefix position, one row of the plan each.
        segment_length: tokens that the encoder reads at once.
        lora_rank: of LoRA on both sides. None: 16, or where an encoder is named, all weights of both sides.
        full: all weights of both sides.
        dtype: of the backbones' weights and of the KV cache.
        prefix: `"residual"`, the paper's, or `"direct"`.

    Raises:
        ModelError: a backbone that is not found or not supported. InputError: settings that cannot be used.
    """
    decoder_shape = shapes.find(decoder)
    encoder_shape = None if encoder is None else shapes.find(encoder)
    rank = lora_rank or 16
    settings = {"segment_length": segment_length, "rates": list(rates), "prefix": prefix}
    ways = _ways(decoder_shape, encoder_shape, settings, rank, dtype)
    chosen = list(ways)[full or (encoder_shape is not None and lora_rank is None)]
    models = {name: way.build() for name, way in ways.items()}
    model = models[chosen]
    position, plain = position_bytes(model), stored_bytes(model.decoder, adapters=False)
    data = {
        "backbone": _about(decoder, model.decoder),
        "encoder": None if encoder_shape is None else _about(encoder, model.encoder),
        "dtype": str(dtype).removeprefix("torch."),
        "segment_length": segment_length,
        "learns": chosen,
        "added": added_parameters(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "position_bytes": position,
        "reserve": model.window - model.room(),
        "reading": [_reading(model, r, position, plain if r is None else stored_bytes(model)) for r in (None, *rates)],
    }
    training = [
        _training(name, way, models[name], tokens, frozen)  # which sets the model up to learn
        for name, way in ways.items()
        for tokens, frozen in ((SHORT, []), (LONG, ["encoder"]))
    ]
    return {**data, "training": training}


def _ways(
    decoder: PreTrainedConfig,
    encoder: PreTrainedConfig | None,
    settings: dict[str, Any],
    rank: int,
    dtype: torch.dtype,
) -> dict[str, Blueprint]:
    """Return the model under LoRA of this rank, and the one all of whose weights learn, by what learns."""
    ways = {}
    for name, own in ((f"LoRA of rank {rank}", 0), ("all weights", 1)):
        side = SideConfig(lora_rank=0 if own else rank)
        config = RCCConfig(share_base=encoder is None and not own, encoder=side, decoder=side, **settings)
        ways[name] = Blueprint(config, decoder, decoder if encoder is None and own else encoder, dtype)
    return ways


def _about(name: Any, side: PreTrainedModel) -> dict[str, Any]:
    shape = side.config
    scans = shape.model_type in backbones.STATE_SPACE
    heads = None if scans else shape.num_attention_heads
    return {
        "name": str(name),
        "family": shape.model_type,
        "layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "attention_heads": heads,
        "key_value_heads": getattr(shape, "num_key_value_heads", None) or heads,
        "window": None if scans else backbones.window(shape),
        "parameters": sum(p.numel() for name, p in side.named_parameters() if ".lora_" not in name),
    }


def added_parameters(model: RCCForCausalLM) -> dict[str, int]:
    """Return the parameters beside the decoder's base, by what they are."""
    base = {id(p) for p in model.decoder.parameters()}
    added = {"projections": sum(p.numel() for p in model.projections.parameters())}
    if model.sink is not None:
        added["sink"] = model.sink.numel()
    for side, body in (("encoder", model.encoder), ("decoder", model.decoder)):
        lora = [p for name, p in body.named_parameters() if ".lora_" in name]
        adapters = {id(p) for p in lora}
        weights = [p for p in body.parameters() if id(p) not in base | adapters]
        for name, parameters in ((side, weights), (f"lora_{side}", lora)):
            if parameters:
                added[name] = sum(p.numel() for p in parameters)
    return added


def _reading(model: RCCForCausalLM, rate: int | None, position: int, weights: int) -> dict[str, Any]:
    """Return the longest text at a rate, and the memory that texts take; rate None: of plain text, read by the base."""
    texts = []
    for tokens in TEXTS:
        positions = positions_of(tokens, rate or 1, model.config)
        kv, fits = positions * position, positions <= model.room()
        texts.append({"tokens": tokens, "positions": positions, "kv_bytes": kv, "bytes": weights + kv, "fits": fits})
    return {"rate": rate, "longest_text": model.room() * (rate or 1), "weights_bytes": weights, "texts": texts}


def _training(name: str, blueprint: Blueprint, model: RCCForCausalLM, tokens: int, frozen: list[str]) -> dict[str, Any]:
    """Return the memory to train on one text, at the lowest rate at which it fits the window."""
    config = blueprint.config
    freeze(model, frozen, blueprint.dtype)
    tokens = max(tokens, config.segment_length)
    fitting = (r for r in sorted(config.rates) if positions_of(tokens, r, config) + TARGET <= model.window)
    batch = Batch(1, tokens, next(fitting, max(config.rates)), TARGET)
    memory = activations(blueprint, batch, frozen)
    return {
        "learns": name,
        "frozen": frozen,
        "texts": batch.rows,
        "context_tokens": batch.tokens,
        "rate": batch.rate,
        "decoder_tokens": batch.target,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state_bytes": learning_bytes(model),
        "estimated_activations_bytes": memory.kept,
        "estimated_checkpointed_bytes": memory.checkpointed,
    }
