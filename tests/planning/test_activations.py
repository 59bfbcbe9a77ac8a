"""What a training pass is estimated to keep is what it allocates."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_backbone, tokens
from rcc import RCCConfig, RCCForCausalLM, SideConfig
from rcc.model.freezing import freeze
from rcc.planning import blueprint as blueprints
from rcc.planning import plan as planning
from rcc.planning.activations import Batch, activations
from rcc.planning.blueprint import Blueprint, position_bytes
from rcc.runtime import memory
from rcc.training.objective import Objective


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def allocated(model: RCCForCausalLM, batch: Batch, dtype: torch.dtype) -> int:
    """Bytes that torch allocates at most, less gradients, while a real model learns, by torch's own profiler."""
    generator = torch.Generator().manual_seed(0)
    ids, prompt = (torch.randint(1, 500, (batch.rows, n), generator=generator) for n in (batch.tokens, batch.target))
    objective = Objective(model, dtype).train()

    def step() -> None:
        keep = torch.arange(batch.target - 1)
        objective(prompt, prompt, keep, ids, batch.rate)["loss"].backward()

    step()
    for p in model.parameters():  # they are there: what is added to them is not kept
        p.grad = None if p.grad is None else torch.zeros_like(p.grad)
    return memory.allocated(step)


WAYS: dict[str, tuple[int, list[str], bool, torch.dtype, str]] = {
    "LoRA": (8, [], False, torch.bfloat16, "sdpa"),
    "LoRA, checkpointed": (8, [], True, torch.bfloat16, "sdpa"),
    "LoRA, frozen": (8, ["encoder"], False, torch.bfloat16, "sdpa"),
    "all weights": (0, [], False, torch.bfloat16, "sdpa"),
    "all weights, checkpointed": (0, [], True, torch.bfloat16, "sdpa"),
    "float32, eager": (8, [], False, torch.float32, "eager"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_activations(way: tuple[int, list[str], bool, torch.dtype, str]) -> None:
    """Eight blocks, of which three are run: between what torch allocates for the real model and half as much again."""
    lora, frozen, recompute, dtype, attention = way
    shape = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        attn_implementation=attention,
    )
    config = RCCConfig(
        segment_length=128, rates=[8], share_base=lora > 0, encoder=SideConfig(lora), decoder=SideConfig(lora)
    )
    batch = Batch(4, 256, 8, 96)
    computed = activations(Blueprint(config, shape, None if lora else shape, dtype, attention), batch, frozen)
    sides = [AutoModelForCausalLM.from_config(shape, dtype=dtype) for _ in range(1 if lora else 2)]
    model = RCCForCausalLM.from_base(sides[0], None if lora else sides[1], config)
    freeze(model, frozen, dtype)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    real = allocated(model, batch, dtype)
    assert real < (computed.checkpointed if recompute else computed.kept) < 1.5 * real


@pytest.mark.parametrize("rate", [1, 8])
def test_activations_of_a_direct_prefix(rate: int) -> None:
    """As of any other; at rate 1 the decoder reads what the encoder would."""
    shape = make_backbone("qwen2", 6, 64, vocab_size=512).config
    config = RCCConfig(
        segment_length=64, rates=[8, 1], prefix="direct", share_base=True, encoder=SideConfig(4), decoder=SideConfig(4)
    )
    batch = Batch(4, 192, rate, 96)
    computed = activations(Blueprint(config, shape, None, torch.float32), batch)
    model = RCCForCausalLM.from_base(make_backbone("qwen2", 6, 64, vocab_size=512), config=config)
    freeze(model, (), torch.float32)
    real = allocated(model, batch, torch.float32)
    assert real < computed.kept < 1.5 * real
    built = Blueprint(config, shape, None, torch.float32).build()
    assert planning.added_parameters(built)["sink"] == 6 * 64
    assert position_bytes(built) == model.compress(torch.tensor([tokens(40)]), rate=8).nbytes // 5


@pytest.mark.parametrize("depths", [(5, 5), (4, 6), (6, 4)])
def test_three_blocks_stand_for_all(depths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, decoder = make_backbone("gpt_neox", depths[0], 32).config, make_backbone("gpt_neox", depths[1]).config
    config = RCCConfig(segment_length=32, rates=[4], share_base=False, encoder=SideConfig(0), decoder=SideConfig(0))
    blueprint = Blueprint(config, decoder, encoder)
    for frozen in ([], ["encoder"]):
        few = activations(blueprint, Batch(2, 128, 4, 64), frozen)
        with monkeypatch.context() as patch:
            patch.setattr(blueprints, "TRACED", 99)
            whole = activations(blueprint, Batch(2, 128, 4, 64), frozen)
        assert few.kept == pytest.approx(whole.kept, rel=0.02)
        assert few.checkpointed == pytest.approx(whole.checkpointed, rel=0.05)


def test_blocks_of_every_kind_are_run() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4}
    shape = AutoConfig.for_model("qwen3", **sliding, num_hidden_layers=6)
    cut = Blueprint(RCCConfig(), shape).shallow().decoder
    assert (cut.num_hidden_layers, len(cut.layer_types)) == (3, 3)
    assert set(cut.layer_types) == set(shape.layer_types) == {"full_attention", "sliding_attention"}
    assert len(shape.layer_types) == 6


@pytest.mark.parametrize("frozen", [[], ["encoder"]])
def test_a_state_space_encoder_is_not_run(frozen: list[str]) -> None:
    """Its share is 34 bytes · width a token and block, where it learns: 4 blocks of it run for 3 of the decoder."""
    config = RCCConfig(segment_length=32, rates=[4], share_base=False, encoder=SideConfig(0), decoder=SideConfig(0))
    blueprint = Blueprint(config, make_backbone("llama").config, make_backbone("mamba", 4, 32).config)
    computed = activations(blueprint, Batch(2, 128, 4, 64), frozen)
    other = activations(blueprint, Batch(2, 128, 4, 64), ["encoder"])
    share = 34 * 32 * 2 * 128 * blueprint.states[-1]
    assert computed.kept - other.kept == pytest.approx(0 if frozen else share, abs=0.05 * other.kept)


def test_what_grows_with_what() -> None:
    """Activations follow the texts of a batch, and nothing is random."""
    config = RCCConfig(segment_length=64, share_base=True, encoder=SideConfig(4), decoder=SideConfig(4))
    blueprint = Blueprint(config, make_backbone("llama").config)
    one, again, four = (activations(blueprint, Batch(n, 256, 32, 64)) for n in (1, 1, 4))
    assert one == again
    assert four.kept == pytest.approx(4 * one.kept, rel=0.05)
