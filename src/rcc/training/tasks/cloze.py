"""The task `cloze`: find the name or number that is missing in a sentence of the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...data.corpus import Row
from .base import Draw, Marks, at_least, is_share
from .instruction import QUOTE, Instruction, can_be_quoted
from .patterns import NAME, NUMBER, SENTENCE, YEAR

GAP = "____"
"""What stands for the missing words in a question."""
GAP_TOKENS = 96
"""Tokens of a context that the question may take."""
ASKS = {
    "year": ("When", "In what year"),
    "number": ("How many", "What number"),
    "thing": ("What", "Which"),
    "place": ("Where", "What"),
    "name": ("Who", "Who", "What"),
}
"""The words that a question in words begins with, one of them by chance."""
_PHRASE = re.compile(  # a noun with what describes it, as far as can be told without knowing words
    r"(?<=\b(?:the|his|her|its) )(?:[a-z]+ ){0,2}[a-z]{4,}"
    r"(?=[.,;]|\s(?:of|in|on|at|to|that|was|were|is|are|had|with|from|for|by)\b)"
)
_WORD = re.compile(r"\b[a-z]{4,}\b")
_PLACE = re.compile(r"\b(?:in|at|from|near|to|into|through)$")
_CLAUSE = re.compile(r"[,;:()—\"“”]| - ")


@dataclass
class Cloze(Instruction):
    """Find what is missing in a sentence of the text, a name or a number.

    Questions are made by rule, so that any text gives questions that it answers. The options are those of
    `instruction`; the whole context is one passage, and nothing is left out of it.

    Args:
        worded: how often what is missing is asked for in words (who, what, where, when, how many) rather than shown as
            a gap: some words of the sentence, not all and not always in their order, so that the question
            does not occur in the text as it is.
    """

    distractors: float = 0.0
    worded: float = 0.0
    name: ClassVar[str] = "cloze"
    reads: ClassVar[str | None] = "text"
    fixed_texts: ClassVar[tuple[str, ...]] = (
        QUOTE.format(question="x"),
        f"What is missing here? {GAP}",
        *(asked for words in ASKS.values() for asked in words),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("distractors", "unanswerable", "renamed"):
            self.check(getattr(self, key) == 0, key, "left out: there are no other passages")
        self.check(is_share(self.worded), "worded", "a probability from 0 to 1")

    def window(self, length: int, targets: int) -> int:
        """Return the tokens of text to draw: what the question leaves of the context."""
        return max(32, length - GAP_TOKENS)

    def draw_row(self, draw: Draw, rng: np.random.Generator, length: int, marks: Marks) -> Row:
        """Draw a text, and make a question about it."""
        return self._about(at_least(2, draw.text(), marks), rng, marks)

    def more_questions(
        self, draw: Draw, rng: np.random.Generator, row: Row, passages: dict[int, bool], marks: Marks
    ) -> Iterator[Row]:
        """Yield more questions about the same text; some may be the same."""
        for _ in range(2 * self.turns):
            yield self._about(row.context, rng, marks)

    def _about(self, text: np.ndarray, rng: np.random.Generator, marks: Marks) -> Row:
        quoted = self.quoted > 0 and rng.random() < self.quoted
        worded = self.worded > 0 and rng.random() < self.worded
        question, answer = cloze(marks.decode(text), rng, worded, quoted)
        return Row(text, marks.encode(question), marks.encode(answer), "", 0)

    def quote(self, row: Row, rng: np.random.Generator, marks: Marks) -> Row:
        """Return the row as it is."""
        return row  # see _about, which knows the sentence


def cloze(text: str, rng: np.random.Generator, worded: bool = False, quoted: bool = False) -> tuple[str, str]:
    """Return a question about a sentence of a text, and its answer, which occurs there.

    Args:
        text: as :func:`askable` takes it.
        rng: chooses what is asked for, and how.
        worded: ask in words; otherwise the question is the sentence with a gap.
        quoted: ask in words, and for the whole sentence, where it has as many words as `QUOTED` says.
    """
    low, start, end, high = askable(text, rng, phrases=worded or quoted)
    before, after = text[low:start], text[end:high]
    sentence = text[low:high].strip()
    quoted = quoted and can_be_quoted(sentence)
    if worded or quoted:
        question = _in_words(before, text[start:end], after, rng)
        return (QUOTE.format(question=question), sentence) if quoted else (question, text[start:end])
    before = " ".join(before.split()[-12:])  # long sentences in part: a question stays short
    after = " ".join(after.split()[:12])
    gap = f"{before} {GAP}" + ("" if after[:1] in ",.;:!?)'’" else " ") + after
    return f"What is missing here? {gap.strip()}", text[start:end]


def askable(text: str, rng: np.random.Generator, phrases: bool = False) -> tuple[int, int, int, int]:
    """Choose something in a text that can be asked for: a name in a sentence or a number if there is one, else a word.

    Args:
        text: any; its first and last sentences, which may be cut, and those of fewer than six words are taken only
            where there are no others.
        rng: chooses among what there is.
        phrases: four times in ten, what follows a "the" or the like instead, where there is such a one.

    Returns:
        In characters: the start of its sentence, its own start and end, and the end of the sentence.
    """
    sentences = [match.span() for match in SENTENCE.finditer(text)]
    inner = [(a, b) for a, b in sentences[1:-1] if len(text[a:b].split()) >= 6] or sentences or [(0, len(text))]
    patterns = [re.compile(f"{NAME.pattern}|{NUMBER.pattern}"), _WORD, re.compile(r"\S+")]
    if phrases:
        patterns.insert(int(rng.random() < 0.6), _PHRASE)
    for pattern in patterns:
        spans = [match.span() for low, high in inner for match in pattern.finditer(text, low, high)]
        if spans:
            break
    else:
        spans = [(0, len(text))]
    start, end = spans[int(rng.integers(len(spans)))]
    low = next((a for a, b in inner if a <= start < b), 0)
    high = next((b for a, b in inner if a <= start < b), len(text))
    return low, start, end, high


def _in_words(before: str, answer: str, after: str, rng: np.random.Generator) -> str:
    """Return a question in words for an answer and what is around it in its sentence: noisy, often ungrammatical."""
    if YEAR.fullmatch(answer):
        asks = ASKS["year"]
    elif NUMBER.fullmatch(answer):
        asks = ASKS["number"]
    elif not answer[:1].isupper():
        asks = ASKS["thing"]
    elif _PLACE.search(before.rstrip()):
        asks = ASKS["place"]
    else:
        asks = ASKS["name"]
    clauses = _CLAUSE.split(before)[-1].split(), _CLAUSE.split(after)[0].split()
    if sum(map(len, clauses)) < 6:  # too little to find it by
        clauses = before.split(), after.split()
    left, right = clauses[0][-10:], clauses[1][:10]
    words = [*right, *left] if rng.random() < 0.3 else [*left, *right]
    lost = rng.random(len(words)) < 0.4 * rng.random()
    left_over = [word for word, gone in zip(words, lost, strict=True) if not gone or len(words) < 8]
    return f"{asks[int(rng.integers(len(asks)))]} {' '.join(left_over).strip(' .,;:!?')}?"
