"""Samples become a batch: padding, labels, and what a teacher reads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conftest import MakeModel
from equality import run_training_pass
from rcc.training.collate import collate
from rcc.training.tasks.base import Sample


def sample_of(*sizes: int, prompt: int = 2, target: int = 3, plain: int | None = None) -> Sample:
    pieces = tuple(np.arange(100, 100 + n) for n in sizes)
    read = None if plain is None else np.arange(400, 400 + plain)
    return Sample(pieces, np.arange(200, 200 + prompt), np.arange(300, 300 + target), "", read)


def test_collate_pads_and_labels_targets_only() -> None:
    batch = collate([sample_of(4), sample_of(2, 1, prompt=3, target=1)], pad=9)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "context_ids": [[100, 101, 102, 103], [100, 101, 100, 9]],
        "context_mask": [[1, 1, 1, 1], [1, 1, 2, 0]],
        "input_ids": [[200, 201, 300, 301, 302], [200, 201, 202, 300, 9]],
        "labels": [[-100, -100, 300, 301, 302], [-100, -100, -100, 300, -100]],
        "logits_to_keep": [1, 2, 3],
    }
    assert "context_mask" not in collate([sample_of(4), sample_of(4)], pad=9)
    assert "context_mask" in collate([sample_of(4), sample_of(3)], pad=9)
    assert "context_mask" in collate([sample_of(2, 2), sample_of(2, 2)], pad=9)
    own = replace(sample_of(4), predicted=np.array([2, 0, 2]))
    assert collate([sample_of(4, prompt=3), own], pad=9)["predicted"].tolist() == [[0] * 6, [0, 0, 2, 0, 2, 0]]


def test_loss_falls_on_targets_only(tiny: MakeModel) -> None:
    """The model's loss is the mean over targets of what each row costs alone; other tokens' labels do not matter."""
    model = tiny("llama")
    samples = [
        Sample((np.arange(1, 20),), np.arange(20, 24), np.arange(30, 36), ""),
        Sample((np.arange(5, 12),), np.arange(40, 42), np.arange(50, 53), ""),
    ]
    losses = []
    for rows in (samples, samples[:1], samples[1:]):
        batch = collate(rows, pad=0)
        del batch["logits_to_keep"]
        losses.append(run_training_pass(model, **batch, rate=4).loss.item())
    assert losses[0] == pytest.approx((6 * losses[1] + 3 * losses[2]) / 9, rel=1e-4)


def test_a_teachers_target_stands_in_the_same_columns() -> None:
    samples = [sample_of(4), sample_of(2, 1, prompt=3, target=1, plain=8), sample_of(1, plain=1)]
    batch = collate(samples, pad=9, teacher=True)
    ids_, mask = batch["teacher_ids"], batch["teacher_mask"]
    shift = ids_.shape[1] - batch["input_ids"].shape[1]
    for b, sample in enumerate(samples):
        plain = np.concatenate([*sample.pieces, sample.prompt]) if sample.plain is None else sample.plain
        assert ids_[b][mask[b].bool()].tolist() == [*plain, *sample.target]
        assert (ids_[b][~mask[b].bool()] == 9).all()
        at = batch["labels"][b] != -100
        assert ids_[b, shift:][at].tolist() == sample.target.tolist()
