"""The decoder's frozen output head in training: losses from hidden states, a chunk of logits at a time.

All logits of a batch would be its largest tensor (of 512 targets and 151,936 tokens 311 MB in float32, several times
over), and their products a good part of its time. A head that does not learn needs neither: each chunk's gradient is
made with its loss, and rows of the head that no target needs can be left out. What is saved knows nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.rcc import RCCForCausalLM

CHUNK = 2**25
"""Logits that are in memory at once: 134 MB in float32, and twice that while they are worked on."""
NONE = -100
"""The target where there is no loss, as for torch's cross_entropy."""

Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_loss(states: Tensor, weight: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of a chunk of hidden states and its gradient by them.

    Args:
        states: [M, H], in the head's precision.
        weight: [V, H] the head.
        targets: [M] rows of the head.
        share: scalar, what one target counts.
    """
    logits = (states @ weight.t()).float()
    total = logits.logsumexp(-1, keepdim=True)
    loss = (total - logits.gather(1, targets[:, None])).sum() * share
    slope = (logits - total).exp()
    slope = slope.scatter_add(1, targets[:, None], slope.new_full((1, 1), -1.0).expand(len(targets), 1))
    return loss, (slope * share).to(weight.dtype) @ weight


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of hidden states [N, H] against a frozen head; the gradient is made on the way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, rows: int, step: Step) -> Tensor:
        share = torch.tensor(1 / max(1, len(targets)), device=states.device)
        loss, gradient = states.new_zeros((), dtype=torch.float32), torch.empty_like(states)
        for start in range(0, len(states), rows):
            chunk = slice(start, start + rows)
            part, slope = step(states[chunk].to(weight.dtype), weight, targets[chunk], share)
            loss += part
            gradient[chunk] = slope
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None


class FrozenHead:
    """What a model in training computes its losses with (:class:`rcc.model.losses.LossHead`).

    Not a module: it has no state of its own, and is neither saved nor sharded nor handed out to processes.

    Args:
        weight: [vocabulary, H] the decoder's head, which does not learn.
        vocabulary: token ids, ascending, that can be targets; targets of other tokens have no loss. None: all.
        step: :func:`chunk_loss`, compiled or not.
    """

    def __init__(self, weight: Tensor, vocabulary: Tensor | None = None, step: Step = chunk_loss):
        self.step, self.vocabulary = step, None if vocabulary is None else vocabulary.to(weight.device)
        self.weight = weight.detach() if self.vocabulary is None else weight.detach()[self.vocabulary]
        self._row: Tensor | None = None
        if self.vocabulary is not None:
            self._row = torch.full((len(weight),), NONE, device=weight.device)
            self._row[self.vocabulary] = torch.arange(len(self.vocabulary), device=weight.device)

    @staticmethod
    def fits(model: RCCForCausalLM) -> bool:
        """Return whether a model's head is one: under LoRA it does not learn, and some families bend what it gives."""
        frozen = model.config.is_frozen("decoder")
        head = model.decoder.get_output_embeddings()
        bent = getattr(model.decoder.config, "final_logit_softcapping", None) is not None
        return frozen and getattr(head, "bias", None) is None and not bent

    @property
    def rows(self) -> int:
        """Hidden states of a chunk."""
        return max(1, CHUNK // len(self.weight))

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, a scalar.

        Args:
            states: [B, U, H] after the final norm.
            targets: [B, U] the token ids that follow; -100: none.
        """
        targets = targets.flatten()
        if self._row is not None:
            targets = torch.where(targets == NONE, NONE, self._row[targets.clamp(min=0)])
        real = (targets != NONE).nonzero()[:, 0]  # in a batch of conversations less than half
        with torch.autocast(states.device.type, enabled=False):
            states = states.flatten(0, 1).index_select(0, real)
            arguments = states, self.weight, targets[real], self.rows, self.step
            loss: Tensor = _ChunkedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def likeliest(self, states: Tensor) -> Tensor:
        """Return the likeliest token ids [B, U] after hidden states [B, U, H]."""
        with torch.autocast(states.device.type, enabled=False):
            parts = states.flatten(0, 1).to(self.weight.dtype).split(self.rows)
            ids = torch.cat([(part @ self.weight.t()).argmax(-1) for part in parts])
        return (ids if self.vocabulary is None else self.vocabulary[ids]).view(states.shape[:-1])
