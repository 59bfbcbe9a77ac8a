"""Tokens → compressed vectors. This file alone decides segment boundaries, padding and which states are kept.

The encoder reads each segment on its own, from position 0, causally: so segments of any lengths share a batch,
padded on the right, without a mask, and what stands behind a segment's end cannot reach what is kept of it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..config import RCCConfig
from ..context import file as fileformat
from ..errors import ContextError, InputError
from . import backbones

_capture: ContextVar[_Capture | None] = ContextVar("rcc_capture", default=None)
"""Set around an encoder's forward pass, each thread's own: not every family hands keyword arguments to its blocks."""

_Known = dict[bytes, dict[int, Tensor]]
"""Whole segments (their token ids) that are not read again, and their states {number: [m, H]}."""

_remembered: ContextVar[dict[tuple[Any, ...], _Known] | None] = ContextVar("rcc_remembered", default=None)
"""What :func:`remembering` keeps, for each encoder, rate and choice of states."""


@dataclass(frozen=True)
class Piece:
    """One text within a context: what one call of `compress` or `encode` read for one row of its batch."""

    tokens: int
    positions: int
    rate: int
    sha256: str
    """SHA-256 of the token ids as little-endian int64."""
    opening: tuple[int, ...] = ()
    """The first token ids: a prompt for writing the text back."""


def piece_of(ids: Tensor, rate: int, config: RCCConfig) -> Piece:
    """What is recorded of a text of token ids [T]."""
    array = ids.cpu().numpy().astype(np.dtype("<i8"))
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    opening = tuple(int(i) for i in array[:10])
    return Piece(len(ids), positions(len(ids), rate, config), rate, digest, opening)


def rows_of(ids: Tensor, mask: Tensor | None, vocabulary: int, argument: str = "input_ids") -> list[Tensor]:
    """[B, T] token ids and an optional mask of the same shape → the B texts without their padding.

    Raises:
        InputError: a wrong shape or type, an empty text, or an id outside the vocabulary.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{argument} must be a tensor of whole numbers of shape [batch, tokens].")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        name = "context_mask" if argument == "context_ids" else "attention_mask"
        raise InputError(f"{name} must be a tensor of the same shape as {argument}, {list(ids.shape)}.")
    rows = [ids[b] if mask is None else ids[b][mask[b].bool()] for b in range(ids.shape[0])]
    if not rows or any(len(row) == 0 for row in rows):
        raise InputError(f"{argument} holds an empty text: give at least one token.")
    low, high = (int(end) for end in (ids if mask is None else ids[mask.bool()]).aminmax())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise InputError(
            f"{argument} holds token id {bad}, outside the model's vocabulary of {vocabulary}:"
            " use the tokenizer that belongs to the model."
        )
    return rows


def texts_of(rows: list[Tensor], mask: Tensor | None) -> list[tuple[Tensor, ...]]:
    """What :func:`rows_of` gave → the texts that each row holds, by the numbers in its mask (None: one each)."""
    if mask is None:
        return [(row,) for row in rows]
    counts = [numbers[numbers > 0].unique_consecutive(return_counts=True)[1] for numbers in mask]
    return [row.split(count.tolist()) for row, count in zip(rows, counts, strict=True)]


