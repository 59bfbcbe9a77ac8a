"""The axes that charts of evaluations are read by: those of the page and those in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..text.counts import show_count


@dataclass(frozen=True)
class Axis:
    """What a chart is read by.

    Attributes:
        name: what it measures; empty: nothing is written beside it.
        log: whether it is logarithmic.
        ticks: place → what is written there. None: round numbers.
        show: a round number as it is written.
        top: of a linear axis, which begins at 0: its end, at least.
    """

    name: str = ""
    log: bool = False
    ticks: Mapping[float, str] | None = None
    show: Callable[[float], str] = "{:,g}".format
    top: float = 0


def counts_axis(name: str, counts: Iterable[float]) -> Axis:
    """Return a logarithmic axis of whole numbers, each written as people write it: 512, 8k, 1M."""
    return Axis(name, log=True, ticks={count: show_count(int(count)) for count in sorted(set(counts))})
