"""Matrices in 8 bits, in a model's file: the values of a row, or of a column, as whole numbers of a step of its own.

What is stored of a direct prefix's projections is their difference from the identity, so that the steps are small. The
weights in memory are ordinary again; this is about the size of a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .errors import InputError, ModelError

_NUMBERS, _STEPS = ".int8", ".int8_step"
PARTS = {"projections": lambda name: name.startswith("projections."), "lora": lambda name: ".lora_" in name}
"""What can be stored in 8 bits, by name, and which tensors it is."""


def pack(state: Mapping[str, Tensor], parts: Collection[str]) -> dict[str, Tensor]:
    """A state with the matrices of some parts in 8 bits: for each its whole numbers and its steps, in float32.

    A step belongs to a row, or to a column where there are fewer of these: so one belongs to each rank of LoRA.

    Raises:
        InputError: an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise InputError(f"eight_bits has {part!r}: use some of {', '.join(PARTS)}.")
    packed = {}
    for name, tensor in state.items():
        if not any(PARTS[part](name) for part in parts):
            packed[name] = tensor
            continue
        values = tensor.detach().float()
        across = int(values.shape[0] <= values.shape[1])
        step = (values.abs().amax(across, keepdim=True) / 127).clamp(min=1e-30)
        packed[name + _NUMBERS], packed[name + _STEPS] = (values / step).round().to(torch.int8), step
    return packed


def unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`pack` was given, to its precision.

    Raises:
        ModelError: a matrix lacks its steps.
    """
    plain = {}
    for name, tensor in state.items():
        if name.endswith(_NUMBERS):
            step = state.get(name.removesuffix(_NUMBERS) + _STEPS)
            if step is None or step.shape not in ((len(tensor), 1), (1, tensor.shape[1])):
                raise ModelError(f"the model's weights lack the steps of {name}: get the model again.")
            plain[name.removesuffix(_NUMBERS)] = tensor.float() * step
        elif not name.endswith(_STEPS):
            plain[name] = tensor
    return plain


def is_packed(name: str) -> bool:
    """Whether a tensor is one of those that :func:`pack` makes, whose precision is fixed."""
    return name.endswith((_NUMBERS, _STEPS))
