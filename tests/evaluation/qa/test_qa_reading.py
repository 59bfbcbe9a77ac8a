"""Questions as they stand in files of JSON lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from json_lines import write_rows
from rcc import InputError
from rcc.evaluation.qa import reading


def test_read(tmp_path: Path) -> None:
    """Rows in the order of the file, by their own fields; those that cannot be used are counted and the first named."""
    rows = [
        {"id": "a/1", "context": " one ", "question": "q?", "answers": ["", "x", "y "]},
        {"text": "two", "question": "q?", "answers": "x"},
        {"id": "a/1", "context": "three", "question": "q?", "answers": "z"},
        {"context": "four", "question": "q?", "answers": ["x"]},
        {"id": "b/1", "context": "five", "question": "q?", "answers": [7]},
    ]
    found, notes = reading.read([str(write_rows(tmp_path / "some.jsonl", rows))])
    assert [(q.id, q.set, q.context, q.answers) for q in found] == [
        ("a/1", "a", "one", ("x", "y")),
        ("a/1'", "a", "three", ("z",)),
        ("some/4", "some", "four", ("x",)),
    ]
    assert notes == [
        f"2 rows cannot be used; the first: {tmp_path}/some.jsonl:2: no field 'context' (it has text, question,"
        " answers)."
    ]
    found, _ = reading.read([str(tmp_path / "some.jsonl")], include=["some"])
    assert [q.id for q in found] == ["some/4"]
    with pytest.raises(InputError, match=r"has no question that can be used: no id begins with none\."):
        reading.read([str(write_rows(tmp_path / "own.jsonl", rows[:1]))], include=["none"])
