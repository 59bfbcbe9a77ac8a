"""The pass with gradients: encoder, prefix and prompt at once, without a cache (section 3.2 of the paper).

These are functions of a model and a batch. What differs from asking: texts are not compressed into a cache first, so
that gradients reach encoder, projections and decoder; and the decoder may read its own predictions (scheduled
sampling).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import InputError
from . import encoder as encoding
from . import segments
from .arguments import check_prompts, rows_of, to_device
from .decoder import BlockHook, hook_arguments
from .encoder import BATCH_TOKENS
from .losses import PLAIN, TrainingLoss, targets_of, with_loss
from .positions import mask_and_order
from .prefix import text_inputs
from .rcc import RCCForCausalLM


@dataclass(frozen=True)
class TrainingBatch:
    """Texts to compress, and prompts with targets that follow them.

    Attributes:
        input_ids: [B, Q] the prompt, and the target after it.
        attention_mask: [B, Q], 0 at padding, on either side.
        context_ids, context_mask: [B, T] the texts to compress, and 0 at their padding. A row may hold several
            texts, each with a segment of its own to begin with, as an appended one: their tokens are
            masked 1, 2, …. None: there are none, and the decoder alone learns.
        rate: tokens a position; the model's default for None.
        labels: [B, Q] as `input_ids`, -100 where there is no loss.
        logits_to_keep: [U] the positions of the prompt to compute logits at, ascending; None: all. With labels, all
            those before a label.
        predicted: [B, Q], n > 0 where the decoder is to read not the token of `input_ids` but the one that it predicts
            there itself in the n-th of as many passes without gradients, each after what the one before predicted.
            Only where there are logits for it.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    context_ids: Tensor | None = None
    context_mask: Tensor | None = None
    rate: int | None = None
    labels: Tensor | None = None
    logits_to_keep: Tensor | None = None
    predicted: Tensor | None = None

    def to(self, device: torch.device) -> TrainingBatch:
        """Return the batch on a device; what is no tensor as it is, for the checks to name."""
        read = (
            "input_ids",
            "attention_mask",
            "context_ids",
            "context_mask",
            "predicted",
        )  # the others: where logits are
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in read}
        return replace(self, **moved)


def training_pass(model: RCCForCausalLM, batch: TrainingBatch, loss: TrainingLoss = PLAIN) -> CausalLMOutputWithPast:
    """Compute logits, and with labels the mean loss, of a batch, with gradients to all that learns.

    Where no weight of the encoder is trained, it reads in batches of :data:`rcc.model.encoder.BATCH_TOKENS` and keeps
    nothing for a backward pass (the paper's second stage).

    Returns:
        logits [B, Q or U, vocabulary], or, where the loss has a head of its own, the hidden states [B, Q or U, H] they
        would be made of; and the loss.

    Raises:
        InputError: an unusable argument. WindowError: more positions than the decoder has.
    """
    batch = batch.to(model.device)
    if batch.predicted is not None and batch.context_ids is None:
        raise InputError("predicted needs context_ids: give the texts that the predictions follow.")
    if batch.predicted is not None and batch.predicted.shape != batch.input_ids.shape:
        raise InputError(
            f"predicted has shape {list(batch.predicted.shape)}, but input_ids has {list(batch.input_ids.shape)}."
        )
    prompts = check_prompts(batch.input_ids, batch.attention_mask, batch.labels, model.decoder_vocabulary)
    if batch.context_ids is None:
        model.check_window([0] * len(prompts), prompts, None)
        mask, order = mask_and_order(0, None, batch.input_ids.shape[1], batch.attention_mask, batch.input_ids)
        keep = 0 if batch.logits_to_keep is None else batch.logits_to_keep  # 0 is transformers' word for all
        return _decode(model, batch, loss, keep, input_ids=batch.input_ids, attention_mask=mask, position_ids=order)
    rate = model.check_rate(batch.rate)
    rows = rows_of(batch.context_ids, batch.context_mask, model.vocabulary, "context_ids")
    if len(rows) != len(prompts):
        raise InputError(f"context_ids has {len(rows)} rows, but input_ids has {len(prompts)}: give as many.")
    texts = segments.texts_of(rows, batch.context_mask)
    new = [sum(segments.positions(len(text), rate, model.config) for text in row) for row in texts]
    model.check_window(new, prompts, None)
    if model.config.decoder_reads(rate):
        if batch.predicted is not None or any(len(row) > 1 for row in texts):
            raise InputError("rate=1 is read by the decoder itself: without predicted, and one text in each row.")
        return read_and_decode(model, rows, batch, loss)
    states, valid = encode_texts(model, texts, rate)
    if batch.predicted is not None:
        batch = replace(batch, input_ids=_with_predictions(model, states, valid, batch, loss))
    return decode_states(model, states, valid, batch, loss)


