"""Sources, their token caches, held-out rows and streams, with a tokenizer of one token a word."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rcc.data import corpus as data
from rcc.data.corpus import Corpus, Interleave, Mixture, QuestionStream, Source, TextStream, open_questions, open_text
from rcc.errors import FileError, InputError

WORDS = 1000
quick = settings(max_examples=40, deadline=None, derandomize=True)


def make_tokenizer(words: int = WORDS, first: str = "w") -> PreTrainedTokenizerFast:
    """Word `w7` is token 7."""
    inner = Tokenizer(models.WordLevel({f"{first}{i}": i for i in range(words)}, unk_token=f"{first}0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=f"{first}0")


tokenizer = make_tokenizer()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def lines(rows: Iterable[Any]) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def write(path: Path, rows: Iterable[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines(rows))
    return str(path)


def text_corpus(path: Path, documents: Iterable[str], **options: Any) -> Corpus:
    return open_text(Source(write(path, ({"text": d} for d in documents)), **options), tokenizer)


def question(context: str, asked: str = "w1", answers: Any = ("w2",), **more: Any) -> dict[str, Any]:
    return {"context": context, "question": asked, "answers": answers, **more}


def question_corpus(path: Path, rows: Iterable[Any], **options: Any) -> Corpus:
    return open_questions(Source(write(path, rows), **options), tokenizer)


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(i).tolist() for i in range(len(corpus))]


def everything(corpora: Sequence[Corpus]) -> list[np.ndarray]:
    return [np.arange(len(corpus)) for corpus in corpora]


# ---------------------------------------------------------------- sources
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
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, lambda content: content)
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


# ---------------------------------------------------------------- rows
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


def test_other_field_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"c": "w1", "q": "w2", "a": "w3"}])
    assert documents(open_text(Source(path, text="q"), tokenizer)) == [[2]]
    row = open_questions(Source(path, context="c", question="q", answers="a"), tokenizer).row(0)
    assert [a.tolist() for a in (row.context, row.question, row.answer)] == [[1], [2], [3]]


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


# ---------------------------------------------------------------- the cache
def caches(home: Path) -> list[Path]:
    return [p for p in (home / "tokens").iterdir() if p.is_dir()]


def test_a_source_is_read_once(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "w1 w2"}])
    said: list[str] = []
    first = open_text(Source(path), tokenizer, progress=said.append)
    assert said
    monkeypatch.setattr(data, "_read", lambda *args: pytest.fail("the source was read again"))
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


@pytest.mark.parametrize(("size", "kind"), [(65_536, "uint16"), (65_537, "uint32")])
def test_tokens_take_the_room_that_the_vocabulary_needs(tmp_path: Path, size: int, kind: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": f"w1 w{size - 1}"}])
    corpus = open_text(Source(path), make_tokenizer(size))
    assert corpus.document(0).dtype == kind
    assert documents(corpus) == [[1, size - 1]]


def test_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BATCH_CHARACTERS", 500)
    texts = [list(np.random.default_rng(i).integers(0, WORDS, 1 + i % 70)) for i in range(300)]
    corpus = text_corpus(tmp_path / "a.jsonl", (words(*t) for t in texts))
    assert documents(corpus) == texts
    assert corpus.lengths.tolist() == [len(t) for t in texts]


def test_a_corpus_travels_light(tmp_path: Path) -> None:
    corpus = question_corpus(tmp_path / "a.jsonl", (question(words(i, i)) for i in range(300)))
    stream = QuestionStream([corpus], everything([corpus]), 0, 100)
    stream.draw(0)  # maps are open
    sent = pickle.dumps(corpus)
    assert len(sent) < 2000
    assert documents(pickle.loads(sent)) == documents(corpus)
    other = pickle.loads(pickle.dumps(stream))
    assert [other.draw(k).hash for k in range(50)] == [stream.draw(k).hash for k in range(50)]


OPEN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_corpus import Source, data, make_tokenizer, open_text
make = data._make
def counted(*args):
    with Path(sys.argv[1], "made").open("a") as file:
        file.write("x")
    make(*args)
data._make = counted
tokenizer = make_tokenizer()
print("ready", flush=True)
sys.stdin.readline()
print(open_text(Source(sys.argv[1] + "/a.jsonl"), tokenizer).tokens_total)
"""


def test_processes_that_open_at_once_make_one_cache(tmp_path: Path, home: Path) -> None:
    write(tmp_path / "a.jsonl", ({"text": words(*range(i % WORDS))} for i in range(1, 3000)))
    command = [sys.executable, "-c", OPEN, str(tmp_path), *map(str, Path(__file__).parents[:2])]
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


