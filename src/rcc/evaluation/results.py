"""One evaluation's folder: samples as they are made, what they come to, and how sure that is.

A folder holds `samples.jsonl` (a line a sample, written as it is made, so that an interrupted evaluation goes on),
`results.json` (the figures, and what made them), `table.md` and plots.
"""

from __future__ import annotations

import importlib.util
import json
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FileError, InputError, brief
from ..runtime import atomic, locks
from ..runtime.provenance import commit, libraries, machine
from ..runtime.terminal import shown

if TYPE_CHECKING:
    from .plots import Plot

FORMAT_VERSION = 1
RESAMPLES = 2000
CONFIDENCE = 0.95

Key = dict[str, str | int | float]


@dataclass(frozen=True)
class Case:
    """One sample to be measured.

    Attributes:
        key: what tells it from the others, in a form that JSON holds: `{"rate": 8, "length": 2048, "document": 3}`.
        measure: → its figures; numbers are averaged, the rest is kept with the sample.
    """

    key: Key
    measure: Callable[[], dict[str, Any]]


class Skipped(Exception):  # noqa: N818  # no error: a cell that cannot be measured
    """Raised by a measurement that cannot be made; the cell says why and the others go on."""


@dataclass
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: of the samples.
        low: the lower bound, with 95 % confidence; None where the samples are one, or of one document, and say nothing
            about others.
        high: the upper bound; None where `low` is.
        n: how many samples there are.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: Sequence[float], groups: Sequence[Any] | None = None, seed: int = 0) -> Interval:
    """Return a mean with its confidence interval.

    Shares (every value 0 or 1, each from a group of its own) by Wilson's score, which does not shrink to a point when
    all succeed; anything else by the percentile bootstrap over groups.

    Args:
        values: one figure a sample.
        groups: what samples have in common (their document): samples of a group are drawn together.
        seed: of the bootstrap.
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if n == 0:
        raise ValueError("there are no values")
    if bool(np.isin(x, (0.0, 1.0)).all()) and (not groups or len(set(map(str, groups))) == n):
        mean, z = float(x.mean()), 1.959963984540054
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return Interval(mean, max(0.0, float(centre - half)), min(1.0, float(centre + half)), n)
    return _bootstrap(x, groups, seed)


def _bootstrap(x: np.ndarray, groups: Sequence[Any] | None, seed: int = 0) -> Interval:
    names, inverse = np.unique(np.asarray([str(g) for g in groups] if groups else range(len(x))), return_inverse=True)
    if len(names) == 1:
        return Interval(float(x.mean()), None, None, len(x))
    sums, counts = np.bincount(inverse, x), np.bincount(inverse)
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(x.mean()), float(low), float(high), len(x))


@dataclass
class Results:
    """The folder of one evaluation.

    Args:
        task: its name.
        settings: all that the samples depend on: a folder of other settings is refused. Figures made with one model
            say which by its fingerprint.
        folder: where to keep everything; None keeps nothing.
        cluster: the key that samples with something in common share (see :func:`interval`).

    Raises:
        InputError: the folder holds another evaluation, or something else.
        FileError: it cannot be written, or another process is at work there.
    """

    task: str
    settings: dict[str, Any]
    folder: Path | None = None
    cluster: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = json.loads(json.dumps(self.settings))  # as a file will give it back
        if self.folder is None:
            return
        self._lock = locks.FolderLock(self.folder)
        weakref.finalize(self, self._lock.release)  # at the latest when Python ends
        try:
            self._open(self.folder)
        except Exception:
            self._lock.release()
            raise

    def _open(self, folder: Path) -> None:
        """Read what a folder holds of this evaluation, or begin it there."""
        path = folder / "settings.json"
        try:
            if path.exists():
                try:
                    before = json.loads(path.read_text(encoding="utf-8"))
                except (ValueError, RecursionError):
                    before = None
                if before != {"task": self.task, **self.settings}:
                    raise InputError(f"{folder} holds an evaluation with other settings: name another folder.")
                self.rows = self._read()
                return
            if any(file.name != locks.NAME for file in folder.iterdir()):
                raise InputError(f"{folder} is not empty and holds no evaluation: name another folder.")
            self._write("settings.json", json.dumps({"task": self.task, **self.settings}, indent=2) + "\n")
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"{folder} cannot be written: {error.strerror or error}.") from error

    def _read(self) -> list[dict[str, Any]]:
        assert self.folder is not None
        path, rows, lines = self.folder / "samples.jsonl", [], []
        if not path.exists():
            return []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # the last line of a killed process
            if _is_sample(row):  # what is not will be measured again
                rows.append(row)
                lines.append(line + "\n")
        self._write("samples.jsonl", "".join(lines))
        return rows

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        try:
            atomic.write_text(self.folder / name, text)
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"{self.folder / name} cannot be written: {error.strerror or error}.") from error

    def collect(self, cases: Iterable[Case], progress: Callable[[int], None] | None = None) -> None:
        """Measure what has not been measured yet, one case after the other, each kept at once.

        Args:
            cases: all of them; those that the folder has are passed over.
            progress: called with the number of cases done so far.
        """
        done = {_name(row["key"]) for row in self.rows}
        with ExitStack() as stack:
            file = None
            if self.folder is not None:
                try:
                    file = stack.enter_context((self.folder / "samples.jsonl").open("a", encoding="utf-8"))
                except OSError as error:
                    raise FileError(f"{self.folder} cannot be written: {error.strerror or error}.") from error
            for number, case in enumerate(cases, 1):
                if _name(case.key) not in done:
                    start = time.perf_counter()
                    try:
                        row = {"key": case.key, **case.measure()}
                    except Skipped as reason:
                        row = {"key": case.key, "skipped": str(reason)}
                    row["took"] = {"seconds": round(time.perf_counter() - start, 3)}  # no figure of the sample's own
                    self.rows.append(row)
                    if file is not None:
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                if progress is not None:
                    progress(number)

    def cells(self, by: Sequence[str]) -> list[dict[str, Any]]:
        """Return the figures by some of the keys, in order of appearance.

        Each is `{"key": …, metric: Interval, …}`, with `"skipped": why` where no sample could be measured.
        """
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(_name({k: row["key"][k] for k in by if k in row["key"]}), []).append(row)
        cells = []
        for name, rows in groups.items():
            cell: dict[str, Any] = {"key": json.loads(name)}
            made = [row for row in rows if "skipped" not in row]
            if not made:
                cell["skipped"] = rows[0]["skipped"]
            for metric in sorted({k for row in made for k, v in row.items() if _is_number(v)}):
                measured = [row for row in made if _is_number(row.get(metric))]
                shared = [row["key"].get(self.cluster) for row in measured] if self.cluster else None
                cell[metric] = interval([float(row[metric]) for row in measured], shared)
            cells.append(cell)
        return cells

    def summary(self, by: Sequence[str], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what `results.json` holds: the figures by some of the keys, and what made them.

        Args:
            by: those keys.
            more: further figures by name, which may hold intervals.
        """
        data = {
            "format_version": FORMAT_VERSION,
            "task": self.task,
            "settings": self.settings,
            "made": {"date": time.strftime("%Y-%m-%d", time.gmtime()), **libraries(), **commit(), **machine()},
            "seconds": round(sum(row["took"]["seconds"] for row in self.rows), 1),
            "by": list(by),
            "cluster": self.cluster,
            "samples": {"file": "samples.jsonl", "count": len(self.rows)},
            "notes": self.notes,
            "cells": self.cells(by),
            **(more or {}),
        }
        plain: dict[str, Any] = json.loads(json.dumps(data, default=vars))
        return plain

    def finish(
        self,
        by: Sequence[str],
        table: str,
        plots: Mapping[str, Plot] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `results.json` (see :meth:`summary`), `table.md` and the plots, which have their files' names."""
        if self.folder is None:
            return
        for name, plot in (plots or {}).items():
            plot.draw(self.folder / name)
        self._write("table.md", table + "".join(f"\n{note}\n" for note in self.notes))
        self._write("results.json", json.dumps(self.summary(by, more), indent=2) + "\n")
        self._lock.release()


def need(*modules: str, extra: str = "eval") -> None:
    """Raise InputError unless these modules, which come with that extra, are installed."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise InputError(f"this evaluation needs {' and '.join(missing)}: pip install 'rcc-context[{extra}]'.")


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key)


def _is_sample(row: Any) -> bool:
    """Return whether a line of samples.jsonl is what :meth:`Results.collect` wrote."""
    took = row.get("took") if isinstance(row, dict) and isinstance(row.get("key"), dict) else None
    return isinstance(took, dict) and _is_number(took.get("seconds"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))  # True counts as 1


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a finished evaluation's results and samples.

    Raises:
        InputError: the folder holds none, or of a newer format.
    """
    try:
        data = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no finished evaluation: it has no {Path(error.filename).name}.") from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InputError(f"{folder} holds no readable evaluation ({brief(error)}): make it again.") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    tables = {"task": str, "settings": dict, "cells": list}
    if (
        not isinstance(version, int)
        or not all(isinstance(data.get(name), kind) for name, kind in tables.items())
        or not all(isinstance(row, dict) for row in rows)
    ):
        raise InputError(f"{folder} holds no readable evaluation: make it again.")
    if version > FORMAT_VERSION:
        raise InputError(f"{folder} has format version {version}, this rcc reads up to {FORMAT_VERSION}: update rcc.")
    return data, rows


def paired(a: Sequence[float], b: Sequence[float], groups: Sequence[Any] | None = None) -> Interval:
    """Return the mean of b − a over pairs, with a bootstrap interval.

    Raises:
        ValueError: there are no pairs.
    """
    differences = [y - x for x, y in zip(a, b, strict=True)]
    if not differences:
        raise ValueError("there are no pairs")
    return _bootstrap(np.asarray(differences, dtype=np.float64), groups)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column on the left, the others on the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(shown, row)) + " |" for row in rows)]) + "\n"


def show(value: Interval, percent: bool = False, digits: int = 3, sign: str = "") -> str:
    """Write a figure with its interval: `0.812 [0.790, 0.833]`; with `sign="+"`, always with its sign."""
    style = f"{sign}.1%" if percent else f"{sign}.{digits}f"
    if value.low is None or value.high is None:
        return f"{value.mean:{style}}"
    return f"{value.mean:{style}} [{value.low:{style}}, {value.high:{style}}]"
