"""Charts of reconstruction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..axes import Axis
from .charts import Chart, Look, Point, curves
from .folders import Finished, SampleLists
from .groups import PART, SHARE, ChartGroup, lengths_axis, numbered, point, rates_axis
from .keys import joined, text_of

NAMED = {
    "accuracy": ("Accuracy, teacher forced", PART),
    "bleu": ("BLEU-4", SHARE),
    "rouge_l": ("ROUGE-L", SHARE),
    "exact": ("Exact: tokens at their place", SHARE),
    "run": ("Run: tokens before the first error", SHARE),
    "loss": ("Loss, nats a token (less is better)", SHARE),
}
"""Figure → its chart's title and axis."""
FIRST = {"accuracy": "Accuracy", "bleu": "BLEU-4"}
"""The figures that are shown in every way."""


def reconstruction(runs: list[Finished], samples: SampleLists) -> Iterator[ChartGroup]:
    """Yield charts by rate, by length, by where the prompt begins, and by the token's place."""
    yield from _Charts(runs, samples).groups()


class _Charts:
    """The charts of some folders.

    Args:
        runs: the folders.
        samples: the lists that points lead to.
    """

    def __init__(self, runs: list[Finished], samples: SampleLists):
        self.runs, self.samples = runs, samples
        self.keys = [cell["key"] for run in runs for cell in run.cells if "skipped" not in cell]
        cells = [cell for run in runs for cell in run.cells]
        self.lengths = sorted({cell["key"]["length"] for cell in cells})
        self.rates = numbered(sorted({key["rate"] for key in self.keys if "rate" in key}))
        self.contexts = numbered(cell["key"]["context"] for cell in cells)

    def groups(self) -> Iterator[ChartGroup]:
        """Yield all groups, in the order of the page."""
        for length in self.lengths:
            of = f"texts of {length:,} tokens"
            axis = rates_axis({key["rate"] for key in self.keys if key["length"] == length and "rate" in key})
            yield ChartGroup(
                f"By rate, {of}",
                "The context of the text itself (real) beside controls, which are thin: what the same prompts give with"
                " another context.",
                charts=[curves(title, self._by_rate(length, f), axis, y) for f, (title, y) in NAMED.items()],
            )
            yield ChartGroup(
                f"By position, {of}",
                "The context of the text itself. By place, n counts tokens.",
                charts=self._positions(length),
            )
        if len(self.lengths) > 1:
            axis = lengths_axis(self.lengths)
            charts = [curves(title, self._real(f, "cells", "length"), axis, NAMED[f][1]) for f, title in FIRST.items()]
            yield ChartGroup("By length", "The context of the text itself.", charts=charts)

    def _positions(self, length: int) -> list[Chart | None]:
        """Return the charts of one length by where the prompt begins, and by the token's place."""
        start = Axis("token at which the prompt begins")
        within = Axis("place in the segment, 0 to 1", ticks={i / 4: f"{i / 4:g}" for i in range(5)})
        group = Axis("place in the group; of the last, states are kept")
        charts = [
            curves(f"{title} by start of the prompt", self._real(f, "by_start", "start", length), start, NAMED[f][1])
            for f, title in FIRST.items()
        ]
        charts.append(curves("Accuracy by place in the segment", self._by_place("segment", length), within, PART))
        charts.append(curves("Accuracy by place in the group of a rate", self._by_place("group", length), group, PART))
        return charts

    # ---------------------------------------------------------------- points
    def _look(self, run: Finished, rate: int) -> Look:
        return Look(joined(f"{rate}×", run.letter), self.rates[rate] % 8, run.number % 4, run.number % 4)

    def _by_rate(self, length: int, figure: str) -> Iterator[tuple[Look, Point]]:
        for run in self.runs:
            for key, cell, link in self.samples.cells(run):
                if key["length"] != length or figure not in cell:
                    continue
                name = joined(key["context"], run.letter)
                look = Look(name, run.number % 8, run.number % 4)
                if key["context"] != "real":
                    colour = run.number % 8 if run.letter else None
                    marker = self.contexts[key["context"]] % 4
                    look = Look(name, colour, run.number % 4, marker, True, "rate" not in key)
                rate = text_of(key, "rate") or "at any rate"
                yield look, point(name, rate, key.get("rate", 1), cell[figure], link)

    def _real(self, figure: str, grouping: str, x: str, length: int | None = None) -> Iterator[tuple[Look, Point]]:
        """Yield the real context's figures, a line for each rate."""
        for run in self.runs:
            for key, cell, link in self.samples.cells(run, grouping):
                if key["context"] == "real" and figure in cell and length in (None, key["length"]):
                    look = self._look(run, key["rate"])
                    yield look, point(look.name, f"{x} {key[x]}", key[x], cell[figure], link)

    def _by_place(self, part: str, length: int) -> Iterator[tuple[Look, Point]]:
        for run in self.runs:
            for shares in run.data.get("by_place", []):
                key: dict[str, Any] = {"length": length, "rate": shares["rate"], "context": "real"}
                values = shares[part]
                link = self.samples.link(run, key, list(key))
                for i, value in enumerate(values if shares["length"] == length else []):
                    if value is not None:
                        look, x = self._look(run, shares["rate"]), i + 1 if part == "group" else (i + 0.5) / len(values)
                        yield look, point(look.name, f"part {i + 1} of {len(values)}", x, value, link)
