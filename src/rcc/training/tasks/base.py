"""What all tasks share: the sample, what it is drawn from, and the options of every task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...data.corpus import Row
from ...errors import InputError
from ...text import prompting
from ...text.tokens import token_ids


@dataclass(frozen=True)
class Sample:
    """What a model reads and learns to write; token ids, int64.

    Attributes:
        pieces: the texts of the context; each starts a segment of its own.
        prompt: what the decoder is given, at least one token.
        target: what it learns to write after it, at least one token.
        task: the task's name, for the log.
        learnt: [tokens of the target] bool, False at later questions of a conversation, which are given. None: all are
            learnt.
        read: [tokens of the target] what the decoder reads in its place, while it learns to write the target. None: the
            target.
        predicted: [tokens of the target] n > 0 where the decoder reads what it predicts there itself in n passes. None:
            nowhere.
        plain: what a decoder without compression (a teacher, or the one of a stage that is `plain`) reads in place of
            context and prompt. None: the context's tokens, then the prompt.
    """

    pieces: tuple[np.ndarray, ...]
    prompt: np.ndarray
    target: np.ndarray
    task: str
    plain: np.ndarray | None = None
    learnt: np.ndarray | None = None
    read: np.ndarray | None = None
    predicted: np.ndarray | None = None

    def uncompressed(self) -> np.ndarray:
        """Return the token ids [T] before the target, for a decoder that reads the context as it is."""
        return np.concatenate([*self.pieces, self.prompt]) if self.plain is None else self.plain


@dataclass(frozen=True, eq=False)
class Marks:
    """A tokenizer, and the token ids of the fixed parts of :mod:`rcc.text.prompting`.

    `separator` is what SEPARATOR becomes between two texts of which the second begins with a letter; alone, at the end
    of a text or before a digit some tokenizers write it otherwise.
    """

    tokenizer: PreTrainedTokenizerBase
    header: np.ndarray
    turn: np.ndarray
    end: np.ndarray
    following: np.ndarray
    separator: np.ndarray
    eos: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Marks:
        """Return the marks of a tokenizer."""
        fixed = prompting.HEADER, prompting.TURN, prompting.END, prompting.FOLLOWING
        header, turn, end, following, letter, between = (
            token_ids(tokenizer, text, allow_special=True)[0].numpy()
            for text in (*fixed, "x", f"x{prompting.SEPARATOR}x")
        )
        eos = tokenizer.eos_token_id
        separator = between[len(letter) : len(between) - len(letter)]
        return cls(tokenizer, header, turn, end, following, separator, int(end[0] if eos is None else eos))

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids [T] of a text, as it is tokenised for a question."""
        return token_ids(self.tokenizer, text, allow_special=True)[0].numpy()

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of token ids [T]."""
        return str(self.tokenizer.decode(ids))


class Draw(Protocol):
    """What the trainer lets a task draw for one sample."""

    segment: int
    """Tokens of a segment."""

    def text(self) -> np.ndarray:
        """Return at most `Task.window` consecutive tokens of one document."""

    def row(self) -> Row:
        """Return a question with its context and answer."""

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        """Return another row, never one whose context has that hash."""

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        """Return a row whose context has that hash."""

    def prose(self, rng: np.random.Generator) -> np.ndarray | None:
        """Return a stretch of ordinary text; None where the recipe has no source of text."""


@dataclass
class Task:
    """A kind of sample. A subclass's fields are its options in a recipe.

    Args:
        share: the task's part of the batches, relative to the others'.
        lengths, rates: of its batches; the stage's for none.
    """

    share: float = 1.0
    lengths: list[int] = field(default_factory=list)
    rates: list[int] = field(default_factory=list)
    name: ClassVar[str] = ""
    reads: ClassVar[str | None] = None
    """What it draws from: `text`, `questions` or nothing."""
    rate_options: ClassVar[tuple[str, ...]] = ("rates",)
    """Its options that name rates of the model."""
    pass_options: ClassVar[tuple[str, ...]] = ()
    """Its options that, unless 0, make batches differ in how many passes of the decoder they take."""
    fixed_texts: ClassVar[tuple[str, ...]] = ()
    """What it writes that need not occur in any source."""

    def __post_init__(self) -> None:
        self.check(is_number(self.share) and 0 < self.share < np.inf, "share", "a number above 0")
        for key in ("lengths", "rates"):
            self.check(all(value > 0 for value in getattr(self, key)), key, "positive whole numbers")

    def check(self, good: bool, key: str, wanted: str) -> None:
        """Raise InputError that names the option `key` and what is wanted of it, unless it is good."""
        if not good:
            raise InputError(f"tasks.{self.name}.{key} must be {wanted}, not {getattr(self, key)!r}.")

    def window(self, length: int, targets: int) -> int:
        """Return how much a sample draws: tokens of text, or the most tokens of a question and its passage together."""
        return length

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        """Make one sample.

        Args:
            draw: gives this sample's text or question.
            rng: of this sample alone; nothing else is random.
            length: the most context tokens, all pieces together.
            targets: the most decoder tokens, prompt and target together; more than 16.
            marks: text ↔ tokens, and the chat form's marks.
        """
        raise NotImplementedError

    def at(self, rate: int, sample: Sample) -> Sample:
        """Return a sample as it is in a batch of one rate; samples are drawn for all rates alike."""
        return sample


@dataclass
class TextTask(Task):
    """A task whose prompt is the first tokens of what is to be written."""

    prompt_tokens: int = 10
    reads: ClassVar[str | None] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(is_count(self.prompt_tokens), "prompt_tokens", "a positive whole number")

    def begin(self, context: np.ndarray, written: np.ndarray) -> Sample:
        """Return a sample that gives the first tokens of `written`, of at least two; one is always left to learn."""
        given = min(self.prompt_tokens, len(written) - 1)
        return Sample((context,), written[:given], written[given:], self.name)


def describe(sample: Sample, tokenizer: PreTrainedTokenizerBase, most: int = 160) -> str:
    """Return a sample for people to read: its parts as text, pieces longer than `most` tokens without their middle."""
    lines = [sample.task]
    named = [(f"context {i}", piece) for i, piece in enumerate(sample.pieces, 1)]
    for name, ids in (*named, ("prompt", sample.prompt), ("target", sample.target)):
        half = most // 2
        parts = [ids] if len(ids) <= most or not name.startswith("context") else [ids[:half], ids[-half:]]
        text = " […] ".join(repr(tokenizer.decode(part)) for part in parts)
        lines.append(f"  {name} ({len(ids)} tokens): {text}")
    return "\n".join(lines)


def is_count(value: object) -> bool:
    """Return whether a value is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Return whether a value is a number, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_share(value: Any) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def at_least(tokens: int, text: np.ndarray, marks: Marks) -> np.ndarray:
    """Return a text, lengthened by end tokens in the rare case that it is too short for a sample."""
    missing = max(0, tokens - len(text))
    return np.pad(text, (0, missing), constant_values=marks.eos) if missing else text
