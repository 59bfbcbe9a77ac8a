"""`readout="memory_tokens"`: compared with tests/reference.py, which appends the memory to each segment by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeExpected, MakeModel, batch, make_backbone, make_model, tokens
from equality import (
    CLOSE,
    LENGTHS,
    assert_central_difference,
    assert_same_model,
    exact_in_float64,
    gradients,
    new_tokens,
    one,
    run_training_pass,
    same_bits,
)
from rcc import InputError, ModelError, RCCConfig, RCCForCausalLM

MEMORY: dict[str, Any] = {"readout": "memory_tokens", "rates": (4, 2, 8, 16)}
SIDES: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "gpt_neox", "share": False},
    {"family": "gpt_neox", "share": False, "encoder": "mamba", "layers": (2, 3), "hidden": (32, 48)},
]


@pytest.mark.parametrize("states", ["last", "all"])
@pytest.mark.parametrize("sides", SIDES)
def test_compress_then_forward_and_generate(
    tiny: MakeModel, expected: MakeExpected, sides: dict[str, Any], states: str
) -> None:
    """Every kind of length at every rate, an append and a generated answer: the reference's."""
    model = tiny(**sides, states=states, **MEMORY)
    assert model.memory.shape == (8, model.encoder.config.hidden_size)
    want, prompt = expected(model), tokens(6, 1)
    for length in LENGTHS:
        for rate in (2, 4, 16):
            ids = tokens(length)
            context = model.compress(one(ids), rate=rate)
            assert len(context) == -(-length // rate)
            got = model(input_ids=one(prompt), context=context).logits[0]
            torch.testing.assert_close(got, want.logits([ids], prompt, rate), **CLOSE)
    longer = model.compress(one(tokens(21, 2)), context=context)
    out = model.generate(one(prompt), context=longer, max_new_tokens=4)
    assert new_tokens(out, 6)[0] == want.greedy([ids, tokens(21, 2)], prompt, 4, [16, 4])
    vectors = model.encode(one(tokens(37)))
    reference = want.vectors([tokens(37)])
    torch.testing.assert_close(vectors.states[0], reference if states == "all" else reference[:, -1:], **CLOSE)
    assert same_bits(model.prefix(vectors), model.compress(one(tokens(37))))


def test_every_memory_embedding_matters(tiny: MakeModel, expected: MakeExpected) -> None:
    """Another value of any one of those that are used moves the logits; one that a higher rate leaves out does not."""
    model = tiny("llama", states="last", **MEMORY)
    ids, prompt = tokens(16), tokens(6, 1)
    for rate, used in ((2, 8), (4, 4)):
        want = expected(model).logits([ids], prompt, rate)
        for i in range(8):
            other = copy.deepcopy(model)
            with torch.no_grad():
                other.memory[i] += 0.5
            change = (expected(other).logits([ids], prompt, rate) - want).abs().max()
            assert (change > 1e-2) == (i < used), (rate, i)


@pytest.mark.parametrize("padding", ["none", "repeat"])
@pytest.mark.parametrize("sides", SIDES)
def test_batch_and_training(tiny: MakeModel, expected: MakeExpected, sides: dict[str, Any], padding: str) -> None:
    """Texts of different lengths in one batch, padded on either side, at once or in pieces, cached or in one training
    pass: each row is the reference's of its own."""
    model = tiny(**sides, **MEMORY, segment_padding=padding)
    want = expected(model)
    texts = [tokens(length, length) for length in LENGTHS]
    prompts = [tokens(length, 1) for length in (6, 2, 9, 4, 9)]
    prompt_ids, prompt_mask = batch(prompts, "left")
    logits = [
        model(prompt_ids, prompt_mask, context=model.compress(*batch(texts, side), batch_tokens=at_once)).logits
        for side, at_once in (("left", 1), ("right", 4096))
    ]
    ids, mask = batch(texts)
    logits.append(run_training_pass(model, prompt_ids, prompt_mask, context_ids=ids, context_mask=mask).logits)
    for b, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        reference = want.logits([text], prompt)
        for got in logits:
            torch.testing.assert_close(got[b, -len(prompt) :], reference, **CLOSE)


@pytest.mark.parametrize("states", ["last", "all"])
def test_gradients(states: str) -> None:
    """The memory is trained, beside frozen bases too: its gradient is the central difference in float64, and zero for
    embeddings that a higher rate leaves out."""
    model = exact_in_float64(make_model("llama", states=states, **MEMORY))
    assert model.memory.requires_grad
    got = gradients(model, tokens, batch)
    assert got["memory"].abs().amax(1).gt(0).tolist() == [True] * 4 + [False] * 4
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert_central_difference(model, model.memory, tokens, batch)


def test_memory_in_float32_beside_a_base_in_bfloat16() -> None:
    """As in training: a pass under autocast reaches the memory, and its gradient is close to that in float32."""
    model = make_model("llama", **MEMORY)
    want = gradients(model, tokens, batch)["memory"].clone()
    model.to(torch.bfloat16).memory.data = model.memory.data.float()
    assert len(model.compress(one(tokens(37)))) == 10
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, tokens, batch)["memory"]
    assert got.dtype == torch.float32
    assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("reentrant", [None, True])
