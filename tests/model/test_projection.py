"""Which encoder state feeds which decoder layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import reference as ref
from conftest import MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, new_tokens, one, prompt_logits, sides
from rcc import (
    RCCConfig,
)


@sides
def test_every_part_of_the_tiny_models_matters(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, sides: dict[str, Any]
) -> None:
    """Zeroing any one projection, swapping two segments, dropping the encoder's LoRA or changing one token of the
    last, partial group moves the prompt's logits by more than 1e-2: a fault in any of them cannot hide."""
    model = tiny(**sides)
    ids, prompt = tokens(39), tokens(6, 1)
    want = expected(model).logits([ids], prompt)
    assert len(model.projections) == 3
    for i in range(len(model.projections)):
        damaged = copy.deepcopy(model)
        torch.nn.init.zeros_(damaged.get_parameter(f"projections.{i}.weight"))
        assert (expected(damaged).logits([ids], prompt) - want).abs().max() > 1e-2, f"P_{i}"
    swapped = ids[16:32] + ids[:16] + ids[32:]
    assert (expected(model).logits([swapped], prompt) - want).abs().max() > 1e-2
    changed = [*ids[:-1], ids[-1] % 96 + 1]
    assert (expected(model).logits([changed], prompt) - want).abs().max() > 1e-2
    if sides.get("share", True):
        damaged = copy.deepcopy(model)
        for name, parameter in damaged.encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
        assert (expected(damaged).logits([ids], prompt) - want).abs().max() > 1e-2


@pytest.mark.parametrize("layer_map", ["duplicate", "average"])
@pytest.mark.parametrize("layers", [(2, 4), (4, 2), (3, 4), (5, 3)])
@pytest.mark.parametrize(("encoder", "family"), [("gpt_neox", "llama"), ("llama", "gpt_neox")])
def test_unequal_depth_and_width(
    tiny: MakeModel,
    expected: MakeExpected,
    tokens: MakeTokens,
    encoder: str | None,
    family: str,
    layers: tuple[int, int],
    layer_map: str,
) -> None:
    """Separate backbones of another family, depth and width follow the rules of `layer_map`, against the reference's
    own derivation of them; the vectors carry every encoder state."""
    model = tiny(family, encoder=encoder, share=False, layers=layers, hidden=(32, 48), layer_map=layer_map)
    ids, prompt = tokens(37), tokens(6, 1)
    want = expected(model)
    context = model.compress(one(ids))
    torch.testing.assert_close(prompt_logits(model, context, prompt), want.logits([ids], prompt), **CLOSE)
    out = model.generate(input_ids=one(prompt), context=context, max_new_tokens=4)
    assert new_tokens(out, 6)[0] == want.greedy([ids], prompt, 4)
    states = model.encode(one(ids)).states
    assert states.shape == (1, 10, layers[0] + 1, 32)
    torch.testing.assert_close(states[0], want.vectors([ids]), **CLOSE)


@pytest.mark.parametrize("layers", [(3, 3), (2, 4), (4, 2), (3, 5), (30, 24)])
def test_layer_map_by_hand(layers: tuple[int, int]) -> None:
    """The map of encoder states, written down from the definition in exact arithmetic; equal depths are the paper's."""
    from rcc.model.projection import layer_map

    depth_e, depth_d = layers
    marks = torch.arange(depth_e + 1, dtype=torch.float64)[None, :, None]
    for kind in ("duplicate", "average"):
        sources = layer_map(depth_e, depth_d, RCCConfig(layer_map=kind))
        got = [sum(source) / len(source) for source in sources]
        reads = ref.decoder_inputs(marks, depth_d, kind)
        assert got == pytest.approx([float(read) for read in reads[:depth_d]])
        if depth_e == depth_d:
            assert got == list(range(depth_d))
    assert layer_map(depth_e, depth_d, RCCConfig(states="last")) == [[depth_e]]
