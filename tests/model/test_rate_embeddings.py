"""`rate_embeddings`: compared with tests/reference.py, which is told what to add at each rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeExpected, batch, make_model, tokens
from equality import (
    CLOSE,
    assert_central_difference,
    assert_same_model,
    exact_in_float64,
    gradients,
    one,
    run_training_pass,
    same_bits,
)
from rcc import InputError, ModelError, RCCForCausalLM

RATES: dict[str, Any] = {"rates": (4, 16), "rate_embeddings": True}
SIDES: list[dict[str, Any]] = [
    {"family": "llama"},
    {"family": "llama", "readout": "memory_tokens"},
    {"family": "gpt_neox", "share": False, "encoder": "mamba", "layers": (2, 3), "hidden": (32, 48)},
]


def learnt(family: str = "llama", **sides: Any) -> RCCForCausalLM:
    """A model whose embeddings of the rates 4 and 16 are not zero."""
    model = make_model(family, **sides, **RATES)
    with torch.no_grad():
        model.rate_embeddings.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("sides", SIDES)
def test_every_rate_reads_with_its_own(expected: MakeExpected, sides: dict[str, Any]) -> None:
    """Trained rates, one between them, those beyond; texts of several rates; one pass as in training; a batch."""
    model = learnt(**sides)
    four, sixteen = model.rate_embeddings.detach()
    offsets = {4: four, 8: (four + sixteen) / 2, 16: sixteen}
    if model.memory is None:
        offsets |= {1: four, 2: four}
    want = expected(model)
    want.settings["offsets"] = offsets
    prompt, texts = tokens(6, 1), [tokens(37), tokens(21, 2)]
    ids, mask = batch(texts)
    for rate in offsets:
        context = model.compress(one(texts[0]), rate=rate)
        for got in (
            model(one(prompt), context=context).logits[0],
            run_training_pass(model, torch.tensor([prompt] * 2), context_ids=ids, context_mask=mask, rate=rate).logits[
                0
            ],
        ):
            torch.testing.assert_close(got, want.logits(texts[:1], prompt, rate), **CLOSE)
        vectors = model.encode(one(texts[0]), rate=rate)
        assert same_bits(model.prefix(vectors), context)
    longer = model.compress(one(texts[1]), rate=16, context=model.compress(one(texts[0]), rate=4))
    got = model(one(prompt), context=longer).logits[0]
    torch.testing.assert_close(got, want.logits(texts, prompt, [4, 16]), **CLOSE)


def test_the_order_of_rates_does_not_matter() -> None:
    model, other = learnt(), make_model("llama", rates=(16, 4), rate_embeddings=True)
    with torch.no_grad():
        other.rate_embeddings.copy_(model.rate_embeddings.flip(0))
    for rate in (2, 4, 8, 16):
        assert same_bits(model.compress(one(tokens(37)), rate=rate), other.compress(one(tokens(37)), rate=rate))


def test_nothing_changes_before_they_are_learnt() -> None:
    """A model that is given embeddings, or other rates, answers as before; what it had learnt of rates is kept."""
    model = make_model("llama", rates=(4,))
    before = {rate: model.compress(one(tokens(37)), rate=rate) for rate in (2, 4, 8, 16)}
    model.set_rates([4, 16], embeddings=True)
    assert model.rate_embeddings.requires_grad
    assert all(same_bits(before[rate], model.compress(one(tokens(37)), rate=rate)) for rate in before)
    model, prompt, text = learnt(), one(tokens(5)), one(tokens(37))
    before = {rate: model(prompt, context=model.compress(text, rate=rate)).logits for rate in (2, 4, 8, 16)}
    model.set_rates([8, 4, 16], embeddings=True)
    assert model.config.rates == [8, 4, 16]
    assert model.rate_embeddings.shape[0] == 3
    for rate, logits in before.items():
        torch.testing.assert_close(model(prompt, context=model.compress(text, rate=rate)).logits, logits, **CLOSE)
    with pytest.raises(InputError, match="rate_embeddings to true"):
        model.set_rates([4], embeddings=False)
    with pytest.raises(InputError, match="rate=3 does not divide"):
        model.set_rates([3], embeddings=True)


def test_gradients() -> None:
    """Central differences in float64; the rate that is not read has none."""
    model = exact_in_float64(learnt())
    got = gradients(model, tokens, batch)
    assert got["rate_embeddings"].abs().amax(1).gt(0).tolist() == [True, False]
    assert_central_difference(model, model.rate_embeddings, tokens, batch)


def test_save_and_load(tmp_path: Path) -> None:
    model = learnt()
    model.save_pretrained(tmp_path / "model")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_model(model, loaded, tokens)
    assert loaded.config.rate_embeddings
    with torch.no_grad():
        loaded.rate_embeddings[1, 3] += 0.01
    assert loaded.fingerprint != model.fingerprint
    state = model.own_state_dict()
    del state["rate_embeddings"]
    with pytest.raises(ModelError, match="lack rate_embeddings"):
        loaded.load_own_state_dict(state)
