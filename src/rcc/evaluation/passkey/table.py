"""The figures of a passkey test as a table and heat maps, beside the paper's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...data.haystack import POSITIONS, VARIANTS
from ...text.counts import show_count
from ..axes import Axis
from ..plots import HeatPlot
from ..results import Results, interval, markdown, show

PAPER = {2**15: (99, 100, 100), 2**17: (100,) * 3, 2**18: (100,) * 3, 2**19: (98, 100, 100), 2**20: (100,) * 3}
"""Length → % found at start, middle and end: the paper's Transformer encoder at 512×, after both stages."""

Rows = list[dict[str, Any]]
"""Samples, as `samples.jsonl` has them."""


class PasskeyReport:
    """The figures of samples as tables and plots.

    Args:
        measured: with samples of :meth:`rcc.evaluation.passkey.run.PasskeyEvaluation.cases`.
    """

    def __init__(self, measured: Results):
        self.measured, self.positions = measured, measured.settings["positions"]
        order = measured.settings["variants"]
        self.groups: dict[tuple[str, int, int], Rows] = {}
        """{(variant, length, rate): rows}, as tables show them."""
        for row in sorted(measured.rows, key=lambda row: (order.index(row["key"]["variant"]), row["key"]["length"])):
            key = row["key"]
            self.groups.setdefault((key["variant"], key["length"], key["rate"]), []).append(row)

    def more(self) -> dict[str, Any]:
        """Return no further figures."""
        return {}

    def table(self) -> str:
        """Return accuracy by length and position, the control's, time and memory; and the paper's rows."""
        header = ["variant", "tokens", "rate", *self.positions, "key replaced", "s a sample", "peak MB"]
        lines = []
        for (variant, length), groups in itertools.groupby(self.groups.items(), lambda item: item[0][:2]):
            for (*_, rate), rows in groups:
                lines.append([variant, show_count(length), f"{rate}×", *self._line(rows)])
            if variant == "plain" and length in PAPER:
                theirs = dict(zip(POSITIONS, PAPER[length], strict=True))
                shares = [f"{theirs[position]}%" for position in self.positions]
                lines.append(["plain, the paper's", show_count(length), "512×", *shares, *"––––"])
        return markdown([*header, "segments read"], lines)

    def _line(self, rows: Rows) -> list[str]:
        """Return the figures of one line of the table."""
        made = [row for row in rows if "right" in row]
        if not made:
            return [*("does not fit" for _ in self.positions), *"––––"]
        shares = [_right(rows, "whole", position) for position in self.positions]
        line = [show(interval(share), percent=True) if share else "–" for share in shares]
        control = _right(rows, "replaced")
        line.append(f"{sum(control):.0f} of {len(control)}" if control else "–")
        line.append(f"{np.mean([row['seconds'] for row in made]):.2f}")
        peaks = [row["peak_mb"] for row in made if "peak_mb" in row]
        line.append(f"{max(peaks):,.0f}" if peaks else "–")
        most = max(made, key=lambda row: row.get("segments_read", 0))
        read = f"{most['segments_read']:,} of {most['text']['segments']:,}" if "segments_read" in most else "–"
        return [*line, read]

    def plots(self) -> dict[str, HeatPlot]:
        """Return heat maps of accuracy by length and position, one a variant, by file name."""
        made = {}
        settings = self.measured.settings
        for variant in settings["variants"]:
            groups = {key[1:]: rows for key, rows in self.groups.items() if key[0] == variant}
            shares = [[_right(rows, "whole", position) for position in self.positions] for rows in groups.values()]
            made[f"passkey-{variant}.png"] = HeatPlot(
                shares=[[float(np.mean(share)) if share else None for share in line] for line in shares],
                rows=[f"{show_count(length)}, {rate}×" for length, rate in groups],
                columns=self.positions,
                title=f"{settings['model']}: {variant}",
                x=Axis("place of the key in the text"),
                y=Axis("tokens, rate"),
            )
        return made

    def notes(self, untrained: Sequence[int], trained: Sequence[int]) -> list[str]:
        """Return what to know about the figures, each thing once.

        Args:
            untrained: the rates of what was measured that the model was not trained at.
            trained: those that it was.
        """
        settings, rows = self.measured.settings, self.measured.rows
        notes = list(dict.fromkeys(f"Not measured: {row['skipped']}." for row in rows if "skipped" in row))
        notes += [
            f"{settings['model']} was not trained at {rate}×, only at {', '.join(f'{r}×' for r in trained)}:"
            " expect little there."
            for rate in untrained
        ]
        if any("segments_read" in row and not VARIANTS[row["key"]["variant"]].prose for row in rows):
            notes.append(
                "Segments read: a segment's vectors depend on nothing but its tokens, so those that repeat (filler)"
                " were read once; the context is the same up to rounding."
            )
        if settings["prose"]:
            notes.append(f"Prose: {', '.join(settings['prose'])}, begun at any sentence, and again from its beginning.")
        if any(row["key"]["context"] == "replaced" and "right" in row for row in rows):
            notes.append(
                "Key replaced: the control, all positions together. Every segment that holds a token of the key gave"
                " way to the text without it; what is found then was guessed."
            )
        if any("peak_mb" in row for row in rows):
            gpu = settings["device"] == "cuda"
            what = (
                "tensors on the GPU, the model's included" if gpu else "resident memory, model and libraries included"
            )
            notes.append(f"Peak MB: {what}; the most of any sample, shorter texts first.")
        if any(row["key"]["variant"] == "plain" and row["key"]["length"] in PAPER for row in rows):
            notes.append(
                "The paper's: its own figures (arXiv 2406.06110, section 4.2), not measured here: Pythia-1.4B, segments"
                " of 8,192 tokens, 512×."
            )
        return notes


def _right(rows: Rows, context: str, position: str | None = None) -> list[float]:
    """Return 1 for each key that was found and 0 for the others, of a context and, unless None, a position."""
    return [
        float(row["right"])
        for row in rows
        if "right" in row and row["key"]["context"] == context and position in (None, row["key"]["position"])
    ]
