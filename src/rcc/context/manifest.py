"""Manifest: what a context's file says of it, beside its keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError
from .pieces import Piece, pieces_from


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
            **({"compressor": self.compressor} if self.compressor else {}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    @classmethod
    def read(cls, path: str | Path, data: dict[str, Any]) -> Manifest:
        """Check what a file holds.

        Raises:
            ContextError: it lacks something, or has it of another type.
        """
        try:
            fingerprint, name, compressor = data["fingerprint"], data["model"], data.get("compressor", "")
            if not all(isinstance(text, str) for text in (fingerprint, name, compressor)):
                raise TypeError("names that are no text")
            rotated = data.get("rotated", True)
            if not isinstance(rotated, bool):
                raise TypeError("rotated is neither true nor false")
            pieces, versions = tuple(pieces_from(data["pieces"])), dict(data["versions"])
            layers = len(range(data["layers"]))
            length = int(data["segment_length"])
            return cls(name, fingerprint, length, layers, pieces, versions, rotated, compressor)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ContextError(f"{path} is damaged: its manifest is not whole ({error}).") from None

    def layers_of(self, path: str | Path, tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values [1, KV heads, n, head dim] of each layer, out of a file's tensors by name.

        Raises:
            ContextError: they are not the keys and values of the positions that the manifest names.
        """
        names = [(f"keys.{i}", f"values.{i}") for i in range(self.layers)] if 2 * self.layers == len(tensors) else []
        length = sum(piece.positions for piece in self.pieces)
        layers = [(tensors[k], tensors[v]) for k, v in names if k in tensors and v in tensors]
        like = layers[0][0] if layers else torch.empty(0)
        alike = all(t.shape == like.shape and t.dtype == like.dtype for layer in layers for t in layer)
        sized = like.ndim == 4 and like.is_floating_point() and (like.shape[0], like.shape[2]) == (1, length)
        if len(layers) != self.layers or not alike or not sized:
            raise ContextError(f"{path} is damaged: its tensors are not the keys and values of {length} positions.")
        return layers
