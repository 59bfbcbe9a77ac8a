"""Which parameters of a model learn, in which group, and in which precision."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import dtype, nn

if TYPE_CHECKING:
    from .rcc import RCCForCausalLM

GROUPS = ("encoder", "projections", "decoder")
"""Groups of parameters, each with a learning rate and a schedule of its own: memory tokens and rate embeddings belong
to the encoder, the sink of a direct prefix to the projections."""
_GROUP_OF = {"memory": "encoder", "rate_embeddings": "encoder", "sink": "projections"}
"""Parameters that stand alone, and their groups: the sink enters the decoder's blocks, as what is projected."""


def group_of(name: str) -> str:
    """Return the group of a parameter, by its name in the model."""
    part = name.partition(".")[0]
    return _GROUP_OF.get(part, part)


def learned(model: RCCForCausalLM) -> dict[str, nn.Parameter]:
    """Return what training changes in any stage, by name: all that is not a frozen base.

    To be called before a stage freezes parts.
    """
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def freeze(model: RCCForCausalLM, frozen: Collection[str], precision: dtype) -> None:
    """Set a model up to learn: what learns in float32, the groups in `frozen` and the bases in `precision`."""
    for name, parameter in learned(model).items():
        if group_of(name) in frozen:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(precision)
        else:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "lora_A"):  # autocast sees to the type, without a detour through float32
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
