"""The task `instruction`: answer questions about passages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from ...data.corpus import Row
from ...text import prompting
from .base import Draw, Marks, Sample, Task, is_count, is_number, is_share
from .patterns import SENTENCE
from .renaming import RenamedDraw

UNANSWERABLE = "The text does not say."
"""The answer to a question whose passage was left out."""
QUOTE = "Quote the sentence that answers this: {question}"
"""What asks for the sentence that holds an answer."""
QUOTED = (4, 50)
"""Words of a sentence that can be asked for."""
STRETCH = (60, 260)
"""Tokens of a distracting stretch of prose, about as long as passages are."""
ALLOWANCE = 8
"""Tokens of the room for passage and question that the separator may take."""


@dataclass
class Instruction(Task):
    """Answer a question about a passage among distracting ones ("Instruction reconstruction" in the paper).

    A passage that does not fit is cut at its end. A question too long for the decoder is asked in `compress` mode; one
    that takes more than half of the context is cut there.

    Args:
        modes: {mode of :mod:`rcc.text.prompting`: how often, relative to the others}.
        before: how often the question that the encoder reads stands before the passages rather than after them.
        own_segment: how often it is a piece of its own, as `rcc ask` asks a stored context. Where that alone would
            cut the passage it is not.
        distractors: how often distracting passages fill the context, half of them prose.
        unanswerable: how often the passage is left out, and the answer is `UNANSWERABLE`.
        turns: in `human` mode, up to how many questions are asked of a context, one after the other as in `rcc chat`:
            of any passage in it, as many as the targets have room for. A context costs the same to read for all. None
            is asked whose answer occurs in what was asked and answered before it.
        quoted: how often the sentence that holds the answer is asked for instead (`QUOTE`), if just one sentence of
            the passage holds it: so a question has the decoder write some thirty tokens of the text, not three.
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
    fixed_texts: ClassVar[tuple[str, ...]] = (UNANSWERABLE, QUOTE.format(question="x"))

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.modes, dict) and set(self.modes) <= set(prompting.MODES)
        good = good and all(is_number(w) and 0 <= w < np.inf for w in self.modes.values())
        wanted = f"weights, not all of them 0, of {', '.join(prompting.MODES)}"
        self.check(good and sum(self.modes.values()) > 0, "modes", wanted)
        for key in ("before", "own_segment", "distractors", "unanswerable", "quoted", "renamed"):
            self.check(is_share(getattr(self, key)), key, "a probability from 0 to 1")
        self.check(is_count(self.turns), "turns", "a positive whole number")

    def window(self, length: int, targets: int) -> int:
        """Return the most tokens of a question and its passage: what the separator leaves of the context."""
        return max(1, length - ALLOWANCE)

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        """Put a question to the passage that answers it, in one of the modes, with what the options add."""
        if self.renamed and rng.random() < self.renamed:
            draw = RenamedDraw(draw, rng, marks)
        row = self.draw_row(draw, rng, length, marks)
        weights = np.array(list(self.modes.values()), dtype=float)
        mode = list(self.modes)[rng.choice(len(weights), p=weights / weights.sum())]
        before, own, omit = (rng.random() < p for p in (self.before, self.own_segment, self.unanswerable))
        row = row if omit else self.quote(row, rng, marks)
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
                more = self.more_questions(draw, rng, row, passages, marks)
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

        # a teacher is asked in the form it knows; after `reconstruct`'s prompt it would have to guess the question
        chat = (marks.header, context, marks.separator, row.question, marks.turn)
        plain = None if mode == "reconstruct" else np.concatenate(chat)
        return Sample(tuple(pieces), prompt, target, self.name, plain, learnt)

    def draw_row(self, draw: Draw, rng: np.random.Generator, length: int, marks: Marks) -> Row:
        """Return a question, and the passage that it is about."""
        return draw.row()

    def _context(
        self, draw: Draw, rng: np.random.Generator, row: Row, room: int, omit: bool, marks: Marks
    ) -> tuple[np.ndarray, dict[int, bool]]:
        """Put the passage at a random position among distracting ones.

        Returns:
            At most `room` tokens [T] in all; and for the hash of each passage with questions, whether it is whole.
        """
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

    def more_questions(
        self, draw: Draw, rng: np.random.Generator, row: Row, passages: dict[int, bool], marks: Marks
    ) -> Iterator[Row]:
        """Yield more questions about a context that holds these passages; some may be the same."""
        whole = [key for key, all_of_it in passages.items() if all_of_it]
        for _ in range(2 * self.turns):
            if rng.random() < self.unanswerable:
                other = draw.other(rng, row.hash)
                if other.hash not in passages:
                    yield replace(other, answer=marks.encode(UNANSWERABLE))
            elif whole:
                yield self.quote(draw.same(rng, whole[int(rng.integers(len(whole)))]), rng, marks)

    def quote(self, row: Row, rng: np.random.Generator, marks: Marks) -> Row:
        """Return the row, or sometimes one that asks for the sentence that holds its answer."""
        if not (self.quoted and rng.random() < self.quoted):
            return row
        text, answer = marks.decode(row.context), marks.decode(row.answer)
        holding = [sentence for sentence in SENTENCE.findall(text) if answer in sentence]
        sentence = holding[0].strip() if len(holding) == 1 else ""
        if not can_be_quoted(sentence):
            return row
        question = QUOTE.format(question=marks.decode(row.question))
        return replace(row, question=marks.encode(question), answer=marks.encode(sentence))

    def _conversation(
        self, target: np.ndarray, row: Row, more: Iterator[Row], room: int, marks: Marks
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first answer and, in `room` tokens, further questions and answers; and which tokens are learnt."""
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


def can_be_quoted(sentence: str) -> bool:
    """Return whether a sentence has as many words as `QUOTED` says."""
    return QUOTED[0] <= len(sentence.split()) <= QUOTED[1]
