"""`scripts/write_questions.py`: what a writer of questions learns from, and that what is kept can be trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import load_script

TEXT = "".join(
    f"In {1800 + i} the painter Anna Berg{i} sold the {name} mill to a baker. He had seen it from the road.\n"
    for i, name in enumerate(["old", "red", "lost", "wide", "cold", "high", "dark", "long"] * 5)
)


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("scripts/write_questions.py")


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["write_questions.py", *map(str, arguments)])
    script.main()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_contexts_are_whole_sentences_that_make_up_the_text(script: Any) -> None:
    pieces = list(script.contexts_of(TEXT, 500))
    assert max(map(len, pieces)) <= 500
    assert all(piece.endswith((".", "!", "?")) for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(TEXT.split())
    assert list(script.contexts_of("x" * 30, 20)) == ["x" * 20, "x" * 10]  # no sentence ends


def test_a_passage_ends_with_the_answers_sentence(script: Any) -> None:
    start = TEXT.index("Berg20")
    passage = script.passage_of(TEXT, start, start + 6)
    assert passage.endswith("mill to a baker.")
    assert "Berg20" in passage.split(". ")[-1].split("\n")[-1]
    assert script.BEFORE <= len(passage) < 2 * script.BEFORE
    assert script.passage_of(TEXT, 3, 7) == TEXT[: TEXT.index(".") + 1]


def test_learn_makes_a_question_to_write_and_one_to_answer(script: Any, tmp_path: Path, monkeypatch: Any) -> None:
    questions = [
        {"id": "a/1", "context": TEXT, "question": "Who sold it in 1807?", "answers": ["Anna Berg7."]},
        {"id": "a/2", "context": TEXT, "question": "What was sold?", "answers": ["mill"]},  # stands there often
        {"id": "a/3", "context": TEXT, "question": "Who wept?", "answers": ["nobody"]},
        {"id": "b/4", "context": TEXT, "question": "Who sold it in 1809?", "answers": ["Anna Berg9"]},
    ]
    source, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(q) + "\n" for q in questions))
    run(script, monkeypatch, "learn", source, out, "--include", "a/")
    asked, answered = rows(out)
    assert asked["answers"] == ["Who sold it in 1807?"]
    assert "“Anna Berg7”" in asked["question"]
    assert (answered["question"], answered["answers"]) == ("Who sold it in 1807?", ["Anna Berg7"])
    assert asked["context"] == answered["context"]
    assert asked["context"].endswith("mill to a baker.")


def test_write_keeps_what_is_answered_from_the_text_and_goes_on(
    script: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """With the default model, which was never taught to write questions: few are kept, and all are usable."""
    source, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"id": "t/1", "text": TEXT}) + "\n")
    options = ["--writer", "rcc-smollm2-135m", "--size", 900, "--each", 6, "--batch", 2]
    run(script, monkeypatch, "write", source, out, *options, "--limit", 2)
    assert "2 of 2 contexts" in capsys.readouterr().err
    first = rows(out)
    run(script, monkeypatch, "write", source, out, *options)
    assert "4 of 4 contexts" in capsys.readouterr().err
    assert rows(out)[: len(first)] == first
    for row in rows(out):
        assert row["id"] == "written/t/1"
        assert row["context"] in TEXT
        assert row["answers"][0] in row["context"]
        assert row["answers"][0].lower() not in row["question"].lower()
        assert row["question"].endswith("?")
