"""What the charts and heat maps of every kind of evaluation are made with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..axes import Axis, counts_axis
from .charts import WIDTH, Chart, Look, Point, curves
from .keys import joined
from .tables import Cell, Table, Value, digits, interval

WIDE = 900, 400
"""Width and height of a chart that comes first; phones get one as high and as narrow as the others."""


@dataclass
class ChartGroup:
    """What stands under one heading; `main` is the same chart for wide screens and for narrow ones."""

    title: str
    note: str = ""
    main: tuple[Chart, Chart] | None = None
    charts: list[Chart | None] = field(default_factory=list)
    heat: list[Table] = field(default_factory=list)


def point(name: str, condition: str, x: float, value: Value, samples: int | None, factor: float = 1) -> Point:
    """Make a figure of a chart, with what the pointer is told of it: what it is of, and under which condition."""
    ends = {end: None if value[end] is None else value[end] * factor for end in ("mean", "low", "high")}
    decimals = digits([float(ends["mean"] or 0)])
    around = interval(value, decimals, factor)
    text = f"{name}, {condition}: {ends['mean']:,.{decimals}f}{f' [{around}]' if around else ''}, n {value['n']:,}"
    return Point(x, {**ends, "n": value["n"]}, text, samples)


def numbered(names: Iterable[Any]) -> dict[Any, int]:
    """Give each name a number, from 0, in the order of their appearance."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def both(title: str, points: list[tuple[Look, Point]], x: Axis, y: Axis) -> tuple[Chart, Chart] | None:
    """Make a chart for wide screens and for narrow ones."""
    wide, narrow = curves(title, points, x, y, *WIDE), curves(title, points, x, y, WIDTH, WIDE[1])
    return None if wide is None or narrow is None else (wide, narrow)


def rates_axis(rates: Iterable[float], name: str = "compression rate") -> Axis:
    """Return a logarithmic axis with a tick at each of these rates."""
    return Axis(name, log=True, ticks={rate: f"{rate:g}×" for rate in sorted(rates)})


def lengths_axis(lengths: Iterable[int]) -> Axis:
    """Return a logarithmic axis with a tick at each of these lengths in tokens."""
    return counts_axis("tokens of text", lengths)


def size(mb: float) -> str:
    """Write megabytes as an axis shows them."""
    unit, factor = next((u, f) for u, f in (("TB", 1e6), ("GB", 1e3), ("MB", 1), ("kB", 1e-3)) if mb >= f or f < 1)
    return f"{mb / factor:g} {unit}"


SHARE, PART = Axis(), Axis(top=1)
"""Axes of figures: as high as they need, or at least up to 1."""


def shade(cell: Mapping[str, Any], figure: str, link: int | None, most: float = 1, percent: bool = False) -> Cell | str:
    """Return a share as a heat map shows it, its colour deepest at `most`; or why there is none."""
    if figure not in cell:
        return str(cell.get("skipped", ""))
    value, decimals, factor = cell[figure], 0 if percent else 3, 100 if percent else 1
    small = joined(interval(value, max(0, decimals - 1), factor), f"n\u00a0{value['n']:,}")
    return Cell(f"{value['mean'] * factor:.{decimals}f}{'%' if percent else ''}", small, link, value["mean"] / most)
