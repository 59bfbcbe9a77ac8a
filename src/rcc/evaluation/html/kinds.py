"""What a page shows of each kind of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from .folders import Finished, SampleLists
from .groups import ChartGroup
from .passkey import passkey
from .qa import qa
from .reconstruction import reconstruction
from .resources import resources


class Kind(NamedTuple):
    title: str
    lead: str
    groups: Callable[[list[Finished], SampleLists], Iterator[ChartGroup]]


KINDS = {
    "qa": Kind("Answers", "Questions about texts, answered from what each method keeps of them.", qa),
    "reconstruction": Kind(
        "Reconstruction", "How much of a text its compressed context gives back: ten tokens in, what follows.",
        reconstruction,
    ),
    "passkey": Kind("Passkey", "Is a number found that is hidden in a long text?", passkey),
    "resources": Kind("Memory and time", "What reading a text and asking its context take, by its length.", resources),
}  # fmt: skip
"""In the order of the page; any other task has its tables alone."""
