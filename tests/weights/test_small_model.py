"""The smaller shipped model: what it computes, what it knows, what its card says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from conftest import MakeExpected
from equality import run_training_pass
from rcc import RCCForCausalLM, checkpoints, load_tokenizer
from rcc.evaluation.reconstruction.teacher_forcing import PROMPT, teacher_forced
from rcc.runtime.precision import computing
from rcc.text.tokens import token_ids

ROOT = Path(__file__).resolve().parents[2]
MODEL = "rcc-smollm2-135m"


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    text = (ROOT / "examples/simple-susan.txt").read_text(encoding="utf-8")
    return token_ids(load_tokenizer(MODEL), text)[:, :512]


@pytest.mark.parametrize("rate", [4, 8, 16])
def test_what_it_recalls_is_what_the_reference_recalls(ids: torch.Tensor, expected: MakeExpected, rate: int) -> None:
    """A segment and a part of one; loss of the training pass and after a stored context, in float32 and, less exactly,
    in bfloat16, against tests/reference.py, which shares no code with rcc."""
    text, span = ids[:, :300], ids[:, 200:280]
    labels = span.clone()
    labels[:, :PROMPT] = -100
    model = RCCForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        logits = expected(model).logits([text[0].tolist()], span[0].tolist(), rate)
        wanted = torch.nn.functional.cross_entropy(logits[PROMPT - 1 : -1], span[0, PROMPT:]).item()
    assert wanted < 4
    for dtype, exact in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        model = RCCForCausalLM.from_pretrained(MODEL, dtype=dtype)
        with torch.no_grad():
            trained = run_training_pass(model, span, context_ids=text, rate=rate, labels=labels).loss.item()
        measured = teacher_forced(model, model.compress(text, rate=rate), span[0])
        assert measured.tokens == span.shape[1] - PROMPT
        assert measured.loss == pytest.approx(wanted, abs=exact)
        assert trained == pytest.approx(wanted, abs=exact)


def test_a_wrong_context_is_seen(ids: torch.Tensor) -> None:
    """What the model recalls comes from the context: with another text's it knows far less."""
    model = RCCForCausalLM.from_pretrained(MODEL, dtype=computing(torch.bfloat16, "cpu"))
    other = token_ids(load_tokenizer(MODEL), (ROOT / "LICENSE").read_text(encoding="utf-8"))[:, :512]
    right = teacher_forced(model, model.compress(ids, rate=4), ids[0])
    wrong = teacher_forced(model, model.compress(other, rate=4), ids[0])
    assert right.accuracy > wrong.accuracy + 0.3


def test_saved_whole_it_needs_nothing_else(ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `full=True` the folder works on a machine that has neither the base nor a network, tokenizer included."""
    model = RCCForCausalLM.from_pretrained(MODEL)
    tokenizer = load_tokenizer(MODEL)
    model.save_pretrained(tmp_path / "whole", full=True)
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    again = RCCForCausalLM.from_pretrained(tmp_path / "whole")
    assert again.fingerprint == model.fingerprint
    context = model.compress(ids)
    assert torch.equal(
        again.generate(ids[:, :10], context=context, max_new_tokens=8),
        model.generate(ids[:, :10], context=context, max_new_tokens=8),
    )
    assert load_tokenizer(tmp_path / "whole").decode(ids[0, :4]) == tokenizer.decode(ids[0, :4])


def test_the_card_states_the_facts() -> None:
    """The model card names the size, the rates and the base that the configuration has."""
    folder = checkpoints.shipped_models()[MODEL]
    card = (folder / "README.md").read_text(encoding="utf-8")
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    assert f"{megabytes:.1f} MB" in card
    model = RCCForCausalLM.from_pretrained(MODEL)
    trainable = sum(tensor.numel() for tensor in model.own_state_dict().values())
    assert f"{trainable / 1e6:.1f}M" in card
    assert all(f"{rate}×" in card for rate in model.config.rates)
    assert re.search(rf"Segments of {model.config.segment_length} tokens", card)