def positions(tokens: int, rate: int, config: RCCConfig) -> int:
    """Prefix positions that a text of `tokens` tokens takes."""
    if config.segment_padding == "repeat":
        tokens = -(-tokens // config.segment_length) * config.segment_length
    # the rate divides the segment, so partial groups occur only at the very end
    return -(-tokens // rate)


def segments(ids: Tensor, config: RCCConfig) -> tuple[Tensor, ...]:
    """Token ids [T] → segments of `segment_length`; the last one may be shorter.

    With `segment_padding="repeat"` every segment is full: a text shorter than one is repeated until it fills it,
    a longer one is filled up on the left, to a whole number of segments, with its own last tokens.
    """
    size = config.segment_length
    if config.segment_padding == "repeat" and len(ids) % size:
        missing = -len(ids) % size
        ids = ids.repeat(-(-size // len(ids)))[:size] if len(ids) < size else torch.cat([ids[-missing:], ids])
    return ids.split(size)


def lead(tokens: int, config: RCCConfig) -> int:
    """Tokens of padding before a text: its token i stands at place (lead + i) % segment_length of a segment."""
    repeats = config.segment_padding == "repeat" and tokens > config.segment_length
    return -tokens % config.segment_length if repeats else 0


def capture_states(body: PreTrainedModel) -> None:
    """Make every block of an encoder's base model hand its input to the pass's :class:`_Capture`, if it has one."""
    for i, block in enumerate(backbones.blocks(body)):

        def take(module: nn.Module, args: tuple, i: int = i) -> None:
            if (capture := _capture.get()) is not None:
                capture.take(i, args[0])

        block.register_forward_pre_hook(take)


class _Done(Exception):
    """Every wanted state has been captured: the rest of the encoder need not run."""


class _Capture:
    """Keeps, of each wanted state, the positions to be read out, while the encoder runs."""

    def __init__(
        self, wanted: list[int], lengths: list[int], rate: int, device: torch.device, memory: bool, before: int = 0
    ):
        self.wanted, self.rate, self.before = wanted, rate, before  # positions that stand before each segment
        self.states: dict[int, Tensor] = {}
        counts = [-(-n // rate) for n in lengths]
        self.valid: Tensor | None = None  # [segments, m], None: all
        self.index: tuple[Tensor, Tensor] | None = None  # None: every rate-th position of every segment
        if memory or len(set(lengths)) > 1 or lengths[0] % rate:
            ends, order = torch.tensor(lengths, device=device)[:, None], torch.arange(max(counts), device=device)
            # a partial group keeps the state of its last token, so no token is dropped
            index = ends + order if memory else torch.minimum(rate * (order + 1), ends) - 1 + before
            self.index = (torch.arange(len(lengths), device=device)[:, None], index)
            if len(set(counts)) > 1:
                self.valid = torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]

    def take(self, i: int, hidden: Tensor) -> None:
        """State i [segments, T, H], the input of block i."""
        if i in self.wanted:
            # both forms copy, so that nothing keeps the positions that are dropped
            kept = (
                hidden[:, self.before + self.rate - 1 :: self.rate].clone()
                if self.index is None
                else hidden[self.index]
            )
            self.states[i] = kept
        if i == self.wanted[-1]:
            raise _Done


def _read(
    body: PreTrainedModel,
    batch: list[Tensor],
    rate: int,
    wanted: list[int],
    memory: Tensor | None,
    offset: Tensor | None = None,
    sink: int | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Run the encoder over a batch of segments → {state: [segments, m, H]} and which of the m are real (None: all)."""
    lengths = [len(segment) for segment in batch]
    device = batch[0].device
    inputs = {"input_ids": pad_sequence(batch, batch_first=True)}
    if memory is not None or offset is not None or sink is not None:
        embeds = body.get_input_embeddings()(inputs["input_ids"])
        # training keeps what is learned in float32 beside a base that is not
        if offset is not None:
            embeds = embeds + offset.to(embeds.dtype)
        if memory is not None:
            # each segment's memory follows its own end, so padding comes behind both
            memory = memory.to(embeds.dtype)
            rows = [torch.cat([row[:n], memory[: -(-n // rate)]]) for row, n in zip(embeds, lengths, strict=True)]
            embeds = pad_sequence(rows, batch_first=True)
        if sink is not None:
            first = body.get_input_embeddings()(torch.tensor([[sink]], device=device)).to(embeds.dtype)
            embeds = torch.cat([first.expand(len(batch), -1, -1), embeds], 1)
        inputs = {"inputs_embeds": embeds}
    order = torch.arange(next(iter(inputs.values())).shape[1], device=device)[None]
    capture = _Capture(wanted, lengths, rate, device, memory is not None, before=int(sink is not None))
    token = _capture.set(capture)
    try:
        out = body(**inputs, position_ids=order, use_cache=False)  # a family without positions ignores them
        capture.take(len(backbones.blocks(body)), out.last_hidden_state)
    except _Done:
        pass
    finally:
        _capture.reset(token)
    return capture.states, capture.valid


def _joined(parts: list[tuple[dict[int, Tensor], Tensor | None]]) -> tuple[dict[int, Tensor], Tensor | None]:
    """What :func:`_read` gave of several batches of segments, as if it were one."""
    shapes = [next(iter(states.values())).shape for states, _ in parts]
    m = max(shape[1] for shape in shapes)

    def fill(tensor: Tensor) -> Tensor:
        return nn.functional.pad(tensor, (0,) * (2 * tensor.ndim - 4) + (0, m - tensor.shape[1]))

    states = {k: torch.cat([fill(part[k]) for part, _ in parts]) for k in parts[0][0]}
    if all(valid is None for _, valid in parts) and len({shape[1] for shape in shapes}) == 1:
        return states, None
    device = next(iter(states.values())).device
    real = [
        torch.ones(shape[:2], dtype=torch.bool, device=device) if valid is None else valid
        for shape, (_, valid) in zip(shapes, parts, strict=True)
    ]
    return states, torch.cat([fill(valid) for valid in real])


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Within it, what repeats in a text is kept for the texts after it too, which then read it no more.

    For many texts with the same filler, and an encoder that does not change meanwhile.
    """
    token = _remembered.set({})
    try:
        yield
    finally:
        _remembered.reset(token)


class _Reader:
    """Reads batches of segments; what repeats (filler, boilerplate) is read once.

    A segment's states depend on nothing but itself. Those of a segment that occurs twice in a batch are kept for the
    next one: at most a batch's worth, and nothing of a text that does not repeat itself.

    Args:
        read: :func:`_read` of a batch, in passes of `size` segments.
        full: tokens of a whole segment; shorter ones are not kept.
        remembered: what earlier texts have left, to be added to (:func:`remembering`).
    """

    def __init__(
        self,
        read: Callable[[list[Tensor]], tuple[dict[int, Tensor], Tensor | None]],
        size: int,
        full: int,
        remembered: _Known | None,
    ):
        self.read, self.size, self.full = read, size, full
        self.forgets = remembered is None
        self.known: _Known = {} if remembered is None else remembered

    def __call__(self, batch: list[Tensor], last: bool) -> tuple[dict[int, Tensor], Tensor | None]:
        """As :func:`_read`, for every segment of a batch, equal ones too; nothing is kept of the last one."""
        ids = torch.cat(batch).cpu().split([len(segment) for segment in batch])  # one copy from a GPU, not one each
        keys = [segment.numpy().tobytes() for segment in ids]
        counts, segment = Counter(keys), dict(zip(keys, batch, strict=True))
        new = [key for key in counts if key not in self.known]
        again = [key for key in counts if key in self.known]
        parts = [self.read([segment[key] for key in new[i : i + self.size]]) for i in range(0, len(new), self.size)]
        if again:
            kept = [self.known[key] for key in again]
            parts.append(({k: torch.stack([states[k] for states in kept]) for k in kept[0]}, None))
        states, valid = parts[0] if len(parts) == 1 else _joined(parts)
        if self.forgets:
            self.known = {key: self.known[key] for key in again}
        for i, key in enumerate(new):
            if not (last and self.forgets) and counts[key] > 1 and len(segment[key]) == self.full:
                self.known[key] = {k: h[i].clone() for k, h in states.items()}  # a view would keep all of them
        if len(counts) < len(batch) or again:
            place = {key: i for i, key in enumerate([*new, *again])}
            places = [place[key] for key in keys]
            states = {k: h[places] for k, h in states.items()}
            valid = None if valid is None else valid[places]
        return states, valid


def encode(
    body: PreTrainedModel,
    rows: list[tuple[Tensor, ...]],
    rate: int,
    config: RCCConfig,
    wanted: list[int],
    batch_tokens: int | None,
    memory: Tensor | None,
    offset: Tensor | None = None,
    pass_tokens: int | None = None,
    sink: int | None = None,
) -> Iterator[tuple[dict[int, Tensor], Tensor | None, int]]:
    """Read rows of texts segment by segment, all rows in step, a bounded number of segments at a time; what repeats is
    read once (:class:`_Reader`).

    Args:
        body: the encoder, prepared by :func:`capture_states`.
        rows: B rows of one text or several, each [T] token ids on the encoder's device. A text begins a segment.
        wanted: the encoder states to keep, ascending.
        batch_tokens: about how many tokens are read for each set of states that is yielded (at least one segment of
            every text that has one left); None: all at once.
        pass_tokens: about how many of those a forward pass takes; None: all.
        sink: the token that is read before each segment and not kept (`prefix="direct"`); None: none is.
        memory: [M, H] the memory embeddings of `readout="memory_tokens"`, of which a segment of T tokens is followed
            by the first ceil(T / rate); None: `"strided"`.
        offset: [H] what is added to the tokens' embeddings (`rate_embeddings`); None: nothing.

    Yields:
        states: {state: [B, m, H]} for the next m prefix positions of every row,
        valid: [B, m] bool, False where a row has ended (None: all are real),
        tokens: how many tokens have been read so far, all rows together.
    """
    split = [[segment for text in row for segment in segments(text, config)] for row in rows]
    longest = max(map(len, split))
    step = longest if batch_tokens is None else max(1, batch_tokens // (config.segment_length * len(rows)))
    done = 0
    size = step * len(rows) if pass_tokens is None else max(1, pass_tokens // config.segment_length)
    kept = _remembered.get()
    remembered = None if kept is None else kept.setdefault((body, rate, *wanted), {})
    learned = memory, offset, sink
    read = _Reader(lambda some: _read(body, some, rate, wanted, *learned), size, config.segment_length, remembered)
    for start in range(0, longest, step):
        parts = [row[start : start + step] for row in split]
        batch = [segment for part in parts for segment in part]
        states, valid = read(batch, last=start + step >= longest)
        done += sum(map(len, batch))
        counts = [sum(-(-len(segment) // rate) for segment in part) for part in parts]
        m = max(counts)
        if valid is None and min(counts) == m:
            states = {k: h.reshape(len(rows), m, h.shape[-1]) for k, h in states.items()}
        else:
            # rows of different lengths: lay the real vectors of each behind one another, gaps at the end
            real = torch.ones(next(iter(states.values())).shape[:2], dtype=torch.bool) if valid is None else valid.cpu()
            flat = real.flatten().nonzero()[:, 0].split(counts)
            index = pad_sequence(list(flat), batch_first=True).to(rows[0][0].device)
            states = {k: h.flatten(0, 1)[index] for k, h in states.items()}
            valid = (torch.arange(m)[None] < torch.tensor(counts)[:, None]).to(rows[0][0].device)
        yield states, valid, done
        del states, valid  # before the next batch is read


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
        """The same vectors elsewhere or in another precision."""
        states = self.states.to(device=device, dtype=dtype)
        return CompressedVectors(
            states, self.lengths.to(device), self.rate, self.segment_length, self.pieces, self.fingerprint
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        manifest = {
            "rate": self.rate,
            "segment_length": self.segment_length,
            "fingerprint": self.fingerprint,
            "pieces": [vars(piece) for piece in self.pieces],
        }
        tensors = {"states": self.states, "lengths": self.lengths}
        fileformat.write(Path(path), "vectors", manifest, {k: fileformat.lazy(t) for k, t in tensors.items()})

    @classmethod
    def load(cls, path: str | Path, device: Any = None) -> CompressedVectors:
        """Read a file that `save` wrote, checking it whole.

        Raises:
            FileError: it cannot be read. ContextError: it is damaged, of a newer format or something else.
        """
        manifest, tensors, _ = fileformat.read(Path(path), "vectors", verify="full")
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


def pieces_from(rows: list[dict[str, Any]]) -> list[Piece]:
    """Pieces as a manifest holds them; a TypeError or KeyError where they make no sense."""
    pieces = [Piece(**{**row, "opening": tuple(row["opening"])}) for row in rows]
    for piece in pieces:
        counts = (piece.tokens, piece.positions, piece.rate)
        numbers = (*counts, *piece.opening)
        whole = all(type(n) is int and 0 <= n < 1 << 48 for n in numbers) and isinstance(piece.sha256, str)
        if not whole or min(counts) < 1:
            raise TypeError("a piece of text with senseless numbers")
    return pieces
