"""Two evaluations of the same samples side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, brief
from . import results
from .results import Interval


@dataclass(frozen=True)
class Difference:
    """One figure of one cell in both evaluations, over the samples that both have."""

    key: dict[str, Any]
    metric: str
    a: float
    b: float
    change: Interval
    """b − a, sample by sample."""


def compare(a: Path, b: Path) -> tuple[list[Difference], list[str]]:
    """Return the differences between two folders that `rcc eval` wrote, and what to know about them.

    Raises:
        InputError: one holds no finished evaluation, they are of different tasks, or have no sample in common.
    """
    try:
        return _compare(a, b)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:  # what a damaged file holds
        raise InputError(f"{a} or {b} holds no readable evaluation ({brief(error)}): make it again.") from None


def _compare(a: Path, b: Path) -> tuple[list[Difference], list[str]]:
    (left, left_rows), (right, right_rows) = results.load(a), results.load(b)
    if left["task"] != right["task"]:
        raise InputError(f"{a} holds {left['task']!r}, {b} holds {right['task']!r}: compare two of the same task.")
    before = {json.dumps(row["key"]): row for row in left_rows}
    pairs = [(before[name], row) for row in right_rows if (name := json.dumps(row["key"])) in before]
    if not pairs:
        raise InputError(f"{a} and {b} have no sample in common: measure both on the same data and settings.")
    cells: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for x, y in pairs:
        cells.setdefault(json.dumps({k: x["key"][k] for k in left["by"] if k in x["key"]}), []).append((x, y))
    differences = []
    for name, pairs_of_cell in cells.items():
        for metric in [k for k, v in pairs_of_cell[0][0].items() if isinstance(v, (int, float))]:
            both = [(x, y) for x, y in pairs_of_cell if all(isinstance(r.get(metric), (int, float)) for r in (x, y))]
            if not both:
                continue
            xs, ys = ([float(row[metric]) for row in side] for side in zip(*both, strict=True))
            groups = [x["key"].get(left["cluster"]) for x, _ in both] if left["cluster"] else None
            change = results.paired(xs, ys, groups)
            differences.append(Difference(json.loads(name), metric, sum(xs) / len(xs), sum(ys) / len(ys), change))
    notes = []
    for side, rows in ((a, left_rows), (b, right_rows)):
        if len(rows) > len(pairs):
            notes.append(f"{len(rows) - len(pairs)} samples of {side} are not in the other and were left out.")
    different = [
        f"{key} ({left['settings'].get(key)!r}, {right['settings'].get(key)!r})"
        for key in sorted(set(left["settings"]) | set(right["settings"]))
        if left["settings"].get(key) != right["settings"].get(key)
    ]
    if different:
        notes.append(f"settings that differ: {', '.join(different)}.")
    return differences, notes


def table(differences: list[Difference], a: str, b: str) -> str:
    """Return the differences as a Markdown table; those whose interval leaves out zero are marked."""
    rows = []
    for d in differences:
        clear = d.change.low is not None and d.change.high is not None and (d.change.low > 0 or d.change.high < 0)
        change = results.show(d.change, sign="+")
        name = ", ".join(f"{k} {v}" for k, v in d.key.items())
        cells = [name, d.metric, f"{d.a:.3f}", f"{d.b:.3f}", f"**{change}**" if clear else change, str(d.change.n)]
        rows.append(cells)
    return results.markdown(["", "figure", a, b, "difference, 95 % interval", "pairs"], rows)
