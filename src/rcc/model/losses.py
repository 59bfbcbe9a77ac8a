"""Losses of tokens: the cross-entropy, the targets of logits, and what a training pass computes its loss with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast


class LossHead(Protocol):
    """What takes the place of the decoder's head in training, so that all logits are never in memory."""

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of hidden states [B, U, H] and token ids [B, U] (-100: none)."""
        ...

    def likeliest(self, states: Tensor) -> Tensor:
        """Return the likeliest next token ids [B, U] of hidden states [B, U, H]."""
        ...


def targets_of(labels: Tensor, logits_to_keep: Tensor | None) -> Tensor:
    """Return the label that follows each position that logits are computed at, [B, U].

    Args:
        labels: [B, Q].
        logits_to_keep: [U] those positions; None: all but the last, which nothing follows.
    """
    return (
        labels[:, 1:]
        if logits_to_keep is None
        else nn.functional.pad(labels, (0, 1), value=-100)[:, logits_to_keep + 1]
    )


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, in float32: logits [B, U, vocabulary], targets [B, U] (-100: none)."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


@dataclass(frozen=True)
class TrainingLoss:
    """What a training pass computes its loss with.

    Attributes:
        of_logits: :func:`token_loss`, or the same compiled.
        head: takes the place of the decoder's head. None: the decoder's own is used.
    """

    of_logits: Callable[[Tensor, Tensor], Tensor] = token_loss
    head: LossHead | None = None


PLAIN = TrainingLoss()
"""The decoder's own head, and the cross-entropy of its logits."""


def with_loss(
    out: Any,
    labels: Tensor | None,
    logits_to_keep: Tensor | None,
    loss_of: Callable[[Tensor, Tensor], Tensor] = token_loss,
) -> CausalLMOutputWithPast:
    """Return a decoder's output without its cache, and with the mean loss of labels.

    Args:
        out: with logits [B, Q or U, vocabulary].
        labels: [B, Q], -100 where there is no loss; None: the loss is None.
        logits_to_keep: [U] the positions that there are logits of; None: all.
        loss_of: :func:`token_loss`, or the same compiled.
    """
    loss, logits = None, out.logits
    if labels is not None:
        targets = targets_of(labels.to(logits.device), logits_to_keep)
        loss = loss_of(logits[:, : targets.shape[1]], targets)
    more = {name: getattr(out, name, None) for name in ("hidden_states", "attentions")}
    return CausalLMOutputWithPast(loss=loss, logits=logits, **more)
