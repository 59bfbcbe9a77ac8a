"""A layer whose LoRA is added within a product computes what peft's does, and its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from rcc.model import lora

ALPHA, RANK = 6.0, 4


class Body(nn.Module):
    """One linear layer, by a name."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 40, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def adapted(bias: bool = True) -> tuple[nn.Module, nn.Module]:
    """The same random layer with LoRA of ours, and of peft's."""
    torch.manual_seed(0)
    ours = Body(bias).requires_grad_(False)
    theirs = copy.deepcopy(ours)
    inject_adapter_in_model(lora.settings(RANK, ALPHA, ["layer"]), ours)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"]), theirs)  # type: ignore[arg-type]
    for parameter in ours.parameters():
        parameter.data.normal_()
    theirs.load_state_dict(ours.state_dict())  # the very same names
    return ours, theirs


def gradients(body: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the input and of everything that learns, for a loss that weighs every output otherwise."""
    x = x.clone().requires_grad_()
    out = body(x).float()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None
    learnt = {name: p.grad for name, p in body.named_parameters() if p.grad is not None}
    assert len(learnt) == 2
    return {"x": x.grad, **learnt}


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_peft(bias: bool) -> None:
    ours, theirs = adapted(bias)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-5)
    mine, other = gradients(ours, x), gradients(theirs, x)
    assert mine.keys() == other.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-4, rtol=1e-5)


def test_under_autocast_the_output_has_the_weights_precision() -> None:
    ours, theirs = adapted()
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out, want = ours(x), theirs(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, want, atol=0.3, rtol=0.03)
    assert gradients(ours, x)["layer.lora_B.default.weight"].dtype == torch.float32


def test_switched_off_it_is_the_base() -> None:
    ours, _ = adapted()
    x = torch.randn(3, 24)
    assert isinstance(ours.layer, lora.LoRALinear)
    ours.layer.enable_adapters(False)
    assert torch.equal(ours(x), ours.layer.base_layer(x))
    ours.layer.enable_adapters(True)
    assert not torch.allclose(ours(x), ours.layer.base_layer(x))
