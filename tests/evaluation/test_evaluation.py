"""What all kinds of evaluation have in common, and the loop that runs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rcc.evaluation import results
from rcc.evaluation.evaluation import Evaluation, Progress, evaluate, finish
from rcc.evaluation.passkey.run import PasskeyEvaluation
from rcc.evaluation.qa.run import QAEvaluation
from rcc.evaluation.reconstruction.run import ReconstructionEvaluation
from rcc.evaluation.resources.run import ResourcesEvaluation
from rcc.evaluation.results import Case, Results

KINDS: dict[str, Any] = {
    "passkey": PasskeyEvaluation,
    "qa": QAEvaluation,
    "reconstruction": ReconstructionEvaluation,
    "resources": ResourcesEvaluation,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_what_the_loop_calls(kind: str) -> None:
    names = {name for name in vars(Evaluation) if not name.startswith("_")} | {"__len__"}
    assert {"cases", "measuring", "notes", "report", "settings", "verb", "unit", "work"} <= names
    assert all(hasattr(KINDS[kind], name) for name in names)
    assert KINDS[kind].kind == kind


class Squares:
    """An evaluation that measures squares."""

    kind, by, cluster = "squares", ("number",), None
    verb, unit = "squaring", "digits"

    def __init__(self) -> None:
        self.open = False

    def settings(self) -> dict[str, Any]:
        return {"model": "none"}

    def __len__(self) -> int:
        return 3

    def cases(self) -> list[Case]:
        return [Case({"number": n}, partial(self.measure, n)) for n in range(3)]

    def measure(self, number: int) -> dict[str, Any]:
        assert self.open
        return {"square": number**2}

    def work(self, cases: int) -> int:
        return 2 * cases

    @contextlib.contextmanager
    def measuring(self, results: Results, progress: Progress) -> Iterator[None]:
        self.open = True
        yield
        self.open = False

    def notes(self, results: Results) -> list[str]:
        return [f"{len(results.rows)} squares"]

    def report(self, results: Results) -> Squares:
        return self

    def table(self) -> str:
        return "a table\n"

    def plots(self) -> dict[str, Squares]:
        return {"plot.txt": self}

    def draw(self, path: Path) -> None:
        path.write_text("drawn")

    def more(self) -> dict[str, Any]:
        return {"further": 1}


def test_one_loop_measures_and_writes(tmp_path: Path) -> None:
    """Cases are measured within what they need; figures, notes, plots and further figures are in the folder."""
    squares, seen = Squares(), list[int]()
    measured = evaluate(squares, tmp_path / "out", seen.append)
    assert not squares.open
    assert seen == [2, 4, 6]
    finish(squares, measured)
    data, rows = results.load(tmp_path / "out")
    assert [row["square"] for row in rows] == [0, 1, 4]
    assert (data["notes"], data["further"], data["by"]) == (["3 squares"], 1, ["number"])
    assert (tmp_path / "out/table.md").read_text() == "a table\n\n3 squares\n"
    assert (tmp_path / "out/plot.txt").read_text() == "drawn"