# ---------------------------------------------------------------- held-out rows
@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Text and questions that share texts within and between them."""
    folder = tmp_path_factory.mktemp("pools")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(folder / "home"))
        a = text_corpus(folder / "a.jsonl", [words(i % 150, 1) for i in range(300)])
        b = text_corpus(folder / "b.jsonl", [words(i, 1) + "\n" for i in range(100, 250)])
        c = question_corpus(folder / "c.jsonl", [question(words(i % 70 + 60, 1), f"w{i}") for i in range(200)])
        d = text_corpus(folder / "d.jsonl", [words(i, 1) for i in range(120, 160)])
    return [a, b, c, d]


@quick
@given(share=st.floats(0, 1, exclude_max=True), used=st.sets(st.integers(0, 3), min_size=1), apart=st.booleans())
def test_held_out_content_is_never_trained_on(pools: list[Corpus], share: float, used: set[int], apart: bool) -> None:
    corpora, other = [pools[i] for i in sorted(used)], pools[3:] if apart else []
    train, held = data.split(corpora, share, other)

    def contents(rows: list[np.ndarray]) -> set[tuple[int, ...]]:
        return {tuple(c.document(i).tolist()) for c, numbers in zip(corpora, rows, strict=True) for i in numbers}

    elsewhere = {tuple(document) for corpus in other for document in documents(corpus)}
    assert not contents(train) & contents(held)
    assert not (contents(train) | contents(held)) & elsewhere
    for corpus, ours, theirs in zip(corpora, train, held, strict=True):
        assert not set(ours) & set(theirs)
        left_out = sum(tuple(document) in elsewhere for document in documents(corpus))
        assert len(ours) + len(theirs) == len(corpus) - left_out
    alone = data.split(corpora[:1], share, other)
    assert alone[0][0].tolist() == train[0].tolist()  # whatever else is opened


def test_the_share_that_is_held_out(pools: list[Corpus]) -> None:
    assert [len(rows) for rows in data.split(pools, 0)[1]] == [0, 0, 0, 0]
    _, held = data.split(pools[1:2], 0.3)
    assert 0.2 < len(held[0]) / len(pools[1]) < 0.4
    assert set(held[0]) <= set(data.split(pools[1:2], 0.5)[1][0])
    for share in (1, -0.1, float("nan"), True, "0.1"):
        with pytest.raises(InputError, match="held_out"):
            data.split(pools, share)  # type: ignore[arg-type]


# ---------------------------------------------------------------- streams
shares = st.lists(st.floats(0.001, 100), min_size=1, max_size=6)


@quick
@given(shares=shares, seed=st.integers(0, 2**64), block=st.integers(0, 5000))
def test_every_block_holds_every_share(shares: list[float], seed: int, block: int) -> None:
    interleave = Interleave(shares, seed)
    drawn = Counter(interleave.at(1024 * block + i)[0] for i in range(1024))
    for i, share in enumerate(shares):
        assert abs(drawn[i] - 1024 * share / sum(shares)) < 1.01


@quick
@given(shares=shares, seed=st.integers(0, 99), start=st.integers(0, 1024 * 1024 * 2))
def test_draws_of_a_thing_are_numbered_without_gaps(shares: list[float], seed: int, start: int) -> None:
    interleave = Interleave(shares, seed)
    counts: dict[int, set[int]] = {i: set() for i in range(len(shares))}
    start -= start % 1024
    for k in range(start, start + 3 * 1024):
        which, number = interleave.at(k)
        assert number not in counts[which]
        counts[which].add(number)
    for i, numbers in counts.items():
        if numbers:
            assert max(numbers) - min(numbers) == len(numbers) - 1
            # never far from the share, at whatever block
            assert abs(min(numbers) - start * shares[i] / sum(shares)) < 10


def test_a_period_holds_the_shares_exactly_and_a_small_one_is_not_lost() -> None:
    interleave = Interleave([1, 2, 5, 1e-9, 0], seed=3)
    period = 1024**2
    after = [interleave._before[-1][i] for i in range(5)]
    assert sum(after) == period
    assert abs(after[0] - period / 8) <= 1
    assert abs(after[1] - period / 4) <= 1
    assert after[3:] == [1, 0]
    first = Counter(interleave.at(k)[0] for k in range(1024))
    second = Counter(interleave.at(k)[0] for k in range(1024, 2048))
    assert first.keys() >= {0, 1, 2}
    assert [interleave.at(k)[0] for k in range(1024)] != [interleave.at(k)[0] for k in range(1024, 2048)]
    assert abs(first[0] - second[0]) <= 1


@quick
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 99),
    start=st.integers(0, 50),
    data=st.data(),
)
def test_each_item_once_an_epoch(counts: list[int], seed: int, start: int, data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=len(counts), max_size=len(counts)))
    mixture = Mixture(counts, weights, seed)
    assert len(mixture) == sum(counts)
    drawn: dict[int, list[int]] = {}
    for k in range(3000):
        corpus, item = mixture.at(k)
        drawn.setdefault(corpus, []).append(item)
    assert 0 not in [counts[corpus] for corpus in drawn]
    for corpus, items in drawn.items():
        for epoch in range(0, len(items) - counts[corpus] + 1, counts[corpus]):
            assert sorted(items[epoch : epoch + counts[corpus]]) == list(range(counts[corpus]))
    other = Mixture(counts, weights, seed)
    for k in (start + 40_000, start, start + 2000, start):
        assert other.at(k) == mixture.at(k)


def test_epochs_seeds_and_corpora_have_orders_of_their_own() -> None:
    mixture = Mixture([50, 50], [1, 1], 0)
    drawn: dict[int, list[int]] = {0: [], 1: []}
    for k in range(1024):
        corpus, item = mixture.at(k)
        drawn[corpus].append(item)
    assert drawn[0][:50] != drawn[0][50:100]
    assert drawn[0][:50] != drawn[1][:50]
    assert [mixture.at(k) for k in range(50)] != [Mixture([50, 50], [1, 1], 1).at(k) for k in range(50)]


@pytest.mark.parametrize(
    ("counts", "weights", "seed"),
    [
        ([], [], 0),
        ([0], [1], 0),
        ([1], [0], 0),
        ([1], [1, 2], 0),
        ([1, 1], [1, -1], 0),
        ([1], [1], -1),
        ([1], [1], 0.5),
    ],
)
def test_a_mixture_of_nothing(counts: list[int], weights: list[float], seed: Any) -> None:
    with pytest.raises(InputError):
        Mixture(counts, weights, seed)


@quick
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12), window=st.integers(1, 20), data=st.data())
def test_a_stretch_is_of_one_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], window: int, data: st.DataObject
) -> None:
    minimum = data.draw(st.integers(1, window))
    # no token stands twice, so a token tells its document and its place
    ends = np.concatenate([[0], np.cumsum(lengths)])
    texts = [words(*range(ends[i], ends[i + 1])) for i in range(len(lengths))]
    corpus = text_corpus(tmp_path_factory.mktemp("stretch") / "a.jsonl", texts)
    if max(lengths) < minimum:
        with pytest.raises(InputError, match=f"has {max(lengths)}"):
            TextStream([corpus], everything([corpus]), 0, window, minimum)
        return
    stream = TextStream([corpus], everything([corpus]), 0, window, minimum)
    items = [max(1, n // window) if n >= minimum else 0 for n in lengths]
    assert len(stream) == sum(items)
    rng = np.random.default_rng(0)
    seen: Counter[int] = Counter()
    for k in range(2 * len(stream)):
        for drawn in (stream.draw(k), stream.stretch(rng)):
            assert drawn.dtype == np.int64
            document = int(ends.searchsorted(drawn[0], "right")) - 1
            assert len(drawn) == min(window, lengths[document])
            assert drawn.tolist() == list(range(drawn[0], drawn[0] + len(drawn)))
            assert drawn[-1] < ends[document + 1]
        seen[int(ends.searchsorted(stream.draw(k)[0], "right")) - 1] += 1
    assert [seen[i] for i in range(len(lengths))] == [2 * n for n in items]


def test_text_from_files_keeps_to_its_document(tmp_path: Path) -> None:
    sizes = [5, 40, 17, 8, 1, 100]
    corpora = [
        text_corpus(tmp_path / "a.jsonl", [words(*[i] * n) for i, n in enumerate(sizes, 1)]),
        text_corpus(tmp_path / "b.jsonl", [words(*[i] * n) for i, n in enumerate(sizes, 11)], weight=3.0),
    ]
    stream = TextStream(corpora, everything(corpora), 7, 8, 4)
    drawn = [stream.draw(k) for k in range(1024)]
    assert all(len(set(d.tolist())) == 1 for d in drawn)
    assert {int(d[0]) for d in drawn} == {1, 2, 3, 4, 6, 11, 12, 13, 14, 16}
    assert sum(d[0] > 10 for d in drawn) == 768
    assert {len(d) for d in drawn} == {5, 8}
    # a fresh object, in another order
    fresh = TextStream(corpora, everything(corpora), 7, 8, 4)
    for k in reversed(range(0, 1024, 7)):
        assert fresh.draw(k).tolist() == drawn[k].tolist()
    equal = TextStream(corpora, everything(corpora), 7, 8, 4, weights=[1, 1])
    assert sum(equal.draw(k)[0] > 10 for k in range(1024)) == 512


def test_starts_differ_from_epoch_to_epoch_and_reach_both_ends(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path / "a.jsonl", [words(*range(100))])
    stream = TextStream([corpus], everything([corpus]), 0, 30, 30)
    assert len(stream) == 3
    starts = {int(stream.draw(k)[0]) for k in range(600)}
    assert (min(starts), max(starts)) == (0, 70)
    assert len(starts) > 60


def test_a_corpus_without_long_documents_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpora = [text_corpus(tmp_path / "a.jsonl", ["w1"]), text_corpus(tmp_path / "b.jsonl", [words(2, 2, 2)])]
    stream = TextStream(corpora, everything(corpora), 0, 3, 2)
    assert {int(stream.draw(k)[0]) for k in range(50)} == {2}
    assert "a.jsonl is left out" in caplog.text
    with pytest.raises(InputError, match=r"the longest \(.*b\.jsonl\) has 3"):
        TextStream(corpora, everything(corpora), 0, 8, 4)
    with pytest.raises(InputError, match="minimum"):
        TextStream(corpora, everything(corpora), 0, 3, 4)


def test_questions_that_fit(tmp_path: Path) -> None:
    rows = [question(words(*[i] * i), words(*range(3)), f"w{i}") for i in range(1, 20)]
    corpora = [question_corpus(tmp_path / "a.jsonl", rows), question_corpus(tmp_path / "b.jsonl", [question("w50")])]
    stream = QuestionStream(corpora, everything(corpora), 0, 10)
    assert len(stream) == 8
    drawn = [stream.draw(k) for k in range(1024)]
    assert {int(row.context[0]) for row in drawn} == {*range(1, 8), 50}
    assert all(row.answer[0] == row.context[0] for row in drawn if row.context[0] != 50)
    fresh = QuestionStream(corpora, everything(corpora), 0, 10)
    for k in reversed(range(0, 1024, 7)):
        assert fresh.draw(k).context.tolist() == drawn[k].context.tolist()
    with pytest.raises(InputError, match=r"room=1 .*the shortest row has 2"):
        QuestionStream(corpora, everything(corpora), 0, 1)


def test_long_contexts_are_cut_to_the_passage_that_holds_the_answer(tmp_path: Path) -> None:
    """Passages of 24 of a room of 32 tokens; w1 to w100, and again w1 to w20 from 100 on."""
    context = words(*range(1, 101), *range(1, 21))
    answers = {
        "w30": 1,  # once, in tokens 24 to 47
        "W48 w49.": None,  # across an edge
        "w49 w50": 2,
        "w5": None,  # in two passages
        "w97 w98 w99": 4,
        "yes": None,
        "w300": None,
    }
    rows = [question(context, words(200 + i), answer) for i, answer in enumerate(answers)]
    rows.append(question(context, words(*range(300, 309)), "w30"))  # no room for the question
    rows.append(question(words(*range(70, 90)), "w400", "w500"))
    corpus = question_corpus(tmp_path / "a.jsonl", rows)
    stream = QuestionStream([corpus], everything([corpus]), 0, 32)
    found = {int(row.question[0]): row for row in (stream.draw(k) for k in range(4))}
    assert len(stream) == 4
    assert {i: found[200 + i].context.tolist() for i in (0, 2, 4)} == {
        0: [*range(25, 49)],
        2: [*range(49, 73)],
        4: [97, 98, 99, 100, *range(1, 21)],
    }
    assert found[400].context.tolist() == [*range(70, 90)]
    assert len({row.hash for row in found.values()}) == 4
    rng = np.random.default_rng(0)
    for row in found.values():
        assert stream.same(rng, row.hash).question.tolist() == row.question.tolist()
        others = {stream.other(rng, row.hash).hash for _ in range(60)}
        assert others == {other.hash for other in found.values()} - {row.hash}


def test_a_distractor_is_never_the_same_context(tmp_path: Path) -> None:
    rows = [question("w7", f"w{i}") for i in range(300)]
    common = question_corpus(tmp_path / "a.jsonl", rows)
    rare = question_corpus(tmp_path / "b.jsonl", [question(" w7 "), question("w8")])
    rng = np.random.default_rng(0)
    stream = QuestionStream([common, rare], everything([common, rare]), 0, 9)
    for k in range(300):
        row = stream.draw(k)
        assert stream.other(rng, row.hash).context.tolist() == ([7] if row.context[0] == 8 else [8])
        assert stream.same(rng, row.hash).context.tolist() == row.context.tolist()
    seven = stream.same(rng, stream.other(rng, 0).hash).hash
    assert {int(stream.same(rng, seven).question[0]) for _ in range(2000)} >= {*range(290, 300)}
    alone = QuestionStream([common], everything([common]), 0, 9)
    with pytest.raises(InputError, match="share one context"):
        alone.other(rng, alone.draw(0).hash)
