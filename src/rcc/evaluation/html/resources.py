"""Charts of memory and time."""

from __future__ import annotations

from collections.abc import Iterator

from ...text.counts import show_count
from ..axes import Axis
from ..resources.settings import PAPER, PAPER_RATE, compressor_label
from .charts import Look, Point, curves
from .folders import Finished, SampleLists
from .groups import ChartGroup, both, lengths_axis, numbered, point, size
from .keys import joined, name_of


def resources(runs: list[Finished], samples: SampleLists) -> Iterator[ChartGroup]:
    """Yield memory and time by length, for each folder: they are of different shapes and machines."""
    figures = {  # → the chart that it is in
        "compress_peak_bytes": "peak",
        "plain_peak_bytes": "peak",
        "first_token_seconds": "first",
        "plain_first_token_seconds": "first",
        "compress_seconds": "compress",
        "ask_peak_bytes": "ask",
    }
    for run in runs:
        axis = lengths_axis({cell["key"]["length"] for cell in run.cells if "rate" in cell["key"]})
        rates = numbered(sorted({cell["key"]["rate"] for cell in run.cells if "rate" in cell["key"]}))
        compressor = compressor_label(run.data["settings"])
        sources = {name_of(row["key"]): row.get("source", "") for row in run.rows}
        points: dict[str, list[tuple[Look, Point]]] = {"peak": [], "first": [], "compress": [], "ask": []}
        for key, cell, link in samples.cells(run):
            source = sources.get(name_of(key), "")
            condition = joined(f"{show_count(key['length'])} tokens", source, between=", ")
            of = Look("plain", None, 0, 1)
            if "rate" in key:
                of = Look(f"{compressor} {key['rate']}×", rates[key["rate"]] % 8)
                if "kv_bytes" in cell and "weights_bytes" in cell:
                    floor = Look(f"floor {key['rate']}×", of.colour, 2, 3, soft=True)
                    least = {**cell["kv_bytes"], "mean": cell["kv_bytes"]["mean"] + cell["weights_bytes"]["mean"]}
                    points["peak"].append((floor, point(floor.name, condition, key["length"], least, link, 1e-6)))
            elif source == "extrapolated":
                of = Look("plain, extrapolated", None, 2, 1, soft=True)
            for figure, chart in figures.items():
                if figure in cell:
                    factor = 1e-6 if figure.endswith("bytes") else 1
                    points[chart].append((of, point(of.name, condition, key["length"], cell[figure], link, factor)))
        if run.data["settings"].get("paper"):
            points["peak"] += paper()
        seconds, memory = Axis(log=True), Axis(log=True, show=size)
        how = "Measured" if run.data["settings"].get("measured") else "Computed"
        charts = [
            curves("Seconds to the first token", points["first"], axis, seconds),
            curves("Seconds to compress", points["compress"], axis, seconds),
            curves("Peak memory of asking", points["ask"], axis, memory),
        ]
        yield ChartGroup(
            f"Peak memory{f': {run.name}' if run.letter else ''}",
            f"{how}, by length of the text. Floor: weights and KV cache alone. Plain: the same base reading the text as"
            " it is.",
            both("peak memory", points["peak"], axis, memory),
            charts,
        )


def paper() -> Iterator[tuple[Look, Point]]:
    """Yield the paper's own figures."""
    for reader, name in (("rcc", f"paper, RCC {PAPER_RATE}×"), ("plain", "paper, plain")):
        for length, mb in PAPER[reader].items():
            if length:
                value = {"mean": mb, "low": None, "high": None, "n": 1}
                condition = f"{show_count(length)} tokens"
                yield Look(name, None, 3, 2, soft=True), point(name, condition, length, value, None)
