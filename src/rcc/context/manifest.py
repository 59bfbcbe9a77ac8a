"""Manifest: what a context's file says of it, beside its keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError
from . import file as fileformat
from .eight_bits import GROUP, EightBitLayers, EightBits
from .pieces import Piece, pieces_from

_NAMES = ("keys", "values")


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
            eight_bits = data.get("eight_bits", False)
            if not isinstance(rotated, bool) or not isinstance(eight_bits, bool):
                raise TypeError("rotated or eight_bits is neither true nor false")
            pieces, versions = tuple(pieces_from(data["pieces"])), dict(data["versions"])
            layers = len(range(data["layers"]))
            length = int(data["segment_length"])
            return cls(name, fingerprint, length, layers, pieces, versions, rotated, eight_bits, compressor)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ContextError(f"{path} is damaged: its manifest is not whole ({error}).") from None

    def tensors_of(self, layers: Sequence[tuple[Tensor, Tensor]], length: int) -> dict[str, fileformat.Lazy]:
        """Return what a file holds of a context's layers, by name.

        Args:
            layers: keys and values [1, KV heads, capacity, head dim].
            length: positions that count.
        """
        tensors = {}
        if isinstance(layers, EightBitLayers):
            for i, pair in enumerate(layers.layers):
                for name, part in zip(_NAMES, pair, strict=True):
                    tensors[f"{name}.{i}"] = fileformat.lazy(part.numbers)
                    tensors[f"{name}.{i}.steps"] = fileformat.lazy(part.steps)
            return tensors
        for i, layer in enumerate(layers):
            for name, block in zip(_NAMES, layer, strict=True):
                tensors[f"{name}.{i}"] = fileformat.lazy(block[:, :, :length])
        return tensors

    def layers_of(self, path: str | Path, tensors: dict[str, Tensor]) -> Sequence[tuple[Tensor, Tensor]]:
        """Return keys and values [1, KV heads, n, head dim] of each layer, out of a file's tensors by name.

        Raises:
            ContextError: they are not the keys and values of the positions that the manifest names.
        """
        length = sum(piece.positions for piece in self.pieces)
        damaged = ContextError(f"{path} is damaged: its tensors are not the keys and values of {length} positions.")
        count = (4 if self.eight_bits else 2) * self.layers
        names = [f"{name}.{i}" for i in range(self.layers) for name in _NAMES] if count == len(tensors) else []
        blocks = [tensors[name] for name in names if name in tensors]
        if not blocks or len(blocks) != 2 * self.layers:
            raise damaged
        like = blocks[0]
        alike = all(t.shape == like.shape and t.dtype == like.dtype for t in blocks)
        if not alike or like.ndim != 4 or (like.shape[0], like.shape[2]) != (1, length):
            raise damaged
        counted = [list(map(len, piece.heads)) for piece in self.pieces if piece.heads]
        if any(heads != [like.shape[1]] * self.layers for heads in counted):
            raise damaged
        if not self.eight_bits:
            if not like.is_floating_point():
                raise damaged
            return list(zip(blocks[::2], blocks[1::2], strict=True))
        steps = [tensors[f"{name}.steps"] for name in names if f"{name}.steps" in tensors]
        shape = (1, like.shape[1], -(-length // GROUP), like.shape[3])
        fits = all(t.shape == shape and t.dtype == steps[0].dtype and t.is_floating_point() for t in steps)
        if len(steps) != len(blocks) or not fits or like.dtype != torch.int8:
            raise damaged
        parts = [EightBits(*pair) for pair in zip(blocks, steps, strict=True)]
        return EightBitLayers(list(zip(parts[::2], parts[1::2], strict=True)))
