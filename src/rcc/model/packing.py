"""Matrices in 8 bits, in a model's file: the values of a row, or of a column, as whole numbers of a step of its own.

What is stored of a direct prefix's projections is their difference from the identity, so that the steps are small. The
weights in memory are ordinary again; this is about the size of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from ..context.eight_bits import to_steps
from ..errors import InputError, ModelError

_NUMBERS, _STEPS = ".int8", "int8_steps"
PARTS: dict[str, Callable[[str], bool]] = {
    "projections": lambda name: name.startswith("projections."),
    "lora": lambda name: ".lora_" in name,
}
"""What can be stored in 8 bits, by name, and which tensors it is."""


def pack(state: Mapping[str, Tensor], parts: Collection[str]) -> dict[str, Tensor]:
    """Return a state with the matrices of these parts in 8 bits: whole numbers, and all their steps in one tensor.

    A step, in bfloat16, belongs to a row, or to a column where there are fewer of these: so one belongs to each rank of
    LoRA. The steps stand in the order of the matrices' names.

    Raises:
        InputError: an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"eight_bits has {part!r}: use some of {', '.join(PARTS)}.")
    packed, steps = {}, []
    for name in sorted(state):
        if not any(PARTS[part](name) for part in parts):
            packed[name] = state[name]
            continue
        values = state[name].detach().float()
        packed[name + _NUMBERS], step = to_steps(values, _across(values), 1e-30, torch.bfloat16)
        steps.append(step.flatten())
    return {**packed, _STEPS: torch.cat(steps)} if steps else packed


def unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what :func:`pack` was given, to its precision.

    Raises:
        ModelError: there are other steps than the matrices need.
    """
    plain = {name: tensor for name, tensor in state.items() if not is_packed(name)}
    names = sorted(name.removesuffix(_NUMBERS) for name in state if name.endswith(_NUMBERS))
    counts = [min(state[name + _NUMBERS].shape) for name in names]
    steps = state.get(_STEPS, torch.empty(0)).float()
    if steps.shape != (sum(counts),):
        raise ModelError("the model's weights in 8 bits lack their steps: get the model again.")
    for name, own in zip(names, steps.split(counts), strict=True):
        numbers = state[name + _NUMBERS].float()
        plain[name] = numbers * own.unsqueeze(_across(numbers))
    return plain


def is_packed(name: str) -> bool:
    """Return whether a tensor is one of those that :func:`pack` makes, whose precision is fixed."""
    return name.endswith(_NUMBERS) or name == _STEPS


def _across(matrix: Tensor) -> int:
    """Return the dimension that values of one step lie along: the longer one."""
    return int(matrix.shape[0] <= matrix.shape[1])
