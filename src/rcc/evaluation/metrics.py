"""How close an answer is to the accepted ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def normalise(text: str) -> list[str]:
    """Words of an answer as SQuAD counts them: lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The best harmonic mean of word precision and recall against the accepted answers (SQuAD's F1), 0 to 1."""
    words = Counter(normalise(answer))
    best = 0.0
    for reference in accepted:
        truth = Counter(normalise(reference))
        common = (words & truth).total()
        if common:
            best = max(best, 2 * common / (words.total() + truth.total()))
    return best
