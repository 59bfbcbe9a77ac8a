"""The model that a stage trains: made or loaded by the recipe, and set up to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .. import checkpoints
from ..errors import InputError, ModelError
from ..model import backbones
from ..model.freezing import freeze
from ..model.losses import TrainingLoss, token_loss
from ..model.rcc import RCCForCausalLM
from ..runtime.precision import computing
from .head import FrozenHead, chunk_loss
from .recipe import Recipe
from .stage import Stage


def make_model(recipe: Recipe, init: str | None, device: torch.device) -> RCCForCausalLM:
    """Return the recipe's model as training starts: new, or with the weights of `init`.

    Raises:
        ModelError: a backbone or `init` cannot be loaded. InputError: `init` is made otherwise than the recipe says.
    """
    settings = recipe.model
    torch.manual_seed(recipe.seed)  # LoRA starts at random, the same in every process
    dtype = precision(recipe, device)
    load: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention(recipe, device)}
    config = settings.named(recipe.name)
    if settings.max_position_embeddings is not None:
        load["max_position_embeddings"] = settings.max_position_embeddings
    if init is None:
        model = RCCForCausalLM.from_base(settings.encoder, settings.decoder, config, **load)
    else:
        model = RCCForCausalLM.from_pretrained(init, **load)
        wanted, made = config.settings(), model.config.settings()
        for key in ("prefix", "states", "readout", "layer_map", "segment_padding"):
            _same(key, wanted[key], made[key], init)
        for key in ("share_base", "encoder_lora_rank", "decoder_lora_rank", "lora_alpha", "sink_token"):
            if wanted[key] is not None:  # not set: as it is there
                _same(key, wanted[key], made[key], init)
        model.config.name, model.config.segment_length = config.name, config.segment_length
        model.set_rates(config.rates, config.rate_embeddings)
    return model.to(device)


def _same(key: str, wanted: Any, made: Any, init: str) -> None:
    if wanted != made:
        raise InputError(f"model.{key} is {wanted!r}, but {init} was made with {made!r}: use that, or no init.")


def copy_weights(weights: dict[str, nn.Parameter], values: dict[str, Tensor], source: Path) -> None:
    """Copy a checkpoint's weights into a model's.

    Raises:
        ModelError: they are not the same ones.
    """
    if set(weights) != set(values):
        odd = sorted(set(weights) ^ set(values))[0]
        raise ModelError(f"the weights in {source} are of another model ({odd}).")
    for name, parameter in weights.items():
        # a checkpoint may be more exact than the model as made
        parameter.data = values[name].to(parameter.device, torch.promote_types(values[name].dtype, parameter.dtype))


def load_tokenizer(recipe: Recipe, init: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that both sides read with."""
    if init is not None:
        return checkpoints.load_tokenizer(init)
    return checkpoints.load_tokenizer(
        checkpoints.resolve_base(recipe.model.decoder or recipe.model.encoder, weights=False)
    )


def attention(recipe: Recipe, device: torch.device) -> str:
    """Return transformers' attn_implementation for a run."""
    if recipe.run.attention is not None:
        return recipe.run.attention
    longest = max(n // rate + stage.target_tokens for stage in recipe.stages for _, n, rate in stage.kinds())
    short = recipe.model.config.segment_length <= 256 and longest <= 768
    return "eager" if device.type == "cpu" and short else "sdpa"


def precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return what a run computes in."""
    return computing(getattr(torch, recipe.run.dtype), device)


def prepare(
    model: RCCForCausalLM, stage: Stage, recipe: Recipe, device: torch.device, vocabulary: Tensor | None = None
) -> TrainingLoss:
    """Set a model up for a stage: frozen, checkpointed and compiled as it says; and return what to compute losses with.

    Args:
        model: changed in place.
        stage: what is frozen, and whether activations are recomputed.
        recipe: the precision, and whether blocks are compiled.
        device: where it will run, which decides what the recipe leaves open.
        vocabulary: token ids, ascending, that can be targets, where a head for losses is to know no others.

    Raises:
        InputError: there is no such head, because the decoder's learns or a teacher's logits are compared with its.
    """
    freeze(model, stage.frozen, precision(recipe, device))
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = device.type == "cuda" if recipe.run.compile is None else recipe.run.compile
    if compiled:
        for block in (*backbones.blocks(model.encoder), *backbones.blocks(backbones.body(model.decoder))):
            # only the block's own code: the hooks around it take objects that dynamo need not see; batches have
            # many shapes, more than dynamo would make a graph for each
            block.forward = torch.compile(block.forward, dynamic=True)
    if FrozenHead.fits(model) and stage.distillation is None:
        step = torch.compile(chunk_loss, dynamic=True) if compiled else chunk_loss
        return TrainingLoss(head=FrozenHead(model.decoder.get_output_embeddings().weight, vocabulary, step))
    if vocabulary is not None:
        raise InputError("run.vocabulary=data needs LoRA on the decoder: use all.")
    # in one piece it never holds a vocabulary of float32 for every target: at 1,000 targets 0.2 instead of 1.2 GB
    return TrainingLoss(torch.compile(token_loss, dynamic=True) if compiled else token_loss)
