"""Sources: which files a path stands for, and which of their rows are used."""

from __future__ import annotations

import gzip
import logging
import lzma
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpora import (
    caches,
    documents,
    lines,
    question,
    question_corpus,
    tokenizer,
    words,
    write,
)
from rcc.data.corpus import open_questions, open_text
from rcc.data.sources import Source
from rcc.errors import FileError, InputError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("path", ""),
        ("path", 3),
        ("weight", 0),
        ("weight", -1.0),
        ("weight", True),
        ("weight", float("nan")),
        ("weight", "1"),
        ("text", ""),
        ("answers", None),
        ("split", 1),
        ("include", "squad"),
        ("exclude", [1]),
        ("extractive", -1),
        ("extractive", True),
        ("extractive", 2.5),
    ],
)
def test_a_source_names_the_key_that_cannot_be_used(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=key):
        Source(**{"path": "a.jsonl", key: value})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.json.gz", "a.txt", "a.md", "a.txt.xz", "notes"])
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    content = lines([{"text": "w3 w1"}, {"text": "w4"}]) if ".json" in name else "w3 w1\nw4\n".encode("utf-8-sig")
    pack: Any = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, lambda content: content)
    (tmp_path / name).write_bytes(pack(content))
    corpus = open_text(Source(str(tmp_path / name)), tokenizer)
    assert documents(corpus) == ([[3, 1], [4]] if ".json" in name else [[3, 1, 4]])
    assert corpus.tokens_total == 3
    assert corpus.lengths.sum() == 3
    assert corpus.broken == 0


def test_folders_and_globs_take_their_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "in/b.jsonl", [{"text": "w2"}])
    write(tmp_path / "in/a/x.txt", ["w1"])
    write(tmp_path / "in/c.json", [{"text": "w3"}])
    write(tmp_path / "in/image.png", ["w9"])
    write(tmp_path / "in/.hidden.txt", ["w9"])
    write(tmp_path / "in/.hidden/x.txt", ["w9"])
    assert documents(open_text(Source(str(tmp_path / "in")), tokenizer)) == [[1], [2], [3]]
    assert documents(open_text(Source(str(tmp_path / "in" / "*.js*")), tokenizer)) == [[2], [3]]
    assert documents(open_text(Source(str(tmp_path / "in" / "**" / "*.txt")), tokenizer)) == [[1]]


def test_a_folder_of_questions_may_describe_itself(tmp_path: Path) -> None:
    write(tmp_path / "in/README.md", ["what this is"])
    write(tmp_path / "in/a.jsonl", [question("w5")])
    assert len(open_questions(Source(str(tmp_path / "in")), tokenizer)) == 1
    with pytest.raises(InputError, match=r"README\.md is not a JSON-lines file"):
        open_questions(Source(str(tmp_path / "in/README.md")), tokenizer)


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "a/b/c", "missing.txt.xz", "missing/*.txt"])
def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=re.escape(path)):
        open_text(Source(path), tokenizer)


def test_what_is_no_file_needs_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        open_text(Source("someone/something"), tokenizer)


def test_a_dataset_on_disk(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [question("w5 w6", answers=["", "w7"], id="a/1"), question("w8", id="a/2")]
    files = {"train": write(tmp_path / "train.jsonl", rows), "test": write(tmp_path / "test.jsonl", rows[:1])}
    made = datasets.load_dataset("json", data_files=files)
    made.save_to_disk(str(tmp_path / "set"))
    corpus = open_questions(Source(str(tmp_path / "set")), tokenizer)
    assert documents(corpus) == [[5, 6], [8]]
    assert corpus.row(0).answer.tolist() == [7]
    assert len(open_questions(Source(str(tmp_path / "set"), split="test"), tokenizer)) == 1
    with pytest.raises(InputError, match="train, test"):
        open_questions(Source(str(tmp_path / "set"), split="dev"), tokenizer)
    made["train"].to_parquet(str(tmp_path / "tables" / "train.parquet"))
    for _ in range(2):
        assert documents(open_text(Source(str(tmp_path / "tables"), text="context"), tokenizer)) == [[5, 6], [8]]
    open_questions(Source(str(tmp_path / "set")), tokenizer)
    assert len(caches(home)) == 3


def test_rows_are_kept_and_dropped_by_id(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"w{n}"} for n, i in enumerate(["news/1", "news/2", "old/1", 7, "newsy"])]
    path = write(tmp_path / "a.jsonl", [*rows, {"text": "w9"}])
    assert documents(open_text(Source(path, include=["news/", "7"]), tokenizer)) == [[0], [1], [3]]
    assert documents(open_text(Source(path, exclude=["news"]), tokenizer)) == [[2], [3], [9]]
    assert documents(open_text(Source(path, include=["news"], exclude=["news/2"]), tokenizer)) == [[0], [4]]
    with pytest.raises(InputError, match="include"):
        open_text(Source(path, include=["nothing"]), tokenizer)


