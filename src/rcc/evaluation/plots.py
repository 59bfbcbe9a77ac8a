"""Plots of evaluations, as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..text.counts import show_count
from .results import Interval


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'rcc-context[eval]', or name no folder.") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def curves(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, Interval]]],
    x: str,
    y: str,
    title: str,
    log: bool = False,
    log_y: bool = False,
) -> None:
    """Draw curves with their intervals as bands: {name: [(x, figure), …]}; `log` is of whole numbers."""
    figure, axes = _figure(6.4, 4.0)
    for name, points in lines.items():
        across = [value for value, _ in points]
        axes.plot(across, [v.mean for _, v in points], marker="o", markersize=3, label=name)
        bounds = [(v.mean if v.low is None else v.low, v.mean if v.high is None else v.high) for _, v in points]
        axes.fill_between(across, [low for low, _ in bounds], [high for _, high in bounds], alpha=0.15)
    if log:
        axes.set_xscale("log", base=2)
        ticks = sorted({value for points in lines.values() for value, _ in points})
        axes.set_xticks(ticks, [show_count(int(tick)) for tick in ticks])
        axes.minorticks_off()
    if log_y:
        axes.set_yscale("log")
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, dpi=150)


def heat_map(
    path: Path,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    x: str,
    y: str,
) -> None:
    """Draw shares from 0 to 1 by row and column, red to green; None is left white."""
    figure, axes = _figure(1.6 + 0.9 * len(columns), 1.4 + 0.45 * len(rows))
    table = [[float("nan") if v is None else v for v in row] for row in values]
    axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, "–" if value is None else f"{value:.0%}", ha="center", va="center")
    axes.set(xlabel=x, ylabel=y, title=title)
    figure.savefig(path, dpi=150)
