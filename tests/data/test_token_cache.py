"""The tokens of a source are made once, whatever is interrupted and whoever else makes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rcc
from corpora import (
    WORDS,
    caches,
    documents,
    make_tokenizer,
    question,
    text_corpus,
    tokenizer,
    words,
    write,
)
from rcc.data import token_cache
from rcc.data.corpus import open_questions, open_text
from rcc.data.sources import Source
from rcc.errors import FileError, InputError
from rcc.text.prompting import END
from rcc.text.tokens import token_ids


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_source_is_read_once(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    said: list[str] = []
    first = open_text(Source(path), tokenizer, progress=said.append)
    assert said
    monkeypatch.setattr(token_cache, "_tokenize", lambda *args: pytest.fail("the source was read again"))
    tokenizer(["w1", "w2 w3"], padding=True, truncation=True, max_length=1)  # leaves settings in the tokenizer
    second = open_text(Source(path, weight=2.0), tokenizer)
    assert documents(first) == documents(second) == [[1, 2]]
    assert second.source.weight == 2.0
    assert len(caches(home)) == 1


def test_whatever_changes_the_tokens_makes_another_cache(tmp_path: Path, home: Path) -> None:
    path = write(tmp_path / "a.jsonl", [question("w1", text="w1", id="x")])
    open_text(Source(path), tokenizer)
    open_text(Source(path, text="context"), tokenizer)
    open_text(Source(path, include=["x"]), tokenizer)
    open_text(Source(path, exclude=["y"]), tokenizer)
    open_text(Source(path), make_tokenizer(WORDS + 1))
    open_questions(Source(path), tokenizer)
    assert len(caches(home)) == 6
    write(tmp_path / "a.jsonl", [{"text": "w2"}])
    os.utime(path, ns=(1, 1))
    assert documents(open_text(Source(path), tokenizer)) == [[2]]
    os.utime(path, ns=(2, 2))
    open_text(Source(path), tokenizer)
    assert len(caches(home)) == 8


def test_a_damaged_cache_is_made_anew(tmp_path: Path, home: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    open_text(Source(path), tokenizer)
    [cache] = caches(home)
    (cache / "tokens.bin").write_bytes(b"")
    (home / "tokens" / f".{cache.name}-killed").mkdir()
    assert documents(open_text(Source(path), tokenizer)) == [[1, 2]]
    assert caches(home) == [cache]


def test_a_home_that_cannot_be_written(tmp_path: Path, home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(FileError, match="RCC_HOME"):
        text_corpus(tmp_path / "a.jsonl", ["w1"])


OPEN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from corpora import Source, make_tokenizer, open_text
from rcc.data import token_cache
tokenize = token_cache._tokenize
def counted(*args):
    with Path(sys.argv[1], "made").open("a") as file:
        file.write("x")
    tokenize(*args)
token_cache._tokenize = counted
tokenizer = make_tokenizer()
print("ready", flush=True)
sys.stdin.readline()
print(open_text(Source(sys.argv[1] + "/a.jsonl"), tokenizer).tokens_total)
"""


def test_processes_that_open_at_once_make_one_cache(tmp_path: Path, home: Path) -> None:
    write(tmp_path / "a.jsonl", ({"text": words(*range(i % WORDS))} for i in range(1, 3000)))
    command = [sys.executable, "-c", OPEN, str(tmp_path), str(Path(__file__).parents[1])]
    running = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate() for process in running]
    total = str(sum(i % WORDS for i in range(1, 3000) if i % WORDS))
    assert [out.split() for out, _ in results] == [[total]] * 2, results
    assert (tmp_path / "made").read_text() == "x"
    assert len(caches(home)) == 1


# ---------------------------------------------------------------- chat marks
@pytest.mark.parametrize("allowed", [False, True])
def test_a_texts_marks_are_characters_unless_its_source_allows_them(tmp_path: Path, home: Path, allowed: bool) -> None:
    tokens = rcc.load_tokenizer("rcc-smollm2-135m")
    text = "The end.<|im_end|>\n<|im_start|>user\nGo on."
    rows = [{"text": text}, {"text": "Nothing here is a mark."}]
    write(tmp_path / "a.jsonl", rows)
    corpus = open_text(Source(str(tmp_path / "a.jsonl"), allow_special=allowed), tokens)
    for i, row in enumerate(rows):
        assert corpus.document(i).tolist() == token_ids(tokens, row["text"], allowed)[0].tolist()
    ends = [token_ids(tokens, END, True)[0, 0].item() in corpus.document(i) for i in range(2)]
    assert ends == [allowed, False]
    with pytest.raises(InputError, match="allow_special"):
        Source("a.jsonl", allow_special="yes")  # type: ignore[arg-type]
