"""Streams are pure functions of the draw's number; what is held out is never drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import (
    documents,
    everything,
    question,
    question_corpus,
    text_corpus,
    words,
)
from rcc.data.corpus import Corpus
from rcc.data.streams import Interleave, Mixture, QuestionStream, TextStream, split
from rcc.errors import InputError

quick = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


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
    train, held = split(corpora, share, other)

    def contents(rows: list[np.ndarray]) -> set[tuple[int, ...]]:
        return {tuple(c.document(i).tolist()) for c, numbers in zip(corpora, rows, strict=True) for i in numbers}

    elsewhere = {tuple(document) for corpus in other for document in documents(corpus)}
    assert not contents(train) & contents(held)
    assert not (contents(train) | contents(held)) & elsewhere
    for corpus, ours, theirs in zip(corpora, train, held, strict=True):
        assert not set(ours) & set(theirs)
        left_out = sum(tuple(document) in elsewhere for document in documents(corpus))
        assert len(ours) + len(theirs) == len(corpus) - left_out
    alone = split(corpora[:1], share, other)
    assert alone[0][0].tolist() == train[0].tolist()  # whatever else is opened


def test_the_share_that_is_held_out(pools: list[Corpus]) -> None:
    assert [len(rows) for rows in split(pools, 0)[1]] == [0, 0, 0, 0]
    _, held = split(pools[1:2], 0.3)
    assert 0.2 < len(held[0]) / len(pools[1]) < 0.4
    assert set(held[0]) <= set(split(pools[1:2], 0.5)[1][0])
    for share in (1, -0.1, float("nan"), True, "0.1"):
        with pytest.raises(InputError, match="held_out"):
            split(pools, share)  # type: ignore[arg-type]


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
    cut = {int(row.question[0]): row for row in (stream.draw(k) for k in range(4))}
    assert len(stream) == 4
    assert {i: cut[200 + i].context.tolist() for i in (0, 2, 4)} == {
        0: [*range(25, 49)],
        2: [*range(49, 73)],
        4: [97, 98, 99, 100, *range(1, 21)],
    }
    assert cut[400].context.tolist() == [*range(70, 90)]
    assert len({row.hash for row in cut.values()}) == 4
    rng = np.random.default_rng(0)
    for row in cut.values():
        assert stream.same(rng, row.hash).question.tolist() == row.question.tolist()
        others = {stream.other(rng, row.hash).hash for _ in range(60)}
        assert others == {other.hash for other in cut.values()} - {row.hash}


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
