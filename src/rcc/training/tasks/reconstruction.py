"""The task `reconstruction`: write a span of the context."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from .base import Draw, Marks, Sample, TextTask, at_least, is_count, is_share

REPEATED = (3, 12)
"""Tokens of a stretch that is copied to a second place of the text."""


@dataclass
class Reconstruction(TextTask):
    """Write a random span of the context, given its first tokens ("Training" in the paper).

    Args:
        prompt_tokens: how many are given.
        spans: the span is cut at random places into 1 to this many, which are written in random order, each after
            its own first tokens, from a third of `prompt_tokens` on. To go on in the text the decoder need only know
            its position; each new span has to be found by what it says, as the answer to a question has.
        wrong: how many of the tokens that it has learnt to write the decoder then reads as others of the text, 0 to 1:
            as it will its own errors, after which it has to keep its place.
        predicted: how often the decoder reads, in place of all other tokens that it has learnt to write, those that it
            predicts there itself: its own errors, as far as one pass over the text shows them (parallel scheduled
            sampling, Mihaylova and Martins 2019). Costs a pass of the decoder more.
        predicted_rates: the rates at which it does that; all for none. Where most of what is predicted is wrong,
            nothing can be learnt from it.
        passes: these are of 1 to this many passes, each after the predictions of the one before: errors that follow
            from errors, as where it writes freely.
        repeated: how often stretches of the text also stand in a second place, one of 3 to 12 tokens (`REPEATED`) for
            every 64, in place of what was there. What follows a stretch is then known only to a decoder that keeps
            track of its position: by the words alone it goes on in the other place, or in circles.
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
        self.check(is_count(self.spans), "spans", "a positive whole number")
        self.check(is_share(self.wrong), "wrong", "a share from 0 to 1")
        self.check(is_share(self.predicted), "predicted", "a probability from 0 to 1")
        self.check(is_count(self.passes), "passes", "a positive whole number")
        self.check(is_share(self.repeated), "repeated", "a probability from 0 to 1")

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        """Compress a text, and have spans of it written back."""
        text = at_least(2, draw.text()[:length], marks)
        if self.repeated and rng.random() < self.repeated:
            text = _repeat(text, rng)
        size = min(targets, len(text))
        start = int(rng.integers(len(text) - size + 1))
        written = text[start : start + size]
        cuts = min(int(rng.integers(self.spans)), size // 2 - 1)  # each span has at least two tokens
        edges = np.sort(rng.choice(size - cuts - 2, cuts, replace=False)) + np.arange(cuts) + 2
        spans = np.split(written, edges)
        first, *others = (spans[i] for i in rng.permutation(len(spans)))
        sample = self.begin(text, first)
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
        """Return the sample, without predictions at rates that are to have none."""
        if self.predicted_rates and rate not in self.predicted_rates:
            return replace(sample, predicted=None)
        return sample


def _repeat(text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a text in which copies of some stretches replace others."""
    repeated = text.copy()
    for _ in range(len(text) // 64):
        size = int(rng.integers(REPEATED[0], REPEATED[1] + 1))
        source, copy = rng.integers(len(text) - size, size=2)
        repeated[copy : copy + size] = text[source : source + size]
    return repeated
