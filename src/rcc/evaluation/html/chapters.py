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


class Chapter(NamedTuple):
    """How a kind of evaluation is shown: its title, what it is about, and what makes its charts."""

    title: str
    lead: str
    groups: Callable[[list[Finished], SampleLists], Iterator[ChartGroup]]


CHAPTERS = {
    "qa": Chapter("Answers", "Questions about texts, answered from what each method keeps of them.", qa),
    "reconstruction": Chapter(
        "Reconstruction",
        "How much of a text its compressed context gives back: ten tokens in, what follows.",
        reconstruction,
    ),
    "passkey": Chapter("Passkey", "Is a number found that is hidden in a long text?", passkey),
    "resources": Chapter(
        "Memory and time", "What reading a text and asking its context take, by its length.", resources
    ),
}
"""In the order of the page; any other kind has its tables alone."""
