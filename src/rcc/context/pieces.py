"""Piece: the record of one text within a context.

It lives here and not with the segments, because a context's and a vectors file's manifest is a list of pieces, and
`context` imports nothing from `model`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Piece:
    """One text within a context: what one call of `compress` or `encode` read for one row of its batch.

    Attributes:
        tokens: of the text.
        positions: that it takes in the prefix.
        rate: tokens a position.
        sha256: SHA-256 of the token ids as little-endian int64.
        opening: the first token ids: a prompt for writing the text back.
        special_tokens: whether chat marks in the text were read as the special tokens that they name.
        heads: for each layer, how many pairs each KV head has, where heads have different numbers. In all they have
            `positions` a head, and lie in the layer's [KV heads, positions] one head after the other.
    """

    tokens: int
    positions: int
    rate: int
    sha256: str
    opening: tuple[int, ...] = ()
    special_tokens: bool = False
    heads: tuple[tuple[int, ...], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return what a manifest holds; `special_tokens` and `heads` only where there are some."""
        return {key: value for key, value in vars(self).items() if value or key not in ("special_tokens", "heads")}


def rate_of(pieces: Iterable[Piece]) -> int | list[int]:
    """Return the rate of some texts, or all of them in ascending order if they differ."""
    rates = sorted({piece.rate for piece in pieces})
    return rates[0] if len(rates) == 1 else rates


def rate_text(rate: int | list[int]) -> str:
    """Return one rate or several as people read them: `4×`, `4×/8×`."""
    return "/".join(f"{r}×" for r in (rate if isinstance(rate, list) else [rate]))


def sha256_of(pieces: Sequence[Piece]) -> str:
    """Return the digest of a text: of its token ids, or, after an append, of its pieces' digests in order."""
    if len(pieces) == 1:
        return pieces[0].sha256
    return hashlib.sha256("".join(piece.sha256 for piece in pieces).encode()).hexdigest()


def longest_head(pieces: Sequence[Piece]) -> int:
    """Return how many pairs that head of any layer has that has most: the positions that texts take in the window."""
    even = sum(piece.positions for piece in pieces if not piece.heads)
    layers = zip(*(piece.heads for piece in pieces if piece.heads), strict=True)
    return even + max((max(map(sum, zip(*counts, strict=True))) for counts in layers), default=0)


def pieces_from(rows: list[dict[str, Any]]) -> list[Piece]:
    """Read the pieces of a manifest.

    Raises:
        TypeError, KeyError: they are no pieces, or their numbers are out of range.
    """
    pieces = [
        Piece(**{**row, "opening": tuple(row["opening"]), "heads": tuple(map(tuple, row.get("heads", ())))})
        for row in rows
    ]
    for piece in pieces:
        counts = (piece.tokens, piece.positions, piece.rate)
        numbers = (*counts, *piece.opening, *(count for layer in piece.heads for count in layer))
        whole = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) and isinstance(piece.sha256, str)
        if not whole or min(counts) < 1 or not isinstance(piece.special_tokens, bool):
            raise TypeError("a piece of text with values out of range")
        if any(sum(layer) != len(layer) * piece.positions for layer in piece.heads):
            raise TypeError("a piece of text whose heads have other pairs than there are")
    return pieces
