"""Masks, positions and the window: what stands before what in the decoder, and whether it fits.

This file alone decides positions and attention masks of prefix and prompt. A context's KV cache may have gaps
(shorter texts of a batch), and so may prompts (padding): gaps are masked, and positions count real entries only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import RCCConfig
from ..context.cache import SPARE
from ..errors import WindowError
from . import segments


def mask_and_order(
    past: int, past_mask: Tensor | None, new: int, new_mask: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Return the attention mask of old and new entries, and the positions of the new ones.

    Args:
        past: entries of the cache.
        past_mask: [B, past], which of them are real (None: all).
        new: entries to come.
        new_mask: [B, new], which of them are real (None: all).
        like: any tensor with the batch size and the device.

    Returns:
        The mask [B, past + new] (None without gaps) and positions [B or 1, new].
    """
    if past_mask is None and (new_mask is None or bool(new_mask.all())):
        return None, torch.arange(past, past + new, device=like.device)[None]

    def full(mask: Tensor | None, width: int) -> Tensor:
        shape = (like.shape[0], width)
        return torch.ones(shape, dtype=torch.long, device=like.device) if mask is None else mask.long()

    mask = torch.cat([full(past_mask, past), full(new_mask, new)], 1)
    return mask, count_real(mask)[:, past:]


def count_real(mask: Tensor) -> Tensor:
    """Return positions [B, n] that count the real entries of a mask [B, n] only."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def room(window: int, sink: int, reserve: int = SPARE) -> int:
    """Return the positions that a window leaves for a prefix.

    Args:
        window: positions that the decoder can address.
        sink: positions before the prefix.
        reserve: positions for a question and its answer, at most half of the window.
    """
    return window - min(reserve, window // 2) - sink


def fitting_rate(tokens: Sequence[int], config: RCCConfig, window: int, space: int, budget: int | None = None) -> int:
    """Return the lowest trained rate at which texts fit; see :func:`lowest_fitting`."""

    def count(n: int, rate: int) -> int:
        return segments.positions(n, rate, config)

    return lowest_fitting(tokens, config.rates, count, window, space, budget, "trained rate", " (untrained)")


def lowest_fitting(
    tokens: Sequence[int],
    rates: Sequence[int],
    count: Callable[[int, int], int],
    window: int,
    space: int,
    budget: int | None = None,
    kind: str = "rate of auto",
    other: str = "",
) -> int:
    """Return the lowest rate at which texts fit within a budget, or, where there is none, within the window.

    Args:
        tokens: lengths of texts that follow one another.
        rates: to choose from.
        count: (tokens of a text, rate) → its positions.
        window: positions that the decoder can address, for the message.
        space: positions that it leaves for these texts.
        budget: positions that they may take; None: the window alone decides.
        kind: what the message calls these rates.
        other: what the message says of other rates.

    Raises:
        WindowError: they fit at none.
    """
    for limit in (space,) if budget is None else (min(space, budget), space):
        for rate in sorted(rates):
            if sum(count(n, rate) for n in tokens) <= limit:
                return rate
    top = max(rates)
    raise WindowError(
        f"{sum(tokens):,} tokens do not fit: at the highest {kind}, {top}, they take"
        f" {sum(count(n, top) for n in tokens):,} positions, and the decoder's window of"
        f" {window:,} has room for {max(0, space):,} beside a question and its answer; give at most"
        f" {max(0, space) * top:,} tokens, or a higher rate{other}."
    )


def check_window(
    window: int, sink: int, held: Sequence[int], new: Sequence[int], prompts: Sequence[int], first: str = "The sink"
) -> None:
    """Check that every row of a batch fits.

    Args:
        window: positions that the decoder can address.
        sink: positions before all others.
        held: for each row, positions of the context.
        new: for each row, new prefix positions.
        prompts: for each row, tokens of prompt and answer.
        first: what the message calls the positions before all others.

    Raises:
        WindowError: a row takes more positions than the window has.
    """
    context, prefix, tokens = max(zip(held, new, prompts, strict=True), key=sum)
    if sink + context + prefix + tokens <= window:
        return
    parts = [first] if sink else []
    parts += [f"{context:,} positions of the context"] if context else []
    parts += [f"{prefix:,} new prefix positions"] if prefix else []
    parts += [f"{tokens:,} tokens of prompt and answer"] if tokens else []
    remedy = "use a higher rate or less text" if tokens <= window // 2 else "shorten the prompt or the answer"
    raise WindowError(f"{' and '.join(parts)} are more than the decoder's window of {window:,} positions: {remedy}.")
