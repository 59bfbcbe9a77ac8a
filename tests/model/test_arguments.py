"""Unusable arguments are refused by name."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeModel, MakeTokens
from equality import FAMILIES, one, run_training_pass
from rcc import (
    InputError,
    RCCForCausalLM,
)


def bad(model: RCCForCausalLM, tokens: MakeTokens) -> dict[str, Any]:
    """Calls that must fail, by name: the call, the error's class, and what its message must say."""
    text, context = one(tokens(20)), model.compress(one(tokens(20)))
    prompt = one(tokens(5))
    three = prompt.expand(3, -1)
    empty = torch.zeros(1, 0, dtype=torch.long)
    far = one([1, 97, 2])
    calls = {
        "rate does not divide": (lambda: model.compress(text, rate=3), InputError, "rate=3.*divide.*16"),
        "rate too large": (lambda: model.compress(text, rate=32), InputError, "rate=32"),
        "rate zero": (lambda: model.compress(text, rate=0), InputError, "rate=0"),
        "rate negative": (lambda: model.encode(text, rate=-4), InputError, "rate=-4"),
        "rate no number": (lambda: model.compress(text, rate="4"), InputError, "rate='4'"),  # type: ignore[arg-type]
        "rate in training": (
            lambda: run_training_pass(model, input_ids=prompt, context_ids=text, rate=5),
            InputError,
            "rate=5",
        ),
        "empty text": (lambda: model.compress(empty), InputError, "input_ids.*empty"),
        "no texts": (lambda: model.compress(torch.zeros(0, 5, dtype=torch.long)), InputError, "input_ids"),
        "one empty row": (
            lambda: model.compress(three, torch.tensor([[1] * 5, [0] * 5, [1] * 5])),
            InputError,
            "input_ids.*empty",
        ),
        "empty prompt": (lambda: model(input_ids=empty, context=context), InputError, "input_ids.*empty"),
        "empty prompt, generate": (lambda: model.generate(empty, context=context), InputError, "input_ids"),
        "empty context_ids": (
            lambda: run_training_pass(model, input_ids=prompt, context_ids=empty),
            InputError,
            "context_ids",
        ),
        "id too large": (lambda: model.compress(far), InputError, "input_ids.*97.*vocabulary of 97"),
        "id negative": (lambda: model.encode(one([1, -2])), InputError, "input_ids.*-2"),
        "id in prompt": (lambda: model(input_ids=far, context=context), InputError, "input_ids.*97"),
        "id in generate": (lambda: model.generate(far, context=context), InputError, "input_ids.*97"),
        "id in context_ids": (
            lambda: run_training_pass(model, input_ids=prompt, context_ids=far),
            InputError,
            "context_ids.*97",
        ),
        "not a tensor": (lambda: model.compress([[1, 2]]), InputError, "input_ids"),  # type: ignore[arg-type]
        "one dimension": (lambda: model.compress(text[0]), InputError, "input_ids"),
        "floating ids": (lambda: model.compress(text.float()), InputError, "input_ids"),
        "mask of another length": (
            lambda: model.compress(text, torch.ones(1, 5, dtype=torch.long)),
            InputError,
            "mask.*input_ids",
        ),
        "prompt's mask of another length": (
            lambda: model(input_ids=prompt, context=context, attention_mask=torch.ones(1, 10, dtype=torch.long)),
            InputError,
            "attention_mask",
        ),
        "prompt's mask of another length, generate": (
            lambda: model.generate(prompt, torch.ones(1, 10, dtype=torch.long), context),
            InputError,
            "attention_mask",
        ),
        "prompt's mask of another batch": (
            lambda: run_training_pass(
                model, input_ids=prompt, context_ids=text, attention_mask=torch.ones(3, 5, dtype=torch.long)
            ),
            InputError,
            "attention_mask",
        ),
        "labels of another length": (
            lambda: run_training_pass(model, input_ids=prompt, context_ids=text, labels=one([1, 2])),
            InputError,
            "labels",
        ),
        "batch of prompts": (lambda: model(input_ids=three, context=context), InputError, "1 texts?.*3.*expand"),
        "batch of prompts, generate": (lambda: model.generate(three, context=context), InputError, "expand"),
        "batch to append": (lambda: model.compress(three, context=context), InputError, "context.*3"),
        "batch of contexts": (
            lambda: model.compress(text, context=context.expand(2)),
            InputError,
            "context holds 2 texts.*1",
        ),
        "batch in training": (
            lambda: run_training_pass(model, input_ids=three, context_ids=text),
            InputError,
            "context_ids.*1.*input_ids.*3",
        ),
        "context and context_ids": (
            lambda: model(input_ids=prompt, context=context, context_ids=text),
            InputError,
            "context_ids is for training",
        ),
        "predictions outside training": (
            lambda: model(input_ids=prompt, context=context, predicted=torch.ones_like(prompt)),
            InputError,
            "predicted is for training",
        ),
        "predictions of another shape": (
            lambda: run_training_pass(model, input_ids=prompt, context_ids=text, predicted=one([1, 1])),
            InputError,
            "predicted has shape",
        ),
        "padding on the right": (
            lambda: model.generate(prompt, torch.tensor([[1, 1, 1, 1, 0]]), context),
            InputError,
            "attention_mask.*right.*left",
        ),
        "padding on the right, no context": (
            lambda: model.generate(prompt, torch.tensor([[1, 1, 1, 1, 0]])),
            InputError,
            "attention_mask.*right",
        ),
        "an empty prompt of a batch": (
            lambda: model.generate(prompt.expand(2, -1), torch.tensor([[1] * 5, [0] * 5]), context.expand(2)),
            InputError,
            "attention_mask|input_ids",
        ),
    }
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_input(tiny: MakeModel, tokens: MakeTokens, family: str) -> None:
    """Each unusable argument is refused with the right class and a one-line message that names the argument."""
    model = tiny(family)
    wrong = []
    for name, (call, kind, words) in bad(model, tokens).items():
        try:
            call()
            wrong.append(f"{name}: accepted")
        except Exception as error:
            message = str(error)
            if not isinstance(error, kind) or not re.search(words, message) or "\n" in message:
                wrong.append(f"{name}: {type(error).__name__}: {message.splitlines()[0][:150] if message else ''}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_untrained_rate_warns(tiny: MakeModel, tokens: MakeTokens, caplog: pytest.LogCaptureFixture) -> None:
    """A rate that divides the segment but was not trained works and says so, once; a trained one is silent."""
    model = tiny("llama", rates=(4, 8))
    with caplog.at_level(logging.WARNING, "rcc"):
        model.compress(one(tokens(20)))
        model.compress(one(tokens(20)), rate=8)
        assert not caplog.records
        model.compress(one(tokens(20)), rate=2)
        model.compress(one(tokens(20)), rate=2)
    assert caplog.text.count("not trained at rate 2") == 1
    assert "4, 8" in caplog.text


@pytest.mark.parametrize("after_context", [True, False])
def test_forward_gives_hidden_states_and_attentions(fresh: MakeModel, tokens: MakeTokens, after_context: bool) -> None:
    model = fresh(attn="eager")
    context = model.compress(torch.tensor([tokens(40)]), rate=4) if after_context else None
    out = model(torch.tensor([tokens(5)]), context=context, output_hidden_states=True, output_attentions=True)
    assert [t.shape[1] for t in out.hidden_states] == [5] * 4
    assert [t.shape[2:] for t in out.attentions] == [(5, 15 if after_context else 5)] * 3
    assert model(torch.tensor([tokens(5)]), context=context, use_cache=False, return_dict=True).hidden_states is None


@pytest.mark.parametrize("name", ["return_dict", "use_cache", "position_ids", "inputs_embeds", "past_key_values"])
def test_forward_refuses_by_name_what_it_cannot_give(tiny: MakeModel, tokens: MakeTokens, name: str) -> None:
    value = {"return_dict": False, "use_cache": True}.get(name, torch.zeros(1, 5))
    with pytest.raises(InputError, match=name):
        tiny()(torch.tensor([tokens(5)]), **{name: value})


@pytest.mark.parametrize("wrong", ["c.rcc", Path("c.rcc"), 5, torch.zeros(1)])
@pytest.mark.parametrize("use", ["forward", "generate", "compress"])
def test_what_is_no_context_is_refused_by_name(tiny: MakeModel, tokens: MakeTokens, use: str, wrong: Any) -> None:
    with pytest.raises(InputError, match="context must be a CompressedContext"):
        getattr(tiny(), use)(torch.tensor([tokens(5)]), context=wrong)