def encode_texts(
    model: RCCForCausalLM, texts: list[tuple[Tensor, ...]], rate: int
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Compute the encoder's states of a batch, without gradients where nothing of the encoder learns.

    Args:
        model: whose encoder, memory and rate embeddings read.
        texts: B rows of one text or several, each [T] token ids.
        rate: tokens a position.

    Returns:
        The states {number: [B, n, H]} and which positions are real, [B, n] (None: all).
    """
    learning = [*model.encoder.parameters(), model.memory, model.rate_embeddings]
    frozen = not any(parameter.requires_grad for parameter in learning if parameter is not None)
    pass_tokens = BATCH_TOKENS if frozen else None
    with torch.no_grad() if frozen else contextlib.nullcontext():
        wanted, additions = model.projections.states, model.additions(rate)
        read = encoding.encode(model.encoder, texts, rate, model.config, wanted, None, additions, pass_tokens)
        ((states, valid, _),) = read
    return states, valid


def decode_states(
    model: RCCForCausalLM,
    states: dict[int, Tensor],
    valid: Tensor | None,
    batch: TrainingBatch,
    loss: TrainingLoss = PLAIN,
) -> CausalLMOutputWithPast:
    """Run the decoder over the prefix that encoder states make, and the prompts after it.

    Args:
        model: whose projections and decoder learn.
        states: {number: [B, n, H]}, as :func:`encode_texts` gives them.
        valid: [B, n], which positions are real (None: all).
        batch: the prompts and their targets.
        loss: what the loss is computed with.
    """
    maker = model.prefix_maker
    hook, inputs = maker.training_inputs(states)
    if valid is not None and maker.sink_positions:
        valid = nn.functional.pad(valid, (maker.sink_positions, 0), value=True)
    return _decode_after(model, hook, inputs, valid, batch, loss)


def read_and_decode(
    model: RCCForCausalLM, rows: list[Tensor], batch: TrainingBatch, loss: TrainingLoss = PLAIN
) -> CausalLMOutputWithPast:
    """Run the decoder over the sink, texts that it reads itself (rate 1 of a direct prefix), and the prompts.

    Args:
        model: one with a direct prefix.
        rows: B texts, [T] token ids each.
        batch: the prompts and their targets.
        loss: what the loss is computed with.
    """
    assert model.sink is not None
    texts = model.decoder.get_input_embeddings()(pad_sequence(rows, batch_first=True))
    hook, inputs, valid = text_inputs(model.sink, texts, [len(row) for row in rows])
    return _decode_after(model, hook, inputs, valid, batch, loss)


def likeliest(out: CausalLMOutputWithPast, loss: TrainingLoss = PLAIN) -> Tensor:
    """Return the likeliest next tokens [B, U] of the positions that a training pass with that loss was computed at."""
    if out.logits is not None:
        return out.logits.argmax(-1)
    assert loss.head is not None
    assert out.hidden_states is not None
    return loss.head.likeliest(out.hidden_states[0])


@torch.no_grad()
def _with_predictions(
    model: RCCForCausalLM, states: dict[int, Tensor], valid: Tensor | None, batch: TrainingBatch, loss: TrainingLoss
) -> Tensor:
    """Return token ids [B, Q] with the decoder's own likeliest tokens of pass n where `predicted` [B, Q] is n > 0."""
    assert batch.predicted is not None
    tokens, logits_at = batch.input_ids, batch.logits_to_keep
    if logits_at is None:
        logits_at = torch.arange(tokens.shape[1], device=model.device)
    inner = logits_at < tokens.shape[1] - 1  # what follows the last token is not in the batch
    next_to = logits_at[inner] + 1
    for n in range(int(batch.predicted.max())):
        out = decode_states(model, states, valid, replace(batch, input_ids=tokens, labels=None), loss)
        predictions, tokens = likeliest(out, loss)[:, inner], tokens.clone()
        tokens[:, next_to] = torch.where(batch.predicted[:, next_to] > n, predictions, tokens[:, next_to])
    return tokens


def _decode_after(
    model: RCCForCausalLM,
    hook: BlockHook,
    prefix: Tensor,
    valid: Tensor | None,
    batch: TrainingBatch,
    loss: TrainingLoss,
) -> CausalLMOutputWithPast:
    """Run one pass of the decoder over a prefix and prompts.

    Args:
        model: whose decoder runs.
        hook: what changes the inputs of the blocks.
        prefix: [B, n, H] the input of the first one, before the prompts'.
        valid: [B, n], which of it are real (None: all).
        batch: the prompts and their targets.
        loss: what the loss is computed with.
    """
    n, ids = prefix.shape[1], batch.input_ids
    embeds = model.decoder.get_input_embeddings()(ids)
    inputs = torch.cat([prefix, embeds.to(prefix.dtype)], 1)
    everything = None
    if valid is not None or batch.attention_mask is not None:
        before = torch.ones(inputs.shape[0], n, device=model.device) if valid is None else valid
        after = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask
        everything = torch.cat([before, after], 1)
    mask, order = mask_and_order(0, None, inputs.shape[1], everything, inputs)
    keep = ids.shape[1] if batch.logits_to_keep is None else n + batch.logits_to_keep
    arguments: dict[str, Any] = {"inputs_embeds": inputs, "attention_mask": mask, "position_ids": order}
    return _decode(model, batch, loss, keep, **arguments, **hook_arguments(hook))


def _decode(
    model: RCCForCausalLM, batch: TrainingBatch, loss: TrainingLoss, keep: int | Tensor, **inputs: Any
) -> CausalLMOutputWithPast:
    """Run the decoder without a cache and compute the loss, by its own head or by the one for losses.

    Args:
        model: whose decoder runs.
        batch: the targets, if any.
        loss: what the loss is computed with.
        keep: the positions of `inputs` to compute logits at; a number: so many at the end, 0: all.
        **inputs: of the decoder.
    """
    if loss.head is None:
        out = model.decoder(use_cache=False, logits_to_keep=keep, **inputs)
        return with_loss(out, batch.labels, batch.logits_to_keep, loss.of_logits)
    states = model.decoder.base_model(use_cache=False, **inputs).last_hidden_state
    states = states[:, slice(-keep, None) if isinstance(keep, int) else keep]
    if batch.labels is None:
        return CausalLMOutputWithPast(hidden_states=(states,))
    targets = targets_of(batch.labels.to(states.device), batch.logits_to_keep)
    mean = loss.head.loss(states[:, : targets.shape[1]], targets)
    return CausalLMOutputWithPast(loss=mean, hidden_states=(states,))
