"""Measuring on held-out samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .batches import Kind, Samples
from .objective import Objective


def kinds_of(samples: Samples) -> list[tuple[int, Kind]]:
    """Return every kind of sample of a stage, each with the number of its stream."""
    schedule = samples.schedule
    return [
        (number, Kind(task, length, rate))
        for number, (task, length) in enumerate(schedule.streams)
        for rate in schedule.rates[task, length]
    ]


def measure(
    objective: Objective, samples: Samples, count: int, device: torch.device
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield teacher-forced loss (nats a token) and token accuracy over `count` samples of every kind of a stage.

    Always the same samples: the first ones of each of the stage's streams.
    """
    for number, kind in kinds_of(samples):
        was_training = objective.training
        objective.eval()
        figures = _measure_kind(objective, samples, count, number, kind, device)
        objective.train(was_training)
        yield str(kind), figures


@torch.no_grad()
def _measure_kind(
    objective: Objective, samples: Samples, count: int, number: int, kind: Kind, device: torch.device
) -> dict[str, float]:
    rows = min(samples.stage.rows(kind.length), count)
    loss = correct = tokens = 0.0
    for first in range(0, count, rows):
        drawn = [samples.sample(number, k) for k in range(first, min(first + rows, count))]
        batch = {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in samples.collate(drawn, kind).items()
            if not key.startswith("teacher")  # what counts is what was to be written, not who it sounds like
        }
        out = objective(**batch)
        targets = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, batch["logits_to_keep"] + 1]
        real = targets != -100
        n = int(real.sum())
        loss += n * float(out["loss"])
        correct += float((out["tokens"] == targets)[real].sum())
        tokens += n
    return {"loss": round(loss / tokens, 4), "accuracy": round(correct / tokens, 4)}
