"""LoRA, and what is frozen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import MakeBatch, MakeModel, MakeTokens
from equality import CLOSE, FAMILIES, gradients


@pytest.mark.parametrize("states", ["all", "last"])
@pytest.mark.parametrize(("share", "lora"), [(True, 4), (False, 0), (False, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_everything_that_is_trained(
    fresh: MakeModel, tokens: MakeTokens, batch: MakeBatch, family: str, share: bool, lora: int, states: str
) -> None:
    """Every trainable parameter gets a gradient that is not zero and every frozen one none; what is trained is what
    should be: LoRA alone where there is LoRA, else everything but what reaches no loss (with all states, the encoder's
    last block and final norm)."""
    model = fresh(family, share=share, lora=lora, states=states)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    got = gradients(model, tokens, batch)
    for name, gradient in got.items():
        if name in trained:
            assert gradient is not None, name
            assert gradient.abs().max() > 0, name
        else:
            assert gradient is None, name

    def reaches_no_loss(name: str) -> bool:
        parts = ("encoder.layers.2.", "encoder.norm.", "encoder.final_layer_norm.")
        return states == "all" and name.startswith(parts)

    def wanted(name: str) -> bool:
        own = name.startswith("projections.") or ".lora_" in name or not lora
        return own and not reaches_no_loss(name)

    assert trained == {name for name in got if wanted(name)}
    assert any(name.startswith("encoder.layers.0.") for name in trained)
    assert any(name.startswith("decoder.") for name in trained)


def test_a_shared_base_is_shared(fresh: MakeModel) -> None:
    """The encoder's base weights are the decoder's very tensors, in any precision; LoRA is each side's own."""
    for model in (fresh("llama"), fresh("gpt_neox").to(torch.bfloat16)):
        decoder = {id(p) for p in model.decoder.parameters()}
        for name, parameter in model.encoder.named_parameters():
            assert (id(parameter) in decoder) == (".lora_" not in name), name


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 1.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_scale(tiny: MakeModel, family: str, alpha: float | None, scale: float) -> None:
    """Every linear layer of every block on both sides computes W x + b + (alpha / rank) · B A x; alpha defaults to the
    rank."""
    model = tiny(family, lora_alpha=alpha)
    for body in (model.encoder, model.decoder.base_model):
        for block in body.layers:
            layers = [m for m in block.modules() if hasattr(m, "base_layer")]
            assert len(layers) == {"llama": 7, "gpt_neox": 4}[family]
            for layer in layers:
                x = torch.linspace(-1, 1, layer.in_features)[None]
                low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                want = F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + scale * x @ low.T @ high.T
                torch.testing.assert_close(layer(x), want, **CLOSE)
