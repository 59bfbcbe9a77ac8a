"""Charts of questions and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..axes import Axis
from .charts import Look, Point, curves
from .folders import Finished, SampleLists
from .groups import SHARE, ChartGroup, both, numbered, point, rates_axis, shade, size
from .keys import describe, joined
from .tables import Cell, Table, heat_map, label


def qa(runs: list[Finished], samples: SampleLists) -> Iterator[ChartGroup]:
    """Yield quality against compression, for every method; its cost; by length and by set."""
    cells = [cell for run in runs for cell in run.cells]
    methods = numbered(["rcc", *(cell["key"]["method"] for cell in cells if cell["key"]["rate"])])
    modes = numbered(cell["key"]["mode"] for cell in cells)
    ways = {(cell["key"]["method"], cell["key"]["mode"]) for cell in cells}
    several = {method for method, _ in ways if sum(other == method for other, _ in ways) > 1}
    rates = sorted({cell["key"]["rate"] for cell in cells if "skipped" not in cell} - {0})

    def look(run: Finished, key: Mapping[str, Any], level: bool = True) -> Look:
        """Return a look: a colour for each method, a marker for each way to ask it, a dash for each folder."""
        name = joined(key["method"], key["mode"] if key["method"] in several else "", run.letter)
        if not key["rate"]:
            return Look(name, None, run.number % 4, modes[key["mode"]] % 4, soft=True, level=level)
        return Look(name, methods[key["method"]] % 8, run.number % 4, modes[key["mode"]] % 4)

    def points(figure: str) -> Iterator[tuple[Look, Point]]:
        for run in runs:
            for key, cell, link in samples.cells(run):
                if figure in cell:
                    of, x = look(run, key), held(cell)
                    condition = f"{x:.1f} tokens a position" if key["rate"] else "at any rate"
                    yield of, point(of.name, condition, x, cell[figure], link, label(figure)[1])

    axis = rates_axis(rates, "tokens of text for each position held")
    yield ChartGroup(
        "Quality against compression",
        "Each set’s own score, 0 to 1. Dashed across: what does not compress, but reads the whole text or none of it.",
        main=both("score", list(points("score")), axis, SHARE),
    )
    costs = {
        "bytes": ("Memory of a text that is held", Axis(log=True, show=size)),
        "compress_seconds": ("Seconds to compress it", Axis(log=True)),
        "first_token_seconds": ("Seconds to an answer’s first token", Axis(log=True)),
    }
    yield ChartGroup("Cost", charts=[curves(title, points(f), axis, y) for f, (title, y) in costs.items()])

    lengths: dict[str, float] = {}
    for run in runs:
        for cell in run.groupings.get("by_length", []):
            lengths.setdefault(cell["key"]["bucket"], cell.get("context_tokens", {}).get("mean", 0))
    buckets = numbered(sorted(lengths, key=lambda name: lengths[name]))

    def by_length(rate: int) -> Iterator[tuple[Look, Point]]:
        for run in runs:
            for key, cell, link in samples.cells(run, "by_length"):
                if key["rate"] in (0, rate) and "score" in cell:
                    of, bucket = look(run, key, level=False), key["bucket"]
                    yield of, point(of.name, bucket, buckets[bucket], cell["score"], link)

    axis = Axis("tokens of text", ticks={number: name for name, number in buckets.items()})
    yield ChartGroup(
        "Score by length of the text",
        "Each rate, beside what does not compress.",
        charts=[curves(f"{rate}×", by_length(rate), axis, SHARE) for rate in rates],
    )
    yield ChartGroup("Score by set", heat=[by_set(run, samples) for run in runs if "by_set" in run.groupings])


def held(cell: Mapping[str, Any]) -> float:
    """Return the tokens of text for each position held: measured, or the rate."""
    if "context_tokens" in cell and "positions" in cell and cell["positions"]["mean"] > 0:
        return float(cell["context_tokens"]["mean"] / cell["positions"]["mean"])
    return float(cell["key"]["rate"])


def by_set(run: Finished, samples: SampleLists) -> Table:
    """Return scores by method and set; the highest one has the deepest colour."""
    cells = run.groupings["by_set"]
    most = max((cell["score"]["mean"] for cell in cells if "score" in cell), default=0) or 1
    rows: dict[tuple[str, ...], dict[tuple[str, str], Cell | str]] = {}
    for key, cell, link in samples.cells(run, "by_set"):
        name = describe({k: v for k, v in key.items() if k != "set"})
        rows.setdefault((name,), {})["", key["set"]] = shade(cell, "score", link, most)
    return heat_map(run.name, ["method"], {"": list(dict.fromkeys(cell["key"]["set"] for cell in cells))}, rows)
