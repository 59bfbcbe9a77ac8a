"""A decoder whose blocks let a prefix change what enters them: stateless hooks, no copied model code."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import backbones
from .projection import Projections

Args: TypeAlias = tuple[Any, ...]  # of a module's call, as torch hands them to hooks
Kwargs: TypeAlias = dict[str, Any]

_KEY = "rcc_prefix"  # travels through the model's keyword arguments to every block


class BlockHook(Protocol):
    """What a forward pass hands to every block of a prepared decoder, to change its input."""

    def enter(self, i: int, hidden: Tensor) -> Tensor:
        """Return what enters block i (from 0) in place of `hidden` [B, T, H]."""
        ...


class Residuals:
    """The paper's prefix: what the first positions of a forward pass receive after each block (section 3).

    The maps are applied where they are needed, block by block, so that one term at a time is in memory.

    Args:
        projections: P_0, P_1, …
        states: {encoder state number: [B, n, H_encoder]}.
    """

    def __init__(self, projections: Projections, states: dict[int, Tensor]):
        self.projections, self.states = projections, states

    def inputs(self) -> Tensor:
        """Return the prefix's input embeddings P_0 · h_0, [B, n, H]."""
        return self.projections.project(0, self.states)

    def enter(self, i: int, hidden: Tensor) -> Tensor:
        """Return `hidden` [B, T, H], the input of block i (from 0), with P_i's term added to its first n positions."""
        if not 0 < i < len(self.projections):
            return hidden
        term = self.projections.project(i, self.states)
        n = term.shape[1]
        if n == hidden.shape[1]:
            return hidden + term
        return torch.cat([hidden[:, :n] + term, hidden[:, n:]], 1)


def accept_prefix(body: PreTrainedModel) -> None:
    """Make every block of a decoder's base model look for a :class:`BlockHook` among its keyword arguments.

    Stateless, hence safe in threads, under activation checkpointing and in a sharded model.
    """
    for i, block in enumerate(backbones.blocks(body)):

        def enter(module: nn.Module, args: Args, kwargs: Kwargs, i: int = i) -> tuple[Args, Kwargs] | None:
            hook = kwargs.pop(_KEY, None)
            return None if hook is None else ((hook.enter(i, args[0]), *args[1:]), kwargs)

        block.register_forward_pre_hook(enter, with_kwargs=True)


def hook_arguments(hook: BlockHook) -> dict[str, BlockHook]:
    """Return keyword arguments that hand a hook to a forward pass of a prepared decoder."""
    return {_KEY: hook}
