"""The folder of an evaluation: what is kept, resumed, averaged and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rcc import FileError, InputError
from rcc.evaluation import compare, results
from rcc.evaluation.results import Case, Results, Skipped, interval

SETTINGS: dict[str, Any] = {"model": "a", "rates": [4, 8]}


def cases(
    count: int = 6, better: float = 0.0, fails_at: int | None = None
) -> tuple[list[Case], list[tuple[int, int, int]]]:
    """Two documents, two rates; `calls` says what was measured."""
    calls: list[tuple[int, int, int]] = []

    def measure(rate: int, document: int, sample: int) -> dict[str, Any]:
        if sample == fails_at:
            raise KeyboardInterrupt
        calls.append((rate, document, sample))
        return {"accuracy": 1 / rate + 0.01 * document + better, "right": sample % 2 == 0, "text": "kept"}

    made = [
        Case({"rate": rate, "document": s // 3, "sample": s}, partial(measure, rate, s // 3, s))
        for rate in (4, 8)
        for s in range(count)
    ]
    return made, calls


class Drawn:
    """A plot that is a word."""

    def draw(self, path: Path) -> None:
        path.write_text("drawn")


def test_a_folder(tmp_path: Path) -> None:
    """Samples, figures by cell, table and plots are written; figures are the means of the samples."""
    run = Results("demo", SETTINGS, tmp_path / "out", cluster="document")
    seen: list[int] = []
    run.collect(cases()[0], seen.append)
    assert seen == list(range(1, 13))
    run.notes.append("a note")
    run.finish(["rate"], "| table |\n", {"plot.txt": Drawn()})
    data, rows = results.load(tmp_path / "out")
    assert [cell["key"] for cell in data["cells"]] == [{"rate": 4}, {"rate": 8}]
    assert data["cells"][0]["accuracy"]["mean"] == pytest.approx(0.255)
    assert data["cells"][1]["right"]["mean"] == pytest.approx(0.5)
    assert data["cells"][0]["accuracy"]["n"] == 6
    assert data["seconds"] == pytest.approx(sum(row.pop("took")["seconds"] for row in rows), abs=0.1)
    assert rows[0] == {"key": {"rate": 4, "document": 0, "sample": 0}, "accuracy": 0.25, "right": True, "text": "kept"}
    assert data["settings"] == SETTINGS
    assert {"torch", "processor", "commit"} <= set(data["made"])
    assert (tmp_path / "out/table.md").read_text() == "| table |\n\na note\n"
    assert (tmp_path / "out/plot.txt").read_text() == "drawn"


def test_resuming(tmp_path: Path) -> None:
    """After an interruption, and a line cut short, only what is missing is measured."""
    folder = tmp_path / "out"
    made, calls = cases(fails_at=4)
    with pytest.raises(KeyboardInterrupt):
        Results("demo", SETTINGS, folder).collect(made)
    assert len(calls) == 4
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"key": {"rate": 4, "docu')
    made, calls = cases()
    run = Results("demo", SETTINGS, folder)
    run.collect(made)
    assert calls[0] == (4, 1, 4)
    assert len(calls) == 8
    assert len(run.rows) == 12
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 12


def test_folders_of_something_else(tmp_path: Path) -> None:
    """Other settings, another task and a folder of other files are refused, and nothing in them is changed."""
    Results("demo", SETTINGS, tmp_path / "out").collect(cases()[0])
    before = (tmp_path / "out/samples.jsonl").read_bytes()
    for task, settings in (("demo", {**SETTINGS, "rates": [4]}), ("other", SETTINGS)):
        with pytest.raises(InputError, match="other settings"):
            Results(task, settings, tmp_path / "out")
    assert (tmp_path / "out/samples.jsonl").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("words")
    with pytest.raises(InputError, match="not empty"):
        Results("demo", SETTINGS, tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        Results("demo", SETTINGS, tmp_path / "file" / "out")
    with pytest.raises(InputError, match=r"no finished evaluation.*results.json"):
        results.load(tmp_path / "out")


def test_skipped_cells(tmp_path: Path) -> None:
    """A case that cannot be measured says why, and the others go on."""

    def impossible() -> None:
        raise Skipped("the prefix does not fit")

    run = Results("demo", SETTINGS, tmp_path / "out")
    run.collect([Case({"rate": 1}, impossible), Case({"rate": 2}, lambda: {"x": 1.0})])
    cells = run.cells(["rate"])
    assert cells[0] == {"key": {"rate": 1}, "skipped": "the prefix does not fit"}
    assert cells[1]["x"].mean == 1.0


def test_intervals() -> None:
    """Wilson's interval by hand; the bootstrap covers a known mean about 95 times in 100; samples of one document
    count as little as they tell."""
    got = interval([1] * 20)
    assert (got.mean, got.high) == (1.0, 1.0)
    assert got.low == pytest.approx(0.8389, abs=1e-4)
    got = interval([1] * 7 + [0] * 3)
    assert (got.low, got.high) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        got = interval(generator.normal(3, 1, 40).tolist())
        inside += got.low < 3 < got.high
    assert 180 <= inside <= 198
    values = np.repeat(generator.normal(0, 1, 30), 10).tolist()
    alone, grouped = interval(values), interval(values, [i // 10 for i in range(300)])
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    for one in (interval([0.3]), interval([0.2, 0.4], [7, 7])):  # nothing is known of other documents
        assert one.mean == pytest.approx(0.3)
        assert (one.low, one.high) == (None, None)
    assert results.show(one) == "0.300"
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_compare(tmp_path: Path) -> None:
    """Differences sample by sample: small ones are seen where the samples are the same, whatever separates samples."""
    for name, better in (("a", 0.0), ("b", 0.002)):
        run = Results("demo", {**SETTINGS, "model": name}, tmp_path / name, cluster="document")
        run.collect(cases(6 if name == "a" else 5, better)[0])
        run.finish(["rate"], "")
    table, notes = compare.compare(tmp_path / "a", tmp_path / "b")
    first = table[0]
    assert (first.key, first.metric) == ({"rate": 4}, "accuracy")
    assert first.change.mean == pytest.approx(0.002)
    assert first.change.low == pytest.approx(0.002)
    assert first.change.n == 5
    assert notes == [
        f"2 samples of {tmp_path / 'a'} are not in the other and were left out.",
        "settings that differ: model ('a', 'b').",
    ]
    text = compare.table(table, "a", "b")
    assert "| rate 4 | accuracy | 0.254 | 0.256 | **+0.002 [+0.002, +0.002]** | 5 |" in text
    assert "| rate 4 | right | 0.600 | 0.600 | +0.000 [+0.000, +0.000] | 5 |" in text


def test_equal_evaluations_do_not_differ(tmp_path: Path) -> None:
    """Differences that happen to be all 0 or all 1 are no shares."""
    assert vars(results.paired([1.0, 0.0, 3.0], [1.0, 0.0, 3.0])) == {"mean": 0, "low": 0, "high": 0, "n": 3}
    assert vars(results.paired([1.0, 2.0], [2.0, 3.0])) == {"mean": 1, "low": 1, "high": 1, "n": 2}
    with pytest.raises(ValueError, match="no pairs"):
        results.paired([], [])


def test_compare_from_the_command_line(tmp_path: Path) -> None:
    """`rcc eval compare A B` prints the table and the notes, or JSON; what it refuses is one sentence and code 2."""
    for name, better in (("a", 0.0), ("b", 0.5)):
        run = Results("demo", {**SETTINGS, "model": name}, tmp_path / name)
        run.collect(cases(better=better)[0])
        run.finish(["rate"], "")
    rcc = [sys.executable, "-m", "rcc", "eval", "compare"]
    done = subprocess.run([*rcc, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=True)
    assert "| rate 4 | accuracy | 0.255 | 0.755 | **+0.500 [+0.500, +0.500]** | 6 |" in done.stdout
    assert "settings that differ: model ('a', 'b')." in done.stdout
    done = subprocess.run([*rcc, tmp_path / "a", tmp_path / "b", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["differences"][0]["change"]["mean"] == pytest.approx(0.5)
    done = subprocess.run([*rcc, tmp_path / "a", tmp_path / "none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("rcc: ")
    assert "no finished evaluation" in done.stderr


def test_compare_refuses(tmp_path: Path) -> None:
    """Another task, nothing in common, and a damaged file: one sentence."""
    for name, task, rate in (("a", "demo", 4), ("b", "other", 4), ("c", "demo", 8)):
        run = Results(task, SETTINGS, tmp_path / name)
        run.collect([Case({"rate": rate}, lambda: {"x": 1.0})])
        run.finish(["rate"], "")
    with pytest.raises(InputError, match=r"'demo', .* holds 'other'"):
        compare.compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, match="no sample in common"):
        compare.compare(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c/results.json").write_text("{")
    with pytest.raises(InputError, match="no readable evaluation"):
        compare.compare(tmp_path / "a", tmp_path / "c")
    data = json.loads((tmp_path / "a/results.json").read_text())
    (tmp_path / "a/results.json").write_text(json.dumps({**data, "format_version": 99}))
    with pytest.raises(InputError, match="update rcc"):
        compare.compare(tmp_path / "a", tmp_path / "b")
