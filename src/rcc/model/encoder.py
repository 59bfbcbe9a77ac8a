"""Segments → encoder states. This file alone decides which states are kept.

The encoder reads each segment on its own, from position 0, causally: so segments of any lengths share a batch,
padded on the right, without a mask, and what comes after a segment's end cannot reach what is kept of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..config import RCCConfig
from . import backbones
from .segments import split

BATCH_TOKENS = 4096
"""Tokens that the encoder reads in one forward pass, unless told otherwise."""
CPU_BATCH_TOKENS = 512
"""The same where `compress` runs on a CPU, which larger batches make hardly faster, and there is less memory."""

_capture: ContextVar[_Capture | None] = ContextVar("rcc_capture", default=None)
"""Set around an encoder's forward pass, each thread's own: not every family hands keyword arguments to its blocks."""

_Known = dict[bytes, dict[int, Tensor]]
"""Whole segments (their token ids) that are not read again, and their states {number: [m, H]}."""

_remembered: ContextVar[dict[tuple[Any, ...], _Known] | None] = ContextVar("rcc_remembered", default=None)
"""What :func:`remembering` keeps, for each encoder, rate and choice of states."""


@dataclass(frozen=True)
class Additions:
    """What a model adds to the token embeddings of every segment.

    Attributes:
        memory: [M, H] the memory embeddings of `readout="memory_tokens"`, of which a segment of T tokens is followed
            by the first ceil(T / rate), and whose states alone are kept; None: `"strided"`.
        offset: [H] what is added to the tokens' embeddings (`rate_embeddings`); None: nothing.
        sink: the token that is read before each segment and not kept (`prefix="direct"`); None: none is.
    """

    memory: Tensor | None = None
    offset: Tensor | None = None
    sink: int | None = None


NOTHING = Additions()


def batch_tokens_on(device: torch.device) -> int:
    """Return how many tokens `compress` reads at once on a device, unless told otherwise."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


def capture_states(body: PreTrainedModel) -> None:
    """Make every block of an encoder's base model hand its input to the pass's :class:`_Capture`, if it has one."""
    for i, block in enumerate(backbones.blocks(body)):

        def take(module: nn.Module, args: tuple[Any, ...], i: int = i) -> None:
            if (capture := _capture.get()) is not None:
                capture.take(i, args[0])

        block.register_forward_pre_hook(take)


class _Done(Exception):  # noqa: N818  # no error: the pass ends here
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
        """Keep what is wanted of state i [segments, T, H], the input of block i."""
        if i in self.wanted:
            # both forms copy, so that nothing keeps the positions that are dropped
            every = slice(self.before + self.rate - 1, None, self.rate)
            self.states[i] = hidden[:, every].clone() if self.index is None else hidden[self.index]
        if i == self.wanted[-1]:
            raise _Done


