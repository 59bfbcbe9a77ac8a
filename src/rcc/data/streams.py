"""Streams that training samples are drawn from, and which rows are held out of them.

A stream is a pure function: draw `k` is the same whatever was drawn before, so a run resumes at the exact sample by
its number alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ..errors import InputError
from .corpus import Corpus, Row

logger = logging.getLogger(__name__)


def split(
    corpora: Sequence[Corpus], held_out: float, other: Sequence[Corpus] = ()
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split corpora into rows to train on and rows held out: for each an array of row numbers a corpus.

    The content decides: equal documents and rows that share a context are on the same side, in whichever corpora
    they stand.

    Args:
        corpora: to split; what one holds out, the others hold out as well.
        held_out: the share of contents that is held out, at least 0 and below 1.
        other: corpora whose contents are on neither side, such as separate evaluation data.

    Raises:
        InputError: a share that cannot be used.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 <= held_out < 1:
        raise InputError(f"held_out must be a number from 0 to below 1, not {held_out!r}.")
    bound = np.uint64(int(held_out * 2**64))
    elsewhere = np.unique(np.concatenate([np.zeros(0, np.uint64), *(corpus.hashes for corpus in other)]))
    train, held = [], []
    for corpus in corpora:
        free = ~np.isin(corpus.hashes, elsewhere)
        below = corpus.hashes < bound
        train.append(np.flatnonzero(free & ~below))
        held.append(np.flatnonzero(free & below))
    return train, held


_BLOCK, _ORDER, _START = range(3)  # what randomness is for: no two uses share a sequence


def _rng(seed: int, *words: int) -> np.random.Generator:
    return np.random.default_rng([seed, *words])


class Interleave:
    """Which of several things each draw takes, by their shares; a pure function of the draw's number.

    Every block of 1024 draws holds each thing in proportion to its share, rounded to a whole number up or down;
    every 1024 blocks exactly so (the shares themselves being rounded to 2⁻²⁰ of their sum, but not to nothing).

    Args:
        shares: one a thing; only their proportions matter, and one of 0 is never drawn.

    Raises:
        InputError: a share or the seed is negative, or no share is above 0.
    """

    SIZE = 1024  # of a block in draws, and of a period in blocks

    def __init__(self, shares: Sequence[float], seed: int):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed must be a whole number that is not negative, not {seed!r}.")
        exact, size = np.asarray(shares, float), self.SIZE
        if not len(exact) or exact.min() < 0 or not 0 < exact.sum() < math.inf:
            raise InputError(f"shares must be numbers that are not negative, one of them above 0, not {shares!r}.")
        self.shares, self.seed = list(shares), seed
        self._draws = np.maximum(np.rint(exact / exact.sum() * size**2), exact > 0).astype(np.int64)  # a period
        self._draws[self._draws.argmax()] += size**2 - self._draws.sum()
        # A period's draws are the numbers below size², each thing having a stretch of them. Block b takes every
        # size-th one from phase b on: it cuts each stretch evenly, and together the blocks take each number once.
        edges = np.concatenate([[0], self._draws.cumsum()])
        phases = np.arange(size) * 633 % size  # 633 ≈ size / golden ratio, odd: neighbours are far apart
        per_block = np.diff(-((phases[:, None] - edges) // size), axis=1)
        self._before = np.concatenate([np.zeros((1, len(exact)), np.int64), per_block.cumsum(0)])
        self._block = lru_cache(4)(self._make_block)

    def __reduce__(self) -> tuple[Any, ...]:
        return Interleave, (self.shares, self.seed)

    def at(self, k: int) -> tuple[int, int]:
        """Return the number of the thing that draw `k` takes, from 0 on, and how many draws before it took the same."""
        block, draw = divmod(k, self.SIZE)
        which, number = self._block(block)
        return int(which[draw]), int(number[draw])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what :meth:`at` answers for a block's draws, [1024] each."""
        period, b = divmod(block, self.SIZE)
        here = self._before[b + 1] - self._before[b]
        which = np.repeat(np.arange(len(here)), here)
        _rng(self.seed, _BLOCK, block).shuffle(which)
        number = np.empty(self.SIZE, np.int64)
        for i in np.flatnonzero(here):
            number[which == i] = period * self._draws[i] + self._before[b, i] + np.arange(here[i])
        return which, number


