"""The KV cache that a context lives in: blocks with spare room, shared by the contexts that grew from one another."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .eight_bits import EightBitLayers, EightBits

SPARE = 512
"""Positions kept free after a prefix, for a question and its answer."""


class BlockLayer(DynamicLayer):
    """One layer of a KV cache that writes into spare capacity instead of concatenating.

    `DynamicLayer` would copy the whole prefix for every token; this one copies it only when the block is full.

    Attributes:
        visible: [B, KV heads, n] bool, which of the first n positions each head sees; None: all. It says so only: the
            decoder must look at it, see :func:`rcc.model.selection.heads.hide_gaps`.
    """

    visible: Tensor | None = None

    def __init__(self, capacity: int, keys: Tensor | None = None, values: Tensor | None = None, length: int = 0):
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, length
        if keys is not None and values is not None:
            self._hold(keys, values)

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.block = (keys, values)  # [B, KV heads, capacity, head dim] each
        self.capacity = keys.shape[-2]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (b[:, :, : self.length] for b in self.block)

    @property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions so far, [B, KV heads, n, head dim] each: views."""
        return cast("tuple[Tensor, Tensor]", (self.keys, self.values))  # DynamicLayer's are None while it is empty

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, KV heads, T, head dim] each, and return all of them so far."""
        end = self.length + key_states.shape[-2]
        if not self.is_initialized or end > self.capacity:
            size = max(self.capacity, end + (SPARE if self.length else 0))
            grown = [k.new_empty(*k.shape[:2], size, k.shape[-1]) for k in (key_states, value_states)]
            if self.length:
                for new, old in zip(grown, self.block, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            self._hold(*grown)
        for block, new in zip(self.block, (key_states, value_states), strict=True):
            block[:, :, self.length : end] = new
        self.length = end
        self._show()
        return self.entries

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._hold(*map(change, self.block))
        if self.visible is not None:
            self.visible = change(self.visible)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search, spare capacity included."""
        self._map(lambda block: block.index_select(0, beam_idx.to(block.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, spare capacity included."""
        self._map(lambda block: block.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows of these indices."""
        self._map(lambda block: block[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` positions; their memory becomes spare."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of positions to remove, not {tokens_to_remove}.")
        if self.is_initialized:
            self.resize(max(0, self.length + tokens_to_remove))

    def resize(self, length: int) -> None:
        """Hold so many positions, whatever was written there; the rest of the block is spare."""
        self.length = length
        self._show()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.is_initialized = False


def new_cache(layers: int, capacity: int) -> Cache:
    """Return an empty cache with room for `capacity` positions in each layer."""
    return Cache(layers=[BlockLayer(capacity) for _ in range(layers)])


def block_layers(cache: Cache) -> list[BlockLayer]:
    """Return the layers of a cache that :func:`new_cache` or a :class:`KVBlocks` made."""
    return cast("list[BlockLayer]", cache.layers)


class KVBlocks:
    """Keys and values of every layer, shared by the contexts that grew from one another.

    Args:
        layers: keys and values, [B, KV heads, capacity, head dim] each.
        used: positions that a context calls its own; what comes after them is free.
        writable: whether what is free may be written to: not in a mapped file, nor in rows that share memory.
        release: lets go of the memory of what is mapped from a file.
        visible: of each layer, as a :class:`BlockLayer` has it.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        used: int,
        writable: bool,
        release: Callable[[], None] | None = None,
        visible: Sequence[Tensor] | None = None,
    ):
        self.layers, self.used, self.writable, self._release = layers, used, writable, release
        self.visible = visible
        self.lock = threading.Lock()

    @classmethod
    def of(cls, cache: Cache) -> KVBlocks:
        """Return the blocks of a cache of :class:`BlockLayer`, which go on belonging to it."""
        return cls([layer.block for layer in block_layers(cache)], cache.get_seq_length(), writable=True)

    def release(self) -> None:
        """Let go of the memory of what is mapped from a file, until it is used again."""
        if self._release is not None:
            self._release()

    def with_layers(self, layers: Sequence[tuple[Tensor, Tensor]], length: int) -> KVBlocks:
        """Return blocks of views of these, not to be written to."""
        return KVBlocks(layers, length, False, self._release, self.visible)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: the tensors; not the lock, nor a file's mapping."""
        return {"layers": self.layers, "used": self.used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        writable = not isinstance(state["layers"], EightBitLayers)
        self.__init__(state["layers"], state["used"], writable)  # type: ignore[misc]

    @property
    def eight_bits(self) -> bool:
        """Whether they are at rest in 8 bits: :attr:`layers` then makes ordinary tensors of a layer at a time."""
        return isinstance(self.layers, EightBitLayers)

    @property
    def like(self) -> Tensor:
        """A tensor of the precision that they are used in, on their device."""
        if isinstance(self.layers, EightBitLayers):
            return self.layers.layers[0][0].steps
        return self.layers[0][0]

    @property
    def capacity(self) -> int:
        """Positions that there is memory for."""
        if isinstance(self.layers, EightBitLayers):
            return self.layers.layers[0][0].numbers.shape[-2]
        return self.layers[0][0].shape[-2]

    def nbytes(self, length: int) -> int:
        """Return the bytes of the first positions' keys and values."""
        if isinstance(self.layers, EightBitLayers):
            return self.layers.nbytes
        return sum(t.numel() // t.shape[-2] * length * t.element_size() for layer in self.layers for t in layer)

    def in_eight_bits(self, length: int, device: Any = None) -> KVBlocks:
        """Return the first positions in 8 bits, made a layer at a time.

        Args:
            length: positions to take.
            device: of the result; None: where they are.
        """
        if isinstance(self.layers, EightBitLayers):
            return KVBlocks(self.layers.map(lambda tensor: tensor.to(device)), length, False, self._release)
        layers = []
        for pair in self.layers:
            keys, values = (EightBits.of(block[:, :, :length]).map(lambda tensor: tensor.to(device)) for block in pair)
            layers.append((keys, values))
            self.release()
        return KVBlocks(EightBitLayers(layers), length, writable=False)

    def copies(
        self, length: int, extra: int, device: Any = None, dtype: torch.dtype | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Copy the first positions of all layers, with room for more.

        Of what is mapped from a file, no more than one layer is in memory beside its copy.

        Args:
            length: positions to copy.
            extra: more positions to have capacity for.
            device: of the copies; None: as these.
            dtype: likewise.
        """

        def copy(block: Tensor) -> Tensor:
            like: dict[str, Any] = {"device": device or block.device, "dtype": dtype or block.dtype}
            new = torch.empty(*block.shape[:2], length + extra, block.shape[-1], **like)
            new[:, :, :length] = block[:, :, :length]
            return new

        layers = []
        for keys, values in self.layers:
            layers.append((copy(keys), copy(values)))
            self.release()
        return layers

    @contextlib.contextmanager
    def borrow(self, length: int, extra: int, spare: int) -> Iterator[Cache]:
        """Yield a cache of the first `length` positions with room for `extra` more; see `CompressedContext.borrow`."""
        free = self.writable and length + extra <= self.capacity
        if free and self.used == length and self.lock.acquire(blocking=False):
            try:
                # an append may have finished between the check and the lock
                yield self.cache(length) if self.used == length else self.cache(length, extra + spare)
            finally:
                self.lock.release()
        else:
            yield self.cache(length, extra + spare)

    def cache(self, length: int, extra: int | None = None) -> Cache:
        """Return a cache of the first `length` positions: in these blocks, or in a copy with room for `extra` more."""
        layers = self.layers if extra is None else self.copies(length, extra)
        cache = Cache(layers=[BlockLayer(0, keys, values, length) for keys, values in layers])
        if self.visible is not None:
            for layer, visible in zip(block_layers(cache), self.visible, strict=True):
                layer.visible = visible.expand(len(layer.block[0]), -1, -1)
        return cache
