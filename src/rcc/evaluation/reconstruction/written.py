"""One text beside what its context gives back: what was written freely, and what of the whole is recovered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...answers import WrittenText
from ...context.context import CompressedContext
from ...engine import Engine
from ...text.tokens import decode, token_ids
from .teacher_forcing import PROMPT as PROMPT_TOKENS
from .teacher_forcing import Recovery, teacher_forced


@dataclass(frozen=True)
class WrittenBack:
    """A text beside what was written.

    Attributes:
        same_text: whether it is the text that was compressed.
        source_tokens: its length.
        truth: what follows the prompt in the text, token ids; empty where the prompt does not occur.
        guess: as many of the ids that were written, or fewer.
        truth_text, guess_text: the same as strings.
        whole: next-token accuracy and loss over the whole text.
        rate: tokens a position.
    """

    same_text: bool
    source_tokens: int
    truth: list[int]
    guess: list[int]
    truth_text: str
    guess_text: str
    whole: Recovery
    rate: int

    @property
    def recovered(self) -> float:
        """The share of `truth` that was written."""
        return sum(a == b for a, b in zip(self.guess, self.truth, strict=False)) / len(self.truth)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompt before each span of the measurement."""
        return PROMPT_TOKENS


def compare(
    engine: Engine,
    context: CompressedContext,
    source: str,
    written: WrittenText,
    progress: Callable[[int, int], None] | None = None,
) -> WrittenBack:
    """Set a text beside what its context gave back, and measure how much of the whole it gives back.

    Args:
        engine: that made the context.
        context: of the text.
        source: the text that was compressed.
        written: what the context gave back.
        progress: is told spans measured, and spans in all.

    Raises:
        InputError: the text is too short to measure.
    """
    ids = token_ids(engine.tokenizer, source)[0]
    piece = context.pieces[0][0]
    digest = engine.compressor.piece(ids, piece.rate).sha256
    truth = _following(ids.tolist(), written.prompt_ids, len(written.ids))
    guess = written.ids[: len(truth)]
    return WrittenBack(
        any(digest == part.sha256 for part in context.pieces[0]),
        len(ids),
        truth,
        guess,
        decode(engine.tokenizer, truth),
        decode(engine.tokenizer, guess),
        teacher_forced(engine.compressor, context, ids, progress=progress),
        piece.rate,
    )


def _following(text: list[int], prompt: list[int], count: int) -> list[int]:
    """Return the tokens of `text` that follow the first occurrence of `prompt`."""
    for i in range(len(text) - len(prompt)):
        if text[i : i + len(prompt)] == prompt:
            return text[i + len(prompt) : i + len(prompt) + count]
    return []
