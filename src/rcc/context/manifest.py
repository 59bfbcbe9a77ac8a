"""Manifest: what a context's file says of it, beside its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..errors import ContextError
from .container import FLOATS, Container, Entry
from .pieces import Piece, pieces_from

NAMES, STEPS = ("keys", "values"), ".steps"
GROUP = 64
"""Positions that share a step in 8 bits."""


@dataclass(frozen=True)
class Manifest:
    """The description of a context of one text; attributes as of `CompressedContext`.

    Attributes:
        layers: how many layers have keys and values.
    """

    model_name: str
    fingerprint: str
    segment_length: int
    layers: int
    pieces: tuple[Piece, ...]
    versions: dict[str, str]
    rotated: bool
    eight_bits: bool = False
    compressor: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what is written, with the present time."""
        return {
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "segment_length": self.segment_length,
            "layers": self.layers,
            "pieces": [piece.as_dict() for piece in self.pieces],
            "versions": self.versions,
            **({} if self.rotated else {"rotated": False}),
            **({"eight_bits": True} if self.eight_bits else {}),
            **({"compressor": self.compressor} if self.compressor else {}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    @classmethod
    def of(cls, container: Container) -> Manifest:
        """Return what a context's file says, and check that its tensors are those that it speaks of.

        Raises:
            ContextError: it lacks something, or has it of another type; or they are others.
        """
        path, data = container.path, container.manifest
        try:
            fingerprint, name, compressor = data["fingerprint"], data["model"], data.get("compressor", "")
            if not all(isinstance(text, str) for text in (fingerprint, name, compressor)):
                raise TypeError("names that are no text")
            rotated = data.get("rotated", True)
            eight_bits = data.get("eight_bits", False)
            if not isinstance(rotated, bool) or not isinstance(eight_bits, bool):
                raise TypeError("rotated or eight_bits is neither true nor false")
            pieces, versions = tuple(pieces_from(data["pieces"])), dict(data["versions"])
            layers = len(range(data["layers"]))
            length = int(data["segment_length"])
            manifest = cls(name, fingerprint, length, layers, pieces, versions, rotated, eight_bits, compressor)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ContextError(f"{path} is damaged: its manifest is not whole ({error}).") from None
        if not manifest._describes(container.entries):
            raise ContextError(
                f"{path} is damaged: its tensors are not the keys and values of {manifest.positions} positions."
            )
        return manifest

    @property
    def positions(self) -> int:
        """Positions of the context."""
        return sum(piece.positions for piece in self.pieces)

    @property
    def names(self) -> list[str]:
        """What a file calls keys and values, those of the first layer first."""
        return [f"{name}.{i}" for i in range(self.layers) for name in NAMES]

    def _describes(self, entries: Mapping[str, Entry]) -> bool:
        """Return whether a file's tensors are the keys and values of the positions that the manifest names."""
        # the count first: a damaged number of layers may be anything
        if len(entries) != (4 if self.eight_bits else 2) * self.layers:
            return False
        first = entries.get(f"{NAMES[0]}.0")
        if first is None or len(first.shape) != 4 or (first.shape[0], first.shape[2]) != (1, self.positions):
            return False
        _, heads, n, size = first.shape
        if any(list(map(len, piece.heads)) != [heads] * self.layers for piece in self.pieces if piece.heads):
            return False
        if not self.eight_bits:
            return first.dtype in FLOATS and self._alike(entries, "", first.dtype, first.shape)
        steps = entries.get(f"{NAMES[0]}.0{STEPS}")
        if steps is None or steps.dtype not in FLOATS:
            return False
        return self._alike(entries, "", "I8", first.shape) and self._alike(
            entries, STEPS, steps.dtype, (1, heads, -(-n // GROUP), size)
        )

    def _alike(self, entries: Mapping[str, Entry], suffix: str, dtype: str, shape: tuple[int, ...]) -> bool:
        found = [entries.get(f"{name}{suffix}") for name in self.names]
        return all(entry is not None and (entry.dtype, entry.shape) == (dtype, shape) for entry in found)
