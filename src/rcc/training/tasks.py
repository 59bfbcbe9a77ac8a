"""What a model is trained on: a task turns what was drawn from the sources into a sample.

| task             | the encoder reads            | the decoder's prompt     | the target                     |
|------------------|------------------------------|--------------------------|--------------------------------|
| `reconstruction` | a text                       | the opening of a span    | the rest of the span           |
| `continuation`   | a text                       | the token that follows   | what follows that              |
| `instruction`    | passages and, but in `human` | as `rcc ask` prompts     | the answer, in `reconstruct`   |
|                  | mode, the question           |                          | behind the question            |
| `cloze`          | a text and, but in `human`   | as `rcc ask` prompts     | the name or number that is     |
|                  | mode, the question           |                          | missing in a sentence of it    |
| `passkey`        | filler around a number       | the question for it      | the number                     |

Samples have exactly the form in which :mod:`rcc.text.prompting` asks. All chance comes from the generator that a
task is given, so a sample is a pure function of it and of what was drawn. A new task is one class and its entry in
`TASKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.corpus import Row
from ..errors import InputError
from ..text import prompting
from ..text.tokens import token_ids

UNANSWERABLE = "The text does not say."
"""The answer to a question whose passage was left out."""
QUOTE = "Quote the sentence that answers this: {question}"
"""What asks for the sentence in which an answer stands."""
QUOTED = (4, 50)  # words of a sentence that can be asked for
OPENING = (
    "One important fact is hidden in this long and tedious text. Find it and keep it in mind: it will be asked for."
)
FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
HIDDEN = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
FIXED_TEXTS = (
    *(UNANSWERABLE, QUOTE.format(question="x"), OPENING, *FILLER, HIDDEN.format(key="0123456789"), QUESTION),
    *(f" {digit}" for digit in "0123456789"),
    *("What is missing here? ____", "When", "In what year", "How many", "What number", "What", "Which", "Where", "Who"),
)
"""What tasks write that need not stand in any source."""
REPEATED = (3, 12)  # tokens of a stretch that stands in two places
STRETCH = (60, 260)  # tokens of a distracting stretch of prose, about as long as passages are
GAP = 96  # tokens of a context that the question of `cloze` may take
ALLOWANCE = 8  # tokens of a room for passage and question that the separator may take


@dataclass(frozen=True)
class Sample:
    """What a model reads and learns to write; token ids, int64.

    Attributes:
        pieces: the texts of the context; each starts a segment of its own.
        prompt: what the decoder is given, at least one token.
        target: what it learns to write behind it, at least one token.
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
        """Token ids [T] in front of the target, for a decoder that reads the context as it is."""
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
        """The marks of a tokenizer."""
        fixed = prompting.HEADER, prompting.TURN, prompting.END, prompting.FOLLOWING
        header, turn, end, following, letter, between = (
            token_ids(tokenizer, text, allow_special=True)[0].numpy()
            for text in (*fixed, "x", f"x{prompting.SEPARATOR}x")
        )
        eos = tokenizer.eos_token_id
        separator = between[len(letter) : len(between) - len(letter)]
        return cls(tokenizer, header, turn, end, following, separator, int(end[0] if eos is None else eos))

    def encode(self, text: str) -> np.ndarray:
        """Text → token ids [T], as `rcc ask` tokenises it."""
        return token_ids(self.tokenizer, text, allow_special=True)[0].numpy()

    def decode(self, ids: np.ndarray) -> str:
        """Token ids [T] → text."""
        return str(self.tokenizer.decode(ids))


class Draw(Protocol):
    """What the trainer lets a task draw for one sample."""

    segment: int
    """Tokens of a segment."""

    def text(self) -> np.ndarray:
        """At most `Task.window` consecutive tokens of one document."""

    def row(self) -> Row:
        """A question with its context and answer."""

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        """Another row, never one whose context is that of that hash."""

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        """A row whose context is that of that hash."""

    def prose(self, rng: np.random.Generator) -> np.ndarray | None:
        """A stretch of ordinary text; None where the recipe has no source of text."""


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

    def __post_init__(self) -> None:
        self._check(_number(self.share) and 0 < self.share < np.inf, "share", "a number above 0")
        for key in ("lengths", "rates"):
            self._check(all(value > 0 for value in getattr(self, key)), key, "positive whole numbers")

    def _check(self, good: bool, key: str, wanted: str) -> None:
        if not good:
            raise InputError(f"tasks.{self.name}.{key} must be {wanted}, not {getattr(self, key)!r}.")

    def window(self, length: int, targets: int) -> int:
        """How much a sample draws: tokens of text, or the most tokens of a question and its passage together."""
        return length

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        """One sample.

        Args:
            draw: gives this sample's text or question.
            rng: of this sample alone; nothing else is random.
            length: the most context tokens, all pieces together.
            targets: the most decoder tokens, prompt and target together; more than 16.
        """
        raise NotImplementedError

    def at(self, rate: int, sample: Sample) -> Sample:
        """What holds of a sample, which is drawn for all rates alike, in a batch of this one."""
        return sample


