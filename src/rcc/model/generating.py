"""Prompts after a context → logits or tokens: what every compressor does, whatever made the context."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..context.context import CompressedContext
from ..errors import ContextError, InputError
from . import backbones, positions
from .arguments import check_forward, check_is_context, check_prompts, rows_of, to_device
from .losses import with_loss


class Generates(Protocol):
    """What :func:`forward` and :func:`generate` need of a compressor."""

    decoder: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision that it computes in."""
        ...

    @property
    def decoder_vocabulary(self) -> int:
        """Token ids that prompts may have."""
        ...

    def check_fingerprint(self, fingerprint: str, name: str, what: str = "the context") -> None:
        """Raise ContextError unless this model made it."""

    def check_window(self, new: list[int], prompts: list[int], context: CompressedContext | None) -> None:
        """Raise WindowError unless context, new positions and tokens fit."""

    def as_cache(self, context: CompressedContext) -> CompressedContext:
        """Return a context as the decoder's KV cache."""
        ...


def forward(
    model: Generates,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    context: CompressedContext | None = None,
    labels: Tensor | None = None,
    logits_to_keep: Tensor | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Compute the logits of prompts after a context, or of the decoder alone; see :meth:`RCCForCausalLM.forward`."""
    check_forward(kwargs)
    input_ids, attention_mask = to_device(input_ids, model.device), to_device(attention_mask, model.device)
    prompts = check_prompts(input_ids, attention_mask, labels, model.decoder_vocabulary)
    if context is not None:
        context = check_context(model, context, len(prompts))
    model.check_window([0] * len(prompts), prompts, context)
    keep = 0 if logits_to_keep is None else logits_to_keep  # 0 is transformers' word for all
    arguments = {"input_ids": input_ids, "logits_to_keep": keep, **kwargs}
    if context is None:
        mask, order = positions.mask_and_order(0, None, input_ids.shape[1], attention_mask, input_ids)
        out = model.decoder(attention_mask=mask, position_ids=order, use_cache=False, **arguments)
        return with_loss(out, labels, logits_to_keep)
    context = model.as_cache(context)
    new = input_ids.shape[1]
    mask, order = positions.mask_and_order(len(context), context.mask, new, attention_mask, input_ids)
    with torch.no_grad(), context.borrow(new) as cache:
        arguments[backbones.CACHE] = cache
        out = model.decoder(attention_mask=mask, position_ids=order, use_cache=True, **arguments)
    return with_loss(out, labels, logits_to_keep)


@torch.no_grad()
def generate(
    model: Generates,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    context: CompressedContext | None,
    **kwargs: Any,
) -> Any:
    """Continue prompts after a context; see :meth:`RCCForCausalLM.generate`."""
    input_ids, attention_mask = to_device(input_ids, model.device), to_device(attention_mask, model.device)
    prompts = [len(row) for row in rows_of(input_ids, attention_mask, model.decoder_vocabulary)]
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise InputError("attention_mask has padding on the right: generate needs prompts padded on the left.")
    settings: GenerationConfig = kwargs.get("generation_config") or model.decoder.generation_config

    def setting(name: str, default: int) -> int:
        value = kwargs.get(name, getattr(settings, name, None))
        return default if value is None else int(value)

    length = input_ids.shape[1]
    answer = setting("max_new_tokens", max(0, setting("max_length", 20) - length))
    if context is not None:
        context = check_context(model, context, len(prompts))
    model.check_window([0] * len(prompts), [n + answer for n in prompts], context)
    decoder_generate: Any = model.decoder.generate
    if context is None:
        if attention_mask is None:  # or transformers takes what looks like padding for padding
            attention_mask = torch.ones_like(input_ids)
        return decoder_generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    context = model.as_cache(context)
    mask = positions.mask_and_order(len(context), context.mask, length, attention_mask, input_ids)[0]
    if mask is None:
        mask = torch.ones(len(input_ids), len(context) + length, dtype=torch.long, device=model.device)
    copies = max(setting("num_beams", 1), setting("num_return_sequences", 1))
    # a cache that is handed out is the caller's: the next question must not write there
    handed_out = bool(setting("return_dict_in_generate", 0))
    with context.lend(length + answer) if handed_out else context.borrow(length + answer) as cache:
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return decoder_generate(input_ids=input_ids, attention_mask=mask, **{backbones.CACHE: cache}, **kwargs)


def check_context(model: Generates, context: CompressedContext, batch: int) -> CompressedContext:
    """Return a context on a model's device and in its precision.

    Raises:
        InputError: it is none, or holds another number of texts. ContextError: another model made it.
    """
    check_is_context(context)
    model.check_fingerprint(context.fingerprint, context.model_name)
    if context.batch_size != batch:
        hint = f"use context.expand({batch})" if context.batch_size == 1 else "give as many of each"
        raise InputError(f"the context holds {context.batch_size} texts, but the batch has {batch}: {hint}.")
    return context.to(model.device, model.dtype)


def check_maker(own: str, own_name: str, fingerprint: str, name: str, what: str) -> None:
    """Raise ContextError unless the model of the fingerprint `own` made what bears another fingerprint."""
    if fingerprint != own:
        raise ContextError(
            f"{what} was made by another model ({name}, {fingerprint[:12]}) than {own_name}"
            f" ({own[:12]}): load that model, or compress the text again."
        )
