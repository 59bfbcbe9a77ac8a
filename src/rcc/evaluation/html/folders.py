"""What a page is made from: the folders of `rcc eval` and their samples."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import InputError
from .. import results
from .keys import describe, joined, keys_of, name_of


@dataclass
class Finished:
    """A finished evaluation's folder.

    Attributes:
        name: as short as it can be without being another's.
        data: `results.json`.
        rows: `samples.jsonl`.
        letter: by which charts name it; empty where there is no other of its task.
        number: its index among those of its task.
    """

    name: str
    data: dict[str, Any]
    rows: list[dict[str, Any]]
    letter: str = ""
    number: int = 0
    _groups: dict[tuple[str, ...], dict[str, list[int]]] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The kind of evaluation."""
        return str(self.data["task"])

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The figures of its table."""
        cells: list[dict[str, Any]] = self.data["cells"]
        return cells

    @cached_property
    def groupings(self) -> dict[str, list[dict[str, Any]]]:
        """All lists of cells that `results.json` holds, by name."""
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

    def rows_of(self, key: Mapping[str, Any], by: Sequence[str]) -> list[int]:
        """Return the numbers of the rows that a cell was made from.

        Args:
            key: the cell's.
            by: the keys that tell such cells apart.
        """
        if (groups := self._groups.get(tuple(by))) is None:
            groups = self._groups[tuple(by)] = {}
            for i, row in enumerate(self.rows):
                if "skipped" not in row:
                    groups.setdefault(name_of({k: row["key"][k] for k in by if k in row["key"]}), []).append(i)
        return groups.get(name_of(key), [])


class SampleLists:
    """The samples that the page holds, each once, and which of them belong to which figure.

    Args:
        limit: samples a figure, at most. Which ones: drawn by what is the same in all cells (the question, the
            document), so that different methods and folders show the same ones.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.rows: list[dict[str, Any]] = []
        self.lists: list[dict[str, Any]] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._made: dict[tuple[str, ...], int] = {}

    def cells(
        self, run: Finished, grouping: str = "cells"
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], int | None]]:
        """Yield each cell of a list: its key, itself, and its :meth:`link`."""
        cells = run.groupings.get(grouping, [])
        by = keys_of(cells)
        for cell in cells:
            yield cell["key"], cell, self.link(run, cell["key"], by)

    def link(self, run: Finished, key: Mapping[str, Any], by: Sequence[str]) -> int | None:
        """Return the number of the list of a cell's samples; None where there are none to show.

        Args:
            run: the folder that the cell is of.
            key: the cell's.
            by: the keys that tell such cells apart.
        """
        rows, name = run.rows_of(key, by), (run.name, *sorted(by), name_of(key))
        if not rows or not self.limit:
            return None
        if name not in self._made:
            cell = set(run.data["by"])

            def draw(i: int) -> int:
                return zlib.crc32(name_of({k: v for k, v in run.rows[i]["key"].items() if k not in cell}).encode())

            chosen = sorted(sorted(rows, key=draw)[: self.limit])
            self._made[name] = len(self.lists)
            title = joined(run.name, describe(key), between=" · ")
            self.lists.append({"title": title, "all": len(rows), "rows": [self._number(run, i) for i in chosen]})
        return self._made[name]

    def _number(self, run: Finished, i: int) -> int:
        if (run.name, i) not in self._numbers:
            self._numbers[run.name, i] = len(self.rows)
            self.rows.append(_tidy(run.rows[i]))
        return self._numbers[run.name, i]


def _tidy(value: Any) -> Any:
    """Shorten numbers to five digits, and write those that JSON does not have as text."""
    if isinstance(value, dict):
        return {k: _tidy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_tidy(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def read(folders: Sequence[Path]) -> list[Finished]:
    """Read folders that `rcc eval` wrote; their names are as short as they can be without being the same.

    Raises:
        InputError: one holds no finished evaluation, or is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder} is named more than once: name each folder once.")
    runs = []
    for path, folder in zip(paths, folders, strict=True):
        others = [other for other in paths if other != path]
        ends = ("/".join(path.parts[-n:]) for n in range(1, len(path.parts) + 1))
        name = next((end for end in ends if not any(f"/{other}".endswith(f"/{end}") for other in others)), str(path))
        data, rows = results.load(folder)
        parts = {"task": str, "by": list, "cells": list, "settings": dict, "made": dict, "notes": list}
        if not all(isinstance(data.get(part), kind) for part, kind in parts.items()):
            raise InputError(f"{folder} holds no readable evaluation: make it again.")
        runs.append(Finished(name, data, rows))
    return runs
