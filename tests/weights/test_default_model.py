"""The default model: what it computes, that its context matters, what its card says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import reference as ref
from rcc import RCCForCausalLM, checkpoints, load_tokenizer
from rcc.defaults import DEFAULT_MODEL
from rcc.evaluation.reconstruction.teacher_forcing import teacher_forced
from rcc.runtime.precision import computing
from rcc.text.tokens import token_ids

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    text = (ROOT / "examples/simple-susan.txt").read_text(encoding="utf-8")
    return token_ids(load_tokenizer(DEFAULT_MODEL), text)[:, :256]


@pytest.fixture(scope="module")
def exact() -> RCCForCausalLM:
    """The model in float32, not to be changed."""
    return RCCForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)


@pytest.mark.parametrize("rate", [1, 4])
@torch.no_grad()
def test_it_reads_as_the_reference_does(exact: RCCForCausalLM, ids: torch.Tensor, rate: int) -> None:
    """The logits after a context are those of tests/reference.py, which shares no code with rcc."""
    text, prompt = ids[:, :50], ids[:, 50:60]
    want = ref.direct(exact, [text[0].tolist()], [rate], prompt[0].tolist())
    got = exact(prompt, context=exact.compress(text, rate=rate)).logits[0]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)


def test_a_wrong_context_is_seen(ids: torch.Tensor) -> None:
    """What the model recalls comes from the context: with another text's it knows far less; and exact reading most."""
    model = RCCForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=computing(torch.bfloat16, "cpu"))
    other = token_ids(load_tokenizer(DEFAULT_MODEL), (ROOT / "LICENSE").read_text(encoding="utf-8"))[:, :256]
    recalled = {
        name: teacher_forced(model, model.compress(text, rate=rate), ids[0]).accuracy
        for name, text, rate in (("right", ids, 4), ("wrong", other, 4), ("exact", ids, 1))
    }
    assert recalled["exact"] > recalled["right"] > recalled["wrong"] + 0.2


def test_the_card_states_the_facts(exact: RCCForCausalLM) -> None:
    """The model card names the size, the rates and the segment that the configuration has; what ships is small."""
    folder = checkpoints.shipped_models()[DEFAULT_MODEL]
    card = (folder / "README.md").read_text(encoding="utf-8")
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    assert f"{megabytes:.1f} MB" in card
    trainable = sum(tensor.numel() for tensor in exact.own_state_dict().values())
    assert f"{trainable / 1e6:.1f}M" in card
    assert all(f"{rate}×" in card for rate in exact.config.rates)
    assert re.search(rf"[Ss]egments of {exact.config.segment_length:,} tokens", card)
    assert exact.config.base["decoder"].source in checkpoints.BASES
    assert sum(file.stat().st_size for file in (ROOT / "src/rcc/weights").rglob("*") if file.is_file()) < 100e6
