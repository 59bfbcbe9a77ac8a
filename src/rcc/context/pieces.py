"""Piece: the record of one text within a context.

It lives here and not with the segments, because a context's and a vectors file's manifest is a list of pieces, and
`context` imports nothing from `model`.
"""

from __future__ import annotations

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
    """

    tokens: int
    positions: int
    rate: int
    sha256: str
    opening: tuple[int, ...] = ()
    special_tokens: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what a manifest holds; `special_tokens` only where there are some."""
        return {key: value for key, value in vars(self).items() if key != "special_tokens" or value}


def pieces_from(rows: list[dict[str, Any]]) -> list[Piece]:
    """Read the pieces of a manifest.

    Raises:
        TypeError, KeyError: they are no pieces, or their numbers are out of range.
    """
    pieces = [Piece(**{**row, "opening": tuple(row["opening"])}) for row in rows]
    for piece in pieces:
        counts = (piece.tokens, piece.positions, piece.rate)
        numbers = (*counts, *piece.opening)
        whole = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) and isinstance(piece.sha256, str)
        if not whole or min(counts) < 1 or not isinstance(piece.special_tokens, bool):
            raise TypeError("a piece of text with values out of range")
    return pieces
