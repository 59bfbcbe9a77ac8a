"""A fingerprint names the model that made a context."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MakeModel, MakeTokens
from equality import one
from rcc import (
    CompressedContext,
    ContextError,
    RCCForCausalLM,
)


def test_fingerprint(fresh: MakeModel, tokens: MakeTokens, tmp_path: Path) -> None:
    """The fingerprint stays through save, load and any precision of loading; it changes with any weight (projection,
    LoRA, base), also in place, and with any setting that changes contexts, but not with the model's name."""
    model = fresh("llama")
    name = model.fingerprint
    assert fresh("llama").fingerprint == name
    assert fresh("llama", name="another").fingerprint == name
    assert copy.deepcopy(model).fingerprint == name
    model.save_pretrained(tmp_path / "m")
    for dtype in (None, torch.float32, torch.bfloat16, "float16"):
        loaded = RCCForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
        assert loaded.fingerprint == name
        if dtype is not None:
            assert loaded.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    loaded.save_pretrained(tmp_path / "n")
    assert json.loads((tmp_path / "n" / "config.json").read_text())["fingerprint"] == name
    names = {name}
    for part in ("projections.1.weight", "encoder.layers.0.", "decoder.model.layers.2.", "decoder.model.embed"):
        other = RCCForCausalLM.from_pretrained(tmp_path / "m")
        parameter = next(p for n, p in other.named_parameters() if n.startswith(part))
        with torch.no_grad():
            parameter.view(-1)[3] += 0.01
        names.add(other.fingerprint)
    settings: list[dict[str, Any]] = [
        {"segment_length": 32},
        {"states": "last"},
        {"layer_map": "average"},
        {"segment_padding": "repeat"},
        {"lora_alpha": 3.0},
    ]
    names |= {fresh("llama", **setting).fingerprint for setting in settings}
    assert len(names) == 1 + 4 + len(settings)


def test_context_of_another_model(tiny: MakeModel, tokens: MakeTokens) -> None:
    """A context or vectors that another model made are refused in every place where they can be given."""
    model, other = tiny("llama"), tiny("llama", seed=9)
    context, prompt = other.compress(one(tokens(20))), one(tokens(5))
    calls: list[Callable[[], object]] = [
        lambda: model(input_ids=prompt, context=context),
        lambda: model.generate(prompt, context=context),
        lambda: model.compress(prompt, context=context),
        lambda: model.prefix(other.encode(prompt)),
        lambda: model.prefix(model.encode(prompt), context=context),
    ]
    for call in calls:
        with pytest.raises(ContextError, match="made by another model"):
            call()
    with pytest.raises(ContextError, match="different models"):
        CompressedContext.stack([context, model.compress(prompt)])
