"""The figures of a reconstruction as tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ...model.compressor import Compressor
from .. import results
from ..axes import Axis, counts_axis
from ..evaluation import untrained
from ..plots import CurvePlot, HeatPlot, Lines, Plot
from ..results import Interval, Results
from .settings import BY, CONTROLS, REAL
from .teacher_forcing import PROMPT

PARTS = 8
"""Parts of a segment whose accuracy is told apart."""


def padding_before(model: Compressor, length: int) -> int:
    """Return the tokens of padding before a text of so many, in its first segment."""
    if length <= model.segment_length:  # what fills the one segment stands after it
        return 0
    return sum(map(len, model.split(torch.arange(length)))) - length


def by_place(
    rows: Sequence[dict[str, Any]], length: int, rate: int, segment: int, padding: int = 0
) -> dict[str, list[Any]]:
    """Return the real context's teacher-forced accuracy by the place of the token in its segment and in its group.

    Args:
        rows: samples, of any lengths, rates and contexts.
        length: tokens of a document, of the rows to take.
        rate: of the rows to take.
        segment: tokens of a segment.
        padding: tokens before the document in its first one.

    Returns:
        `segment`: by eighths of the segment; `group`: by place in the group of `rate` tokens, of which the last one's
        state is kept. Intervals, None where there is no token.
    """
    offsets, right, documents = [], [], []  # in the segment; whether predicted right; of which document
    for row in rows:
        key = row["key"]
        if "skipped" in row or (key["length"], key.get("rate"), key["context"]) != (length, rate, REAL):
            continue
        recalled = row["recalled"]
        offsets.append((padding + key["start"] + PROMPT + np.arange(len(recalled))) % segment)
        right.append(np.array([c == "1" for c in recalled], float))
        documents.append(np.full(len(recalled), key["document"]))
    parts = min(PARTS, segment)
    if not offsets:
        return {"segment": [None] * parts, "group": [None] * rate}
    offset, hit, document = map(np.concatenate, (offsets, right, documents))

    def means(number: np.ndarray, count: int) -> list[Interval | None]:
        chosen = [number == i for i in range(count)]
        return [results.interval(hit[c].tolist(), document[c].tolist()) if c.any() else None for c in chosen]

    return {"segment": means(offset * parts // segment, parts), "group": means(offset % rate, rate)}


class ReconstructionReport:
    """The figures of samples as tables and plots.

    Args:
        measured: with samples of :meth:`rcc.evaluation.reconstruction.run.ReconstructionEvaluation.cases`.
        model: that they were made with.
    """

    def __init__(self, measured: Results, model: Compressor):
        self.measured, self.model = measured, model
        self.cells = sorted(measured.cells(BY), key=_rank)
        self.by_start = sorted(measured.cells((*BY, "start")), key=_rank)
        self.lengths = list(dict.fromkeys(cell["key"]["length"] for cell in self.cells))
        self.rates = sorted({cell["key"]["rate"] for cell in self.cells if "rate" in cell["key"]})
        self.by_place = {
            (length, rate): by_place(measured.rows, length, rate, model.segment_length, padding_before(model, length))
            for length in self.lengths
            for rate in self.rates
        }

    def more(self) -> dict[str, Any]:
        """Return figures for `results.json` by the prompt's start, and by places in the segment and in the group."""
        by_place = [{"length": length, "rate": rate, **parts} for (length, rate), parts in self.by_place.items()]
        return {"by_start": self.by_start, "by_place": by_place}

    def _real(self, length: int) -> dict[int, dict[int, dict[str, Any]]]:
        """Return the real context's cells by rate and start of the prompt, without those that were skipped."""
        real: dict[int, dict[int, dict[str, Any]]] = {rate: {} for rate in self.rates}
        for cell in self.by_start:
            key = cell["key"]
            if (key["length"], key["context"]) == (length, REAL) and "skipped" not in cell:
                real[key["rate"]][key["start"]] = cell
        return {rate: cells for rate, cells in real.items() if cells}

    def _edges(self) -> list[tuple[int, int]]:
        """Return the first and the last place of each part of a segment."""
        segment = self.model.segment_length
        parts = min(PARTS, segment)
        edges = [-(-i * segment // parts) for i in range(parts + 1)]
        return [(low, high - 1) for low, high in pairwise(edges)]

    # ---------------------------------------------------------------- tables
    def table(self) -> str:
        """Return all figures, and the real context's by place, as Markdown."""
        figures = {"bleu": "BLEU-4", "rouge_l": "ROUGE-L", "exact": "exact", "run": "run, tokens"}
        figures |= {"accuracy": "accuracy", "loss": "loss"}
        rows = []
        for cell in self.cells:
            key = cell["key"]
            row = [key["context"], f"{key['length']:,}", self._rate(key["rate"]) if "rate" in key else "–"]
            if "skipped" in cell:
                rows.append([*row, "0", cell["skipped"], *["–"] * (len(figures) - 1)])
                continue
            shown = [results.show(cell[name], digits=1 if name == "run" else 3) for name in figures]
            rows.append([*row, str(cell["bleu"].n), *shown])
        text = results.markdown(["context", "tokens", "rate", "samples", *figures.values()], rows)
        for length in self.lengths:
            if not (real := self._real(length)):
                continue
            starts = sorted({start for cells in real.values() for start in cells})
            rows = [
                [f"{figures[name]}, {self._rate(rate)}", *(f"{cells[s][name].mean:.3f}" for s in starts)]
                for name in ("accuracy", "bleu")
                for rate, cells in real.items()
            ]
            title = f"By where in the text of {length:,} tokens the prompt begins (real context)"
            text += f"\n{title}:\n\n" + results.markdown(["", *map(str, starts)], rows)
            rows = [
                [
                    self._rate(rate),
                    *("–" if v is None else f"{v.mean:.3f}" for v in self.by_place[length, rate]["segment"]),
                ]
                for rate in real
            ]
            title = f"Accuracy by the token's place in its segment (real context, {length:,} tokens)"
            header = ["rate", *(str(a) if a == b else f"{a}–{b}" for a, b in self._edges())]
            text += f"\n{title}:\n\n" + results.markdown(header, rows)
        return text

    def _rate(self, rate: int) -> str:
        return f"{rate}× (untrained)" if untrained(self.model, [rate]) else f"{rate}×"

    # ---------------------------------------------------------------- plots
    def plots(self) -> dict[str, Plot]:
        """Return plots by file name, five for each length that anything was measured at."""
        made: dict[str, Plot] = {}
        accurate = Axis("token accuracy, teacher forced")
        for length in self.lengths:
            if not (real := self._real(length)):
                continue
            named, of = f"-{length}.png", f"texts of {length:,} tokens"
            for metric, y in (("bleu", Axis("BLEU-4")), ("accuracy", accurate)):
                lines = self._by_rate(length, metric)
                x = counts_axis("compression rate", (rate for points in lines.values() for rate, _ in points))
                made[f"{metric}-by-rate{named}"] = CurvePlot(lines, x, y, f"Reconstruction, {of}")
            accuracy: Lines = {
                f"{rate}×": [(start, cell["accuracy"]) for start, cell in cells.items()] for rate, cells in real.items()
            }
            start = Axis("token at which the prompt begins")
            made[f"accuracy-by-start{named}"] = CurvePlot(accuracy, start, accurate, f"By position in the text, {of}")
            middles = [(low + high) / 2 for low, high in self._edges()]
            made[f"accuracy-by-place{named}"] = CurvePlot(
                lines={
                    f"{rate}×": [
                        (x, v)
                        for x, v in zip(middles, self.by_place[length, rate]["segment"], strict=True)
                        if v is not None
                    ]
                    for rate in real
                },
                x=Axis("place of the token in its segment"),
                y=accurate,
                title=f"By place in the segment, {of}",
            )
            starts = [start for start, _ in next(iter(accuracy.values()))]
            made[f"heat{named}"] = HeatPlot(
                shares=[[v.mean for _, v in points] for points in accuracy.values()],
                rows=list(accuracy),
                columns=[str(start) for start in starts],
                x=start,
                y=Axis("rate"),
                title=f"Token accuracy, {of}",
            )
        return made

    def _by_rate(self, length: int, metric: str) -> Lines:
        """Return a curve for each context; what does not depend on the rate is the same at all."""
        lines: Lines = {}
        for cell in self.cells:
            key = cell["key"]
            if key["length"] == length and "skipped" not in cell:
                rates = [key["rate"]] if "rate" in key else self.rates
                lines.setdefault(key["context"], []).extend((rate, cell[metric]) for rate in rates)
        return lines


def _rank(cell: dict[str, Any]) -> tuple[int, bool, int, int, int]:
    """Rank a cell in tables: by length, then rate, what has none last; contexts in the order of the page's legend."""
    key = cell["key"]
    kinds = [REAL, *CONTROLS]
    return key["length"], "rate" not in key, key.get("rate", 0), kinds.index(key["context"]), key.get("start", 0)
