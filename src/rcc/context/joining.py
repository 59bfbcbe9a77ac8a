"""Contexts of a direct prefix as sums of independent pieces: joined, cut and reordered, with nothing read again.

Possible because such a context's keys are stored before their rotation and depend on no other segment. The result has
the very bits of compressing the texts in that order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ContextError, InputError
from ..model.encoder import Piece

if TYPE_CHECKING:
    from .context import CompressedContext, KVBlocks


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


def segments(context: CompressedContext) -> tuple[Segment, ...]:
    """The segments of a context of one text, in order.

    Raises:
        InputError: it holds several texts. ContextError: its segments depend on one another.
    """
    _check(context, "cut")
    parts, start = [], 0
    for number, piece in enumerate(context.pieces[0]):
        size = piece.tokens if piece.rate == 1 else context.segment_length
        for first in range(0, piece.tokens, size):
            tokens = min(size, piece.tokens - first)
            stop = start + -(-tokens // piece.rate)
            whole = tokens == piece.tokens
            parts.append(Segment(start, stop, piece if whole else _part(piece, first, tokens), number, whole))
            start = stop
    return tuple(parts)


def select(context: CompressedContext, chosen: Sequence[int]) -> CompressedContext:
    """A context of some segments of another, in any order.

    Args:
        context: of one text.
        chosen: numbers of its segments, from 0.

    Raises:
        InputError: no number, one that there is not, or a context of several texts.
        ContextError: the context's segments depend on one another.
    """
    parts = segments(context)
    if not chosen:
        raise InputError("segments is empty: name at least one.")
    for number in chosen:
        if not isinstance(number, int) or not 0 <= number < len(parts):
            raise InputError(f"segments has {number!r}, but the context's segments are 0 to {len(parts) - 1}.")
    index = torch.cat([torch.arange(parts[k].start, parts[k].stop) for k in chosen])
    pieces = tuple(_pieces([parts[k] for k in chosen], parts, context.pieces[0]))
    return replace(positions(context, index), pieces=(pieces,))


def positions(context: CompressedContext, index: Tensor) -> CompressedContext:
    """A context of some positions of another, in any order; its pieces are the other's.

    Args:
        context: of one text.
        index: [n], numbers of positions.

    Raises:
        InputError: a context of several texts. ContextError: its positions depend on one another.
    """
    _check(context, "cut")
    index, layers = index.to(context.device), []
    for i in range(len(context.blocks.layers)):
        keys, values = (t.index_select(2, index) for t in context.layer(i))
        layers.append((keys, values))
        context.blocks.release()
    return replace(context, blocks=_blocks(layers, len(index)), length=len(index), mask=None)


def join(contexts: Sequence[CompressedContext]) -> CompressedContext:
    """One context of several, one after the other, on the device and in the precision of the first.

    Raises:
        InputError: there are none, or one holds several texts.
        ContextError: different models made them, or their segments depend on one another.
    """
    if not contexts:
        raise InputError("contexts is empty: give at least one.")
    for context in contexts:
        _check(context, "joined")
    first = contexts[0]
    first.check_one_model(contexts, "joined")
    layers = []
    for i in range(len(first.blocks.layers)):
        pairs = [context.layer(i) for context in contexts]
        keys, values = (torch.cat([pair[k].to(first.device, first.dtype) for pair in pairs], 2) for k in (0, 1))
        layers.append((keys, values))
        for context in contexts:
            context.blocks.release()
    length = sum(map(len, contexts))
    pieces = tuple(piece for context in contexts for piece in context.pieces[0])
    return replace(first, blocks=_blocks(layers, length), length=length, pieces=(pieces,), mask=None)


def _blocks(layers: list[tuple[Tensor, Tensor]], length: int) -> KVBlocks:
    from .context import KVBlocks

    return KVBlocks(layers, length, writable=True)


def _check(context: CompressedContext, what: str) -> None:
    if context.batch_size != 1:
        raise InputError(f"the context holds {context.batch_size} texts: take one of them, context[i].")
    if context.rotated:
        raise ContextError(
            f"a context of {context.model_name} cannot be {what}: its segments depend on one another. Use a model with"
            ' prefix="direct", or compress the texts again.'
        )


def _part(piece: Piece, first: int, tokens: int) -> Piece:
    """A segment of a piece as a piece of its own; its digest is of where it comes from, as its tokens are not known."""
    digest = hashlib.sha256(f"{piece.sha256} {first} {tokens}".encode()).hexdigest()
    opening = piece.opening[:tokens] if first == 0 else ()
    return Piece(tokens, -(-tokens // piece.rate), piece.rate, digest, opening)


def _pieces(parts: list[Segment], every: Sequence[Segment], own: Sequence[Piece]) -> list[Piece]:
    """The pieces of some segments; those of a whole piece, in order, are that piece again."""
    pieces: list[Piece] = []
    k = 0
    while k < len(parts):
        whole = [part for part in every if part.of == parts[k].of]
        if parts[k : k + len(whole)] == whole:
            pieces.append(own[parts[k].of])
            k += len(whole)
        else:
            pieces.append(parts[k].piece)
            k += 1
    return pieces
