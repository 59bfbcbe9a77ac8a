"""CompressedVectors: the encoder's half of a compression, in memory and in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError
from . import container
from . import file as fileformat
from .pieces import Piece, pieces_from


@dataclass(frozen=True)
class CompressedVectors:
    """The encoder's half of a compression: what a decoder needs, on another machine if need be.

    Attributes:
        states: [B, n, L + 1, H]: for each prefix position, the encoder's embedding output and the output of each
            of its L blocks, the last one after the final norm. Texts with fewer than n positions end in zeros.
        lengths: [B] positions of each text.
        rate, segment_length: how they were made.
        pieces: what was read, a text each.
        fingerprint: of the model that made them.
    """

    states: Tensor
    lengths: Tensor
    rate: int
    segment_length: int
    pieces: tuple[Piece, ...]
    fingerprint: str

    @property
    def segment(self) -> int:
        """Tokens a segment, the same as `segment_length`."""
        return self.segment_length

    @property
    def source_sha256(self) -> list[str]:
        """SHA-256 of each text's token ids."""
        return [piece.sha256 for piece in self.pieces]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> CompressedVectors:
        """Return the same vectors on another device or in another precision."""
        states = self.states.to(device=device, dtype=dtype)
        return CompressedVectors(
            states, self.lengths.to(device), self.rate, self.segment_length, self.pieces, self.fingerprint
        )

    def chunks(
        self, step: int, wanted: list[int], device: torch.device
    ) -> Iterator[tuple[dict[int, Tensor], Tensor | None]]:
        """Yield the states on a device, `step` positions at a time.

        Args:
            step: prefix positions of a chunk at most.
            wanted: numbers of the encoder states.
            device: where the chunks go.

        Yields:
            {state number: [B, m, H]}, and which positions are real, [B, m] (None: all).
        """
        for start in range(0, self.states.shape[1], step):
            block = self.states[:, start : start + step].to(device)
            numbers = wanted if block.shape[2] == 1 else range(block.shape[2])
            index = {number: i for i, number in enumerate(numbers)}
            order = torch.arange(start, start + block.shape[1], device=device)[None]
            valid = order < self.lengths.to(device)[:, None]
            yield {k: block[:, :, index[k]] for k in wanted}, None if bool(valid.all()) else valid

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        manifest = {
            "rate": self.rate,
            "segment_length": self.segment_length,
            "fingerprint": self.fingerprint,
            "pieces": [piece.as_dict() for piece in self.pieces],
        }
        tensors = {"states": self.states, "lengths": self.lengths}
        fileformat.write(Path(path), "vectors", manifest, {k: fileformat.lazy(t) for k, t in tensors.items()})

    @classmethod
    def load(cls, path: str | Path, device: Any = None) -> CompressedVectors:
        """Read a file that :meth:`save` wrote, checking every byte.

        Raises:
            FileError: it cannot be read. ContextError: it is damaged, of a newer format or something else.
        """
        file = container.read(Path(path), "vectors", verify="full")
        manifest, tensors = file.manifest, fileformat.tensors_of(file)
        try:
            states, lengths, pieces = tensors["states"], tensors["lengths"], tuple(pieces_from(manifest["pieces"]))
            rate, segment, fingerprint = (manifest[name] for name in ("rate", "segment_length", "fingerprint"))
            if type(rate) is not int or type(segment) is not int or not isinstance(fingerprint, str):
                raise TypeError("settings of the wrong kind")
            if states.ndim != 4 or not states.is_floating_point():
                raise ValueError("its states have another shape")
            if lengths.dtype != torch.int64 or lengths.tolist() != [piece.positions for piece in pieces]:
                raise ValueError("its lengths are not those of its pieces")
            if states.shape[:2] != (len(pieces), max(piece.positions for piece in pieces)):
                raise ValueError("its states are not those of its pieces")
            return cls(states.clone().to(device), lengths.clone().to(device), rate, segment, pieces, fingerprint)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ContextError(f"{path} is damaged: its description is not whole ({error}).") from None
