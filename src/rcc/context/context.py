"""CompressedContext: a KV cache prefix and what made it. It can be appended to, batched, saved, loaded and checked."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import ContextError, InputError
from ..model.encoder import Piece, pieces_from
from . import file as fileformat
from . import joining

if TYPE_CHECKING:
    from ..model.rcc import RCCForCausalLM

SPARE = 512
"""Positions kept free behind a prefix, for a question and its answer."""


class BlockLayer(DynamicLayer):
    """One layer of a KV cache that writes into spare capacity instead of concatenating.

    `DynamicLayer` would copy the whole prefix for every token; this one copies it only when the block is full.
    """

    def __init__(self, capacity: int, keys: Tensor | None = None, values: Tensor | None = None, length: int = 0):
        super().__init__()
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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, KV heads, T, head dim] each → all keys and values so far."""
        end = self.length + key_states.shape[-2]
        if not self.is_initialized or end > self.capacity:
            size = max(self.capacity, end + (SPARE if self.length else 0))
            grown = [k.new_empty(*k.shape[:2], size, k.shape[-1]) for k in (key_states, value_states)]
            if self.length:
                for new, old in zip(grown, (self.keys, self.values), strict=True):
                    new[:, :, : self.length] = old
            self._hold(*grown)
        for block, new in zip(self.block, (key_states, value_states), strict=True):
            block[:, :, self.length : end] = new
        self.length = end
        self._show()
        return self.keys, self.values

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._hold(*map(change, self.block))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search, spare capacity included."""
        self._map(lambda block: block.index_select(0, beam_idx.to(block.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, spare capacity included."""
        self._map(lambda block: block.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._map(lambda block: block[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` positions; their memory becomes spare."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of positions to remove, not {tokens_to_remove}.")
        if self.is_initialized:
            self.length = max(0, self.length + tokens_to_remove)
            self._show()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.is_initialized = False


class KVBlocks:
    """Keys and values of every layer, [B, KV heads, capacity, head dim], shared by the contexts that grew from
    one another. `used` counts the positions that some context calls its own; what lies behind is free. `release`
    lets go of the memory of what is mapped from a file, until it is used again."""

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Tensor]],
        used: int,
        writable: bool,
        release: Callable[[], None] | None = None,
    ):
        self.layers, self.used, self.writable, self._release = layers, used, writable, release
        self.lock = threading.Lock()

    def release(self) -> None:
        """Let go of the memory of what is mapped from a file, until it is used again."""
        if self._release is not None:
            self._release()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: the tensors; not the lock, nor a file's mapping."""
        return {"layers": self.layers, "used": self.used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layers"], state["used"], writable=True)  # type: ignore[misc]

    @property
    def capacity(self) -> int:
        return self.layers[0][0].shape[-2]


@dataclass(frozen=True, eq=False)
class CompressedContext:
    """One or several compressed texts: the decoder's KV cache after the prefix pass, as a value.

    Attributes:
        pieces: for each text of the batch, what was read: a piece for the first text and one for each append.
        fingerprint: of the model (configuration and weights) that made it.
        model_name: that model's name.
        segment_length: tokens a segment.
        mask: [B, n] bool, False where a shorter text of the batch has a gap; None without gaps.
        versions: of the libraries that made it.
        rotated: whether the keys are rotated to their positions. Those of a direct prefix are not, and have no sink at
            the front: the model's `place` makes the decoder's cache of them.
        repeats: the context of one text that this one holds several times (:meth:`expand`).
        placed: the decoder's cache that the model made of this context, for the next question.
    """

    blocks: KVBlocks
    length: int
    pieces: tuple[tuple[Piece, ...], ...]
    fingerprint: str
    model_name: str
    segment_length: int
    versions: dict[str, str]
    mask: Tensor | None = None
    rotated: bool = True
    repeats: CompressedContext | None = field(default=None, init=False)
    placed: CompressedContext | None = field(default=None, init=False)

    # ---------------------------------------------------------------- a value
    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: its own positions of the blocks, which it shares with no other context; and not the
        cache that a model has made of it."""
        layers = [(k.clone(), v.clone()) for k, v in (self.layer(i) for i in range(len(self.blocks.layers)))]
        self.blocks.release()
        state = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("repeats", "placed")}
        return {**state, "blocks": KVBlocks(layers, self.length, writable=True)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {"repeats": None, "placed": None, **state}.items():
            object.__setattr__(self, name, value)

    # ---------------------------------------------------------------- what it is
    def __len__(self) -> int:
        """Prefix positions, gaps included."""
        return self.length

    @property
    def batch_size(self) -> int:
        """Number of texts."""
        return len(self.pieces)

    @property
    def lengths(self) -> list[int]:
        """Prefix positions of each text, without gaps."""
        return [sum(piece.positions for piece in row) for row in self.pieces]

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.layers[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self.blocks.layers[0][0].device

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, spare capacity not counted."""
        return sum(2 * t[0].numel() // t[0].shape[-2] * len(self) * t[0].element_size() for t in self.blocks.layers)

    @property
    def rate(self) -> int | list[int]:
        """The compression rate, or all of them in ascending order if pieces differ."""
        rates = sorted({piece.rate for row in self.pieces for piece in row})
        return rates[0] if len(rates) == 1 else rates

    @property
    def source_tokens(self) -> int:
        """Tokens read, all texts together."""
        return sum(piece.tokens for row in self.pieces for piece in row)

    @property
    def source_sha256(self) -> list[str]:
        """A digest of each text: of its token ids, or, after an append, of its pieces' digests in order."""
        return [
            row[0].sha256
            if len(row) == 1
            else hashlib.sha256("".join(piece.sha256 for piece in row).encode()).hexdigest()
            for row in self.pieces
        ]

    def __repr__(self) -> str:
        texts = "" if self.batch_size == 1 else f"{self.batch_size} texts, "
        rate = "/".join(f"{r}×" for r in (self.rate if isinstance(self.rate, list) else [self.rate]))
        return (
            f"<CompressedContext: {texts}{self.source_tokens:,} tokens at {rate} in {sum(self.lengths):,} positions,"
            f" {self.nbytes / 1e6:.1f} MB {str(self.dtype).removeprefix('torch.')} on {self.device},"
            f" made by {self.model_name} ({self.fingerprint[:12]})>"
        )

    def info(self) -> dict[str, Any]:
        """What `rcc inspect --json` prints of a context of one text."""
        return {
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "source_tokens": self.source_tokens,
            "source_sha256": self.source_sha256[0],
            "rate": self.rate,
            "segment_length": self.segment_length,
            "positions": len(self),
            "bytes": self.nbytes,
            "bytes_per_position": self.nbytes // len(self),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": len(self.blocks.layers),
            "pieces": [{k: v for k, v in vars(piece).items() if k != "opening"} for piece in self.pieces[0]],
            "versions": self.versions,
        }

    # ---------------------------------------------------------------- its keys and values
    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of layer i, [B, KV heads, n, head dim] each: views, not to be written to."""
        keys, values = self.blocks.layers[i]
        return keys[:, :, : self.length], values[:, :, : self.length]

    @contextlib.contextmanager
    def borrow(self, extra: int, spare: int = 0) -> Iterator[Cache]:
        """A transformers cache that starts as this context and has room for `extra` more positions.

        It writes into the spare capacity behind the prefix where that is free, and into a copy where it is not
        (another thread is writing there, a longer context shares the memory, it is a mapped file, or rows were
        expanded), which then has room for `spare` more. The cache must not be used after the `with` block.
        """
        blocks = self.blocks
        free = self.length + extra <= blocks.capacity and blocks.writable
        if free and blocks.used == self.length and blocks.lock.acquire(blocking=False):
            try:
                # an append may have finished between the check and the lock
                yield self._cache(blocks.layers) if blocks.used == self.length else self._copy(extra + spare)
            finally:
                blocks.lock.release()
        else:
            yield self._copy(extra + spare)

    @contextlib.contextmanager
    def lend(self, extra: int) -> Iterator[Cache]:
        """As :meth:`borrow`, a cache of its own, which may be used after the `with` block."""
        yield self._copy(extra)

    def _cache(self, layers: Sequence[tuple[Tensor, Tensor]]) -> Cache:
        return Cache(layers=[BlockLayer(0, keys, values, self.length) for keys, values in layers])

    def _copy(self, extra: int) -> Cache:
        return self._cache(self._rooms(extra))

    def _rooms(self, extra: int, device: Any = None, dtype: torch.dtype | None = None) -> list[tuple[Tensor, Tensor]]:
        """Copies of all keys and values with capacity for `extra` more positions, one layer after the other: of what
        is mapped from a file, no more than one layer is in memory beside its copy."""
        layers = []
        for i in range(len(self.blocks.layers)):
            layers.append(_room(*self.layer(i), extra, device, dtype))
            self.blocks.release()
        return layers

    def grown(self, cache: Cache, pieces: tuple[tuple[Piece, ...], ...], mask: Tensor | None) -> CompressedContext:
        """The longer context that `cache` has become since :meth:`borrow`: shares memory with this one where it can."""
        length = cache.get_seq_length()
        layers = [layer.block for layer in cache.layers]
        blocks = self.blocks
        if layers[0][0] is blocks.layers[0][0]:
            blocks.used = length
        else:
            blocks = KVBlocks(layers, length, writable=True)
        return replace(self, blocks=blocks, length=length, pieces=pieces, mask=mask)

    # ---------------------------------------------------------------- other forms of it
    @property
    def segments(self) -> tuple[joining.Segment, ...]:
        """The parts of this context that were read on their own; see :func:`rcc.context.joining.segments`."""
        return joining.segments(self)

    def select(self, segments: Sequence[int]) -> CompressedContext:
        """Some of the segments, in any order; see :func:`rcc.context.joining.select`."""
        return joining.select(self, segments)

    @classmethod
    def join(cls, contexts: Sequence[CompressedContext]) -> CompressedContext:
        """Several contexts of a direct prefix as one, in that order; see :func:`rcc.context.joining.join`."""
        return joining.join(contexts)

    def keep_placed(self, blocks: KVBlocks, length: int, mask: Tensor | None) -> None:
        """Keep the decoder's cache that a model has made of this context, to be found in `placed`."""
        placed = replace(self, blocks=blocks, length=length, mask=mask, rotated=True)
        object.__setattr__(self, "placed", placed)  # as computed from the value, not a part of it

    def expand(self, n: int) -> CompressedContext:
        """The one text of this context n times over, for n questions in one batch; shares memory until it is used.

        Raises:
            InputError: it holds more than one text.
        """
        if self.batch_size != 1:
            raise InputError(f"expand needs a context of one text, this one holds {self.batch_size}: take context[i].")
        if n < 1:
            raise InputError(f"n must be at least 1, not {n!r}.")
        layers = [(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in self.blocks.layers]
        mask = None if self.mask is None else self.mask.expand(n, -1)
        blocks = KVBlocks(layers, self.length, False, self.blocks.release)
        expanded = replace(self, blocks=blocks, pieces=self.pieces * n, mask=mask)
        object.__setattr__(expanded, "repeats", self)
        return expanded

    def __getitem__(self, i: int) -> CompressedContext:
        """Text i on its own, without the gaps that a batch gives it; copies it out where there are some."""
        if not -self.batch_size <= i < self.batch_size:
            raise IndexError(i)
        i %= self.batch_size
        layers = [(k[i : i + 1], v[i : i + 1]) for k, v in self.blocks.layers]
        length = self.length
        if self.mask is not None and not bool(self.mask[i].all()):
            keep = self.mask[i].nonzero()[:, 0]
            layers = [(k[:, :, keep], v[:, :, keep]) for k, v in layers]
            length = len(keep)
        blocks = KVBlocks(layers, length, False, self.blocks.release)
        return replace(self, blocks=blocks, length=length, pieces=(self.pieces[i],), mask=None)

    @classmethod
    def stack(cls, contexts: Sequence[CompressedContext]) -> CompressedContext:
        """Several contexts of the same model as one batch; gaps stand before the shorter ones.

        Raises:
            InputError: there are none. ContextError: different models made them.
        """
        if not contexts:
            raise InputError("contexts is empty: give at least one.")
        first = contexts[0]
        cls.check_one_model(contexts, "stacked")
        length = max(map(len, contexts))

        def fill(tensors: Sequence[Tensor]) -> Tensor:
            rows = [torch.nn.functional.pad(t, (0, 0, length - t.shape[2], 0)) for t in tensors]
            return torch.cat([row.to(first.device, first.dtype) for row in rows])

        layers = []
        for i in range(len(first.blocks.layers)):
            keys, values = zip(*(c.layer(i) for c in contexts), strict=True)
            layers.append((fill(keys), fill(values)))
        masks = [
            torch.nn.functional.pad(c._mask().to(first.device), (length - len(c), 0), value=False) for c in contexts
        ]
        mask = torch.cat(masks)
        pieces = tuple(row for c in contexts for row in c.pieces)
        blocks = KVBlocks(layers, length, writable=True)
        return replace(first, blocks=blocks, length=length, pieces=pieces, mask=None if bool(mask.all()) else mask)

    @staticmethod
    def check_one_model(contexts: Sequence[CompressedContext], what: str) -> None:
        """Raise ContextError unless one model made all of them."""
        names = {c.fingerprint: c.model_name for c in contexts}
        if len(names) > 1:
            made = " and ".join(f"{name} ({fingerprint[:12]})" for fingerprint, name in list(names.items())[:2])
            raise ContextError(f"contexts of different models, {made}, cannot be {what}: use those of one model.")

    def _mask(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.batch_size, len(self), dtype=torch.bool, device=self.device)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> CompressedContext:
        """The same context elsewhere or in another precision; itself where nothing changes."""
        device = self.device if device is None else torch.device(device)
        dtype = dtype or self.dtype
        if (device, dtype) == (self.device, self.dtype):
            return self
        layers = self._rooms(SPARE, device, dtype)
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, blocks=KVBlocks(layers, self.length, writable=True), mask=mask)

    # ---------------------------------------------------------------- its file
    def save(self, path: str | Path, replace: bool = True, private: bool = False) -> None:
        """Write a context of one text to a file, whole or not at all.

        Args:
            replace: whether an existing file is replaced; it passes on its mode and, where permitted, its owner.
            private: a new file is for its owner alone.

        Raises:
            InputError: it holds several texts. ExistsError: the file exists, and is not to be replaced.
            FileError: the file cannot be written.
        """
        if self.batch_size != 1:
            raise InputError(f"save needs a context of one text, this one holds {self.batch_size}: save context[i].")
        one = self[0] if self.mask is not None else self
        manifest = {
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "segment_length": self.segment_length,
            "layers": len(self.blocks.layers),
            "pieces": [vars(piece) for piece in self.pieces[0]],
            "versions": self.versions,
            **({} if self.rotated else {"rotated": False}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        tensors = {}
        for i in range(len(one.blocks.layers)):
            for name, tensor in zip(("keys", "values"), one.layer(i), strict=True):
                tensors[f"{name}.{i}"] = fileformat.lazy(tensor)
        fileformat.write(Path(path), "context", manifest, tensors, replace, private)

    @classmethod
    def load(
        cls, path: str | Path, model: RCCForCausalLM | None = None, verify: str = "full", device: Any = None
    ) -> CompressedContext:
        """Read a context file.

        Args:
            model: refuse the context unless this model made it, and put it on its device and in its precision.
            verify: `"full"` checks every byte and reads it into memory; `"header"` checks the manifest, the sizes
                and the model, and maps the rest, which is then read when it is used.
            device: where to put it; the model's by default, else the CPU.

        Raises:
            FileError: the file cannot be read.
            ContextError: it is damaged, truncated, of a newer format, not a context, or made by another model.
        """
        manifest, tensors, release = fileformat.read(Path(path), "context", verify)
        try:
            pieces = tuple(pieces_from(manifest["pieces"]))
            fingerprint, name = manifest["fingerprint"], manifest["model"]
            if not isinstance(fingerprint, str) or not isinstance(name, str):
                raise TypeError("names that are no text")
            layers = [(tensors.pop(f"keys.{i}"), tensors.pop(f"values.{i}")) for i in range(manifest["layers"])]
            versions, segment_length = dict(manifest["versions"]), int(manifest["segment_length"])
            rotated = manifest.get("rotated", True)
            if not isinstance(rotated, bool):
                raise TypeError("rotated is neither true nor false")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ContextError(f"{path} is damaged: its manifest is not whole ({error}).") from None
        length = sum(piece.positions for piece in pieces)
        like = layers[0][0] if layers else torch.empty(0)
        alike = all(t.shape == like.shape and t.dtype == like.dtype for layer in layers for t in layer)
        sized = like.ndim == 4 and like.is_floating_point() and (like.shape[0], like.shape[2]) == (1, length)
        if tensors or not alike or not sized:
            raise ContextError(f"{path} is damaged: its tensors are not the keys and values of {length} positions.")
        if model is not None:
            model.check_fingerprint(fingerprint, name, str(path))
        blocks = KVBlocks(layers, length, False, release)
        context = cls(blocks, length, (pieces,), fingerprint, name, segment_length, versions, rotated=rotated)
        target = device if device is not None or model is None else model.device
        moved = context.to(target, None if model is None else model.dtype)
        if moved is context and verify == "full":
            moved = replace(context, blocks=KVBlocks(context._rooms(SPARE), length, writable=True))
        return moved


def _room(
    keys: Tensor, values: Tensor, extra: int, device: Any = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Copies of keys and values [B, KV heads, n, head dim] with capacity for `extra` more positions."""

    def copy(tensor: Tensor) -> Tensor:
        n = tensor.shape[-2]
        new = torch.empty(
            *tensor.shape[:2], n + extra, tensor.shape[-1], device=device or tensor.device, dtype=dtype or tensor.dtype
        )
        new[:, :, :n] = tensor
        return new

    return copy(keys), copy(values)
