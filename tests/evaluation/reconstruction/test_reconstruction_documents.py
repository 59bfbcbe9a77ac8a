"""The documents that are reconstructed: which texts, and which part of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import MakeTokens
from rcc import InputError
from rcc.evaluation.reconstruction.documents import Documents, open_texts
from short_text import make_home
from word_tokens import word_tokenizer, words

ROOT = Path(__file__).resolve().parents[3]
LENGTH = 64


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCC_HOME", str(make_home(tmp_path_factory.mktemp("home"))))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def documents(tokens: MakeTokens) -> list[list[int]]:
    return [[0, 0, *tokens(LENGTH + 3, seed)] for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def data(documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three texts that are long enough, and a short one."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": words(ids)} for ids in [*documents, documents[0][: LENGTH - 1]]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_documents(tokenizer: PreTrainedTokenizerFast, data: Path, documents: list[list[int]], tmp_path: Path) -> None:
    """Of several texts the beginnings, a short one left out; one text is cut; another document is never the same."""
    texts = open_texts([str(data)], "text", tokenizer)
    divided = Documents(texts, LENGTH, seed=0)
    assert (len(divided), divided.too_short) == (3, 1)
    assert [divided[i].tolist() for i in range(3)] == [ids[:LENGTH] for ids in documents]
    assert sorted(map(divided.another, range(3))) == [0, 1, 2]
    assert all(divided.another(i) != i for i in range(3))
    assert {tuple(Documents(texts, LENGTH, seed).order) for seed in range(20)} > {tuple(divided.order)}
    (tmp_path / "one.txt").write_text(words(documents[0]), encoding="utf-8")
    cut = Documents(open_texts([str(tmp_path / "one.txt")], "text", tokenizer), 20, seed=0)
    assert [cut[i].tolist() for i in range(len(cut))] == [documents[0][i : i + 20] for i in (0, 20, 40)]


def test_the_example_is_the_default(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the repository's folder, or from a source checkout; elsewhere a file is asked for."""
    monkeypatch.chdir(tmp_path)
    here = open_texts([], "text", tokenizer)  # this source checkout's
    assert Path(here[0].source.path) == ROOT / "examples/simple-susan.txt"
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/simple-susan.txt").write_text("w1 w2", encoding="utf-8")
    assert open_texts([], "text", tokenizer)[0].tokens_total == 2
    monkeypatch.setattr("rcc.evaluation.example.EXAMPLE", Path("examples/none.txt"))
    with pytest.raises(InputError, match="no texts are named"):
        open_texts([], "text", tokenizer)
