"""What is asked in question answering, of which rows, and what a base is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BY = ("method", "mode", "rate")
"""The keys that tell cells apart; rate 0: nothing is compressed."""
BASELINES = {
    "plain": "the base reads the text as it is",
    "truncated": "the base reads the beginning and the end, as many tokens as the context has positions",
    "bm25": "the base reads the passages that BM25 finds for the question, as many tokens as the context has positions",
    "no-context": "the model's decoder reads the question alone",
}
"""What a user might do instead of compressing."""
SELECTIONS = {
    "selection": "the base's own KV pairs that its repetition of the text attends to most",
    "selection-expected": "the base's own KV pairs that later tokens are expected to attend to",
    "selection-shared": "the first, where the KV heads of a layer share its budget",
    "selection-expected-shared": "the second, likewise",
    "selection-stride": "every so many of the base's own KV pairs",
    "selection-random": "KV pairs of the base's own by chance",
}
"""The base's own KV pairs, as many as the context has positions: named one by one, since each compresses anew."""
TUNED = "plain-tuned"
"""The row of a decoder that was trained on the plain text."""
HINT = "Answer in as few words as possible."
"""What a model that was not trained to answer shortly is told after each question."""


@dataclass(frozen=True)
class QASettings:
    """What is asked.

    Args:
        rates: of the methods that compress.
        limit: questions of each set, chosen by `seed`; None: all.
        pad_to: texts are read in packs of so many tokens, see :class:`rcc.evaluation.qa.texts.Texts`; 0: each alone.
        max_new_tokens: of an answer, where its set does not say.
        hint: see :data:`HINT`.
        seed: of what is chosen and what stands around it.
        kv: precision that contexts of the methods that compress are kept in; None: the model's.
    """

    rates: Sequence[int]
    limit: int | None = None
    pad_to: int = 0
    max_new_tokens: int = 64
    hint: str = HINT
    seed: int = 0
    kv: str | None = None
