"""The transformers families that work as encoder and decoder, and what rcc needs to know of each.

A family is listed when the equality tests (`tests/test_equality.py`) pass for it.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .errors import ModelError

BLOCKS = {"llama": "layers", "gpt_neox": "layers"}
"""model_type → attribute of the base model that holds its blocks, in order."""


def check_family(config: PreTrainedConfig) -> None:
    """Raise ModelError unless the family is supported."""
    family = config.model_type
    if family not in BLOCKS:
        raise ModelError(f"backbone family {family!r} is not supported: use one of {', '.join(sorted(BLOCKS))}.")


def blocks(body: PreTrainedModel) -> Any:
    """The blocks of a base model (without head), a ModuleList in order."""
    return getattr(body, BLOCKS[body.config.model_type])


def linear_names(body: PreTrainedModel) -> list[str]:
    """Names of every linear layer in the blocks, relative to the base model: where LoRA goes."""
    prefix = BLOCKS[body.config.model_type]
    return [f"{prefix}.{name}" for name, m in blocks(body).named_modules() if isinstance(m, nn.Linear)]


def window(config: PreTrainedConfig) -> int:
    """Number of positions that a decoder can address."""
    return config.max_position_embeddings