def read_segments(
    body: PreTrainedModel, batch: list[Tensor], rate: int, wanted: list[int], additions: Additions = NOTHING
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Run the encoder over a batch of segments in one pass.

    Args:
        body: the encoder, prepared by :func:`capture_states`.
        batch: segments, [tokens] token ids each.
        rate: tokens for each state that is kept.
        wanted: the encoder states to keep, ascending.
        additions: what is added to the embeddings of each segment.

    Returns:
        {state: [segments, m, H]} and which of the m are real, [segments, m] (None: all).
    """
    memory, offset, sink = additions.memory, additions.offset, additions.sink
    lengths = [len(segment) for segment in batch]
    device = batch[0].device
    inputs = {"input_ids": pad_sequence(batch, batch_first=True)}
    if memory is not None or offset is not None or sink is not None:
        embeds = body.get_input_embeddings()(inputs["input_ids"])
        # training keeps what is learned in float32 beside a base that is not
        if offset is not None:
            embeds = embeds + offset.to(embeds.dtype)
        if memory is not None:
            # each segment's memory follows its own end, so padding comes after both
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
    """Join what :func:`read_segments` gave of several batches of segments, as if it were one."""
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
    """Keep, within it, what repeats in a text for the texts after it too, which then need not read it again.

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
        read: :func:`read_segments` of a batch, in passes of `size` segments.
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
        """Read as :func:`read_segments` does, for every segment of a batch, equal ones too.

        Nothing is kept of the last batch.
        """
        ids = torch.cat(batch).cpu().split([len(segment) for segment in batch])  # one copy from a GPU, not one each
        keys = [segment.numpy().tobytes() for segment in ids]
        counts, segment = Counter(keys), dict(zip(keys, batch, strict=True))
        new = [key for key in counts if key not in self.known]
        again = [key for key in counts if key in self.known]
        parts = [self.read([segment[key] for key in new[i : i + self.size]]) for i in range(0, len(new), self.size)]
        if again:
            earlier = [self.known[key] for key in again]
            parts.append(({k: torch.stack([states[k] for states in earlier]) for k in earlier[0]}, None))
        states, valid = parts[0] if len(parts) == 1 else _joined(parts)
        if self.forgets:
            self.known = {key: self.known[key] for key in again}
        for i, key in enumerate(new):
            if not (last and self.forgets) and counts[key] > 1 and len(segment[key]) == self.full:
                self.known[key] = {k: h[i].clone() for k, h in states.items()}  # a view would keep all of them
        if len(counts) < len(batch) or again:
            number = {key: i for i, key in enumerate([*new, *again])}
            numbers = [number[key] for key in keys]
            states = {k: h[numbers] for k, h in states.items()}
            valid = None if valid is None else valid[numbers]
        return states, valid


def encode(
    body: PreTrainedModel,
    rows: list[tuple[Tensor, ...]],
    rate: int,
    config: RCCConfig,
    wanted: list[int],
    batch_tokens: int | None,
    additions: Additions = NOTHING,
    pass_tokens: int | None = None,
) -> Iterator[tuple[dict[int, Tensor], Tensor | None, int]]:
    """Read rows of texts segment by segment, all rows in step, a bounded number of segments at a time.

    What repeats is read once (:class:`_Reader`).

    Args:
        body: the encoder, prepared by :func:`capture_states`.
        rows: B rows of one text or several, each [T] token ids on the encoder's device. A text begins a segment.
        rate: tokens a position.
        config: says how a text is cut into segments.
        wanted: the encoder states to keep, ascending.
        batch_tokens: about how many tokens are read for each set of states that is yielded (at least one segment of
            every text that has one left); None: all at once.
        additions: what is added to the embeddings of each segment.
        pass_tokens: about how many of those a forward pass takes; None: all.

    Yields:
        states: {state: [B, m, H]} for the next m prefix positions of every row,
        valid: [B, m] bool, False where a row has ended (None: all are real),
        tokens: how many tokens have been read so far, all rows together.
    """
    segments = [[segment for text in row for segment in split(text, config)] for row in rows]
    longest = max(map(len, segments))
    step = longest if batch_tokens is None else max(1, batch_tokens // (config.segment_length * len(rows)))
    done = 0
    size = step * len(rows) if pass_tokens is None else max(1, pass_tokens // config.segment_length)
    memories = _remembered.get()
    remembered = None if memories is None else memories.setdefault((body, rate, *wanted), {})
    read = _Reader(
        lambda batch: read_segments(body, batch, rate, wanted, additions), size, config.segment_length, remembered
    )
    for start in range(0, longest, step):
        parts = [row[start : start + step] for row in segments]
        states, valid = read([segment for part in parts for segment in part], last=start + step >= longest)
        done += sum(len(segment) for part in parts for segment in part)
        counts = [sum(-(-len(segment) // rate) for segment in part) for part in parts]
        states, valid = _in_rows(states, valid, counts, rows[0][0].device)
        yield states, valid, done
        del states, valid  # before the next batch is read


def _in_rows(
    states: dict[int, Tensor], valid: Tensor | None, counts: list[int], device: torch.device
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Lay the states of a batch of segments out by the rows that they belong to, gaps at the end.

    Args:
        states: {state: [segments, m, H]}.
        valid: [segments, m], which of them are real (None: all).
        counts: states of each of B rows.
        device: of the states.

    Returns:
        {state: [B, max(counts), H]} and which are real, [B, max(counts)] (None: all).
    """
    m = max(counts)
    if valid is None and min(counts) == m:
        return {k: h.reshape(len(counts), m, h.shape[-1]) for k, h in states.items()}, None
    real = torch.ones(next(iter(states.values())).shape[:2], dtype=torch.bool) if valid is None else valid.cpu()
    flat = real.flatten().nonzero()[:, 0].split(counts)
    index = pad_sequence(list(flat), batch_first=True).to(device)
    states = {k: h.flatten(0, 1)[index] for k, h in states.items()}
    return states, (torch.arange(m)[None] < torch.tensor(counts)[:, None]).to(device)
