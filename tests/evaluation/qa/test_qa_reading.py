"""Questions as they stand in files of JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    questions, notes = reading.read([str(write_rows(tmp_path / "some.jsonl", rows))])
    assert [(q.id, q.set, q.context, q.answers) for q in questions] == [
        ("a/1", "a", "one", ("x", "y")),
        ("a/1'", "a", "three", ("z",)),
        ("some/4", "some", "four", ("x",)),
    ]
    assert notes == [
        f"2 rows cannot be used; the first: {tmp_path}/some.jsonl:2: no field 'context' (it has text, question,"
        " answers)."
    ]
    questions, _ = reading.read([str(tmp_path / "some.jsonl")], include=["some"])
    assert [q.id for q in questions] == ["some/4"]
    with pytest.raises(InputError, match=r"has no question that can be used: no id begins with none\."):
        reading.read([str(write_rows(tmp_path / "own.jsonl", rows[:1]))], include=["none"])


@pytest.mark.parametrize("field", ["context", "question", "answers"])
def test_a_row_with_half_a_character_is_left_out_and_named(tmp_path: Path, field: str) -> None:
    """JSON can spell one half of a surrogate pair; UTF-8 cannot."""
    rows: list[dict[str, Any]] = [
        {"id": f"a/{i}", "context": "a text", "question": "who?", "answers": "me"} for i in range(3)
    ]
    rows[1][field] = "half \ud800"
    file = write_rows(tmp_path / "rows.jsonl", rows)
    questions, notes = reading.open_questions([str(file)], None, [])
    assert [question.id for question in questions] == ["a/0", "a/2"]
    assert f"{file}:2: {field!r} is not Unicode" in notes[0]
