"""Figures as a page's tables show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .folders import Finished, SampleLists
from .keys import joined, keys_of, text_of

FIGURES: dict[str, tuple[str, float]] = {
    "score": ("score", 1),
    "f1": ("F1", 1),
    "exact_match": ("exact match", 1),
    "bleu": ("BLEU-4", 1),
    "rouge_l": ("ROUGE-L", 1),
    "exact": ("exact", 1),
    "run": ("run, tokens", 1),
    "accuracy": ("accuracy", 1),
    "loss": ("loss, nats", 1),
    "right": ("found, %", 100),
    "instruction_accuracy": ("question rebuilt", 1),
    "context_tokens": ("text, tokens", 1),
    "positions": ("positions", 1),
    "bytes": ("held, MB", 1e-6),
    "load_seconds": ("load, ms", 1000),
}
"""Figure → its name in tables, and what it is multiplied with; in the order of their columns, before all others."""
CERTAIN = ("beyond_window",)
"""Figures that are no measurements but yes or no."""
Value = Mapping[str, Any]
"""An interval as `results.json` has it: mean, low, high, n."""


class Cell(NamedTuple):
    """A figure in a table; `share` is how much of the deepest colour it is shown on, 0 to 1."""

    text: str
    small: str = ""
    samples: int | None = None
    share: float | None = None


class TableRow(NamedTuple):
    """Figures for each heading of the table, or why there are none."""

    head: list[str]
    cells: list[list[Cell]]
    skipped: str = ""


class Table(NamedTuple):
    """`columns` are under headings of their own, which may be empty: {heading: names}."""

    title: str
    head: list[str]
    columns: dict[str, list[str]]
    rows: list[TableRow]


def label(figure: str) -> tuple[str, float]:
    """Return a figure's name in tables, and what it is multiplied with."""
    if figure in FIGURES:
        return FIGURES[figure]
    for end, unit, factor in (("_bytes", "MB", 1e-6), ("_seconds", "s", 1), ("_mb", "MB", 1)):
        if figure.endswith(end):
            return f"{figure.removesuffix(end).replace('_', ' ')}, {unit}", factor
    return figure.replace("_", " "), 1


def figures_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of all figures, in the order of columns."""
    names = {name for cell in cells for name, value in cell.items() if name != "key" and isinstance(value, dict)}
    return [*(name for name in FIGURES if name in names), *sorted(names - set(FIGURES))]


def digits(values: Sequence[float]) -> int:
    """Return the decimal places of a column: three digits of its smallest figure show, at most three decimals.

    Large figures have none.
    """
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    if all(v.is_integer() for v in sizes) or max(sizes) >= 10_000:
        return 0
    return min(max(0, 2 - math.floor(math.log10(min(sizes)))), 1 if max(sizes) >= 1000 else 3)


def interval(value: Value, decimals: int, factor: float = 1) -> str:
    """Write the bounds of a figure; nothing where there are none."""
    if value["low"] is None or value["high"] is None:
        return ""
    low, high = value["low"] * factor, value["high"] * factor
    return f"{low:,.{decimals}f}{' – ' if low < 0 else '–'}{high:,.{decimals}f}"


def table(run: Finished, name: str, samples: SampleLists) -> Table:
    """Make a table of a list of cells: every figure with its interval."""
    cells = run.groupings[name]
    by, figures = keys_of(cells), figures_of(cells)
    decimals = {f: digits([float(c[f]["mean"] * label(f)[1]) for c in cells if f in c]) for f in figures}
    rows = []
    for key, cell, link in samples.cells(run, name):
        count = max((cell[f]["n"] for f in figures if f in cell), default=0)

        def shown(figure: str, cell: Value = cell, link: int | None = link, count: int = count) -> Cell:
            if figure not in cell:
                return Cell("–")
            value, factor = cell[figure], label(figure)[1]
            if figure in CERTAIN:
                return Cell("yes" if value["mean"] else "no", "", link)
            small = joined(
                interval(value, decimals[figure], factor), f"n {value['n']:,}" if value["n"] != count else ""
            )
            return Cell(f"{value['mean'] * factor:,.{decimals[figure]}f}", small, link)

        head = [text_of(key, k) or "–" for k in by]
        columns = [Cell(f"{count:,}", "", link), *map(shown, figures)]
        rows.append(TableRow(head, [columns], cell.get("skipped", "")))
    title = "All figures" if name == "cells" else name.replace("_", " ").capitalize()
    names = ["tokens" if k == "length" else k for k in by]
    return Table(title, names, {"": ["samples", *(label(f)[0] for f in figures)]}, rows)


def heat_map(
    title: str,
    head: list[str],
    columns: dict[str, list[str]],
    rows: Mapping[tuple[str, ...], Mapping[tuple[str, str], Cell | str]],
) -> Table:
    """Make a table whose figures have a colour.

    Args:
        title: what stands above it.
        head: headings of the columns that name a row.
        columns: {heading: the columns under it}.
        rows: {what a row is called: {(heading, column): figure, or why there is none}}.
    """
    made = []
    for name, given in rows.items():
        reasons = [cell for cell in given.values() if isinstance(cell, str)]
        if len(reasons) == len(given):
            made.append(TableRow(list(name), [], reasons[0]))
            continue
        groups = [[given.get((heading, column), "") for column in names] for heading, names in columns.items()]
        cells = [[Cell("–", cell) if isinstance(cell, str) else cell for cell in group] for group in groups]
        made.append(TableRow(list(name), cells))
    return Table(title, head, columns, made)
