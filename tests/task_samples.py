"""Samples of training tasks with the small shipped model's tokenizer; shared by the tests of `rcc.training.tasks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings

import rcc
from rcc.data.corpus import Row
from rcc.text import prompting
from rcc.text.tokens import token_ids
from rcc.training.tasks import Instruction, Task
from rcc.training.tasks.base import Marks, Sample

TEXT = (Path(__file__).resolve().parents[1] / "examples/simple-susan.txt").read_text(encoding="utf-8")
TOKENIZER: Any = rcc.load_tokenizer("rcc-smollm2-135m")
MARKS = Marks.of(TOKENIZER)
PROSE = MARKS.encode(TEXT)
LOW, HIGH = 17, 3000  # ids of ordinary tokens
ROWS = [
    ("Ada went to Paris in 1843. It rained all day.", "Where did Ada go?", "Paris"),
    ("“Come in!” said the wolf – the door was open.", "“Who” spoke? (One word.)", "the wolf"),
    ("Œuvre: 12 volumes, naïve style; price 3.50 €.", "12 volumes of what… and at 3.50 €?", "an œuvre"),
    ("def f(x):\n    return x + 1\n\nprint(f(2))", "'s what does `print(f(2))` show?", "3"),
]
quick = settings(max_examples=150, deadline=None, derandomize=True)


def ids(text: str) -> list[int]:
    """The token ids of a text that rcc itself writes, chat marks included."""
    return token_ids(TOKENIZER, text, allow_special=True)[0].tolist()


def within(part: np.ndarray, whole: np.ndarray) -> int:
    """How often a run of tokens stands in another."""
    windows: Any = np.lib.stride_tricks.sliding_window_view(whole, len(part)) if len(whole) >= len(part) else []
    return sum(bool((window == part).all()) for window in windows)


def row_of(context: str, question: str, answer: str, hash: int = 7) -> Row:
    return Row(MARKS.encode(context), MARKS.encode(question), MARKS.encode(answer), "", hash)


@dataclass
class GivenDraw:
    """What a task may draw: ids below HIGH are of distracting passages, ids from there on of prose."""

    given: Any = None
    segment: int = 64
    has_prose: bool = True
    renamed: bool = False  # then names are also drawn for the distracting passages
    asked: list[str] = field(default_factory=list)
    others: dict[int, np.ndarray] = field(default_factory=dict)

    def text(self) -> np.ndarray:
        return self.given

    def row(self) -> Any:
        return self.given

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        assert not_hash == self.given.hash or (self.renamed and not_hash in self.others)
        self.asked.append("passage")
        key = 8 + len(self.others)
        self.others[key] = rng.integers(LOW, HIGH, rng.integers(1, 120))
        return Row(self.others[key], *self._about(key, 0), set="", hash=key)

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        return Row(np.array([]), *self._about(context_hash, int(rng.integers(1, 4))), set="", hash=context_hash)

    @staticmethod
    def _about(key: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        return MARKS.encode(f"What is number {number} of {key}?"), MARKS.encode(f"Number {number}: {key}")

    def prose(self, rng: np.random.Generator) -> np.ndarray | None:
        self.asked.append("prose")
        return rng.integers(HIGH, 2 * HIGH, 256) if self.has_prose else None


def sampled(task: Task, given: Any, length: int = 512, targets: int = 128, seed: int = 0, **draw: Any) -> Sample:
    return task.sample(GivenDraw(given, **draw), np.random.default_rng(seed), length, targets, MARKS)


def only(mode: str, **options: Any) -> Instruction:
    return Instruction(modes={mode: 1.0}, **{"distractors": 0.0, **options})


def read(sample: Sample) -> list[tuple[str, str]]:
    """The questions and answers of a sample in `human` mode; its tokens are those of a chat's prompt, and what is
    learnt are the answers."""
    text = TOKENIZER.decode(np.concatenate([sample.prompt, sample.target]))
    assert text.startswith(prompting.HEADER)
    assert text.endswith(prompting.END)
    turns = text.removeprefix(prompting.HEADER).removesuffix(prompting.END).split(prompting.END + prompting.FOLLOWING)
    pairs = [(q, a) for q, a in (turn.split(prompting.TURN) for turn in turns)]
    *history, (question, answer) = pairs
    built = prompting.build(question, "human", history).decoder_text + answer + prompting.END
    assert [*sample.prompt, *sample.target] == ids(built)
    learnt = np.split(sample.target, np.flatnonzero(np.diff(sample.learnt)) + 1)[::2]
    assert [TOKENIZER.decode(part) for part in learnt] == [answer + prompting.END for _, answer in pairs]
    return pairs


def read_once(sample: Sample) -> tuple[str, str]:
    """The question and the answer of a sample in `human` mode."""
    question, answer = TOKENIZER.decode(np.concatenate([sample.prompt, sample.target])).split(prompting.TURN)
    return question.removeprefix(prompting.HEADER), answer.removesuffix(prompting.END)


def check_sizes(sample: Sample, length: int, targets: int, segment: int) -> None:
    assert all(len(piece) for piece in sample.pieces)
    assert sum(map(len, sample.pieces)) <= length
    assert sum(-(-len(piece) // segment) for piece in sample.pieces) <= -(-length // segment)
    assert len(sample.prompt) >= 1
    assert len(sample.target) >= 1
    assert len(sample.prompt) + len(sample.target) <= targets
    assert {part.dtype for part in (*sample.pieces, sample.prompt, sample.target)} == {np.dtype(np.int64)}


def same(a: Sample, b: Sample) -> bool:
    parts = [(*s.pieces, s.prompt, s.target, np.array([]) if s.plain is None else s.plain) for s in (a, b)]
    return len(parts[0]) == len(parts[1]) and all(np.array_equal(x, y) for x, y in zip(*parts, strict=True))
