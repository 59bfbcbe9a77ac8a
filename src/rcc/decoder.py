"""A decoder whose blocks accept a residual at prefix positions: one stateless hook, no copied model code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import backbones
from .projection import Projections

_KEY = "rcc_residuals"  # travels through the model's keyword arguments to every block


class Residuals:
    """What the first positions of a forward pass receive after each block: prefix vectors and their maps.

    The maps are applied where they are needed, block by block, so that one term at a time is in memory.

    Args:
        projections: P_0, P_1, …
        states: {encoder state number: [B, n, H_encoder]}.
    """

    def __init__(self, projections: Projections, states: dict[int, Tensor]):
        self.projections, self.states = projections, states

    def inputs(self) -> Tensor:
        """The prefix's input embeddings P_0 · h_0, [B, n, H]."""
        return self.projections.project(0, self.states)

    def add(self, i: int, hidden: Tensor) -> Tensor:
        """`hidden` [B, T, H], the input of block i (from 0), with P_i's term added to its first n ≤ T positions."""
        if not 0 < i < len(self.projections):
            return hidden
        term = self.projections.project(i, self.states)
        n = term.shape[1]
        if n == hidden.shape[1]:
            return hidden + term
        return torch.cat([hidden[:, :n] + term, hidden[:, n:]], 1)


def accept_residuals(body: PreTrainedModel) -> None:
    """Make every block of a decoder's base model look for :class:`Residuals` among its keyword arguments.

    Stateless, hence safe in threads, under activation checkpointing and in a sharded model.
    """
    for i, block in enumerate(backbones.blocks(body)):

        def add(module: nn.Module, args: tuple, kwargs: dict, i: int = i) -> tuple[tuple, dict] | None:
            residuals = kwargs.pop(_KEY, None)
            return None if residuals is None else ((residuals.add(i, args[0]), *args[1:]), kwargs)

        block.register_forward_pre_hook(add, with_kwargs=True)


def residual_arguments(residuals: Residuals) -> dict[str, Residuals]:
    """Keyword arguments that hand `residuals` to a forward pass of a prepared decoder."""
    return {_KEY: residuals}
