"""CompressedContext: a KV cache prefix and what made it. It can be appended to, batched, saved, loaded and checked."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..errors import ContextError, InputError
from ..runtime.precision import kept_dtype
from . import container, information, joining
from . import file as fileformat
from .cache import SPARE, KVBlocks
from .manifest import Manifest
from .pieces import Piece, rate_of, rate_text, sha256_of
from .saved_layers import layers_to_save, saved_layers

if TYPE_CHECKING:
    from ..model.compressor import Compressor

_DERIVED = ("repeats", "decoder_cache")
"""Attributes that a copy does without."""


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
            the front: the model's `as_cache` makes the decoder's cache of them.
        compressor: how it was made, where that was not by an RCC model: "selection, rule repeat".
        repeats: the context of one text that this one holds several times (:meth:`expand`).
        decoder_cache: the decoder's cache that the model made of this context, for the next question.
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
    compressor: str = ""
    repeats: CompressedContext | None = field(default=None, init=False)
    decoder_cache: CompressedContext | None = field(default=None, init=False)

    # ---------------------------------------------------------------- a value
    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: this context's positions alone, and no cache that a model has made of it."""
        state = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _DERIVED}
        if self.blocks.eight_bits:
            return state
        layers = [(k.clone(), v.clone()) for k, v in (self.layer(i) for i in range(len(self.blocks.layers)))]
        self.blocks.release()
        return {**state, "blocks": KVBlocks(layers, self.length, writable=True)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in {**dict.fromkeys(_DERIVED), **state}.items():
            object.__setattr__(self, name, value)

    # ---------------------------------------------------------------- what it is
    def __len__(self) -> int:
        """Return the prefix positions, gaps included."""
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
        """Precision of its keys and values; `torch.int8` where they are in 8 bits."""
        return torch.int8 if self.blocks.eight_bits else self.blocks.like.dtype

    @property
    def device(self) -> torch.device:
        """Where its keys and values are."""
        return self.blocks.like.device

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, spare capacity not counted."""
        return self.blocks.nbytes(len(self))

    @property
    def rate(self) -> int | list[int]:
        """The compression rate, or all of them in ascending order if pieces differ."""
        return rate_of(piece for row in self.pieces for piece in row)

    @property
    def source_tokens(self) -> int:
        """Tokens read, all texts together."""
        return sum(piece.tokens for row in self.pieces for piece in row)

    @property
    def source_sha256(self) -> list[str]:
        """A digest of each text: of its token ids, or, after an append, of its pieces' digests in order."""
        return [sha256_of(row) for row in self.pieces]

    def __repr__(self) -> str:
        texts = "" if self.batch_size == 1 else f"{self.batch_size} texts, "
        return (
            f"<CompressedContext: {texts}{self.source_tokens:,} tokens at {rate_text(self.rate)}"
            f" in {sum(self.lengths):,} positions, {self.nbytes / 1e6:.1f} MB"
            f" {str(self.dtype).removeprefix('torch.')} on {self.device},"
            f" made by {self.model_name} ({self.fingerprint[:12]})>"
        )

    def info(self) -> dict[str, Any]:
        """Return what `rcc inspect --json` prints of a context of one text."""
        return information.as_json(self._manifest(), self.nbytes, str(self.dtype).removeprefix("torch."))

    def _manifest(self) -> Manifest:
        """Return what a file says of a context of one text."""
        return Manifest(
            self.model_name,
            self.fingerprint,
            self.segment_length,
            len(self.blocks.layers),
            self.pieces[0],
            self.versions,
            self.rotated,
            self.blocks.eight_bits,
            self.compressor,
        )

    # ---------------------------------------------------------------- its keys and values
    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of layer i, [B, KV heads, n, head dim] each: views, not to be written to."""
        keys, values = self.blocks.layers[i]
        return keys[:, :, : self.length], values[:, :, : self.length]

    @contextlib.contextmanager
    def borrow(self, extra: int, spare: int = 0) -> Iterator[Cache]:
        """Yield a transformers cache that starts as this context and has room for `extra` more positions.

        It writes into the spare capacity after the prefix where that is free, and into a copy where it is not
        (another thread is writing there, a longer context shares the memory, it is a mapped file, or rows were
        expanded), which then has room for `spare` more. The cache must not be used after the `with` block.
        """
        with self.blocks.borrow(self.length, extra, spare) as cache:
            yield cache

    @contextlib.contextmanager
    def lend(self, extra: int) -> Iterator[Cache]:
        """Yield a cache as :meth:`borrow` does, but one of its own, which may be used after the `with` block."""
        yield self.blocks.cache(self.length, extra)

    def grown(self, cache: Cache, pieces: tuple[tuple[Piece, ...], ...], mask: Tensor | None) -> CompressedContext:
        """Return the longer context that a cache from :meth:`borrow` has become; it shares memory where it can."""
        blocks = KVBlocks.of(cache)
        if self.blocks.writable and blocks.layers[0][0] is self.blocks.layers[0][0]:
            self.blocks.used, blocks = blocks.used, self.blocks
        return replace(self, blocks=blocks, length=cache.get_seq_length(), pieces=pieces, mask=mask)

    def keep_decoder_cache(self, blocks: KVBlocks, length: int, mask: Tensor | None) -> CompressedContext:
        """Keep, and return, the decoder's cache that a model has made of this context."""
        cache = replace(self, blocks=blocks, length=length, mask=mask, rotated=True)
        object.__setattr__(self, "decoder_cache", cache)  # as computed from the value, not a part of it
        return cache

    # ---------------------------------------------------------------- its segments (a direct prefix)
    @property
    def segments(self) -> tuple[joining.Segment, ...]:
        """The segments of a context of one text, in order: its parts that were read on their own.

        Raises:
            InputError: it holds several texts. ContextError: its segments depend on one another.
        """
        joining.check_independent(self, "cut")
        # chunks of a selection are read after what was kept before: a text is one
        return joining.segments_of(self.pieces[0], None if self.compressor else self.segment_length)

    def select(self, segments: Sequence[int]) -> CompressedContext:
        """Return a context of chosen segments of this one, in any order.

        Args:
            segments: numbers of segments, from 0.

        Raises:
            InputError: no number, one that there is not, or a context of several texts.
            ContextError: its segments depend on one another.
        """
        own = self.segments
        chosen = joining.choose(own, segments)
        index = torch.cat([torch.arange(segment.start, segment.stop) for segment in chosen])
        return replace(_positions(self, index), pieces=(joining.pieces_of(chosen, own, self.pieces[0]),))

    def take(self, index: Tensor) -> CompressedContext:
        """Return a context of chosen positions of this one, in any order; its pieces stay these.

        Args:
            index: [n], numbers of positions.

        Raises:
            InputError: it holds several texts. ContextError: its positions, or pairs, depend on one another.
        """
        joining.check_independent(self, "cut")
        joining.check_even(self.pieces[0])
        return _positions(self, index)

    @classmethod
    def join(cls, contexts: Sequence[CompressedContext]) -> CompressedContext:
        """Return several contexts of a direct prefix as one, in that order; device and precision are the first's.

        Raises:
            InputError: there are none, or one holds several texts.
            ContextError: different models made them, or their segments depend on one another.
        """
        if not contexts:
            raise InputError("contexts is empty: give at least one.")
        for context in contexts:
            joining.check_independent(context, "joined")
        _check_one_model(contexts, "joined")
        first = contexts[0]
        blocks = joining.concatenate([(c.blocks, c.length) for c in contexts], first.device, first.blocks.like.dtype)
        pieces = tuple(piece for context in contexts for piece in context.pieces[0])
        return replace(first, blocks=blocks, length=blocks.used, pieces=(pieces,), mask=None)

    # ---------------------------------------------------------------- other forms of it
    def expand(self, n: int) -> CompressedContext:
        """Return the one text of this context n times over, for n questions in one batch; it shares memory.

        Raises:
            InputError: it holds more than one text.
        """
        if self.batch_size != 1:
            raise InputError(f"expand needs a context of one text, this one holds {self.batch_size}: take context[i].")
        if n < 1:
            raise InputError(f"n must be at least 1, not {n!r}.")
        layers = [(k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in self.blocks.layers]
        mask = None if self.mask is None else self.mask.expand(n, -1)
        blocks = self.blocks.with_layers(layers, self.length)
        expanded = replace(self, blocks=blocks, pieces=self.pieces * n, mask=mask)
        object.__setattr__(expanded, "repeats", self)
        return expanded

    def __getitem__(self, i: int) -> CompressedContext:
        """Return text i on its own, without the gaps that a batch gives it; copies it out where there are some."""
        if not -self.batch_size <= i < self.batch_size:
            raise IndexError(i)
        i %= self.batch_size
        layers = [(k[i : i + 1], v[i : i + 1]) for k, v in self.blocks.layers]
        length = self.length
        if self.mask is not None and not bool(self.mask[i].all()):
            keep = self.mask[i].nonzero()[:, 0]
            layers = [(k[:, :, keep], v[:, :, keep]) for k, v in layers]
            length = len(keep)
        blocks = self.blocks.with_layers(layers, length)
        return replace(self, blocks=blocks, length=length, pieces=(self.pieces[i],), mask=None)

    @classmethod
    def stack(cls, contexts: Sequence[CompressedContext]) -> CompressedContext:
        """Return several contexts of one model as one batch; gaps stand before the shorter ones.

        Raises:
            InputError: there are none. ContextError: different models made them.
        """
        if not contexts:
            raise InputError("contexts is empty: give at least one.")
        first = contexts[0]
        _check_one_model(contexts, "stacked")
        length = max(map(len, contexts))
        blocks = joining.stack([(c.blocks, c.length) for c in contexts], length, first.device, first.blocks.like.dtype)
        pad = torch.nn.functional.pad
        mask = torch.cat([pad(c.real().to(first.device), (length - len(c), 0), value=False) for c in contexts])
        pieces = tuple(row for c in contexts for row in c.pieces)
        return replace(first, blocks=blocks, length=length, pieces=pieces, mask=None if bool(mask.all()) else mask)

    def real(self) -> Tensor:
        """Return which positions are no gaps, bool [B, n]."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.batch_size, len(self), dtype=torch.bool, device=self.device)

    def to(self, device: Any = None, dtype: torch.dtype | str | None = None) -> CompressedContext:
        """Return the same context on another device or in another precision; itself where nothing changes.

        Args:
            device: None: where it is.
            dtype: a torch dtype or its name. `"int8"` is for keeping it, in half the bytes: what is asked of it is made
                of that once more in the model's precision.

        Raises:
            InputError: an unknown precision.
        """
        device = self.device if device is None else torch.device(device)
        wanted = self.dtype if dtype is None else kept_dtype(dtype)
        if (device, wanted) == (self.device, self.dtype):
            return self
        mask = None if self.mask is None else self.mask.to(device)
        if wanted == torch.int8:
            return replace(self, blocks=self.blocks.in_eight_bits(self.length, device), mask=mask)
        layers = self.blocks.copies(self.length, SPARE, device, wanted)
        return replace(self, blocks=KVBlocks(layers, self.length, writable=True), mask=mask)

    # ---------------------------------------------------------------- its file
    def save(self, path: str | Path, replace: bool = True, private: bool = False) -> None:
        """Write a context of one text to a file, whole or not at all.

        Args:
            path: the file, `.rcc` by custom.
            replace: whether an existing file is replaced; it passes on its mode and, where permitted, its owner.
            private: a new file is for its owner alone.

        Raises:
            InputError: it holds several texts. ExistsError: the file exists, and is not to be replaced.
            FileError: the file cannot be written.
        """
        if self.batch_size != 1:
            raise InputError(f"save needs a context of one text, this one holds {self.batch_size}: save context[i].")
        one = self[0] if self.mask is not None else self
        tensors = layers_to_save(one.blocks.layers, len(one))
        fileformat.write(Path(path), "context", one._manifest().as_dict(), tensors, replace, private)

    @classmethod
    def load(
        cls, path: str | Path, model: Compressor | None = None, verify: str = "full", device: Any = None
    ) -> CompressedContext:
        """Read a context file.

        Args:
            path: a file that :meth:`save` wrote.
            model: refuse the context unless this model made it, and put it on its device and in its precision.
            verify: `"full"` checks every byte and reads it into memory; `"header"` checks the manifest, the sizes
                and the model, and maps the rest, which is then read when it is used.
            device: where to put it; the model's by default, else the CPU.

        Raises:
            FileError: the file cannot be read.
            ContextError: it is damaged, truncated, of a newer format, not a context, or made by another model.
        """
        file = container.read(Path(path), "context", verify)
        manifest = Manifest.of(file)
        if model is not None:
            model.check_fingerprint(manifest.fingerprint, manifest.model_name, str(path))
        length = manifest.positions
        context = cls(
            KVBlocks(saved_layers(file, manifest), length, False, file.release),
            length,
            (manifest.pieces,),
            manifest.fingerprint,
            manifest.model_name,
            manifest.segment_length,
            manifest.versions,
            rotated=manifest.rotated,
            compressor=manifest.compressor,
        )
        target = device if device is not None or model is None else model.device
        moved = context.to(target, None if model is None else model.dtype)
        if moved is context and verify == "full" and manifest.eight_bits:
            moved = copy.deepcopy(context)
        elif moved is context and verify == "full":
            moved = replace(context, blocks=KVBlocks(context.blocks.copies(length, SPARE), length, writable=True))
        return moved


def _check_one_model(contexts: Sequence[CompressedContext], what: str) -> None:
    """Raise ContextError unless one model made all of them."""
    names = {c.fingerprint: c.model_name for c in contexts}
    if len(names) > 1:
        made = " and ".join(f"{name} ({fingerprint[:12]})" for fingerprint, name in list(names.items())[:2])
        raise ContextError(f"contexts of different models, {made}, cannot be {what}: use those of one model.")


def _positions(context: CompressedContext, index: Tensor) -> CompressedContext:
    """Return chosen positions [n] of a context, with all of its pieces."""
    blocks = joining.take(context.blocks, context.length, index.to(context.device))
    return replace(context, blocks=blocks, length=len(index), mask=None)
