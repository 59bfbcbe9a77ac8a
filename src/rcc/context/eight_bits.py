"""Keys and values in 8 bits: half the bytes of bfloat16 at rest, ordinary ones again when they are used.

A value is a whole number of steps. A step belongs to a channel of a head and to 64 positions in a row: of the groupings
tried, that one loses least for keys and for values alike, 0.2 to 0.7 % of their size (docs/results.md). A context in 8
bits costs a token of an answer nothing: what a model reads is made of it once, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .manifest import GROUP


def to_steps(values: Tensor, dimension: int, least: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round values to whole steps, of which the largest value has 127.

    Args:
        values: of any shape, in float32.
        dimension: along which values share a step.
        least: the smallest step.
        dtype: precision of the steps.

    Returns:
        The numbers of steps, int8 in the values' shape, and the steps, 1 long in that dimension.
    """
    steps = (values.abs().amax(dimension, keepdim=True) / 127).clamp(min=least).to(dtype)
    return (values / steps.float()).round().clamp(-127, 127).to(torch.int8), steps


@dataclass(frozen=True)
class EightBits:
    """Keys, or values, of a layer.

    Attributes:
        numbers: int8 [B, KV heads, n, head dim].
        steps: [B, KV heads, ceil(n / 64), head dim], in the precision that :meth:`values` gives.
    """

    numbers: Tensor
    steps: Tensor

    @classmethod
    def of(cls, values: Tensor) -> EightBits:
        """Round values [B, KV heads, n, head dim] to whole steps."""
        n = values.shape[2]
        groups = -(-n // GROUP)
        padded = torch.nn.functional.pad(values.float(), (0, 0, 0, groups * GROUP - n)).unflatten(2, (groups, GROUP))
        numbers, steps = to_steps(padded, 3, torch.finfo(values.dtype).tiny, values.dtype)
        return cls(numbers.flatten(2, 3)[:, :, :n].contiguous(), steps.squeeze(3))

    def values(self) -> Tensor:
        """Return the values, [B, KV heads, n, head dim]."""
        steps = self.steps.repeat_interleave(GROUP, 2)[:, :, : self.numbers.shape[2]]
        return steps * self.numbers

    def map(self, change: Callable[[Tensor], Tensor]) -> EightBits:
        """Return what a function makes of both tensors."""
        return EightBits(change(self.numbers), change(self.steps))

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.numbers.nbytes + self.steps.nbytes


class EightBitLayers(Sequence[tuple[Tensor, Tensor]]):
    """Keys and values of every layer, which become ordinary ones when a layer is asked for.

    Args:
        layers: keys and values of each.
    """

    def __init__(self, layers: Sequence[tuple[EightBits, EightBits]]):
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # a slice is nobody's need
        keys, values = self.layers[i]
        return keys.values(), values.values()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self.layers)))

    def map(self, change: Callable[[Tensor], Tensor]) -> EightBitLayers:
        """Return what a function makes of all tensors."""
        return EightBitLayers([(keys.map(change), values.map(change)) for keys, values in self.layers])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(part.nbytes for layer in self.layers for part in layer)
