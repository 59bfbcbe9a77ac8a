"""The tasks `reconstruction` and `continuation`: write spans of a text, or what follows it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcc.training.collate import collate
from rcc.training.tasks import TASKS, Continuation, Reconstruction
from rcc.training.tasks.reconstruction import REPEATED
from task_samples import (
    LOW,
    MARKS,
    check_sizes,
    quick,
    same,
    sampled,
)


def test_reconstruction_starts_anywhere() -> None:
    starts: Counter[int] = Counter()
    for seed in range(400):
        sample = sampled(Reconstruction(), np.arange(100, 140), 40, 20, seed)
        assert np.concatenate([sample.prompt, sample.target]).tolist() == list(
            range(sample.prompt[0], sample.prompt[0] + 20)
        )
        assert len(sample.prompt) == 10
        starts[int(sample.prompt[0]) - 100] += 1
    assert set(starts) == set(range(21))
    assert max(starts.values()) < 45
    short = sampled(Reconstruction(), np.arange(100, 115), 40, 20)
    assert np.concatenate([short.prompt, short.target]).tolist() == list(range(100, 115))


def test_reconstruction_in_spans() -> None:
    """All of the span once, in pieces that begin anywhere, each after tokens of its own that are given."""
    counts, firsts, given = Counter[int](), Counter[int](), Counter[int]()
    for seed in range(600):
        sample = sampled(Reconstruction(spans=4, prompt_tokens=6), np.arange(100, 160), 60, 60, seed)
        written = np.concatenate([sample.prompt, sample.target])
        learnt = np.concatenate([np.full(len(sample.prompt), False), sample.learnt])
        assert sorted(written) == list(range(100, 160))
        starts = [0, *(np.flatnonzero(learnt[:-1] & ~learnt[1:]) + 1)]
        for i, start in enumerate(starts):
            span = learnt[start : [*starts, 60][i + 1]]
            known = int((~span).sum())
            assert 1 <= known < len(span)
            assert not span[:known].any()
            assert known in range(2, 7) or known == len(span) - 1
            assert (np.diff(written[start:][: len(span)]) == 1).all()
            given[known] += 1
        counts[len(starts)] += 1
        firsts[int(written[0])] += 1
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 100
    assert set(given) == {1, 2, 3, 4, 5, 6}
    assert len(firsts) > 40
    # some of what it has written is read as other tokens of the text; what it is given, and what it learns, stay
    for spans in (1, 4):
        shares = []
        for seed in range(50):
            sample = sampled(Reconstruction(spans=spans, wrong=0.3), np.arange(100, 160), 60, 60, seed)
            same_without = sampled(Reconstruction(spans=spans), np.arange(100, 160), 60, 60, seed)
            assert np.array_equal(sample.target, same_without.target)
            learnt = np.full(len(sample.target), True) if sample.learnt is None else sample.learnt
            assert (sample.read == sample.target)[~learnt].all()
            assert set(sample.read) <= set(range(100, 160))
            shares.append((sample.read != sample.target)[learnt].mean())
            batch = collate([sample], pad=0)
            start = len(sample.prompt)
            assert batch["input_ids"][0, start:].tolist() == sample.read.tolist()
            assert batch["labels"][0, start:][learnt].tolist() == sample.target[learnt].tolist()
        assert np.mean(shares) == pytest.approx(0.3, abs=0.04)
    # in some samples it reads its own predictions of all that it learns, but for what is read wrong anyway
    untouched = []
    for seed in range(100):
        sample = sampled(Reconstruction(spans=4, wrong=0.3, predicted=0.4), np.arange(100, 160), 60, 60, seed)
        same_without = sampled(Reconstruction(spans=4, wrong=0.3), np.arange(100, 160), 60, 60, seed)
        for name in ("prompt", "target", "learnt", "read"):
            assert np.array_equal(getattr(sample, name), getattr(same_without, name))
        untouched.append(sample.predicted is not None)
        if sample.predicted is not None:
            assert not sample.predicted[~sample.learnt].any()
            assert sample.predicted[(sample.read == sample.target) & sample.learnt].mean() > 0.9
            assert not sample.predicted[sample.read != sample.target].any()
    assert np.mean(untouched) == pytest.approx(0.4, abs=0.12)
    own = Reconstruction(predicted=1, passes=3)
    assert {n for seed in range(30) for n in sampled(own, np.arange(60), 60, 60, seed).predicted} == {1, 2, 3}
    # in some samples stretches of the text stand in two places, in what is read and in what is written
    doubled = []
    for seed in range(100):
        sample = sampled(Reconstruction(repeated=0.4), np.arange(100, 356), 256, 300, seed)
        (text,) = sample.pieces
        assert np.array_equal(np.concatenate([sample.prompt, sample.target]), text)
        doubled.append(256 - len(set(text)))
        assert doubled[-1] <= 4 * REPEATED[1]
    assert np.mean([many > 0 for many in doubled]) == pytest.approx(0.4, abs=0.12)
    assert np.mean([many for many in doubled if many]) > 15
    short = sampled(Reconstruction(spans=9, repeated=1), np.arange(100, 105), 40, 20)
    assert sorted(np.concatenate([short.prompt, short.target])) == list(range(100, 105))


@pytest.mark.parametrize(
    ("tokens", "context"),
    [(60, 40), (59, 40), (50, 37), (41, 30), (40, 30), (8, 6), (5, 3), (3, 1), (2, 1), (1, 1)],
)
def test_continuation_goes_on_where_the_context_ends(tokens: int, context: int) -> None:
    """Windows of 40 + 20; of a shorter document a quarter, rounded up, is left, or what does not fit."""
    assert Continuation().window(40, 20) == 60
    sample = sampled(Continuation(), np.arange(100, 100 + tokens), 40, 20)
    everything = np.concatenate([*sample.pieces, sample.prompt, sample.target])
    assert everything.tolist() == [*range(100, 100 + tokens), *[MARKS.eos] * (3 - tokens)]
    assert len(sample.prompt) == 1
    assert len(sample.pieces[0]) == context


@quick
@given(
    name=st.sampled_from(["reconstruction", "continuation"]),
    tokens=st.integers(1, 300),
    length=st.integers(2, 200),
    targets=st.integers(17, 128),
    prompt_tokens=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_text_sizes(name: str, tokens: int, length: int, targets: int, prompt_tokens: int, seed: int) -> None:
    kind: Any = TASKS[name]
    task = kind(prompt_tokens=prompt_tokens)
    text = np.arange(LOW, LOW + min(tokens, task.window(length, targets)))
    sample = sampled(task, text, length, targets, seed)
    check_sizes(sample, length, targets, 64)
    assert same(sample, sampled(task, text, length, targets, seed))
