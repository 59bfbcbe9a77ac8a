"""Samples → a batch: the arguments of the training pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .tasks.base import Sample


def collate(samples: Sequence[Sample], pad: int, teacher: bool = False) -> dict[str, Tensor]:
    """Return the arguments of the training pass for B samples, all int64 and padded on the right.

    Returns:
        context_ids: [B, T].
        context_mask: [B, T], the number of the piece that a token belongs to, from 1, and 0 at padding; absent where
            every row is one piece and all are of the same length.
        input_ids: [B, Q] prompt and target.
        labels: [B, Q] as `input_ids` at targets, elsewhere -100; the model shifts them.
        logits_to_keep: [U] the positions of 0 … Q − 1 that a target of any row follows.
        predicted: [B, Q] n > 0 where the decoder reads its own prediction of n passes; absent where it does so nowhere.
        teacher_ids, teacher_mask: with `teacher`, [B, E + Q]: what the teacher reads and the target, E columns to the
            right of where `input_ids` has it; padded on both sides.
    """
    contexts = [np.concatenate(s.pieces) for s in samples]
    batch = {"context_ids": _padded(contexts, pad), **prompts_and_targets([(s.prompt, s) for s in samples], pad)}
    if len({len(c) for c in contexts}) > 1 or any(len(s.pieces) > 1 for s in samples):
        numbers = [np.repeat(np.arange(1, len(s.pieces) + 1), [len(p) for p in s.pieces]) for s in samples]
        batch["context_mask"] = _padded(numbers, 0)
    if any(s.predicted is not None for s in samples):
        rows = [np.zeros(len(s.prompt) + len(s.target), dtype=np.int64) for s in samples]
        for row, s in zip(rows, samples, strict=True):
            row[len(s.prompt) :] = 0 if s.predicted is None else s.predicted
        batch["predicted"] = _padded(rows, 0)
    if teacher:
        plain = [s.uncompressed() for s in samples]
        extra = [len(p) - len(s.prompt) for p, s in zip(plain, samples, strict=True)]
        shift = max(0, *extra)
        ids = torch.full((len(samples), shift + batch["labels"].shape[1]), pad)
        mask = torch.zeros_like(ids)
        for b, sample in enumerate(samples):
            read = torch.from_numpy(np.concatenate([plain[b], sample.target]))
            start = shift - extra[b]
            ids[b, start : start + len(read)], mask[b, start : start + len(read)] = read, 1
        batch |= {"teacher_ids": ids, "teacher_mask": mask}
    return batch


def collate_plain(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """Return the arguments of a training pass of the decoder alone for B samples, [B, Q] each, padded on the right.

    Returns:
        input_ids: what is read before the target, and the target.
        attention_mask: 0 at padding.
        labels, logits_to_keep: as of :func:`collate`.
    """
    rows = [(s.uncompressed(), s) for s in samples]
    mask = [np.ones(len(read) + len(s.target), dtype=np.int64) for read, s in rows]
    return {**prompts_and_targets(rows, pad), "attention_mask": _padded(mask, 0)}


def prompts_and_targets(rows: Sequence[tuple[np.ndarray, Sample]], pad: int) -> dict[str, Tensor]:
    """Return `input_ids`, `labels` and `logits_to_keep` of B samples, as :func:`collate` does.

    Args:
        rows: what the decoder reads before the target, token ids [T], and the sample.
        pad: the token id at padding.
    """
    read, learnt = [], []
    for before, sample in rows:
        target = sample.target if sample.learnt is None else np.where(sample.learnt, sample.target, -100)
        read.append(np.concatenate([before, sample.target if sample.read is None else sample.read]))
        learnt.append(np.concatenate([np.full(len(before), -100), target]))
    labels = _padded(learnt, -100)
    return {
        "input_ids": _padded(read, pad),
        "labels": labels,
        "logits_to_keep": (labels[:, 1:] != -100).any(0).nonzero()[:, 0],
    }


def for_exact_reading(sample: Sample) -> Sample:
    """Return a sample as a decoder learns from it that reads the context itself, at rate 1 of a direct prefix.

    Its pieces become one text, the form in which a question at hand is given; and there are no predictions of its own.
    """
    return replace(sample, pieces=(np.concatenate(sample.pieces),), predicted=None)


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Return rows of numbers as one tensor [B, longest], int64, padded on the right."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = torch.from_numpy(row)
    return out
