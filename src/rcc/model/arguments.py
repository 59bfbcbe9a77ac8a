"""What callers give: checked, with messages that name the argument, and put on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..context.context import CompressedContext
from ..errors import InputError


def rows_of(ids: Tensor, mask: Tensor | None, vocabulary: int, argument: str = "input_ids") -> list[Tensor]:
    """Return the texts of a batch without their padding.

    Args:
        ids: [B, T] token ids.
        mask: [B, T], 0 at padding; None: there is none.
        vocabulary: ids must be below it.
        argument: what messages call `ids`.

    Returns:
        B rows of token ids [tokens].

    Raises:
        InputError: a wrong shape or type, an empty text, or an id outside the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{argument} must be a tensor of whole numbers of shape [batch, tokens].")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        name = "context_mask" if argument == "context_ids" else "attention_mask"
        raise InputError(f"{name} must be a tensor of the same shape as {argument}, {list(ids.shape)}.")
    rows = [ids[b] if mask is None else ids[b][mask[b].bool()] for b in range(ids.shape[0])]
    if not rows or any(len(row) == 0 for row in rows):
        raise InputError(f"{argument} holds an empty text: give at least one token.")
    low, high = (int(end) for end in (ids if mask is None else ids[mask.bool()]).aminmax())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise InputError(
            f"{argument} holds token id {bad}, outside the model's vocabulary of {vocabulary}:"
            " use the tokenizer that belongs to the model."
        )
    return rows


def check_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, vocabulary: int
) -> list[int]:
    """Return how many tokens each of B prompts has, without padding.

    Raises:
        InputError: an unusable argument.
    """
    prompts = [len(row) for row in rows_of(input_ids, attention_mask, vocabulary)]
    if labels is not None and labels.shape != input_ids.shape:
        raise InputError(f"labels has shape {list(labels.shape)}, but input_ids has {list(input_ids.shape)}.")
    return prompts


def check_is_context(context: Any) -> None:
    """Raise InputError unless it is a CompressedContext."""
    if not isinstance(context, CompressedContext):
        raise InputError(
            f"context must be a CompressedContext, not {type(context).__name__}: compress a text, or load a file with"
            " CompressedContext.load."
        )


def check_forward(given: dict[str, Any]) -> None:
    """Take out of the decoder's arguments what says no more than what happens anyway; refuse what cannot be given."""
    decided = {
        "use_cache": (False, "a context holds the cache: leave it out, or ask with generate"),
        "return_dict": (True, "the output has names: leave it out, and take to_tuple() of it"),
    }
    for name, (value, why) in decided.items():
        if (got := given.pop(name, None)) not in (None, value):
            raise InputError(f"{name}={got!r} cannot be used, because {why}.")
    for name in ("inputs_embeds", "position_ids", "cache", "past_key_values"):
        if given.get(name) is not None:
            raise InputError(f"{name} cannot be used: give input_ids, and a context for what comes before them.")
        given.pop(name, None)
    for name in ("context_ids", "context_mask", "rate", "predicted"):
        if name in given:
            raise InputError(
                f"{name} is for training: use rcc.model.training_pass, or compress the text and give its context."
            )


def to_device(tensor: Any, device: torch.device) -> Any:
    """Return a tensor on a device; anything else as it is, for the checks to name."""
    return tensor.to(device) if isinstance(tensor, Tensor) else tensor
