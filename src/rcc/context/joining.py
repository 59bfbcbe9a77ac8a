"""Contexts of a direct prefix joined, cut and reordered, with nothing read again; contexts of any kind as a batch.

The former is possible because such a context's keys are stored before their rotation and depend on no other segment.
The result has the very bits of compressing the texts in that order. These functions work on what a context is made of,
its pieces and its blocks; `CompressedContext` has them as methods.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ContextError, InputError
from .cache import KVBlocks
from .pieces import Piece

if TYPE_CHECKING:
    from .context import CompressedContext


@dataclass(frozen=True)
class Segment:
    """A part of a context that was read on its own: a segment, or at rate 1 a whole text.

    Attributes:
        start, stop: its positions in the context.
        piece: as which it stands alone.
        of: number of the context's piece that it belongs to.
        whole: whether it is all of that piece.
    """

    start: int
    stop: int
    piece: Piece
    of: int
    whole: bool


def segments_of(pieces: Sequence[Piece], segment_length: int | None) -> tuple[Segment, ...]:
    """Return the segments of a context of one text, in order.

    Args:
        pieces: what was read, in order.
        segment_length: tokens of a segment; None: each piece is one.
    """
    segments, start = [], 0
    for number, piece in enumerate(pieces):
        size = piece.tokens if piece.rate == 1 or segment_length is None else segment_length
        for first in range(0, piece.tokens, size):
            tokens = min(size, piece.tokens - first)
            whole = tokens == piece.tokens
            stop = start + (piece.positions if whole else -(-tokens // piece.rate))
            alone = piece if whole else _part(piece, first, tokens)
            segments.append(Segment(start, stop, alone, number, whole))
            start = stop
    return tuple(segments)


def choose(segments: Sequence[Segment], numbers: Sequence[int]) -> list[Segment]:
    """Return the segments of these numbers.

    Raises:
        InputError: no number, or one that there is not.
    """
    if not numbers:
        raise InputError("segments is empty: name at least one.")
    for number in numbers:
        if not isinstance(number, int) or not 0 <= number < len(segments):
            raise InputError(f"segments has {number!r}, but the context's segments are 0 to {len(segments) - 1}.")
    return [segments[number] for number in numbers]


def _part(piece: Piece, first: int, tokens: int) -> Piece:
    """Return a segment of a piece as a piece of its own.

    Its tokens are not known, so its digest is of where it comes from.
    """
    digest = hashlib.sha256(f"{piece.sha256} {first} {tokens}".encode()).hexdigest()
    opening = piece.opening[:tokens] if first == 0 else ()
    return Piece(tokens, -(-tokens // piece.rate), piece.rate, digest, opening)


def pieces_of(chosen: Sequence[Segment], segments: Sequence[Segment], pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return the pieces of chosen segments; all those of one piece, in order, are that piece again.

    Args:
        chosen: of `segments`, in any order.
        segments: all of the context's, as :func:`segments_of` returns them.
        pieces: all of the context's.
    """
    result: list[Piece] = []
    k = 0
    while k < len(chosen):
        whole = [segment for segment in segments if segment.of == chosen[k].of]
        if list(chosen[k : k + len(whole)]) == whole:
            result.append(pieces[chosen[k].of])
            k += len(whole)
        else:
            result.append(chosen[k].piece)
            k += 1
    return tuple(result)


def check_independent(context: CompressedContext, what: str) -> None:
    """Raise InputError or ContextError unless a context is of one text whose segments do not depend on one another."""
    if context.batch_size != 1:
        raise InputError(f"the context holds {context.batch_size} texts: take one of them, context[i].")
    if context.rotated:
        raise ContextError(
            f"a context of {context.model_name} cannot be {what}: its segments depend on one another. Use a model with"
            ' prefix="direct", or compress the texts again.'
        )


def check_even(pieces: Sequence[Piece]) -> None:
    """Raise ContextError where heads have different numbers of pairs, which are then no positions of all heads."""
    if any(piece.heads for piece in pieces):
        raise ContextError("heads of the context have different numbers of pairs: take whole texts of it (select).")


def take(blocks: KVBlocks, length: int, index: Tensor) -> KVBlocks:
    """Return positions, in the order of an index [n] into the first `length`, as blocks of their own."""
    layers = []
    for keys, values in blocks.layers:
        layers.append((keys[:, :, :length].index_select(2, index), values[:, :, :length].index_select(2, index)))
        blocks.release()
    return KVBlocks(layers, len(index), writable=True)


def concatenate(parts: Sequence[tuple[KVBlocks, int]], device: torch.device, dtype: torch.dtype) -> KVBlocks:
    """Return blocks of several contexts, one after the other.

    Args:
        parts: blocks, and how many of their positions count.
        device: of the result.
        dtype: of the result.
    """
    layers = []
    for pairs in zip(*(blocks.layers for blocks, _ in parts), strict=True):
        keys, values = (
            torch.cat([pair[k][:, :, :n].to(device, dtype) for pair, (_, n) in zip(pairs, parts, strict=True)], 2)
            for k in (0, 1)
        )
        layers.append((keys, values))
        for blocks, _ in parts:
            blocks.release()
    return KVBlocks(layers, sum(length for _, length in parts), writable=True)


def stack(parts: Sequence[tuple[KVBlocks, int]], length: int, device: torch.device, dtype: torch.dtype) -> KVBlocks:
    """Return blocks of several contexts as one batch, filled up with zeros on the left.

    Args:
        parts: blocks, and how many of their positions count.
        length: positions of the result, no fewer than of any part.
        device: of the result.
        dtype: of the result.
    """

    def fill(block: Tensor, own: int) -> Tensor:
        return torch.nn.functional.pad(block[:, :, :own], (0, 0, length - own, 0)).to(device, dtype)

    layers = []
    for pairs in zip(*(blocks.layers for blocks, _ in parts), strict=True):
        keys, values = (
            torch.cat([fill(pair[k], own) for pair, (_, own) in zip(pairs, parts, strict=True)]) for k in (0, 1)
        )
        layers.append((keys, values))
    return KVBlocks(layers, length, writable=True)
