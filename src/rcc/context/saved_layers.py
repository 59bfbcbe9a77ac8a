"""A context's keys and values ↔ the tensors of its file."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .container import Container
from .eight_bits import EightBitLayers, EightBits
from .file import Lazy, lazy, tensors_of
from .manifest import NAMES, STEPS, Manifest


def layers_to_save(layers: Sequence[tuple[Tensor, Tensor]], length: int) -> dict[str, Lazy]:
    """Return what a file holds of a context's layers, by name.

    Args:
        layers: keys and values [1, KV heads, capacity, head dim].
        length: positions that count.
    """
    tensors = {}
    if isinstance(layers, EightBitLayers):
        for i, pair in enumerate(layers.layers):
            for name, part in zip(NAMES, pair, strict=True):
                tensors[f"{name}.{i}"] = lazy(part.numbers)
                tensors[f"{name}.{i}{STEPS}"] = lazy(part.steps)
        return tensors
    for i, layer in enumerate(layers):
        for name, block in zip(NAMES, layer, strict=True):
            tensors[f"{name}.{i}"] = lazy(block[:, :, :length])
    return tensors


def saved_layers(container: Container, manifest: Manifest) -> Sequence[tuple[Tensor, Tensor]]:
    """Return keys and values [1, KV heads, n, head dim] of each layer of a file, mapped."""
    tensors = tensors_of(container)
    blocks = [tensors[name] for name in manifest.names]
    if not manifest.eight_bits:
        return list(zip(blocks[::2], blocks[1::2], strict=True))
    parts = [EightBits(tensors[name], tensors[f"{name}{STEPS}"]) for name in manifest.names]
    return EightBitLayers(list(zip(parts[::2], parts[1::2], strict=True)))
