"""Which batch holds what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from rcc.text import prompting
from rcc.training.batches import Batches, Corpora, Samples, Schedule, used_tokens
from rcc.training.recipe import Recipe
from rcc.training.settings import build
from rcc.training.tasks.base import Marks
from training_runs import (
    Settings,
    changed,
)

pytestmark = pytest.mark.usefixtures("world")


def same(a: Settings, b: Settings) -> bool:
    tensors = [k for k in a if isinstance(a[k], torch.Tensor)]
    plain = all(a[k] == b[k] for k in a if k not in tensors)
    return set(a) == set(b) and plain and all(torch.equal(a[k], b[k]) for k in tensors)


def test_shares_are_exact(shared: Settings) -> None:
    """In every 1,024 batches from a multiple of that on; of the rates, in as many of one task and length."""
    stage = build(Recipe, shared, "").stages[0]
    schedule = Schedule(stage, 7)
    kinds = [schedule.at(i)[0] for i in range(2 * 1024)]
    for block in (kinds[:1024], kinds[1024:]):
        count = Counter((kind.task, kind.length) for kind in block)
        shares = {"reconstruction": 256, "continuation": 128, "instruction": 128}
        assert count == {(task, n): share for task, share in shares.items() for n in (32, 48)}
    rates = [
        kind.rate for i in range(4096) for kind in [schedule.at(i)[0]] if str(kind).startswith("reconstruction@32")
    ]
    assert Counter(rates[:1024]) == {4: 512, 8: 512}
    order = [kind.task for kind in kinds]
    assert order != sorted(order)
    other = Schedule(stage, 8)
    assert order != [other.at(i)[0].task for i in range(2 * 1024)]


def test_a_task_with_lengths_and_rates_of_its_own(shared: Settings) -> None:
    """They go before the stage's, and an entry that stands there twice is drawn twice as often."""
    tasks: Settings = {"reconstruction": 0.5, "instruction": {"share": 0.5, "lengths": [32, 48, 48], "rates": [8]}}
    stage = {**shared["stages"][0], "tasks": tasks, "lengths": [32], "rates": [4]}
    built = build(Recipe, changed(shared, stages=[stage]), "").stages[0]
    schedule = Schedule(built, 7)
    count = Counter(str(schedule.at(i)[0]) for i in range(3 * 1024))
    assert count["reconstruction@32/4x"] == 1536
    assert count["instruction@32/8x"] + count["instruction@48/8x"] == 1536
    assert abs(count["instruction@32/8x"] - 512) <= 3  # a block rounds thirds
    assert (built.all_lengths, built.all_rates) == ([32, 48], [4, 8])


def test_predictions_at_some_rates_only(samples_of: Callable[..., Samples], shared: Settings) -> None:
    """Elsewhere the batches are those of a task without predictions."""

    def batches(**options: Any) -> list[Settings]:
        samples = samples_of(changed(shared, stages__0__tasks={"reconstruction": {"share": 1, **options}}))
        return [samples.batch(i) for i in range(16)]

    none, everywhere = batches(), batches(predicted=1)
    low = batches(predicted=1, predicted_rates=[4])
    assert {batch["rate"] for batch in none} == {4, 8}
    for i, batch in enumerate(low):
        assert same(batch, (everywhere if batch["rate"] == 4 else none)[i])
        assert "predicted" in everywhere[i]
        assert ("predicted" in batch) == (batch["rate"] == 4)


def test_what_is_read_exactly_is_one_text_without_predictions(
    samples_of: Callable[..., Samples], direct: Settings
) -> None:
    """At rate 1 of a direct prefix: the same tokens otherwise, and at 4x what the task made of them."""
    tasks: Settings = {
        "reconstruction": {"share": 1, "predicted": 1},
        "instruction": {"share": 1, "modes": {"compress": 1}},
    }
    tasks["instruction"] |= {"own_segment": 1, "distractors": 0}
    recipe = changed(direct, stages__0__tasks=tasks, stages__0__lengths=[48])
    exact, whole = samples_of(recipe), samples_of(changed(recipe, model__prefix="residual"))
    apart = set()
    for i in range(32):
        got, wanted = exact.batch(i), whole.batch(i)
        parts = int(wanted.get("context_mask", torch.ones(1)).max())
        if got["rate"] == 1:
            assert "predicted" not in got
            assert int(got.get("context_mask", torch.ones(1)).max()) == 1
            wanted.pop("predicted", None)
            keys = [key for key in wanted if key != "context_mask"]
            assert same({k: got[k] for k in keys}, {k: wanted[k] for k in keys})
            apart.add((got["kind"].partition("@")[0], parts))
        else:
            assert same(got, wanted)
    assert apart == {("reconstruction", 1), ("instruction", 2)}


