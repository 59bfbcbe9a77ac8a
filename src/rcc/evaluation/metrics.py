"""How close an answer is to the accepted ones, and a text written back to the original."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any


def normalise(text: str) -> list[str]:
    """Split an answer into words as SQuAD counts them: lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(answer: str, accepted: Sequence[str]) -> float:
    """Return the best harmonic mean of word precision and recall against the accepted answers (SQuAD's F1), 0 to 1."""
    words = Counter(normalise(answer))
    best = 0.0
    for reference in accepted:
        truth = Counter(normalise(reference))
        common = (words & truth).total()
        if common:
            best = max(best, 2 * common / (words.total() + truth.total()))
    return best


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if the words of an accepted answer were written and no others (SQuAD's), else 0."""
    return float(any(normalise(answer) == normalise(reference) for reference in accepted))


@cache
def _bleu() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(effective_order=True)  # a text of fewer than four words can be right, too


def bleu(written: str, truth: str) -> float:
    """Return the BLEU-4 of one text against the original, by sacrebleu with :func:`bleu_settings`, 0 to 1."""
    return min(1.0, float(_bleu().sentence_score(written, [truth]).score) / 100)


def bleu_settings() -> str:
    """Return sacrebleu's own description of how :func:`bleu` counts, its version included."""
    bleu("", "")  # it is not known before the first score
    return str(_bleu().get_signature())


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(written: str, truth: str) -> float:
    """Return the ROUGE-L of one text against the original: F1 of the longest common subsequence of words, 0 to 1.

    rouge-score's words are runs of a–z and 0–9 in lower case: text in other letters counts 0.
    """
    return float(_rouge().score(truth, written)["rougeL"].fmeasure)


def matching(written: Sequence[int], truth: Sequence[int]) -> tuple[float, int]:
    """Return the share of the original's tokens written at their index, and how many before the first error."""
    right = [a == b for a, b in zip(written, truth, strict=False)]
    return sum(right) / len(truth), [*right, False].index(False)