@dataclass
class _TextTask(Task):
    """A task whose prompt is the first tokens of what is to be written."""

    prompt_tokens: int = 10
    reads: ClassVar[str | None] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(_count(self.prompt_tokens), "prompt_tokens", "a positive whole number")

    def _split(self, context: np.ndarray, written: np.ndarray) -> Sample:
        """A sample from at least two tokens to be written; one of them is always left to learn."""
        given = min(self.prompt_tokens, len(written) - 1)
        return Sample((context,), written[:given], written[given:], self.name)


@dataclass
class Reconstruction(_TextTask):
    """Write a random span of the context, given its first tokens ("Training" in the paper).

    Args:
        prompt_tokens: how many are given.
        spans: the span is cut at random places into 1 to this many, which are written in random order, each behind its
            own first tokens: from a third of `prompt_tokens` on. To go on in the text one need only know where one
            is; each new span has to be found by what it says, as the answer to a question has.
        wrong: how many of the tokens that it has learnt to write the decoder then reads as others of the text, 0 to 1:
            as it will its own errors, behind which it has to keep its place.
        predicted: how often the decoder reads, in place of all other tokens that it has learnt to write, those that it
            predicts there itself: its own errors, as far as one pass over the text shows them (parallel scheduled
            sampling, Mihaylova and Martins 2019). Costs a pass of the decoder more.
        predicted_rates: the rates at which it does that; all for none. Where most of what is predicted is wrong,
            nothing can be learnt from it.
        passes: these are of 1 to this many passes, each behind the predictions of the one before: errors that follow
            from errors, as where it writes freely.
        repeated: how often stretches of the text also stand in a second place, one of 3 to 12 tokens (`REPEATED`) for
            every 64, in place of what was there. What follows a stretch is then only known to who keeps track of where
            he is: by the words alone a decoder goes on in the other place, or in circles.
    """

    spans: int = 1
    wrong: float = 0.0
    predicted: float = 0.0
    predicted_rates: list[int] = field(default_factory=list)
    passes: int = 1
    repeated: float = 0.0
    name: ClassVar[str] = "reconstruction"
    rate_options: ClassVar[tuple[str, ...]] = ("rates", "predicted_rates")
    pass_options: ClassVar[tuple[str, ...]] = ("predicted",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(_count(self.spans), "spans", "a positive whole number")
        self._check(_share(self.wrong), "wrong", "a share from 0 to 1")
        self._check(_share(self.predicted), "predicted", "a probability from 0 to 1")
        self._check(_count(self.passes), "passes", "a positive whole number")
        self._check(_share(self.repeated), "repeated", "a probability from 0 to 1")

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        text = _at_least(2, draw.text()[:length], marks)
        if self.repeated and rng.random() < self.repeated:
            text = _repeat(text, rng)
        size = min(targets, len(text))
        start = int(rng.integers(len(text) - size + 1))
        written = text[start : start + size]
        cuts = min(int(rng.integers(self.spans)), size // 2 - 1)  # each span has at least two tokens
        places = np.sort(rng.choice(size - cuts - 2, cuts, replace=False)) + np.arange(cuts) + 2
        spans = np.split(written, places)
        first, *others = (spans[i] for i in rng.permutation(len(spans)))
        sample = self._split(text, first)
        parts = [np.full(len(sample.target), True)]
        for span in others:
            given = int(rng.integers(-(-self.prompt_tokens // 3), self.prompt_tokens + 1))
            parts.append(np.arange(len(span)) >= min(given, len(span) - 1))
        target, learnt = np.concatenate([sample.target, *others]), np.concatenate(parts)
        read, predicted, chosen = None, None, np.full(len(target), False)
        if self.wrong:
            chosen = learnt & (rng.random(len(target)) < self.wrong)
            read = np.where(chosen, rng.choice(text, len(target)), target)
        if self.predicted and rng.random() < self.predicted:
            predicted = int(rng.integers(1, self.passes + 1)) * (learnt & ~chosen)
        return replace(sample, target=target, learnt=learnt, read=read, predicted=predicted)

    def at(self, rate: int, sample: Sample) -> Sample:
        if self.predicted_rates and rate not in self.predicted_rates:
            return replace(sample, predicted=None)
        return sample


def _repeat(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A text some of whose stretches stand in the place of others."""
    repeated = text.copy()
    for _ in range(len(text) // 64):
        size = int(rng.integers(REPEATED[0], REPEATED[1] + 1))
        source, place = rng.integers(len(text) - size, size=2)
        repeated[place : place + size] = text[source : source + size]
    return repeated


@dataclass
class Continuation(_TextTask):
    """Write what follows the context.

    Args:
        prompt_tokens: how many of the tokens that follow are given.
    """

    prompt_tokens: int = 1
    name: ClassVar[str] = "continuation"

    def window(self, length: int, targets: int) -> int:
        return length + targets

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        text = _at_least(3, draw.text()[: length + targets], marks)
        # of a text that is shorter than the window a quarter is left to be written, where targets allow it
        left = max(len(text) - length, min(targets, max(2, -(-len(text) // 4))))
        return self._split(text[:-left], text[-left:])


@dataclass
class Instruction(Task):
    """Answer a question about a passage among distracting ones ("Instruction reconstruction" in the paper).

    A passage that does not fit is cut at its end. A question too long for the decoder is asked in `compress` mode; one
    that takes more than half of the context is cut there.

    Args:
        modes: {mode of :mod:`rcc.text.prompting`: how often, relative to the others}.
        before: how often the question that the encoder reads stands before the passages rather than behind them.
        own_segment: how often it is a piece of its own, as `rcc ask` asks a stored context. Where that alone would
            cut the passage it is not.
        distractors: how often distracting passages fill the context, half of them prose.
        unanswerable: how often the passage is left out, and the answer is `UNANSWERABLE`.
        turns: in `human` mode, up to how many questions are asked of a context, one after the other as in `rcc chat`:
            of any passage in it, as many as the targets have room for. A context costs the same to read for all. None
            is asked whose answer stands in what was asked and answered before it.
        quoted: how often the sentence in which the answer stands is asked for in its place (`QUOTE`), where just one
            sentence of the passage holds it: so a question has the decoder write some thirty tokens of the text and
            not three.
        renamed: how often names and numbers are exchanged for others, the same ones in passages, questions and answers:
            so that a question that is seen again can only be answered from its passage, not by heart.
    """

    modes: dict[str, float] = field(default_factory=lambda: {"human": 2.0, "reconstruct": 1.0, "compress": 1.0})
    before: float = 0.5
    own_segment: float = 0.5
    distractors: float = 1.0
    unanswerable: float = 0.0
    turns: int = 1
    quoted: float = 0.0
    renamed: float = 0.0
    name: ClassVar[str] = "instruction"
    reads: ClassVar[str | None] = "questions"

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.modes, dict) and set(self.modes) <= set(prompting.MODES)
        good = good and all(_number(w) and 0 <= w < np.inf for w in self.modes.values())
        wanted = f"weights, not all of them 0, of {', '.join(prompting.MODES)}"
        self._check(good and sum(self.modes.values()) > 0, "modes", wanted)
        for key in ("before", "own_segment", "distractors", "unanswerable", "quoted", "renamed"):
            self._check(_share(getattr(self, key)), key, "a probability from 0 to 1")
        self._check(_count(self.turns), "turns", "a positive whole number")

    def window(self, length: int, targets: int) -> int:
        return max(1, length - ALLOWANCE)

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        if self.renamed and rng.random() < self.renamed:
            draw = _Renamed(draw, rng, marks)
        row = self._row(draw, rng, length, marks)
        weights = np.array(list(self.modes.values()), dtype=float)
        mode = list(self.modes)[rng.choice(len(weights), p=weights / weights.sum())]
        before, own, omit = (rng.random() < p for p in (self.before, self.own_segment, self.unanswerable))
        row = row if omit else self._quote(row, rng, marks)
        text = marks.decode(row.question)

        asked = prompting.build(text, mode)
        prompt = marks.encode(asked.decoder_text)
        if len(prompt) >= targets:
            mode, asked = "compress", prompting.build(text, "compress")
            prompt = marks.encode(asked.decoder_text)
        answer = marks.encode(UNANSWERABLE) if omit else row.answer
        written = (row.question, marks.turn, answer) if mode == "reconstruct" else (answer,)
        target = np.concatenate([*written, marks.end])[: targets - len(prompt)]

        learnt = None
        if mode == "human":
            context, passages = self._context(draw, rng, row, length, omit, marks)
            pieces = [context]
            if self.turns > 1:
                more = self._following(draw, rng, row, passages, marks)
                target, learnt = self._conversation(target, row, more, targets - len(prompt), marks)
        else:
            apart = marks.encode(text + prompting.SEPARATOR if before else asked.encoder_text)[: length // 2]
            joined = np.concatenate([row.question, marks.separator])[: length // 2] if before else apart
            segments = -(-length // draw.segment) - -(-len(apart) // draw.segment)
            room = min(length - len(apart), segments * draw.segment)
            own = own and room >= max(1, min(len(row.context), length - len(joined)))
            context, _ = self._context(draw, rng, row, room if own else length - len(joined), omit, marks)
            pieces = [apart if own else joined, context] if before else [context, apart if own else joined]
            pieces = pieces if own else [np.concatenate(pieces)]

        # a teacher is asked in the form it knows; behind `reconstruct`'s prompt it would have to guess the question
        chat = (marks.header, context, marks.separator, row.question, marks.turn)
        plain = None if mode == "reconstruct" else np.concatenate(chat)
        return Sample(tuple(pieces), prompt, target, self.name, plain, learnt)

    def _row(self, draw: Draw, rng: np.random.Generator, length: int, marks: Marks) -> Row:
        """What is asked, and of which passage."""
        return draw.row()

    def _context(
        self, draw: Draw, rng: np.random.Generator, row: Row, room: int, omit: bool, marks: Marks
    ) -> tuple[np.ndarray, dict[int, bool]]:
        """The passage at a random place among distracting ones, at most `room` tokens in all; and for the hash of each
        passage with questions whether it is whole."""
        fill = rng.random() < self.distractors
        whole = {} if omit else {row.hash: len(row.context) <= room}
        passages: list[np.ndarray] = []
        left = room if omit else room - len(row.context) - len(marks.separator)
        while left > 0 and (fill or (omit and not passages)):
            prose = draw.prose(rng) if rng.random() < 0.5 else None
            if prose is None:
                other = draw.other(rng, row.hash)
                passage = other.context[:left]
                whole[other.hash] = whole.get(other.hash, False) or len(other.context) <= left
            else:
                passage = prose[: min(left, int(rng.integers(*STRETCH)))]
            passages.append(passage)
            left -= len(passage) + len(marks.separator)
        if not omit:
            passages.insert(int(rng.integers(len(passages) + 1)), row.context[:room])
        joined = [part for passage in passages for part in (marks.separator, passage)]
        return np.concatenate(joined[1:]), whole

    def _following(
        self, draw: Draw, rng: np.random.Generator, row: Row, passages: dict[int, bool], marks: Marks
    ) -> Iterator[Row]:
        """More questions of a context that holds these passages; some may be the same."""
        whole = [key for key, all_of_it in passages.items() if all_of_it]
        for _ in range(2 * self.turns):
            if rng.random() < self.unanswerable:
                other = draw.other(rng, row.hash)
                if other.hash not in passages:
                    yield replace(other, answer=marks.encode(UNANSWERABLE))
            elif whole:
                yield self._quote(draw.same(rng, whole[int(rng.integers(len(whole)))]), rng, marks)

    def _quote(self, row: Row, rng: np.random.Generator, marks: Marks) -> Row:
        """Sometimes, the row that asks for the sentence in which its answer stands."""
        if not (self.quoted and rng.random() < self.quoted):
            return row
        text, answer = marks.decode(row.context), marks.decode(row.answer)
        holding = [sentence for sentence in _SENTENCE.findall(text) if answer in sentence]
        sentence = holding[0].strip() if len(holding) == 1 else ""
        if not _quotable(sentence):
            return row
        question = QUOTE.format(question=marks.decode(row.question))
        return replace(row, question=marks.encode(question), answer=marks.encode(sentence))

    def _conversation(
        self, target: np.ndarray, row: Row, more: Iterator[Row], room: int, marks: Marks
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first answer and, in `room` tokens, further questions and answers; and which tokens are learnt."""
        parts, learnt = [target], [True]
        asked, said = {row.question.tobytes()}, marks.decode(np.concatenate([row.question, target]))
        for other in more:
            question = np.concatenate([marks.following, other.question, marks.turn])
            answer = np.concatenate([other.answer, marks.end])
            text = marks.decode(other.answer)
            if other.question.tobytes() in asked or (text in said and text != UNANSWERABLE):
                continue
            if len(asked) == self.turns or sum(map(len, parts)) + len(question) + len(answer) > room:
                break
            asked.add(other.question.tobytes())
            said += marks.decode(np.concatenate([other.question, answer]))
            parts += [question, answer]
            learnt += [False, True]
        return np.concatenate(parts), np.repeat(learnt, [len(part) for part in parts])


class _Renamed:
    """A draw whose rows have other names and numbers, the same ones in all rows of a passage."""

    def __init__(self, draw: Draw, rng: np.random.Generator, marks: Marks):
        self.segment, self.text, self.prose = draw.segment, draw.text, draw.prose
        self._draw, self._rng, self._marks = draw, rng, marks
        self._passages: dict[int, tuple[np.ndarray, dict[str, str]]] = {}

    def row(self) -> Row:
        return self._rename(self._draw.row())

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        return self._rename(self._draw.other(rng, not_hash))

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        return self._rename(self._draw.same(rng, context_hash))

    def _rename(self, row: Row) -> Row:
        if row.hash not in self._passages:
            text = self._marks.decode(row.context)
            strangers = (self._marks.decode(self._draw.other(self._rng, row.hash).context) for _ in range(3))
            new = others(text, " ".join(strangers), self._rng)
            self._passages[row.hash] = self._marks.encode(exchange(text, new)), new
        context, new = self._passages[row.hash]
        question, answer = (
            self._marks.encode(exchange(self._marks.decode(ids), new)) for ids in (row.question, row.answer)
        )
        return replace(row, context=context, question=question, answer=answer)


@dataclass
class Cloze(Instruction):
    """Find what is missing in a sentence of the text, a name or a number: by rule, so that any text gives questions
    whose answer stands in it.

    The options are those of `instruction`; the whole context is one passage, and nothing is left out of it.

    Args:
        worded: how often what is missing is asked for in words (who, what, where, when, how many) rather than shown as
            a gap: some words of the sentence, not all and not always in their order, so that the question does not
            stand in the text as it is.
    """

    distractors: float = 0.0
    worded: float = 0.0
    name: ClassVar[str] = "cloze"
    reads: ClassVar[str | None] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("distractors", "unanswerable", "renamed"):
            self._check(getattr(self, key) == 0, key, "left out: there are no other passages")
        self._check(_share(self.worded), "worded", "a probability from 0 to 1")

    def window(self, length: int, targets: int) -> int:
        return max(32, length - GAP)

    def _row(self, draw: Draw, rng: np.random.Generator, length: int, marks: Marks) -> Row:
        return self._about(_at_least(2, draw.text(), marks), rng, marks)

    def _following(
        self, draw: Draw, rng: np.random.Generator, row: Row, passages: dict[int, bool], marks: Marks
    ) -> Iterator[Row]:
        for _ in range(2 * self.turns):
            yield self._about(row.context, rng, marks)

    def _about(self, text: np.ndarray, rng: np.random.Generator, marks: Marks) -> Row:
        quoted = self.quoted > 0 and rng.random() < self.quoted
        worded = self.worded > 0 and rng.random() < self.worded
        question, answer = cloze(marks.decode(text), rng, worded, quoted)
        return Row(text, marks.encode(question), marks.encode(answer), "", 0)

    def _quote(self, row: Row, rng: np.random.Generator, marks: Marks) -> Row:
        return row  # see _about, which knows the sentence


def others(text: str, strangers: str, rng: np.random.Generator) -> dict[str, str]:
    """For the words of names in a text those of another text, as far as there are enough, and for numbers ones of the
    same form. No two names become one."""
    names, pool = _name_words(text), _name_words(strangers)
    pool = [word for word in pool if word not in names]
    new = dict(zip(names, (str(word) for word in rng.permutation(pool)), strict=False))
    for number in dict.fromkeys(_NUMBER.findall(text)):
        if _YEAR.fullmatch(number):
            new[number] = str(rng.integers(1500, 2020))
        else:
            new[number] = re.sub(r"\d", lambda _: str(rng.integers(10)), number)
            new[number] = re.sub(r"^0", "1", new[number])
    return new


def exchange(text: str, new: dict[str, str]) -> str:
    """A text with other words and numbers in the place of some."""
    return _EXCHANGED.sub(lambda found: new.get(found[0], found[0]), text)


def _name_words(text: str) -> list[str]:
    """The capitalised words of the names in a text, each once; none that also stands there in lower case."""
    words = [word for name in _NAME.findall(text) for word in name.split()]
    plain = set(_WORD_ANY.findall(text))
    return [word for word in dict.fromkeys(words) if not word.endswith(".") and word.lower() not in plain]


_SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]")
_NAME = re.compile(r"(?<=[a-z,;] )(?:[A-Z][a-z]+\.? )*[A-Z][a-z]{2,}")
_NUMBER = re.compile(r"\b\d+(?:[.,]\d+)*\b")
_PHRASE = re.compile(  # a noun with what describes it, as far as can be told without knowing words
    r"(?<=\b(?:the|his|her|its) )(?:[a-z]+ ){0,2}[a-z]{4,}"
    r"(?=[.,;]|\s(?:of|in|on|at|to|that|was|were|is|are|had|with|from|for|by)\b)"
)
_WORD = re.compile(r"\b[a-z]{4,}\b")
_WORD_ANY = re.compile(r"\b[a-z]+\b")
_EXCHANGED = re.compile(rf"\b[A-Z][a-z]{{2,}}\b|{_NUMBER.pattern}")
_YEAR = re.compile(r"1\d{3}|20\d\d")
_PLACE = re.compile(r"\b(?:in|at|from|near|to|into|through)$")
_CLAUSE = re.compile(r"[,;:()—\"“”]| - ")
_GAP = "____"


def askable(text: str, rng: np.random.Generator, phrases: bool = False) -> tuple[int, int, int, int]:
    """Something in a text that can be asked for: a name within a sentence or a number where there is one, else a word.

    Args:
        text: any; its first and last sentences, which may be cut, and those of fewer than six words are taken only
            where there are no others.
        phrases: four times in ten, what follows a "the" or the like instead, where there is such a one.

    Returns:
        Where its sentence begins, where it begins and ends itself, and where the sentence ends, in characters.
    """
    sentences = [match.span() for match in _SENTENCE.finditer(text)]
    inner = [(a, b) for a, b in sentences[1:-1] if len(text[a:b].split()) >= 6] or sentences or [(0, len(text))]
    some = [re.compile(f"{_NAME.pattern}|{_NUMBER.pattern}"), _WORD, re.compile(r"\S+")]
    if phrases:
        some.insert(int(rng.random() < 0.6), _PHRASE)
    for pattern in some:
        found = [match.span() for low, high in inner for match in pattern.finditer(text, low, high)]
        if found:
            break
    else:
        found = [(0, len(text))]
    start, end = found[int(rng.integers(len(found)))]
    low = next((a for a, b in inner if a <= start < b), 0)
    high = next((b for a, b in inner if a <= start < b), len(text))
    return low, start, end, high


def cloze(text: str, rng: np.random.Generator, worded: bool = False, quoted: bool = False) -> tuple[str, str]:
    """A question about a sentence of a text, and its answer, which stands there.

    Args:
        text: as :func:`askable` takes it.
        worded: ask in words; otherwise the question is the sentence with a gap.
        quoted: ask in words, and for the whole sentence, where it has as many words as `QUOTED` says.
    """
    low, start, end, high = askable(text, rng, phrases=worded or quoted)
    before, after = text[low:start], text[end:high]
    sentence = text[low:high].strip()
    quoted = quoted and _quotable(sentence)
    if worded or quoted:
        question = _in_words(before, text[start:end], after, rng)
        return (QUOTE.format(question=question), sentence) if quoted else (question, text[start:end])
    before = " ".join(before.split()[-12:])  # long sentences in part: a question stays short
    after = " ".join(after.split()[:12])
    gap = f"{before} {_GAP}" + ("" if after[:1] in ",.;:!?)'’" else " ") + after
    return f"What is missing here? {gap.strip()}", text[start:end]


def _quotable(sentence: str) -> bool:
    return QUOTED[0] <= len(sentence.split()) <= QUOTED[1]


def _in_words(before: str, answer: str, after: str, rng: np.random.Generator) -> str:
    """A question in words for an answer and what stands around it in its sentence: noisy, as a rule ungrammatical."""
    asks: tuple[str, ...]
    if _YEAR.fullmatch(answer):
        asks = ("When", "In what year")
    elif _NUMBER.fullmatch(answer):
        asks = ("How many", "What number")
    elif not answer[:1].isupper():
        asks = ("What", "Which")
    elif _PLACE.search(before.rstrip()):
        asks = ("Where", "What")
    else:
        asks = ("Who", "Who", "What")
    clauses = _CLAUSE.split(before)[-1].split(), _CLAUSE.split(after)[0].split()
    if sum(map(len, clauses)) < 6:  # too little to find it by
        clauses = before.split(), after.split()
    left, right = clauses[0][-10:], clauses[1][:10]
    words = [*right, *left] if rng.random() < 0.3 else [*left, *right]
    lost = rng.random(len(words)) < 0.4 * rng.random()
    kept = [word for word, gone in zip(words, lost, strict=True) if not gone or len(words) < 8]
    return f"{asks[int(rng.integers(len(asks)))]} {' '.join(kept).strip(' .,;:!?')}?"


@dataclass
class Passkey(Task):
    """Find a number of five digits in a text that says nothing else (the paper's passkey retrieval)."""

    name: ClassVar[str] = "passkey"

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        key = int(rng.integers(10_000, 100_000))
        context = passkey_ids(key, rng.random(), length, marks.encode)
        prompt, target = marks.encode(QUESTION), np.append(marks.encode(f" {key}."), marks.eos)
        if len(prompt) + len(target) > targets:
            raise InputError(
                f"target_tokens={targets} has no room for the passkey's question and answer:"
                f" give at least {len(prompt) + len(target)}."
            )
        return Sample((context,), prompt, target, self.name)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Reconstruction, Continuation, Instruction, Cloze, Passkey)}
"""The tasks by the names that recipes give them."""


def passkey_text(key: int, position: int, sentences: int) -> str:
    """The text that hides a number: that many sentences of filler, `position` of them before it."""
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    return "".join([OPENING, *filler[:position], _passkey(key), *filler[position:]])


def passkey_ids(key: int, where: float, length: int, encode: Callable[[str], np.ndarray]) -> np.ndarray:
    """Token ids of :func:`passkey_text` with as much filler as `length` tokens hold; fast at any length.

    Args:
        where: how much of the filler stands before the number, 0 to 1; cut at a whole sentence.
        encode: text → token ids [T].

    Raises:
        InputError: `length` leaves no room for the number and the opening line.
    """
    filler = [encode(sentence) for sentence in FILLER]
    return hide(encode(OPENING), [(where, encode(_passkey(key)))], filler, length)[0]


def hide(
    opening: np.ndarray, hidden: Sequence[tuple[float, np.ndarray]], filler: Sequence[np.ndarray], length: int
) -> tuple[np.ndarray, list[int]]:
    """An opening and as many sentences of filler, again and again, as `length` tokens hold, with others among them.

    Args:
        opening: [T] token ids.
        hidden: how much of the filler stands before each sentence that is not filler, 0 to 1, cut at a whole
            sentence; and its token ids [T].
        filler: the token ids [T] of each sentence.

    Returns:
        Token ids [T], less than a sentence of filler fewer than `length`; and the place of each hidden sentence.

    Raises:
        InputError: `length` leaves no room for the opening and what is to be hidden.
    """
    room = length - len(opening) - sum(len(sentence) for _, sentence in hidden)
    if room < 0:
        raise InputError(f"{length} tokens have no room for the passkey's text: give at least {length - room}.")
    ends = np.cumsum([0, *map(len, filler)])  # where the sentences of one round start, and its size
    rounds, rest = divmod(room, int(ends[-1]))
    sentences = len(filler) * rounds + int(np.searchsorted(ends, rest, "right")) - 1

    def size(sentences: int) -> int:
        return int(sentences // len(filler) * ends[-1] + ends[sentences % len(filler)])

    tokens = np.resize(np.concatenate(filler), size(sentences))
    parts, places, done, written = [opening], [0] * len(hidden), 0, len(opening)
    for i in sorted(range(len(hidden)), key=lambda i: hidden[i][0]):
        where, sentence = hidden[i]
        before = size(min(int(where * (sentences + 1)), sentences))
        parts += [tokens[done:before], sentence]
        places[i] = written + before - done
        written, done = places[i] + len(sentence), before
    return np.concatenate([*parts, tokens[done:]]), places


def _passkey(key: int) -> str:
    return HIDDEN.format(key=key)


def collate(samples: Sequence[Sample], pad: int, teacher: bool = False) -> dict[str, Tensor]:
    """B samples → the arguments of the training pass, all int64 and padded on the right.

    Returns:
        context_ids: [B, T].
        context_mask: [B, T], the number of the piece that a token belongs to, from 1, and 0 at padding; absent where
            every row is one piece and all are of the same length.
        input_ids: [B, Q] prompt and target.
        labels: [B, Q] as `input_ids` at targets, elsewhere -100; the model shifts them.
        logits_to_keep: [U] the positions of 0 … Q − 1 behind which a target of any row stands.
        predicted: [B, Q] n > 0 where the decoder reads its own prediction of n passes; absent where it does so nowhere.
        teacher_ids, teacher_mask: with `teacher`, [B, E + Q]: what the teacher reads and the target, which stands E
            columns behind its place in `input_ids`; padded on both sides.
    """
    contexts = [np.concatenate(s.pieces) for s in samples]
    batch = {"context_ids": _padded(contexts, pad), **_written([(s.prompt, s) for s in samples], pad)}
    if len({len(c) for c in contexts}) > 1 or any(len(s.pieces) > 1 for s in samples):
        numbers = [np.repeat(np.arange(1, len(s.pieces) + 1), [len(p) for p in s.pieces]) for s in samples]
        batch["context_mask"] = _padded(numbers, 0)
    if any(s.predicted is not None for s in samples):
        rows = [np.zeros(len(s.prompt) + len(s.target), dtype=np.int64) for s in samples]
        for row, s in zip(rows, samples, strict=True):
            row[len(s.prompt) :] = 0 if s.predicted is None else s.predicted
        batch["predicted"] = _padded(rows, 0)
    if teacher:
        plain = [s.uncompressed() for s in samples]
        extra = [len(p) - len(s.prompt) for p, s in zip(plain, samples, strict=True)]
        shift = max(0, *extra)
        ids = torch.full((len(samples), shift + batch["labels"].shape[1]), pad)
        mask = torch.zeros_like(ids)
        for b, sample in enumerate(samples):
            read = torch.from_numpy(np.concatenate([plain[b], sample.target]))
            start = shift - extra[b]
            ids[b, start : start + len(read)], mask[b, start : start + len(read)] = read, 1
        batch |= {"teacher_ids": ids, "teacher_mask": mask}
    return batch


def collate_plain(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """B samples → the arguments of a training pass of the decoder alone, [B, Q] each, padded on the right.

    Returns:
        input_ids: what stands in front of the target, and the target.
        attention_mask: 0 at padding.
        labels, logits_to_keep: as of :func:`collate`.
    """
    rows = [(s.uncompressed(), s) for s in samples]
    mask = [np.ones(len(read) + len(s.target), dtype=np.int64) for read, s in rows]
    return {**_written(rows, pad), "attention_mask": _padded(mask, 0)}


def _written(rows: Sequence[tuple[np.ndarray, Sample]], pad: int) -> dict[str, Tensor]:
    """What the decoder reads before the target of each of B samples → `input_ids`, `labels` and `logits_to_keep`."""
    read, learnt = [], []
    for before, sample in rows:
        target = sample.target if sample.learnt is None else np.where(sample.learnt, sample.target, -100)
        read.append(np.concatenate([before, sample.target if sample.read is None else sample.read]))
        learnt.append(np.concatenate([np.full(len(before), -100), target]))
    labels = _padded(learnt, -100)
    return {
        "input_ids": _padded(read, pad),
        "labels": labels,
        "logits_to_keep": (labels[:, 1:] != -100).any(0).nonzero()[:, 0],
    }


def read_exactly(sample: Sample) -> Sample:
    """Return a sample as a decoder learns from it that reads the context itself, at rate 1 of a direct prefix.

    Its pieces become one text, the form in which a question at hand is given; and there are no predictions of its own.
    """
    return replace(sample, pieces=(np.concatenate(sample.pieces),), predicted=None)


def describe(sample: Sample, tokenizer: PreTrainedTokenizerBase, most: int = 160) -> str:
    """A sample to be read by people: its parts as text, pieces longer than `most` tokens without their middle."""
    lines = [sample.task]
    named = [(f"context {i}", piece) for i, piece in enumerate(sample.pieces, 1)]
    for name, ids in (*named, ("prompt", sample.prompt), ("target", sample.target)):
        half = most // 2
        parts = [ids] if len(ids) <= most or not name.startswith("context") else [ids[:half], ids[-half:]]
        text = " […] ".join(repr(tokenizer.decode(part)) for part in parts)
        lines.append(f"  {name} ({len(ids)} tokens): {text}")
    return "\n".join(lines)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _at_least(tokens: int, text: np.ndarray, marks: Marks) -> np.ndarray:
    """A text, lengthened by end tokens in the rare case that it is too short for a sample."""
    missing = max(0, tokens - len(text))
    return np.pad(text, (0, missing), constant_values=marks.eos) if missing else text


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Rows of numbers → [B, longest] int64, padded on the right."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.from_numpy(row)
    return out