def test_extractive_keeps_short_answers_that_stand_in_the_context(tmp_path: Path) -> None:
    rows = [
        question("w1 w2 w3 w4", "w9", "w2 w3."),
        question("w1 w2 w3 w4", "w9", "w3 w2"),
        question("w1 w2 w3 w4", "w9", "w1 w2 w3"),
        question("w1 w2 w3 w4", "w9", ["w4", "w3 w2"]),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    corpus = open_questions(Source(path, extractive=2), tokenizer)
    assert [corpus.row(i).answer.tolist()[0] for i in range(len(corpus))] == [2, 4]
    assert corpus.broken == 0
    assert len(open_questions(Source(path, extractive=3), tokenizer)) == 3
    assert len(open_questions(Source(path), tokenizer)) == 4
    with pytest.raises(InputError, match="extractive"):
        open_questions(Source(write(tmp_path / "b.jsonl", rows[1:2]), extractive=2), tokenizer)


def test_broken_rows_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = ["{", "[1]", {"text": 3}, {"text": "  "}, {"id": "a"}, '{"text": "\\ud800"}', "[" * 100_000]
    path = write(tmp_path / "a.jsonl", [{"text": "w1"}, "", *bad, {"text": "w2"}, *["x"] * 7])
    for _ in range(2):  # made, then found
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            corpus = open_text(Source(path), tokenizer)
        assert documents(corpus) == [[1], [2]]
        assert corpus.broken == len(bad) + 7
        assert len(caplog.records) == 1
        assert f"14 broken rows are left out ({path}:3: not JSON; {path}:4: not a JSON object" in caplog.text
    first = corpus.info["broken"]["first"]
    assert len(first) == 10
    reasons = ["not a string", "empty", "no field 'text'", "not Unicode", "not JSON"]
    assert all(reason in line for reason, line in zip(reasons, first[2:], strict=False))


def test_broken_questions(tmp_path: Path) -> None:
    bad = [question(" "), question("w1", ""), question("w1", answers=[]), question("w1", answers=[3]), {"context": "w"}]
    corpus = question_corpus(tmp_path / "a.jsonl", [*bad, question("w1")])
    assert (len(corpus), corpus.broken) == (1, 5)


def test_a_file_without_the_field_is_fatal(tmp_path: Path, home: Path) -> None:
    write(tmp_path / "in/a.jsonl", [{"text": "w1"}])
    write(tmp_path / "in/b.jsonl", [{"id": 1, "body": "w1"}, {"title": "w2"}])
    with pytest.raises(InputError, match=r"b\.jsonl has no row with a field 'text'.*id, body, title"):
        open_text(Source(str(tmp_path / "in")), tokenizer)
    with pytest.raises(InputError, match=r"a\.jsonl has no row with a field 'context' or 'question' or 'answers'"):
        open_questions(Source(str(tmp_path / "in")), tokenizer)
    with pytest.raises(InputError, match="a JSON object a line"):
        open_text(Source(write(tmp_path / "c.json", ["[", "1", "]"])), tokenizer)
    assert not [p for p in (home / "tokens").iterdir() if p.suffix != ".lock"]


def test_a_source_without_a_row_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one row"):
        open_text(Source(write(tmp_path / "a.jsonl", [])), tokenizer)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        open_text(Source(str(tmp_path / "latin.txt")), tokenizer)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_a_damaged_archive_is_named(tmp_path: Path, suffix: str) -> None:
    pack = lzma.compress if suffix == ".xz" else gzip.compress
    packed = pack(lines({"text": words(*np.random.default_rng(i).integers(0, 99, 50))} for i in range(99)))
    for name, content in (("cut", packed[: len(packed) // 2]), ("wrong", b"plain text")):
        file = tmp_path / f"{name}.jsonl{suffix}"
        file.write_bytes(content)
        with pytest.raises(FileError, match=f"{name}.jsonl"):
            open_text(Source(str(file)), tokenizer)
