"""Names and numbers of a text exchanged for others, so that its questions cannot be answered by heart."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from ...data.corpus import Row
from .base import Draw, Marks
from .patterns import NAME, NUMBER, YEAR

_LOWER_CASE_WORD = re.compile(r"\b[a-z]+\b")
_EXCHANGED = re.compile(rf"\b[A-Z][a-z]{{2,}}\b|{NUMBER.pattern}")


class RenamedDraw:
    """A draw whose rows have other names and numbers, the same ones in all rows of a passage."""

    def __init__(self, draw: Draw, rng: np.random.Generator, marks: Marks):
        self.segment, self.text, self.prose = draw.segment, draw.text, draw.prose
        self._draw, self._rng, self._marks = draw, rng, marks
        self._passages: dict[int, tuple[np.ndarray, dict[str, str]]] = {}

    def row(self) -> Row:
        """Return the drawn question, renamed."""
        return self._rename(self._draw.row())

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        """Return another row, renamed; never one whose context has that hash."""
        return self._rename(self._draw.other(rng, not_hash))

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        """Return a row whose context has that hash, renamed as all rows of that context."""
        return self._rename(self._draw.same(rng, context_hash))

    def _rename(self, row: Row) -> Row:
        if row.hash not in self._passages:
            text = self._marks.decode(row.context)
            strangers = (self._marks.decode(self._draw.other(self._rng, row.hash).context) for _ in range(3))
            new = new_words(text, " ".join(strangers), self._rng)
            self._passages[row.hash] = self._marks.encode(exchange(text, new)), new
        context, new = self._passages[row.hash]
        question, answer = (
            self._marks.encode(exchange(self._marks.decode(ids), new)) for ids in (row.question, row.answer)
        )
        return replace(row, context=context, question=question, answer=answer)


def new_words(text: str, strangers: str, rng: np.random.Generator) -> dict[str, str]:
    """Return what to exchange the names and numbers of a text for: {word: its new one}.

    Names get words of another text's names, as far as there are enough, and no two become one; numbers get others of
    the same form.

    Args:
        text: whose names and numbers are exchanged.
        strangers: the other text.
        rng: chooses.
    """
    names, pool = _name_words(text), _name_words(strangers)
    pool = [word for word in pool if word not in names]
    new = dict(zip(names, (str(word) for word in rng.permutation(pool)), strict=False))
    for number in dict.fromkeys(NUMBER.findall(text)):
        if YEAR.fullmatch(number):
            new[number] = str(rng.integers(1500, 2020))
        else:
            new[number] = re.sub(r"\d", lambda _: str(rng.integers(10)), number)
            new[number] = re.sub(r"^0", "1", new[number])
    return new


def exchange(text: str, new: dict[str, str]) -> str:
    """Return a text with its words and numbers exchanged as `new` says."""
    return _EXCHANGED.sub(lambda match: new.get(match[0], match[0]), text)


def _name_words(text: str) -> list[str]:
    """Return the capitalised words of the names in a text, each once; none that also occurs there in lower case."""
    words = [word for name in NAME.findall(text) for word in name.split()]
    plain = set(_LOWER_CASE_WORD.findall(text))
    return [word for word in dict.fromkeys(words) if not word.endswith(".") and word.lower() not in plain]
