"""Teacher-forced reconstruction: is each token the likeliest one after the true tokens before it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...context.context import CompressedContext
from ...errors import InputError
from ...model import generating
from ...model.compressor import Compressor

PROMPT = 10
"""Tokens of a span that the decoder is given before it continues it (section 4.1 of the paper)."""


@dataclass(frozen=True)
class Recovery:
    """What was predicted right of a whole text.

    Attributes:
        tokens: that were predicted.
        correct: of those, how many were the likeliest ones.
        loss: mean, in nats a token.
    """

    tokens: int
    correct: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of the tokens that were predicted right, 0 to 1."""
        return self.correct / self.tokens


@torch.no_grad()
def predictions(
    model: Compressor, context: CompressedContext | None, spans: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Predict every token of spans after their first :data:`PROMPT`, from the context and the true tokens before it.

    Args:
        model: that made the context, and predicts.
        context: of as many texts as there are spans, or None.
        spans: token ids [T] each, of more than :data:`PROMPT`.

    Returns:
        For each span, whether the likeliest token is the true one, bool [T - PROMPT], and the loss in nats a token,
        float32 [T - PROMPT]; on the CPU.
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(spans), batch_first=True).to(model.device)
    predicting = torch.arange(PROMPT - 1, ids.shape[1] - 1, device=model.device)
    # causal: what pads a shorter span on the right cannot reach what is measured
    logits = generating.forward(model, ids, context=context, logits_to_keep=predicting).logits
    assert logits is not None
    predicted = []
    for row, span in zip(logits, spans, strict=True):  # one by one, as float32 logits are large
        truth = span[PROMPT:].to(model.device)
        scores = row[: len(truth)].float()
        loss = torch.nn.functional.cross_entropy(scores, truth, reduction="none")
        predicted.append(((scores.argmax(-1) == truth).cpu(), loss.cpu()))
    return predicted


def teacher_forced(
    model: Compressor,
    context: CompressedContext,
    ids: Tensor,
    span: int = 256,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """Measure next-token accuracy over a whole text, the context being its only source besides the span itself.

    The text is cut into spans; the decoder reads a span's first ten tokens, then predicts each next one from the
    context and the true tokens before it in the span. Every token but the tens is predicted once.

    Args:
        model: that made the context, and predicts.
        context: of one text, which need not be `ids` (a control).
        ids: token ids [T].
        span: tokens of a span, prompt included.
        batch: spans at a time; each needs a copy of the context's keys and values.
        progress: called with spans done and spans in all.

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
        for right, losses in predictions(model, context.expand(len(rows)) if len(rows) > 1 else context, rows):
            tokens, correct, loss = tokens + len(right), correct + int(right.sum()), loss + float(losses.sum())
        if progress is not None:
            progress(min(start + batch, len(spans)), len(spans))
    return Recovery(tokens, correct, loss / tokens)