def test_gradient_checkpointing(reentrant: bool | None) -> None:
    """Recomputing activations gives the memory the same gradient."""
    model = make_model("llama", **MEMORY).train()
    want = gradients(model, tokens, batch)["memory"].clone()
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, tokens, batch)["memory"], want, rtol=1e-4, atol=1e-6)


def test_as_made() -> None:
    """The embeddings are made the same every time, close to the mean of the encoder's own, and differ."""
    base = make_backbone("llama")
    config = RCCConfig(segment_length=16, rates=[4, 2], readout="memory_tokens")
    memory = RCCForCausalLM.from_base(base, config=config).memory
    assert torch.equal(memory, RCCForCausalLM.from_base(base, config=config).memory)
    table: Any = base.get_input_embeddings().weight
    assert memory.shape == (8, 48)
    assert ((memory - table.mean(0)).abs() < 0.5 * table.std(0)).all()
    assert torch.cdist(memory, memory).add(torch.eye(8)).min() > 0.1
    assert RCCForCausalLM.from_base(base, config=config, dtype=torch.bfloat16).memory.dtype == torch.bfloat16
    assert RCCForCausalLM.from_base(base, config=RCCConfig(segment_length=16, rates=[4])).memory is None


def test_save_and_load(tmp_path: Path) -> None:
    """Saved and loaded it is the same model, `memory` among its own weights; the fingerprint follows it."""
    model = make_model("llama", **MEMORY)
    assert "memory" in model.own_state_dict()
    model.save_pretrained(tmp_path / "model")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_model(model, loaded, tokens)
    with torch.no_grad():
        loaded.memory[7, 3] += 0.01
    assert loaded.fingerprint != model.fingerprint
    state = model.own_state_dict()
    del state["memory"]
    with pytest.raises(ModelError, match="lack memory"):
        loaded.load_own_state_dict(state)


def test_a_rate_without_enough_memory(tiny: MakeModel) -> None:
    """A rate below the trained ones is refused wherever it is given, an untrained one above them is not."""
    model = tiny("llama", **MEMORY)
    text = one(tokens(20))
    calls: list[Callable[[], object]] = [
        lambda: model.compress(text, rate=1),
        lambda: model.encode(text, rate=1),
        lambda: run_training_pass(model, input_ids=text, context_ids=text, rate=1),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"rate=1 .*memory tokens.*use 2 or a higher"):
            call()
    config = RCCConfig(segment_length=16, rates=[8, 2], readout="memory_tokens")
    assert [config.check_rate(rate) for rate in (None, 2, 4, 16)] == [8, 2, 4, 16]
    assert config.memory_length == 8
    assert RCCConfig(segment_length=16, rates=[8, 2]).memory_length == 0


def test_segment_and_memory_fit_the_encoder() -> None:
    """Segment and memory together may fill the encoder's positions and not exceed them."""
    for rates, fits in (([8], True), ([4], False)):
        config = RCCConfig(segment_length=32, rates=rates, readout="memory_tokens")
        if fits:
            assert len(RCCForCausalLM.from_base(make_backbone("llama", window=36), config=config).memory) == 4
            continue
        with pytest.raises(InputError, match=r"segment_length=32 with its 8 memory tokens.* 36 positions"):
            RCCForCausalLM.from_base(make_backbone("llama", window=36), config=config)