class Mixture:
    """Which corpus, and which of its items, each draw takes; a pure function of the draw's number.

    The corpora are interleaved by weight. Each goes through all its items, in an order of that epoch's own, before
    it takes one again.

    Args:
        counts: how many items each corpus has; one without any is left out.
        weights: one a corpus; only their proportions matter.

    Raises:
        InputError: no corpus has both items and a weight, or a number is negative.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int):
        if len(counts) != len(weights) or not any(c > 0 and w > 0 for c, w in zip(counts, weights, strict=True)):
            raise InputError("a mixture needs a corpus with items and a weight above 0.")
        self.counts, self.weights, self.seed = [int(c) for c in counts], list(weights), seed
        self._interleave = Interleave([w if c else 0.0 for c, w in zip(counts, weights, strict=True)], seed)
        self._order = [lru_cache(2)(partial(self._make_order, c)) for c in range(len(counts))]

    def __reduce__(self) -> tuple[Any, ...]:
        return Mixture, (self.counts, self.weights, self.seed)

    def __len__(self) -> int:
        return sum(self.counts)

    def at(self, k: int) -> tuple[int, int]:
        """Return the numbers of the corpus and of its item that draw `k` takes, from 0 on.

        Draws near each other are fast; one far away has to make its epoch's order anew.
        """
        corpus, number = self._interleave.at(k)
        epoch, n = divmod(number, self.counts[corpus])
        return corpus, int(self._order[corpus](epoch)[n])

    def _make_order(self, corpus: int, epoch: int) -> np.ndarray:
        return _rng(self.seed, _ORDER, corpus, epoch).permutation(self.counts[corpus])


def _mixture(
    corpora: Sequence[Corpus], counts: Sequence[int], seed: int, weights: Sequence[float] | None, why: str
) -> Mixture:
    for corpus, count in zip(corpora, counts, strict=True):
        if not count:
            logger.warning("%s is left out: %s.", corpus.source.path, why)
    return Mixture(counts, [corpus.source.weight for corpus in corpora] if weights is None else weights, seed)


def _group_and_item(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Return the group of item `i`, where groups of items end at `ends`; and the item's number within it."""
    group = int(ends.searchsorted(i, "right"))
    return group, i - (int(ends[group - 1]) if group else 0)


class TextStream:
    """Stretches of text: at most `window` consecutive tokens of one document.

    An item is a window's worth of a document: one of T ≥ window tokens has T // window, a shorter one of at least
    `minimum` tokens one, a still shorter one none.

    Args:
        corpora: of text.
        rows: which documents of each, as from :func:`split`.
        weights: one a corpus. None: their sources'.

    Raises:
        InputError: no document is long enough, or an argument cannot be used.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        rows: Sequence[np.ndarray],
        seed: int,
        window: int,
        minimum: int,
        weights: Sequence[float] | None = None,
    ):
        if not 1 <= minimum <= window:
            raise InputError(f"minimum must be from 1 to window={window}, not {minimum!r}.")
        self.corpora, self.seed, self.window = list(corpora), seed, window
        self._items: list[tuple[np.ndarray, np.ndarray]] = []  # documents; items up to and with each
        longest, longest_source = 0, ""
        for corpus, numbers in zip(corpora, rows, strict=True):
            lengths = corpus.lengths[numbers]
            if len(lengths) and lengths.max() > longest:
                longest, longest_source = int(lengths.max()), corpus.source.path
            enough = lengths >= minimum
            self._items.append((numbers[enough], np.maximum(lengths[enough] // window, 1).cumsum()))
        counts = [int(ends[-1]) if len(ends) else 0 for _, ends in self._items]
        if not longest:
            raise InputError("there is no document.")
        if not any(counts):
            raise InputError(
                f"no document has {minimum} tokens, the longest ({longest_source}) has {longest}:"
                " use longer texts or a lower minimum."
            )
        self.mixture = _mixture(corpora, counts, seed, weights, f"none of its documents has {minimum} tokens")
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.mixture)

    def draw(self, k: int) -> np.ndarray:
        """Return the token ids of draw `k`, int64 [at most window]."""
        corpus, item = self.mixture.at(k)
        return self._cut(corpus, item, _rng(self.seed, _START, k))

    def stretch(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random item's token ids, int64 [at most window]; for text beside a sample's own."""
        return self._cut(*_group_and_item(self._ends, int(rng.integers(len(self)))), rng)

    def _cut(self, corpus: int, item: int, rng: np.random.Generator) -> np.ndarray:
        documents, ends = self._items[corpus]
        at, slot = _group_and_item(ends, item)
        tokens = self.corpora[corpus].document(int(documents[at]))
        start, last = 0, len(tokens) - self.window
        if last > 0:
            # another start each time, so that an epoch does not repeat the one before
            start = min(slot * self.window + int(rng.integers(self.window)), last)
        return tokens[start : start + self.window].astype(np.int64)


