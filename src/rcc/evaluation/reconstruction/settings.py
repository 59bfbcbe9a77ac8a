"""What a reconstruction asks of each document: the paper's protocol, and how it is varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError
from ...model.compressor import Compressor
from ..evaluation import check_lengths
from .teacher_forcing import PROMPT

PAPER_LENGTH, PAPER_LAST_START, PAPER_TARGET = 2048, 1200, 500
"""The paper's protocol, in tokens: texts of 2,048, five prompts 300 apart, of which the last begins at token 1,200, and
about 500 written after each. Texts of other lengths are measured in proportion."""

REAL = "real"
"""The context of the text itself."""
CONTROLS = {
    "shuffled": "its own compressed vectors in a random order, each with all its layers",
    "wrong": "the context of another document",
    "no-context": "the prompt alone",
    "plain-text": "the text itself, token by token, read by the decoder's base (without LoRA, where it has LoRA)",
}
"""What the decoder is given in place of a text's own context, and what that is."""

BY = ("length", "rate", "context")
"""The keys that tell cells apart."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """What is asked of each document.

    Args:
        rates, lengths: every rate is measured at every length, in tokens.
        prompts: how many times a document is continued, each time from another token on.
        target_tokens: to write after each prompt, at most; fewer where the text ends. None: as many as the paper's 500
            in 2,048, in proportion to the text, and at most 500.
        controls: any of :data:`CONTROLS`.
        documents: at most so many of each length, chosen by `seed`.
        batch: prompts at a time; each needs a copy of its context's keys and values.
        seed: of the choice of documents and of the shuffled order.
        kv: precision that contexts are kept in; None: the model's.
    """

    rates: Sequence[int]
    lengths: Sequence[int]
    prompts: int = 5
    target_tokens: int | None = None
    controls: Sequence[str] = tuple(CONTROLS)
    documents: int = 10
    batch: int = 16
    seed: int = 0
    kv: str | None = None

    def starts(self, length: int) -> list[int]:
        """Return the tokens at which prompts begin in a text of `length`: evenly spread, as far as the paper's."""
        last = length * PAPER_LAST_START / PAPER_LENGTH
        return [round(i * last / max(1, self.prompts - 1)) for i in range(self.prompts)]

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Return for each prompt where it begins, and where the target after it ends."""
        target = self.target_tokens or min(PAPER_TARGET, round(PAPER_TARGET * length / PAPER_LENGTH))
        return [(start, min(start + PROMPT + target, length)) for start in self.starts(length)]

    def check(self, model: Compressor) -> None:
        """Check that a model can be asked so.

        Raises:
            InputError: it cannot.
        """
        for rate in self.rates:
            model.check_rate(rate)
        check_lengths(model, self.lengths)
        for length in self.lengths:
            starts = self.starts(length)
            if length <= starts[-1] + PROMPT:
                raise InputError(
                    f"of {length} tokens none is left to write after the prompt of {PROMPT} at token {starts[-1]}:"
                    " use a greater length."
                )
            if len(set(starts)) < self.prompts:
                raise InputError(f"{length} tokens have no room for {self.prompts} prompts: use fewer.")
