"""A linear layer with LoRA whose low-rank term is added within one matrix product.

peft computes that term as an output of its own, scales it and adds it: three more passes over [tokens, out]. Added as
the second product writes its result, LoRA costs half as much in training (docs/results.md).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn


class LoRALinear(Linear):
    """peft's layer, its parameters and their names, for one adapter without dropout."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute W·x + b + scale · B·A·x.

        Args:
            x: [..., in].
            *args: none, as of `**kwargs`: they are peft's.
            **kwargs: none.

        Returns:
            [..., out], in the precision of W·x.
        """
        out: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return out
        (name,) = self.active_adapters
        a, b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        inner = a(self._cast_input_dtype(x, a.weight.dtype)).to(out.dtype)
        up = b.weight.to(out.dtype).t()
        product = torch.addmm(out.flatten(0, -2), inner.flatten(0, -2), up, alpha=self.scaling[name])
        return product.view_as(out)


def settings(rank: int, alpha: float, layers: list[str]) -> LoraConfig:
    """Return what peft makes such layers by.

    Args:
        rank: of A and B.
        alpha: the scale is alpha / rank.
        layers: names of the linear layers, relative to the model.
    """
    made = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=layers)  # type: ignore[arg-type]  # 1.5 will do, too
    made._register_custom_module({nn.Linear: LoRALinear})  # peft's documented way to bring a layer of one's own
    return made
