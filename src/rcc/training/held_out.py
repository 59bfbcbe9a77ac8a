"""Measuring on held-out samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .batches import Kind, Samples
from .objective import Objective


@torch.no_grad()
def measure(objective: Objective, samples: Samples, count: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return teacher-forced loss (nats a token) and token accuracy over `count` samples of every kind of a stage.

    Always the same samples: the first ones of each of the stage's streams.
    """
    figures = {}
    was_training = objective.training
    objective.eval()
    for number, (task, length) in enumerate(samples.schedule.streams):
        rows = min(samples.stage.rows(length), count)
        for rate in samples.schedule.rates[task, length]:
            kind = Kind(task, length, rate)
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
            figures[str(kind)] = {"loss": round(loss / tokens, 4), "accuracy": round(correct / tokens, 4)}
    objective.train(was_training)
    return figures
