"""Contexts in 8 bits: half the bytes, the same answers within what 8 bits tell apart, refused where damaged."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import MakeModel, MakeTokens
from equality import one
from rcc import CompressedContext, ContextError, InputError
from rcc.context import container
from rcc.context.eight_bits import EightBits
from rcc.context.information import of_file
from rcc.context.manifest import GROUP

PREFIXES = ["residual", "direct"]


@pytest.mark.parametrize("n", [1, GROUP, GROUP + 1, 3 * GROUP - 1])
def test_rounding(n: int) -> None:
    """Every value is within half a step, and a step is a 127th of the largest value of its channel and 64 positions."""
    values = torch.randn(2, 3, n, 5, generator=torch.Generator().manual_seed(n))
    eight = EightBits.of(values)
    again = eight.values()
    assert eight.numbers.dtype == torch.int8
    for start in range(0, n, GROUP):
        part = slice(start, start + GROUP)
        step = values[:, :, part].abs().amax(2, keepdim=True) / 127
        assert bool(((again[:, :, part] - values[:, :, part]).abs() <= step * 0.5001).all())


def test_zeros_and_again() -> None:
    """What is zero stays zero, and rounding what was rounded changes nothing."""
    assert not EightBits.of(torch.zeros(1, 1, 7, 4)).values().any()
    values = EightBits.of(torch.randn(1, 2, 100, 8).bfloat16()).values()
    torch.testing.assert_close(EightBits.of(values).values(), values, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_kept_and_asked(tiny: MakeModel, tokens: MakeTokens, tmp_path: Path, prefix: str) -> None:
    """A context in 8 bits takes half the bytes, in memory and as a file, and gives the logits of its rounded values."""
    model = tiny(prefix=prefix)
    context, prompt = model.compress(one(tokens(300)), rate=2).to(dtype=torch.bfloat16), one(tokens(6, 1))
    small = context.to(dtype="int8")
    assert small.dtype == torch.int8
    assert small.to(dtype="int8") is small
    assert small.nbytes < 0.53 * context.nbytes
    small.save(tmp_path / "small.rcc")
    context.save(tmp_path / "large.rcc")
    assert context.info() == of_file(tmp_path / "large.rcc")
    assert (tmp_path / "small.rcc").stat().st_size < 0.6 * (tmp_path / "large.rcc").stat().st_size
    want = model(prompt, context=small.to(dtype=torch.bfloat16)).logits
    for verify in ("full", "header"):
        plain = CompressedContext.load(tmp_path / "small.rcc", verify=verify)
        assert plain.dtype == torch.int8
        assert plain.info()["dtype"] == "int8"
        assert plain.info() == of_file(tmp_path / "small.rcc")
        loaded = CompressedContext.load(tmp_path / "small.rcc", model=model, verify=verify)
        assert loaded.dtype == model.dtype
        for same in (plain, loaded, small):
            torch.testing.assert_close(model(prompt, context=same).logits, want, rtol=0, atol=0)
    exact = model(prompt, context=context).logits
    assert float((want - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("prefix", PREFIXES)
def test_it_is_a_value(tiny: MakeModel, tokens: MakeTokens, prefix: str) -> None:
    """Copies, batches, joins and appends are those of its rounded values."""
    model = tiny(prefix=prefix)
    context = model.compress(one(tokens(70)), rate=2)
    small, ids = context.to(dtype="int8"), one(tokens(20, 1))
    rounded = small.to(dtype=model.dtype)
    for again in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert again.dtype == torch.int8
        assert all(torch.equal(a, b) for i in range(3) for a, b in zip(again.layer(i), small.layer(i), strict=True))
    changed = [
        (model.compress(ids, rate=2, context=small), model.compress(ids, rate=2, context=rounded)),
        (CompressedContext.stack([small, rounded]), CompressedContext.stack([rounded, rounded])),
        (small.expand(2), rounded.expand(2)),
        (small[0], rounded[0]),
    ]
    if prefix == "direct":
        changed += [
            (CompressedContext.join([small, rounded]), CompressedContext.join([rounded, rounded])),
            (small.select([1]), rounded.select([1])),
        ]
    for got, want in changed:
        assert got.dtype == want.dtype == model.dtype
        for i in range(3):
            assert all(torch.equal(a, b) for a, b in zip(got.layer(i), want.layer(i), strict=True))


def test_refusals(tiny: MakeModel, tokens: MakeTokens, tmp_path: Path) -> None:
    """An unknown precision is named; a file whose numbers or steps do not fit is damaged; the format says that it is
    newer than what old readers know."""
    context = tiny().compress(one(tokens(70)), rate=2).to(dtype=torch.bfloat16)
    with pytest.raises(InputError, match="int4 is none for a context"):
        context.to(dtype="int4")
    path = tmp_path / "small.rcc"
    context.to(dtype="int8").save(path)
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["version"] == "2"
    tensors = load_file(path)
    damages = {
        "keys.0.steps": tensors["keys.0.steps"][:, :, :, :-1].contiguous(),
        "values.1.steps": tensors["values.1.steps"].to(torch.int8),
        "keys.1": tensors["keys.1"].float(),
        "values.2": tensors["values.2"][:, :, :-1].contiguous(),
    }
    for name, tensor in damages.items():
        save_file({**tensors, name: tensor}, path, metadata)
        with pytest.raises(ContextError, match="damaged"):
            CompressedContext.load(path, verify="header")
    save_file({k: v for k, v in tensors.items() if k != "keys.0.steps"}, path, metadata)
    with pytest.raises(ContextError, match="damaged"):
        CompressedContext.load(path, verify="header")
    save_file(tensors, path, {**metadata, "rcc": json.dumps({**json.loads(metadata["rcc"]), "eight_bits": 1})})
    with pytest.raises(ContextError, match="eight_bits"):
        CompressedContext.load(path, verify="header")
    save_file(tensors, path, {**metadata, "version": str(container.VERSION + 1)})
    with pytest.raises(ContextError, match="update rcc"):
        CompressedContext.load(path, verify="header")
