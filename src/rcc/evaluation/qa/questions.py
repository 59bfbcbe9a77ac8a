"""Questions about texts: what one is, how many are asked, and what tells sets of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BUCKETS = ((2048, "0-2k"), (4096, "2-4k"), (8192, "4-8k"))
"""Context tokens below which a question belongs to a bucket, as in the paper's table; the others to `LONGEST`."""
LONGEST = "8k+"


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        id: what tells it from the others.
        set: what it is counted with.
        answers: the accepted ones.
        metric: the set's own, a name in :data:`rcc.evaluation.qa.longbench.METRICS`.
        tokens: the most that an answer may have; None: as the run decides.
        classes: for `classification`, all names of classes.
    """

    id: str
    set: str
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str = "f1"
    tokens: int | None = None
    classes: tuple[str, ...] = ()


def bucket(tokens: int) -> str:
    """Return the bucket of a context of so many tokens."""
    return next((name for most, name in BUCKETS if tokens < most), LONGEST)


def choose(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """Return at most `limit` questions of each set, by chance; those about one text stand together.

    A greater limit gives the same ones and others.
    """
    sets: dict[str, list[Question]] = {}
    for question in questions:
        sets.setdefault(question.set, []).append(question)
    chosen = []
    for name, own in sets.items():
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(own))[:limit]
        texts: dict[str, list[Question]] = {}
        for number in order:
            texts.setdefault(own[number].context, []).append(own[number])
        chosen += [question for together in texts.values() for question in together]
    return chosen


def digest(questions: Sequence[Question]) -> str:
    """Return the SHA-256 over all that was read."""
    sha = hashlib.sha256()
    for question in questions:
        sha.update(repr(question).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()
