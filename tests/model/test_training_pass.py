"""The pass with gradients computes what the cached way computes, and its gradients are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import conftest
from conftest import MakeBatch, MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, FAMILIES, LENGTHS, exact_in_float64, gradients, one, run_training_pass, sides
from rcc import (
    ContextError,
)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@sides
def test_training_forward_equals_cached(
    tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens, batch: MakeBatch, sides: dict[str, Any], attn: str
) -> None:
    """One pass with `context_ids` gives the logits of the reference and of the cached context, in a batch of different
    texts and ragged prompts; the loss is the mean of -log p over labelled targets, computed by hand."""
    model = tiny(**sides, attn=attn)
    want = expected(model)
    texts = [tokens(length, length) for length in LENGTHS]
    prompts = [tokens(length, 1) for length in (6, 2, 9, 4, 9)]
    ids, mask = batch(texts)
    for side in ("left", "right"):
        prompt_ids, prompt_mask = batch(prompts, side)
        labels = prompt_ids.masked_fill(prompt_mask == 0, -100)
        labels[:, 5] = -100
        labels[torch.arange(5), prompt_mask.argmax(1)] = -100  # nothing real stands before the first token
        arguments = {"input_ids": prompt_ids, "attention_mask": prompt_mask, "labels": labels}
        out = run_training_pass(model, **arguments, context_ids=ids, context_mask=mask)
        cached = model(**arguments, context=model.compress(ids, mask))
        assert out.logits.requires_grad
        assert not cached.logits.requires_grad
        losses = []
        for b in range(5):
            real = prompt_mask[b].bool()
            logits = want.logits([texts[b]], prompts[b])
            torch.testing.assert_close(out.logits[b][real], logits, **CLOSE)
            torch.testing.assert_close(cached.logits[b][real], logits, **CLOSE)
            targets = labels[b][real]
            for position in range(1, len(prompts[b])):
                if targets[position] != -100:
                    losses.append(-logits[position - 1].double().log_softmax(-1)[targets[position]])
        assert len(losses) == int((labels != -100).sum())
        assert out.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert cached.loss.item() == pytest.approx(out.loss.item(), rel=1e-5)


def test_loss_by_hand(tiny: MakeModel, expected: MakeExpected, tokens: MakeTokens) -> None:
    """Without padding: the mean of -log p(next token) in float64 over the labelled positions, at any rate."""
    model = tiny("llama")
    text, target = tokens(37), tokens(12, 1)
    labels = torch.tensor([[-100] * 4 + target[4:]])
    for rate in (2, 16):
        got = run_training_pass(
            model, input_ids=one(target), context_ids=one(text), rate=rate, labels=labels
        ).loss.item()
        logits = expected(model).logits([text], target, rate).double()
        want = -sum(logits[i - 1].log_softmax(-1)[target[i]].item() for i in range(4, 12)) / 8
        assert got == pytest.approx(want, rel=1e-5)
    plain = model(input_ids=one(target), labels=labels)
    assert plain.loss.item() == pytest.approx(
        F.cross_entropy(plain.logits[0, 3:-1].double(), torch.tensor(target[4:])).item(), rel=1e-5
    )


def test_predictions_are_read_in_place_of_tokens(fresh: MakeModel, tokens: MakeTokens, batch: MakeBatch) -> None:
    """Loss and gradients are those of the pass that is given the decoder's likeliest tokens, also those of a second
    pass; under autocast, too, which keeps the weights that it has converted for the next pass."""
    model = fresh("llama", lora=4)
    ids, mask = batch([tokens(37), tokens(21, 1)])
    targets = torch.tensor([tokens(12, 2), tokens(12, 3)])
    wanted_logits = torch.arange(2, 11)
    predicted = torch.zeros_like(targets)
    predicted[0, 3:], predicted[1, [3, 7]] = 1, 1
    for dtype in (torch.float32, torch.bfloat16):

        def go(read: Tensor, keep: Tensor | None, predicted: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):  # noqa: B023 - called here
                out = run_training_pass(
                    model,
                    input_ids=read,
                    context_ids=ids,
                    context_mask=mask,
                    labels=targets,
                    logits_to_keep=keep,
                    predicted=predicted,
                )
            out.loss.backward()
            return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        logits, plain = go(targets, None, None)
        own = torch.where(predicted.bool(), logits.argmax(-1).roll(1, 1), targets)
        assert (own != targets).sum() > 6
        # in the first row of two passes, in the second of one
        twice = predicted * torch.tensor([[2], [1]])
        again = own.clone()
        again[0] = torch.where(predicted[0].bool(), go(own, None, None)[0].argmax(-1).roll(1, 1)[0], targets[0])
        assert not torch.equal(own, again)
        for keep in (None, wanted_logits):
            nowhere = torch.zeros_like(targets)
            for read, asked, name in ((own, predicted, "own"), (again, twice, "twice"), (targets, nowhere, "none")):
                want, got = go(read, keep, None), go(targets, keep, asked)
                assert torch.equal(want[0], got[0]), name
                assert want[1].keys() == got[1].keys() == plain.keys(), name
                for parameter in plain:
                    assert torch.equal(want[1][parameter], got[1][parameter]), (name, parameter)


@sides
def test_gradients_agree_with_finite_differences(
    fresh: MakeModel, tokens: MakeTokens, batch: MakeBatch, sides: dict[str, Any]
) -> None:
    """In float64 the derivative of the loss along a random direction, in encoder, projections and decoder parameters
    each, equals the central difference to 1e-5 relative (1e-2 in Mamba, whose scan computes in float32 whatever the
    precision), for a batch with gaps and ragged prompts; LoRA is trained where the base is shared, else everything."""
    model = exact_in_float64(fresh(**sides))
    ids, mask = batch([tokens(37), tokens(21, 2)])
    prompt, prompt_mask = batch([tokens(9, 3), tokens(6, 4)])
    targets = prompt[:, 1:].masked_fill(prompt_mask[:, 1:] == 0, -100)

    def loss() -> Tensor:
        out = run_training_pass(model, input_ids=prompt, attention_mask=prompt_mask, context_ids=ids, context_mask=mask)
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets.flatten())

    model.zero_grad()
    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for side in ("encoder.", "projections.", "decoder."):
        parameters = [p for n, p in model.named_parameters() if n.startswith(side) and p.requires_grad]
        assert parameters
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction, strict=True))
        rough = side == "encoder." and sides.get("encoder") in conftest.STATE_SPACE
        step, values = 1e-5 if rough else 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * step)
                values.append(loss().item())
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
        numeric = (values[0] - values[1]) / (2 * step)
        assert abs(slope) > 1e-3
        assert numeric == pytest.approx(slope, rel=1e-2 if rough else 1e-5), side


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("share", "lora"), [(True, 4), (False, 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(
    fresh: MakeModel, tokens: MakeTokens, batch: MakeBatch, family: str, share: bool, lora: int, reentrant: bool | None
) -> None:
    """Recomputing activations gives the same gradients, whichever way torch does it."""
    model = fresh(family, share=share, lora=lora).train()
    want = {k: None if v is None else v.clone() for k, v in gradients(model, tokens, batch).items()}
    model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
    calls = []
    encoder: Any = model.encoder
    block = encoder.layers[1]
    inner = block.self_attn if family == "llama" else block.attention
    inner.register_forward_pre_hook(lambda *_: calls.append(1))
    got = gradients(model, tokens, batch)
    assert len(calls) == 2  # recomputed
    for name, gradient in want.items():
        if gradient is None:
            assert got[name] is None, name
        else:
            assert got[name] is not None, name
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_training_step_lowers_the_loss_and_renames_the_model(
    fresh: MakeModel, tokens: MakeTokens, batch: MakeBatch
) -> None:
    """Five steps of Adam lower the loss; the model's fingerprint follows its weights, so old contexts are refused."""
    model = fresh("llama").train()
    before = model.fingerprint
    context = model.compress(one(tokens(20)))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        target = one(tokens(9, 1))
        loss = run_training_pass(model, input_ids=target, context_ids=one(tokens(37)), labels=target).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.fingerprint != before
    with pytest.raises(ContextError, match="made by another model"):
        model(input_ids=one([1]), context=context)
