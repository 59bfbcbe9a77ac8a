"""Plots of one evaluation as data, and as the files of its folder, drawn by matplotlib.

The page of `rcc report` (:mod:`rcc.evaluation.html`) has charts of its own: they put several folders into one picture,
lead to the samples of each point, and need no matplotlib. Both are read by the axes of :mod:`rcc.evaluation.axes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError
from .axes import Axis
from .results import Interval

Lines = dict[str, list[tuple[float, Interval]]]
"""Curves by name: (x, figure) each."""


class Plot(Protocol):
    """A picture of figures."""

    def draw(self, path: Path) -> None:
        """Write it into a file, whose name says of what kind."""


@dataclass(frozen=True)
class CurvePlot:
    """Curves with their intervals as bands.

    Args:
        lines: in the order of the legend.
        x, y: the axes; where `x` is logarithmic, in base 2 and with ticks of its own.
    """

    lines: Lines
    x: Axis
    y: Axis
    title: str

    def draw(self, path: Path) -> None:
        """Write the curves into an image file.

        Raises:
            InputError: matplotlib is not installed.
        """
        figure, axes = _figure(6.4, 4.0)
        for name, points in self.lines.items():
            xs = [x for x, _ in points]
            axes.plot(xs, [v.mean for _, v in points], marker="o", markersize=3, label=name)
            bounds = [(v.mean if v.low is None else v.low, v.mean if v.high is None else v.high) for _, v in points]
            axes.fill_between(xs, [low for low, _ in bounds], [high for _, high in bounds], alpha=0.15)
        if self.x.log:
            axes.set_xscale("log", base=2)
        if self.x.ticks is not None:
            axes.set_xticks(list(self.x.ticks), list(self.x.ticks.values()))
            axes.minorticks_off()
        if self.y.log:
            axes.set_yscale("log")
        axes.set(xlabel=self.x.name, ylabel=self.y.name, title=self.title)
        axes.grid(alpha=0.3)
        if len(self.lines) > 1:
            axes.legend()
        figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class HeatPlot:
    """Shares from 0 to 1 by row and column, red to green.

    Args:
        shares: a list a row; None: there is none, which is left white.
        rows, columns: their names.
        x, y: what columns and rows are.
    """

    shares: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    x: Axis
    y: Axis
    title: str

    def draw(self, path: Path) -> None:
        """Write the heat map into an image file.

        Raises:
            InputError: matplotlib is not installed.
        """
        figure, axes = _figure(1.6 + 0.9 * len(self.columns), 1.4 + 0.45 * len(self.rows))
        table = [[float("nan") if share is None else share for share in row] for row in self.shares]
        axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(self.columns)), self.columns)
        axes.set_yticks(range(len(self.rows)), self.rows)
        for i, row in enumerate(self.shares):
            for j, share in enumerate(row):
                axes.text(j, i, "–" if share is None else f"{share:.0%}", ha="center", va="center")
        axes.set(xlabel=self.x.name, ylabel=self.y.name, title=self.title)
        figure.savefig(path, dpi=150)


def from_left(lines: Mapping[str, Sequence[tuple[float, Interval]]]) -> Lines:
    """Return the same lines, the points of each in the order of x."""
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a matplotlib figure of so many inches, and its axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'rcc-context[eval]', or name no folder.") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
