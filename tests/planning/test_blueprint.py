"""Models without storage have the published sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import conftest
from conftest import make_model, tokens
from rcc import RCCConfig
from rcc.model import backbones
from rcc.planning import shapes
from rcc.planning.activations import Batch, activations
from rcc.planning.blueprint import Blueprint, position_bytes

DECODERS = set(backbones.BLOCKS) - set(backbones.STATE_SPACE)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_published_figures() -> None:
    """Figures that others have published of these models."""
    counts = {
        "pythia-1.4b": 1_414_647_808,
        "llama-3.1-8b": 8_030_261_248,
        "qwen2.5-coder-0.5b": 494_032_768,
        "qwen3-4b": 4_022_468_096,
        "mistral-7b": 7_248_023_552,
        "gemma-3-1b": 999_885_952,
        "smollm2-135m": 134_515_008,
    }
    assert counts.items() <= {name: shape.parameters for name, shape in shapes.SHAPES.items()}.items()
    with torch.device("meta"):
        config = AutoConfig.for_model(**shapes.SHAPES["mistral-7b"].config | {"vocab_size": 32000})  # version 0.1
        first = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in first.parameters()) == 7_241_732_096
    for name, size in (("pythia-1.4b", 196_608), ("llama-3.1-8b", 131_072)):
        assert position_bytes(Blueprint(RCCConfig(share_base=True), shapes.find(name)).build()) == size


@pytest.mark.parametrize("name", [n for n, s in shapes.SHAPES.items() if s.config["model_type"] in DECODERS])
def test_bytes_of_a_position(name: str) -> None:
    """Keys and values of every head of every layer, sliding or not, two bytes each."""
    shape = shapes.find(name)
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    config = RCCConfig(share_base=True, states="last")
    assert position_bytes(Blueprint(config, shape).build()) == 2 * shape.num_hidden_layers * heads * width * 2


@pytest.mark.parametrize("family", conftest.DECODERS)
def test_bytes_of_every_family(family: str) -> None:
    """A position takes what one takes in a context, whatever the kind of layers."""
    model = make_model(family, dtype=torch.bfloat16)
    context = model.compress(torch.tensor([tokens(37)]))
    blueprint = Blueprint(model.config, model.decoder.config)
    assert position_bytes(blueprint.build()) == context.nbytes / len(context)
    computed = activations(blueprint, Batch(2, 48, 4, 20))
    assert 0 < computed.checkpointed < computed.kept