def test_a_budget_of_tokens(shared: Settings) -> None:
    """As many steps as bring the context tokens of all processes to the budget."""
    for lengths, world in (([32], 1), ([32, 40], 1), ([32, 40], 3)):
        stage = {**shared["stages"][0], "lengths": lengths, "max_steps": None, "max_tokens": 5000}
        schedule = Schedule(build(Recipe, changed(shared, stages=[stage]), "").stages[0], 1)
        steps = schedule.steps(world)
        rows = {32: 3, 40: 2}
        step = [sum(rows[n] * n for n in [schedule.at(i)[0].length for i in (2 * k, 2 * k + 1)]) for k in range(steps)]
        assert world * sum(step[:-1]) < 5000 <= world * sum(step)


def test_a_batch_depends_on_its_number_alone(samples_of: Callable[..., Samples], shared: Settings) -> None:
    first = samples_of(shared)
    seen = [first.batch(i) for i in range(48)]
    assert len({batch["kind"] for batch in seen}) == 12  # all there are
    again = samples_of(shared)
    assert all(same(again.batch(i), seen[i]) for i in reversed(range(48)))
    other = samples_of(changed(shared, seed=1))
    assert not any(same(other.batch(i), seen[i]) for i in range(48))
    held_out = samples_of(shared, "held_out")
    assert not any(same(held_out.batch(i), seen[i]) for i in range(48))


def test_loading_processes_do_not_change_the_order(samples_of: Callable[..., Samples], shared: Settings) -> None:
    samples = samples_of(shared)
    for start_at in (0, 5):
        batches_of = Batches(samples, start_at, 0, 1)
        loaders = [iter(DataLoader(batches_of, batch_size=None, num_workers=n)) for n in (0, 2)]
        for i in range(start_at, start_at + 7):
            none, two = (next(loader) for loader in loaders)
            assert same(none, two)
            assert same(none, samples.batch(i))


def test_processes_share_out_what_one_would_read(samples_of: Callable[..., Samples], shared: Settings) -> None:
    def rows(batch: Settings) -> list[tuple[Any, ...]]:
        """Each row without its padding, which the end token is."""
        shares = []
        for b in range(len(batch["input_ids"])):
            ids = [batch[key][b].tolist() for key in ("context_ids", "input_ids", "labels")]
            while ids[0][-1] == 2:
                ids[0].pop()
            while ids[2][-1] == -100:
                ids[1].pop(), ids[2].pop()
            shares.append((batch["rate"], batch["kind"], *map(tuple, ids)))
        return shares

    one = samples_of(changed(shared, stages__0__batch_tokens=192))
    two = samples_of(shared)
    for i in range(24):
        halves = [rows(two.batch(i, rank, 2)) for rank in (0, 1)]
        assert rows(one.batch(i)) == halves[0] + halves[1]
        assert not set(halves[0]) & set(halves[1])


def test_tokens_of_the_data(corpora: Corpora, tokenizer: Any) -> None:
    """All that any row holds, the chat marks, and no more than the tasks' own words beside."""
    used = used_tokens(corpora, Marks.of(tokenizer))
    there = {int(t) for group in corpora.sources.values() for corpus in group for t in np.unique(corpus._tokens)}
    marks = {int(t) for text in (prompting.HEADER, prompting.TURN, prompting.END) for t in tokenizer.encode(text)}
    assert there | marks <= set(used.tolist())
    assert list(used) == sorted(set(used.tolist()))
