"""What a report is made from, the folders of `rcc eval` and their samples; and figures as tables."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import InputError
from ...text.counts import show_count
from .. import results

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


# ---------------------------------------------------------------- what is read
@dataclass
class Run:
    """One folder.

    Attributes:
        letter: by which charts name it; empty where there is no other of its task.
        number: its place among those of its task.
    """

    name: str
    data: dict[str, Any]
    rows: list[dict[str, Any]]
    letter: str = ""
    number: int = 0
    _groups: dict[tuple[str, ...], dict[str, list[int]]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        return self.data["task"]

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.data["cells"]

    @cached_property
    def groupings(self) -> dict[str, list[dict[str, Any]]]:
        """All lists of cells that `results.json` holds."""
        lists = {name: value for name, value in self.data.items() if isinstance(value, list) and value}
        return {k: v for k, v in lists.items() if all(isinstance(cell, dict) and "key" in cell for cell in v)}

    @cached_property
    def made(self) -> list[str]:
        """When, where and with what it was made."""
        made = self.data["made"]
        parts = [made.get("date"), f"{len(self.rows):,} samples in {self.data['seconds']:,.0f} s"]
        parts += [f"{name} {made[name]}" for name in ("commit", "rcc", "torch", "transformers") if name in made]
        parts += [made.get("gpu"), made.get("processor")]
        parts += [f"{made['threads']} thread{'s' * (made['threads'] != 1)}"] if "threads" in made else []
        return [str(part) for part in parts if part]

    def behind(self, key: Mapping[str, Any], by: Sequence[str]) -> list[int]:
        """Numbers of the rows that a cell was made from, of cells told apart by some of the keys."""
        if (groups := self._groups.get(tuple(by))) is None:
            groups = self._groups[tuple(by)] = {}
            for i, row in enumerate(self.rows):
                if "skipped" not in row:
                    groups.setdefault(name_of({k: row["key"][k] for k in by if k in row["key"]}), []).append(i)
        return groups.get(name_of(key), [])


def name_of(key: Mapping[str, Any]) -> str:
    """The same for keys that are the same, whatever their order."""
    return json.dumps(key, sort_keys=True)


def joined(*parts: str, between: str = " ") -> str:
    """Those that are not empty."""
    return between.join(filter(None, parts))


def keys_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """By which cells are told apart; some may lack some."""
    return list(dict.fromkeys(name for cell in cells for name in cell["key"]))


class Samples:
    """The samples that the page holds, each once, and which of them belong to which figure.

    Args:
        limit: samples a figure, at most. Which ones: drawn by what is the same in all cells (the question, the
            document), so that different methods and folders show the same ones.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.rows: list[dict[str, Any]] = []
        self.lists: list[dict[str, Any]] = []
        self._places: dict[tuple[str, int], int] = {}
        self._made: dict[tuple[str, ...], int] = {}

    def cells(self, run: Run, grouping: str = "cells") -> Iterator[tuple[dict[str, Any], dict[str, Any], int | None]]:
        """Each cell of a list: its key, itself, and :meth:`behind` it."""
        cells = run.groupings.get(grouping, [])
        by = keys_of(cells)
        for cell in cells:
            yield cell["key"], cell, self.behind(run, cell["key"], by)

    def behind(self, run: Run, key: Mapping[str, Any], by: Sequence[str]) -> int | None:
        """The number of the list of samples of a cell, of cells told apart by some of the keys; None where there are
        none to show."""
        rows, name = run.behind(key, by), (run.name, *sorted(by), name_of(key))
        if not rows or not self.limit:
            return None
        if name not in self._made:
            cell = set(run.data["by"])

            def draw(i: int) -> int:
                return zlib.crc32(name_of({k: v for k, v in run.rows[i]["key"].items() if k not in cell}).encode())

            chosen = sorted(sorted(rows, key=draw)[: self.limit])
            self._made[name] = len(self.lists)
            title = joined(run.name, describe(key), between=" · ")
            self.lists.append({"title": title, "all": len(rows), "rows": [self._place(run, i) for i in chosen]})
        return self._made[name]

    def _place(self, run: Run, i: int) -> int:
        if (run.name, i) not in self._places:
            self._places[run.name, i] = len(self.rows)
            self.rows.append(_tidy(run.rows[i]))
        return self._places[run.name, i]


