"""How much of a text its compressed context gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..context import CompressedContext
from ..errors import InputError
from ..modeling import RCCForCausalLM

PROMPT = 10
"""Tokens of a span that the decoder is given before it continues it (section 4.1 of the paper)."""


@dataclass(frozen=True)
class Recovery:
    """Teacher-forced reconstruction: `correct` of `tokens` predicted right, mean `loss` in nats a token."""

    tokens: int
    correct: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


@torch.no_grad()
def teacher_forced(
    model: RCCForCausalLM,
    context: CompressedContext,
    ids: Tensor,
    span: int = 256,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """Next-token accuracy over a whole text, the context being its only source besides the span itself.

    The text is cut into spans; the decoder reads a span's first ten tokens, then predicts each next one from the
    context and the true tokens before it in the span. Every token but the tens is predicted once.

    Args:
        context: of one text, which need not be `ids` (a control).
        ids: [T] token ids.
        span: tokens a span, prompt included.
        batch: spans at a time; each needs a copy of the context's keys and values.

    Raises:
        InputError: the text is too short to predict anything.
    """
    spans = [piece for piece in ids.split(span) if len(piece) > PROMPT]
    if not spans:
        raise InputError(f"the text has {len(ids)} tokens: at least {PROMPT + 1} are needed to measure recovery.")
    tokens = correct = 0
    loss = 0.0
    for start in range(0, len(spans), batch):
        rows = spans[start : start + batch]
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        real = torch.arange(x.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
        # causal: what pads the last span on the right cannot reach what is measured
        logits = model(x, context=context.expand(len(rows)) if len(rows) > 1 else context).logits
        keep = real[:, PROMPT:].to(model.device)
        guess, truth = logits[:, PROMPT - 1 : -1][keep].float(), x[:, PROMPT:][keep]
        loss += torch.nn.functional.cross_entropy(guess, truth, reduction="sum").item()
        correct += int((guess.argmax(-1) == truth).sum())
        tokens += len(truth)
        if progress is not None:
            progress(min(start + batch, len(spans)), len(spans))
    return Recovery(tokens, correct, loss / tokens)
