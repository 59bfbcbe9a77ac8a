"""The shipped model is the warm start: its loss is the one that the warm start's own script computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rcc import RCCForCausalLM, checkpoints, load_tokenizer
from rcc.evaluation.reconstruction import PROMPT, teacher_forced
from rcc.prompting import token_ids

ROOT = Path(__file__).resolve().parent.parent
MODEL = "rcc-smollm2-135m"

# (rate, start of the 256-token span) → loss and token accuracy of the first 512 tokens of the example text, computed in
# float32 by the forward pass of the script that trained the weights (warmstart.py), which
# shares no code with rcc: segments as a batch, explicit masks, no cache
WARM_START = {
    (4, 0): (0.5944, 0.8171),
    (4, 100): (0.7217, 0.8171),
    (4, 256): (0.7176, 0.8171),
    (8, 0): (1.7949, 0.6341),
    (8, 100): (2.0994, 0.5772),
    (8, 256): (1.8429, 0.5854),
    (16, 0): (2.9179, 0.4634),
    (16, 100): (3.0683, 0.4390),
    (16, 256): (3.2141, 0.3699),
}


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    text = (ROOT / "examples/simple-susan.txt").read_text(encoding="utf-8")
    return token_ids(load_tokenizer(MODEL), text)[:, :512]


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
def test_forward_is_the_warm_starts(ids: torch.Tensor, dtype: torch.dtype, exact: float) -> None:
    """Training pass and cached pass; bfloat16 rounds at other places than the reference, hence the mean over spans."""
    model = RCCForCausalLM.from_pretrained(MODEL, dtype=dtype)
    off: dict[int, list[float]] = {}
    for (rate, start), (loss, accuracy) in WARM_START.items():
        span = ids[:, start : start + 256]
        labels = span.clone()
        labels[:, :PROMPT] = -100
        with torch.no_grad():
            trained = model(span, context_ids=ids, rate=rate, labels=labels)
        measured = teacher_forced(model, model.compress(ids, rate=rate), span[0])
        assert measured.tokens == 256 - PROMPT
        assert measured.loss == pytest.approx(trained.loss.item(), abs=exact)
        if dtype == torch.float32:
            assert measured.accuracy == pytest.approx(accuracy, abs=1e-4)
        assert measured.accuracy == pytest.approx(accuracy, abs=0.02)
        off.setdefault(rate, []).append(measured.loss - loss)
    for difference in off.values():
        assert abs(sum(difference) / len(difference)) < exact


def test_a_wrong_context_is_seen(ids: torch.Tensor) -> None:
    """What the model recalls comes from the context: with another text's it knows far less."""
    model = RCCForCausalLM.from_pretrained(MODEL)
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
    assert sum(f.stat().st_size for f in (ROOT / "src/rcc/models").rglob("*")) < 64e6
