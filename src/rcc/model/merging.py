"""LoRA merged into the layers that it adapts: what inference computes with, and an encoder that is read at first use.

LoRA that stays apart costs two more matrix products in every linear layer. Merged, a layer is an ordinary one again:
its weight is W + scale · B · A, rounded to the weight's precision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ModelError
from . import adapters

reading = threading.Lock()
"""Held while a deferred encoder is read, so that two threads do not read it twice."""

_MATRICES = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class DeferredEncoder:
    """An encoder that is read from its folder when it is first used: asking a stored context never does.

    Attributes:
        config: of its base.
        read: returns the base model without head, with its LoRA merged.
    """

    config: PreTrainedConfig
    read: Callable[[], PreTrainedModel]


def split_lora(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part LoRA's matrices from the rest of a model's own weights: (LoRA, rest), by name."""
    lora = {name: tensor for name, tensor in state.items() if name.endswith(_MATRICES)}
    return lora, {name: tensor for name, tensor in state.items() if name not in lora}


@torch.no_grad()
def merge_lora(body: PreTrainedModel, layers: Iterable[str], lora: Mapping[str, Tensor], scale: float) -> None:
    """Replace the weights of linear layers by W + scale · B · A.

    Weights that other modules share stay as they are: the merged ones are new tensors.

    Args:
        body: a base model without head.
        layers: names of the layers that have LoRA, relative to the body.
        lora: its matrices, `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank].
        scale: LoRA's alpha / rank.

    Raises:
        ModelError: a matrix is missing, left over or has another shape.
    """
    wanted = {layer: [layer + end for end in _MATRICES] for layer in layers}
    adapters.check_names({name for pair in wanted.values() for name in pair}, lora)
    for layer, names in wanted.items():
        module = body.get_submodule(layer)
        assert isinstance(module, nn.Linear)
        weight, (down, up) = module.weight, (lora[name].to(module.weight) for name in names)
        if down.shape[1:] != weight.shape[1:] or up.shape != (len(weight), len(down)):
            raise ModelError(
                f"LoRA of {layer} has shapes {list(down.shape)} and {list(up.shape)}, which do not fit its weight"
                f" {list(weight.shape)}: the model's configuration does not fit its weights."
            )
        module.weight = nn.Parameter(torch.addmm(weight, up, down, alpha=scale), requires_grad=False)
