"""Where the parts of a chart stand, as plain numbers: `page.html` draws them as SVG.

Charts have the width of a phone, so that what is written in them can be read there; wider screens hold several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..axes import Axis

WIDTH, HEIGHT = 360, 230
"""Of a chart, in CSS pixels."""
TOP, BOTTOM = 8, 34
"""Its margins; those at the sides are as wide as what is written there."""
LETTER, ROW = 6.2, 13.0
"""Width of a letter on average, and height of a name."""
LONGEST = 24
"""Letters of a name, at most."""


@dataclass(frozen=True)
class Look:
    """How a line is told from the others: by its name beside its end and, for the eye to follow it, by the rest.

    Attributes:
        colour: one of eight, or None: that of the text.
        dash, marker: one of four each.
        soft: thinner and with hollow markers: something to compare the others with.
        level: it does not depend on x, and is drawn from one side to the other.
    """

    name: str
    colour: int | None = None
    dash: int = 0
    marker: int = 0
    soft: bool = False
    level: bool = False


@dataclass(frozen=True)
class Point:
    """A figure: `value` is an interval as `results.json` has it; `samples` says which samples it was made from."""

    x: float
    value: Mapping[str, Any]
    text: str
    samples: int | None = None


@dataclass
class Chart:
    """A chart in pixels from its upper left corner; `lines` are what the template draws, each a dictionary."""

    title: str
    x_name: str
    width: int
    height: int
    left: float
    right: float
    bottom: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[dict[str, Any]] = field(default_factory=list)


def gather(figures: Iterable[tuple[Look, Point]]) -> dict[Look, list[Point]]:
    """Join points of the same look to a line, from left to right; what is no finite number is left out."""
    lines: dict[Look, list[Point]] = {}
    for look, point in figures:
        if math.isfinite(point.value["mean"]) and math.isfinite(point.x):
            lines.setdefault(look, []).append(point)
    return {look: sorted(points, key=lambda p: p.x) for look, points in lines.items()}


def curves(
    title: str, figures: Iterable[tuple[Look, Point]], x: Axis, y: Axis, width: int = WIDTH, height: int = HEIGHT
) -> Chart | None:
    """Return points, each with the look of its line, as lines with their names at the right.

    None where nothing can be drawn. `width` and `height` are pixels, the latter more where the names need it.
    """
    lines = gather(figures)
    if y.log:
        drawable = {look: [p for p in points if p.value["mean"] > 0] for look, points in lines.items()}
        lines = {look: points for look, points in drawable.items() if points}
    if not lines:
        return None
    xs = [p.x for look, points in lines.items() if not look.level for p in points]
    ends = [p.value[end] for points in lines.values() for p in points for end in ("mean", "low", "high")]
    heights = [v for v in ends if v is not None and math.isfinite(v) and (v > 0 or not y.log)]
    y_ticks = _round(heights if y.log else [0, y.top, *heights], y.log)
    height = max(height, int(TOP + BOTTOM + ROW * (len(lines) + 1)))  # room for the names
    up = _scale([*y_ticks, *heights], y.log, height - BOTTOM, TOP + 4)
    left = 9 + LETTER * max(len(y.show(value)) for value in y_ticks)
    right, bottom = width - 25 - LETTER * max(min(len(look.name), LONGEST) for look in lines), height - BOTTOM
    x_ticks = dict(x.ticks or {value: x.show(value) for value in _round(xs or [1], x.log)})
    across = _scale([*(xs or [1]), *x_ticks], x.log, left + 12, right - 12)
    chart = Chart(
        title,
        x.name,
        width,
        height,
        left,
        right,
        bottom,
        _thin([(across(value), text) for value, text in sorted(x_ticks.items())]),
        [(up(value), y.show(value)) for value in y_ticks],
    )
    apart = [look for look in lines if not look.level]
    uncertain = any(
        end is not None for points in lines.values() for p in points for end in (p.value["low"], p.value["high"])
    )
    for look, points in lines.items():
        # lines that have the same x stand side by side, so that their intervals can be told apart
        aside = 0.0
        if uncertain and not look.level:
            aside = (apart.index(look) - (len(apart) - 1) / 2) * min(3, 18 / len(apart))
        marks = []
        for p in points:
            at = right if look.level else across(p.x) + aside
            low, high = (None if v is None or (y.log and v <= 0) else up(v) for v in map(p.value.get, ("low", "high")))
            marks.append({"x": at, "y": up(p.value["mean"]), "low": low, "high": high, "point": p})
        start = [(left, marks[-1]["y"])] if look.level else []
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in [*start, *((m["x"], m["y"]) for m in marks)])
        name = look.name if len(look.name) <= LONGEST else look.name[: LONGEST - 1] + "…"
        chart.lines.append({"look": look, "path": path, "marks": marks, "name": name, "end": marks[-1]})
    chart.lines.sort(key=lambda line: line["end"]["y"])
    for line, label in zip(chart.lines, _spread([line["end"]["y"] for line in chart.lines], TOP, bottom), strict=True):
        line["label"] = label
    chart.lines.sort(key=lambda line: not line["look"].soft)  # what is compared is drawn over what it is compared with
    return chart


def _scale(values: Sequence[float], log: bool, low: float, high: float) -> Callable[[float], float]:
    """Return a scale: the smallest value → `low`, the largest → `high`; a single one → the middle."""
    measure = math.log if log else float
    first, last = measure(min(values)), measure(max(values))
    if first == last:
        return lambda value: (low + high) / 2
    return lambda value: low + (measure(value) - first) / (last - first) * (high - low)


def _round(values: Sequence[float], log: bool) -> list[float]:
    """Return round numbers for the ticks of an axis.

    A linear axis has them from below the smallest value to above the largest, another one between these, and around
    them where they are few.
    """
    low, high = min(values), max(values)
    if log:
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        steps = [m * 10.0**e for e in decades for m in (1, 2, 5)]
        first = max(i for i, step in enumerate(steps) if step <= low)
        last = min(i for i, step in enumerate(steps) if step >= high)
        inner = steps[first + 1 : last]
        if len(inner) < 3:
            return steps[first : last + 1]
        whole = [step for step in inner if f"{step:e}".startswith("1")]
        return inner if len(inner) <= 8 else whole[:: -(-len(whole) // 8)]
    step = 10 ** math.floor(math.log10((high - low) or 1))
    step = next(step * m for m in (0.1, 0.2, 0.25, 0.5, 1, 2, 5) if (high - low) / (step * m) <= 5)
    return [round(i * step, 12) for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _thin(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return the ticks that there is room for, from left to right."""
    shown: list[tuple[float, str]] = []
    for at, text in ticks:
        if not shown or at - shown[-1][0] >= 8 + LETTER * (len(text) + len(shown[-1][1])) / 2:
            shown.append((at, text))
    return shown


def _spread(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Move heights in rising order apart by a row, between the bounds as long as there is room."""
    apart: list[float] = []
    for height in heights:
        apart.append(max(height, apart[-1] + ROW if apart else low))
    for i in reversed(range(len(apart))):
        apart[i] = min(apart[i], high if i == len(apart) - 1 else apart[i + 1] - ROW)
    return apart
