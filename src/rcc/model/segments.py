"""Texts → segments. This file alone decides segment boundaries, padding, and how many positions a text takes."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from ..config import RCCConfig
from ..context.pieces import Piece


def piece_of(ids: Tensor, rate: int, config: RCCConfig) -> Piece:
    """Return the record of a text of token ids [T]."""
    return record(ids, positions(len(ids), rate, config), rate)


def record(ids: Tensor, taken: int, rate: int) -> Piece:
    """Return the record of a text of token ids [T] that takes so many positions."""
    array = ids.cpu().numpy().astype(np.dtype("<i8"))
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    opening = tuple(int(i) for i in array[:10])
    return Piece(len(ids), taken, rate, digest, opening)


def texts_of(rows: list[Tensor], mask: Tensor | None) -> list[tuple[Tensor, ...]]:
    """Split what :func:`rows_of` gave into the texts of each row, by the numbers in its mask (None: one each)."""
    if mask is None:
        return [(row,) for row in rows]
    counts = [numbers[numbers > 0].unique_consecutive(return_counts=True)[1] for numbers in mask]
    return [row.split(count.tolist()) for row, count in zip(rows, counts, strict=True)]


def positions(tokens: int, rate: int, config: RCCConfig) -> int:
    """Return how many prefix positions a text of `tokens` tokens takes."""
    if config.segment_padding == "repeat":
        tokens = -(-tokens // config.segment_length) * config.segment_length
    # the rate divides the segment, so partial groups occur only at the very end
    return -(-tokens // rate)


def split(ids: Tensor, config: RCCConfig) -> tuple[Tensor, ...]:
    """Split token ids [T] into segments of `segment_length`; the last one may be shorter.

    With `segment_padding="repeat"` every segment is full: a text shorter than one is repeated until it fills it,
    a longer one is filled up on the left, to a whole number of segments, with its own last tokens.
    """
    size = config.segment_length
    if config.segment_padding == "repeat" and len(ids) % size:
        missing = -len(ids) % size
        ids = ids.repeat(-(-size // len(ids)))[:size] if len(ids) < size else torch.cat([ids[-missing:], ids])
    parts: tuple[Tensor, ...] = ids.split(size)
    return parts
