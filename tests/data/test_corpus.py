"""Corpora: documents and rows of questions as tokens."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from corpora import (
    WORDS,
    documents,
    everything,
    make_tokenizer,
    question,
    question_corpus,
    text_corpus,
    tokenizer,
    words,
    write,
)
from rcc.data import token_cache
from rcc.data.corpus import open_questions, open_text
from rcc.data.sources import Source
from rcc.data.streams import QuestionStream
from rcc.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_question_rows(tmp_path: Path) -> None:
    rows = [
        question(" w5 w6\n", " w7 ", ["", " w8 w9 ", "w1"], id="squad/1"),
        question("w5 w6", "w3", "w4", id="squad/2"),
        question("w6", "w3", "w4"),
    ]
    corpus = question_corpus(tmp_path / "a.jsonl", rows)
    row = corpus.row(0)
    assert [a.tolist() for a in (row.context, row.question, row.answer)] == [[5, 6], [7], [8, 9]]
    assert {a.dtype for a in (row.context, row.question, row.answer)} == {np.dtype(np.int64)}
    assert [corpus.row(i).set for i in range(3)] == ["squad", "squad", ""]
    assert corpus.row(0).hash == corpus.row(1).hash != corpus.row(2).hash
    assert corpus.lengths.tolist() == [2, 2, 1]
    assert corpus.question_lengths.tolist() == [1, 1, 1]
    with pytest.raises(IndexError):
        corpus.row(3)
    with pytest.raises(IndexError):
        corpus.row(-1)
    with pytest.raises(InputError, match="open_questions"):
        text_corpus(tmp_path / "b.jsonl", ["w1"]).row(0)


def test_other_field_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"c": "w1", "q": "w2", "a": "w3"}])
    assert documents(open_text(Source(path, text="q"), tokenizer)) == [[2]]
    row = open_questions(Source(path, context="c", question="q", answers="a"), tokenizer).row(0)
    assert [a.tolist() for a in (row.context, row.question, row.answer)] == [[1], [2], [3]]


def test_a_corpus_travels_light(tmp_path: Path) -> None:
    corpus = question_corpus(tmp_path / "a.jsonl", (question(words(i, i)) for i in range(300)))
    stream = QuestionStream([corpus], everything([corpus]), 0, 100)
    stream.draw(0)  # maps are open
    sent = pickle.dumps(corpus)
    assert len(sent) < 2000
    assert documents(pickle.loads(sent)) == documents(corpus)
    other = pickle.loads(pickle.dumps(stream))
    assert [other.draw(k).hash for k in range(50)] == [stream.draw(k).hash for k in range(50)]


@pytest.mark.parametrize(("size", "kind"), [(65_536, "uint16"), (65_537, "uint32")])
def test_tokens_take_the_room_that_the_vocabulary_needs(tmp_path: Path, size: int, kind: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"w1 w{size - 1}"}])
    corpus = open_text(Source(path), make_tokenizer(size))
    assert corpus.document(0).dtype == kind
    assert documents(corpus) == [[1, size - 1]]


def test_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "BATCH_CHARACTERS", 500)
    texts = [list(np.random.default_rng(i).integers(0, WORDS, 1 + i % 70)) for i in range(300)]
    corpus = text_corpus(tmp_path / "a.jsonl", (words(*t) for t in texts))
    assert documents(corpus) == texts
    assert corpus.lengths.tolist() == [len(t) for t in texts]