class QuestionStream:
    """Rows of questions whose context and question have at most `room` tokens together.

    A longer context is cut into passages of `room` less the 64 tokens (at most a quarter) that a question may take. A
    row becomes one about the passage in which its answer stands; a row whose answer stands in none, or in
    several, so that it is not known which of them the question is about, is left out.

    Args:
        corpora: of questions.
        rows: which rows of each, as from :func:`split`.
        weights: one a corpus. None: their sources'.

    Raises:
        InputError: no row fits.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        rows: Sequence[np.ndarray],
        seed: int,
        room: int,
        weights: Sequence[float] | None = None,
    ):
        self.corpora = list(corpora)
        self.passage = room - min(64, room // 4)
        self._items: list[np.ndarray] = []
        self._cuts: list[np.ndarray] = []  # which passage of its context an item is about, -1: it is whole
        shortest: int | None = None
        for corpus, numbers in zip(corpora, rows, strict=True):
            lengths = (corpus.lengths + corpus.question_lengths)[numbers]
            if len(lengths):
                shortest = min(int(lengths.min()), shortest or int(lengths.min()))
            first, last = corpus.spans[numbers].astype(np.int64).T
            cuts = np.where(lengths <= room, -1, first // self.passage)
            inside = (last > first) & ((last - 1) // self.passage == first // self.passage)
            fits = (lengths <= room) | inside & (corpus.question_lengths[numbers] <= room - self.passage)
            self._items.append(numbers[fits])
            self._cuts.append(cuts[fits])
        counts = [len(items) for items in self._items]
        if not any(counts):
            has = "there are no rows" if shortest is None else f"the shortest row has {shortest}"
            raise InputError(f"no context and question fit in room={room} tokens ({has}): give more room or rows.")
        self.mixture = _mixture(corpora, counts, seed, weights, f"none of its rows fits in {room} tokens")
        self._ends = np.cumsum(counts)
        cuts = np.concatenate(self._cuts)
        whole = np.concatenate([c.hashes[items] for c, items in zip(corpora, self._items, strict=True)])
        self._hashes = whole ^ ((cuts + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # wraps around
        self._by_hash = self._hashes.argsort()

    def __len__(self) -> int:
        return len(self.mixture)

    def draw(self, k: int) -> Row:
        """Return the row of draw `k`."""
        corpus, item = self.mixture.at(k)
        return self._row(int(self._ends[corpus]) - len(self._items[corpus]) + item)

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        """Return a random row whose context does not have the hash `not_hash`.

        Raises:
            InputError: all rows share that one context.
        """
        for _ in range(16):
            i = int(rng.integers(len(self._hashes)))
            if int(self._hashes[i]) != not_hash:
                break
        else:  # that context is most of what there is
            others = np.flatnonzero(self._hashes != np.uint64(not_hash))
            if not len(others):
                raise InputError("all rows share one context, so there is none to distract with: use more sources.")
            i = int(others[rng.integers(len(others))])
        return self._row(i)

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        """Return a random row whose context has the hash `context_hash`; there must be one."""
        low, high = (
            self._hashes.searchsorted(np.uint64(context_hash), side, self._by_hash) for side in ("left", "right")
        )
        return self._row(int(self._by_hash[rng.integers(low, high)]))

    def _row(self, i: int) -> Row:
        corpus, item = _group_and_item(self._ends, i)
        row, cut = self.corpora[corpus].row(int(self._items[corpus][item])), int(self._cuts[corpus][item])
        if cut < 0:
            return row
        passage = row.context[cut * self.passage : (cut + 1) * self.passage]
        return replace(row, context=passage, hash=int(self._hashes[i]))
