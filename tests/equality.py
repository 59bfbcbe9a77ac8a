"""Helpers of the tests that compare with the method as the paper defines it: `tests/reference.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

import conftest
from conftest import MakeBatch, MakeTokens
from rcc import (
    CompressedContext,
    RCCForCausalLM,
)
from rcc.model.training_pass import TrainingBatch, training_pass

FAMILIES = conftest.FAMILIES


sides = pytest.mark.parametrize("sides", conftest.SIDES.values(), ids=conftest.SIDES)


LENGTHS = [3, 10, 16, 37, 48]
"""Shorter than a group, partial group, one segment, partial segment and group, several segments."""


CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def one(ids: list[int]) -> Tensor:
    return torch.tensor([ids])


def prompt_logits(model: RCCForCausalLM, context: CompressedContext, prompt: list[int]) -> Tensor:
    return model(input_ids=one(prompt), context=context).logits[0]


def new_tokens(out: Tensor, prompt_length: int) -> list[list[int]]:
    return out[:, prompt_length:].tolist()


def same_bits(a: CompressedContext, b: CompressedContext) -> bool:
    """Whether two contexts hold the same keys and values."""
    pairs = zip(range(len(a.blocks.layers)), range(len(b.blocks.layers)), strict=True)
    return len(a) == len(b) and all(
        torch.equal(x, y) for i, j in pairs for x, y in zip(a.layer(i), b.layer(j), strict=True)
    )


def plain_cache(context: CompressedContext) -> DynamicCache:
    """A transformers cache with copies of a context's keys and values: none of rcc's cache code."""
    layers: list[Any] = []
    for i in range(len(context.blocks.layers)):
        keys, values = (t.clone() for t in context.layer(i))
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layers.append(layer)
    cache = DynamicCache()
    cache.layers = layers
    return cache


@contextlib.contextmanager
def segments_read(model: RCCForCausalLM) -> Iterator[list[int]]:
    """How many segments each pass of the encoder takes."""
    read: list[int] = []
    handle = model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield read
    finally:
        handle.remove()


def gradients(model: RCCForCausalLM, tokens: MakeTokens, batch: MakeBatch, seed: int = 0) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    texts = [tokens(37, seed), tokens(21, seed + 1)]
    targets = one(tokens(9, seed + 2)).expand(2, -1)
    ids, mask = batch(texts)
    run_training_pass(model, input_ids=targets, context_ids=ids, context_mask=mask, labels=targets).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_central_difference(model: RCCForCausalLM, parameter: Tensor, tokens: MakeTokens, batch: MakeBatch) -> None:
    """What :func:`gradients` left in a float64 model's parameter is the central difference of the same loss, computed
    from logits, along a random direction."""
    gradient = parameter.grad
    ids, mask = batch([tokens(37), tokens(21, 1)])
    target = one(tokens(9, 2)).expand(2, -1)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            parameter.add_(direction, alpha=step)
            logits = run_training_pass(model, input_ids=target, context_ids=ids, context_mask=mask).logits[:, :-1]
            values.append(F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()).item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def exact_in_float64(model: RCCForCausalLM) -> RCCForCausalLM:
    """The model in float64 throughout: norms by the root mean square compute in float32 otherwise."""
    model.double()
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Gemma3RMSNorm":  # its weights are what is added to one
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], 1 + m.weight, m.eps)
        elif kind.endswith("RMSNorm"):
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    return model


def assert_same_model(model: RCCForCausalLM, loaded: RCCForCausalLM, tokens: MakeTokens) -> None:
    """Bit-equal weights, states, contexts, logits and answers."""
    own, other = model.state_dict(), loaded.state_dict()
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    assert loaded.fingerprint == model.fingerprint
    context, again = model.compress(one(tokens(37))), loaded.compress(one(tokens(37)))
    assert same_bits(context, again)
    prompt = tokens(6, 1)
    assert torch.equal(prompt_logits(model, context, prompt), prompt_logits(loaded, again, prompt))
    answer = model.generate(input_ids=one(prompt), context=context, max_new_tokens=6)
    assert torch.equal(answer, loaded.generate(input_ids=one(prompt), context=again, max_new_tokens=6))
    assert torch.equal(answer, loaded.generate(input_ids=one(prompt), context=context, max_new_tokens=6))


def run_training_pass(model: RCCForCausalLM, *arguments: Any, **fields: Any) -> CausalLMOutputWithPast:
    """`training_pass` of a batch with these fields."""
    return training_pass(model, TrainingBatch(*arguments, **fields))
