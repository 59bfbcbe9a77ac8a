"""What a training pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model import backbones, training_pass
from ..model.encoder import Additions, read_segments
from ..model.freezing import freeze
from .blueprint import Blueprint
from .live import LiveBytes


@dataclass(frozen=True)
class Batch:
    """Say what a process reads before a backward pass.

    Args:
        rows: texts.
        tokens: context tokens of each text.
        rate: context tokens a prefix position.
        target: decoder tokens after each text's prefix.
    """

    rows: int
    tokens: int
    rate: int
    target: int


@dataclass(frozen=True)
class Activations:
    """Bytes that a training pass needs beside weights, gradients and optimizer.

    Attributes:
        kept: without gradient checkpointing.
        checkpointed: with it.
    """

    kept: int
    checkpointed: int


def activations(blueprint: Blueprint, batch: Batch, frozen: Collection[str] = ()) -> Activations:
    """Estimate what a training pass keeps, with the groups in `frozen` not learning.

    The pass itself runs, with and without gradient checkpointing, on tensors without storage whose sizes are counted;
    :data:`rcc.planning.blueprint.TRACED` blocks of each side stand for all. A state-space encoder's kernels cannot run
    so: what it keeps is taken to be what a Transformer does, 34 bytes · width a token and block (Korthikanti et al.
    2022, section 4.1).
    """
    plain, again = (_run(blueprint.shallow(), batch, frozen, recompute) for recompute in (False, True))
    # what the blocks add that were not run
    missing = {"encoder": blueprint.states[-1], "decoder": blueprint.decoder.num_hidden_layers}
    kept, forward, backward = plain.peak, again.peak, again.after
    for side, first in plain.blocks.items():
        kept += (missing[side] - first.run) * first.kept
        forward += (missing[side] - first.run) * again.blocks[side].kept
        backward += (missing[side] - first.run) * first.entry
    if "encoder" not in plain.blocks:  # its states are there all the same
        more = (len(blueprint.states) - plain.states) * plain.state
        kept, forward, backward = kept + more, forward + more, backward + more
    # one block's activations are there at a time
    backward += max((block.kept for block in plain.blocks.values()), default=0)
    checkpointed = max(forward, backward)
    if plain.scanned:
        kept += 34 * plain.scanned * missing["encoder"]
        checkpointed += plain.scanned * (2 * missing["encoder"] + 34)
    return Activations(kept, min(kept, checkpointed))


@dataclass
class _Block:
    """One block of a side as it was run: bytes of its input, and bytes kept when it and its hooks are done."""

    run: int
    entry: int
    kept: int


@dataclass
class _Trace:
    """A training pass as it was run; sizes in bytes.

    Attributes:
        peak: the most there was at a time.
        after: what was left after the forward pass.
        blocks: of the sides that ran.
        states: how many encoder states there were.
        state: of each of these.
        scanned: tokens · width that a state-space encoder would have read and kept.
    """

    peak: int
    after: int
    blocks: dict[str, _Block]
    states: int
    state: int
    scanned: int


def _run(blueprint: Blueprint, batch: Batch, frozen: Collection[str], recompute: bool) -> _Trace:
    model, wanted = blueprint.build(), blueprint.states
    freeze(model, frozen, blueprint.dtype)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # all segments of one length: a last one that is not full counts as full
    length = min(batch.tokens, blueprint.config.segment_length)
    segments = batch.rows * -(-batch.tokens // length)
    width = model.encoder.config.hidden_size
    shape = batch.rows, segments // batch.rows * -(-length // batch.rate), width
    learning = any(p.requires_grad for name, p in model.named_parameters() if name.startswith(("encoder", "memory")))
    exactly = blueprint.config.direct and batch.rate == 1  # by the decoder itself
    scans = learning and not exactly and model.encoder.config.model_type in backbones.STATE_SPACE
    state = 0
    live = LiveBytes()
    live.adopt(model)
    marks: dict[str, list[tuple[int, int]]] = {"encoder": [], "decoder": []}

    def note(side: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        marks[side].append((live.now, arguments[0].untyped_storage().nbytes()))

    for side, body in (("encoder", model.encoder), ("decoder", backbones.body(model.decoder))):
        for block in backbones.blocks(body):  # before our other hooks, so that what they keep is the block's
            block.register_forward_pre_hook(partial(note, side), prepend=True)
    with live, torch.autocast("cpu", blueprint.dtype, enabled=blueprint.dtype != torch.float32):
        prompt = torch.zeros(batch.rows, batch.target, dtype=torch.long)
        if exactly:
            texts = [torch.zeros(batch.tokens, dtype=torch.long)] * batch.rows
            out = training_pass.read_and_decode(model, texts, training_pass.TrainingBatch(prompt, labels=prompt))
        else:
            if learning and not scans:
                ids = [torch.zeros(length, dtype=torch.long)] * segments
                sink = blueprint.config.sink_token
                read, _ = read_segments(model.encoder, ids, batch.rate, wanted, Additions(model.memory, sink=sink))
                states = {k: h.reshape(shape) for k, h in read.items()}
                del read
            else:
                states = {k: torch.empty(shape, dtype=blueprint.dtype, requires_grad=learning) for k in wanted}
            state = next(iter(states.values())).nbytes
            out = training_pass.decode_states(model, states, None, training_pass.TrainingBatch(prompt, labels=prompt))
    after = live.now
    with live:
        assert out.loss is not None
        assert out.logits is not None  # the model has its own head
        torch.autograd.grad(out.loss, out.logits)  # logits are in memory most often on the way back
    blocks = {
        side: _Block(wanted[-1] if side == "encoder" else len(seen), seen[-1][1], seen[-1][0] - seen[-2][0])
        for side, seen in marks.items()
        if len(seen) > 1
    }
    return _Trace(live.peak, after, blocks, len(wanted), state, scans * segments * length * width)
