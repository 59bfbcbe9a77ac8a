"""Plots are data until they are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from rcc.evaluation.axes import Axis, counts_axis
from rcc.evaluation.plots import CurvePlot, HeatPlot, Plot, from_left
from rcc.evaluation.results import Interval

LINES = {"rcc": [(2048.0, Interval(0.5, 0.4, 0.6, 9)), (512.0, Interval(0.7, None, None, 1))]}
CURVES = CurvePlot(from_left(LINES), counts_axis("tokens", [2048, 512, 512]), Axis("score", log=True), "Scores")
HEAT = HeatPlot([[0.5, None]], ["8×"], ["start", "end"], Axis("place"), Axis("rate"), "Found")


def test_an_axis_of_counts() -> None:
    assert CURVES.x.ticks == {512: "512", 2048: "2k"}
    assert [x for x, _ in CURVES.lines["rcc"]] == [512, 2048]


@pytest.mark.parametrize("plot", [CURVES, HEAT])
def test_they_are_drawn(plot: Plot, tmp_path: Path) -> None:
    plot.draw(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