def _tidy(value: Any) -> Any:
    """With numbers as short as they are read, and none that JSON does not have."""
    if isinstance(value, dict):
        return {k: _tidy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_tidy(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def read(folders: Sequence[Path]) -> list[Run]:
    """Folders that `rcc eval` wrote; their names are as short as they can be without being the same.

    Raises:
        InputError: one holds no finished evaluation, or is named twice.
    """
    places = [folder.resolve() for folder in folders]
    for place, folder in zip(places, folders, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{folder} is named more than once: name each folder once.")
    runs = []
    for place, folder in zip(places, folders, strict=True):
        others = [other for other in places if other != place]
        ends = ("/".join(place.parts[-n:]) for n in range(1, len(place.parts) + 1))
        name = next((end for end in ends if not any(f"/{other}".endswith(f"/{end}") for other in others)), str(place))
        data, rows = results.load(folder)
        parts = {"task": str, "by": list, "cells": list, "settings": dict, "made": dict, "notes": list}
        if not all(isinstance(data.get(part), kind) for part, kind in parts.items()):
            raise InputError(f"{folder} holds no readable evaluation: make it again.")
        runs.append(Run(name, data, rows))
    return runs


# ---------------------------------------------------------------- what is shown
class Cell(NamedTuple):
    """A figure in a table; `share` is how much of the deepest colour is behind it."""

    text: str
    small: str = ""
    samples: int | None = None
    share: float | None = None


class Row(NamedTuple):
    """Figures for each heading of the table, or why there are none."""

    head: list[str]
    cells: list[list[Cell]]
    skipped: str = ""


class Table(NamedTuple):
    """`columns` are under headings of their own, which may be empty: {heading: names}."""

    title: str
    head: list[str]
    columns: dict[str, list[str]]
    rows: list[Row]


def describe(key: Mapping[str, Any]) -> str:
    """`{"method": "rcc", "rate": 8, "length": 512, "start": 75}` → `rcc · 8× · 512 tokens · start 75`."""
    parts = []
    for name, value in key.items():
        text = text_of(key, name)
        if name == "length":
            text += " tokens"
        elif text and name != "rate" and not isinstance(value, str):
            text = f"{name} {text}"
        parts.append(text)
    return joined(*parts, between=" · ")


def text_of(key: Mapping[str, Any], name: str) -> str:
    """A part of a key as a table shows it; nothing for none, and for the rate of what does not compress."""
    value = key.get(name)
    if value is None or (name == "rate" and not value):
        return ""
    if name == "rate":
        return f"{value}×"
    return show_count(value) if name == "length" and isinstance(value, int) else str(value)


def label(figure: str) -> tuple[str, float]:
    """A figure's name, and what it is multiplied with."""
    if figure in FIGURES:
        return FIGURES[figure]
    for end, unit, factor in (("_bytes", "MB", 1e-6), ("_seconds", "s", 1), ("_mb", "MB", 1)):
        if figure.endswith(end):
            return f"{figure.removesuffix(end).replace('_', ' ')}, {unit}", factor
    return figure.replace("_", " "), 1


def figures_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all figures, in the order of columns."""
    found = {name for cell in cells for name, value in cell.items() if name != "key" and isinstance(value, dict)}
    return [*(name for name in FIGURES if name in found), *sorted(found - set(FIGURES))]


def digits(values: Sequence[float]) -> int:
    """Behind the point, for all of a column: three of the smallest figure show, as far as they are not behind the
    third place; none of what is large."""
    sizes = [abs(v) for v in values if v and math.isfinite(v)]
    if all(v.is_integer() for v in sizes) or max(sizes) >= 10_000:
        return 0
    return min(max(0, 2 - math.floor(math.log10(min(sizes)))), 1 if max(sizes) >= 1000 else 3)


def interval(value: Value, places: int, factor: float = 1) -> str:
    """The bounds of a figure; nothing where there are none."""
    if value["low"] is None or value["high"] is None:
        return ""
    low, high = value["low"] * factor, value["high"] * factor
    return f"{low:,.{places}f}{' – ' if low < 0 else '–'}{high:,.{places}f}"


def table(run: Run, name: str, samples: Samples) -> Table:
    """A list of cells as a table: every figure with its interval."""
    cells = run.groupings[name]
    by, figures = keys_of(cells), figures_of(cells)
    places = {f: digits([float(c[f]["mean"] * label(f)[1]) for c in cells if f in c]) for f in figures}
    rows = []
    for key, cell, link in samples.cells(run, name):
        count = max((cell[f]["n"] for f in figures if f in cell), default=0)

        def shown(figure: str, cell: Value = cell, link: int | None = link, count: int = count) -> Cell:
            if figure not in cell:
                return Cell("–")
            value, factor = cell[figure], label(figure)[1]
            if figure in CERTAIN:
                return Cell("yes" if value["mean"] else "no", "", link)
            small = joined(interval(value, places[figure], factor), f"n {value['n']:,}" if value["n"] != count else "")
            return Cell(f"{value['mean'] * factor:,.{places[figure]}f}", small, link)

        head = [text_of(key, k) or "–" for k in by]
        found = [Cell(f"{count:,}", "", link), *map(shown, figures)]
        rows.append(Row(head, [found], cell.get("skipped", "")))
    title = "All figures" if name == "cells" else name.replace("_", " ").capitalize()
    names = ["tokens" if k == "length" else k for k in by]
    return Table(title, names, {"": ["samples", *(label(f)[0] for f in figures)]}, rows)


def heat_map(
    title: str,
    head: list[str],
    columns: dict[str, list[str]],
    rows: Mapping[tuple[str, ...], Mapping[tuple[str, str], Cell | str]],
) -> Table:
    """A table whose figures have a colour.

    Args:
        rows: {what a row is called: {(heading, column): figure, or why there is none}}.
    """
    made = []
    for name, found in rows.items():
        reasons = [some for some in found.values() if isinstance(some, str)]
        if len(reasons) == len(found):
            made.append(Row(list(name), [], reasons[0]))
            continue
        cells = [[found.get((heading, column), "") for column in names] for heading, names in columns.items()]
        made.append(Row(list(name), [[Cell("–", c) if isinstance(c, str) else c for c in some] for some in cells]))
    return Table(title, head, columns, made)
