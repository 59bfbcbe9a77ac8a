"""Where the parts of a chart stand."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcc.evaluation.axes import Axis
from rcc.evaluation.html import charts
from rcc.evaluation.html.charts import Look, Point, curves

values = st.floats(-5, 1000).map(lambda x: round(x, 5)).map(lambda x: {"mean": x, "low": x - 1, "high": x + 1, "n": 3})


lines = st.dictionaries(
    st.text("abc", min_size=1, max_size=30), st.lists(st.tuples(st.integers(1, 64), values), min_size=1), min_size=1
)


@settings(deadline=None, derandomize=True)
@given(lines, st.booleans(), st.booleans(), st.booleans())
def test_charts(lines: dict[str, list[tuple[int, dict[str, float]]]], log_x: bool, log_y: bool, level: bool) -> None:
    """Whatever is drawn stands inside, in its order; names do not overlap."""
    figures = [
        (Look(name, level=level and name < "b"), Point(x, value, ""))
        for name, points in lines.items()
        for x, value in points
    ]
    chart = curves("", figures, Axis(log=log_x), Axis(log=log_y))
    if chart is None:
        assert log_y
        assert all(value["mean"] <= 0 for points in lines.values() for _, value in points)
        return
    marks = [mark for line in chart.lines for mark in line["marks"]]
    for mark in marks:
        assert chart.left <= mark["x"] <= chart.right
        for y in (mark["y"], mark["low"], mark["high"]):
            assert y is None or 0 <= y <= chart.bottom + 1e-6
    assert all(0 <= y <= chart.bottom + 1e-6 for y, _ in chart.y_ticks)
    assert 2 <= len(chart.y_ticks) <= 13
    by_value = sorted(marks, key=lambda mark: mark["point"].value["mean"])
    heights = [mark["y"] for mark in by_value]
    assert heights == pytest.approx(sorted(heights, reverse=True), abs=1e-6)
    names = sorted(line["label"] for line in chart.lines)
    assert all(b - a >= charts.ROW - 1e-6 for a, b in itertools.pairwise(names))
    assert names[0] >= 0
    assert names[-1] <= chart.bottom + 1e-6


def test_charts_by_hand() -> None:
    """Equal ratios are equal distances on a logarithmic axis; no finite number is no point; labels are thinned."""

    def at(x: float, mean: float) -> tuple[Look, Point]:
        return Look("a"), Point(x, {"mean": mean, "low": None, "high": None, "n": 1}, "")

    chart = curves("", [at(4, 0.5), at(8, 0.25), at(16, math.nan), at(16, 0)], Axis(log=True), Axis(top=1))
    xs = [mark["x"] for mark in chart.lines[0]["marks"]]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1])
    assert len(xs) == 3
    ys = [mark["y"] for mark in chart.lines[0]["marks"]]
    assert ys[2] - ys[1] == pytest.approx(ys[1] - ys[0]) == pytest.approx((chart.bottom - charts.TOP - 4) / 4)
    assert [text for _, text in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    logs = curves("", [at(1, 3), at(2, 4e5)], Axis(), Axis(log=True))
    assert [text for _, text in logs.y_ticks] == ["10", "100", "1,000", "10,000", "100,000"]
    crowded = curves("", [at(i, 1) for i in range(1, 200)], Axis(ticks={i: str(i) for i in range(1, 200)}), Axis())
    assert 5 < len(crowded.x_ticks) < 25
    assert curves("", [at(1, math.inf)], Axis(), Axis()) is None
    assert curves("", [at(1, 0)], Axis(), Axis(log=True)) is None
