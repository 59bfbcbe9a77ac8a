"""The head for losses computes what the decoder's own does, in chunks and with fewer rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import VOCABULARY, MakeModel, tokens
from rcc.model.losses import TrainingLoss
from rcc.model.training_pass import TrainingBatch, likeliest, training_pass
from rcc.training import head
from rcc.training.head import FrozenHead


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_loss_and_gradient_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch, cut: bool, chunk: int) -> None:
    """In float64, with positions that have no target, and tokens that the cut head does not have."""
    weight, states = random(20, 6).double(), random(2, 7, 6, seed=1).double().requires_grad_()
    targets = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(2))
    targets[0, :3] = -100
    vocabulary = torch.unique(targets[targets >= 0])[:-2] if cut else None
    size = 20 if vocabulary is None else len(vocabulary)
    monkeypatch.setattr(head, "CHUNK", chunk * size)
    frozen = FrozenHead(weight, vocabulary)
    loss = frozen.loss(states, targets)
    (3 * loss).backward()
    got, states.grad = states.grad, None

    logits, wanted = states @ weight.t(), targets.clone()
    if vocabulary is not None:
        assert (frozen.rows, len(frozen.weight)) == (chunk, size)
        wanted = torch.where(torch.isin(targets, vocabulary), torch.searchsorted(vocabulary, targets), -100)
        assert 0 < (wanted >= 0).sum() < (targets >= 0).sum()
        logits = logits[..., vocabulary]
    reference = cross_entropy(logits.flatten(0, 1), wanted.flatten())
    (3 * reference).backward()
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, states.grad, rtol=1e-5, atol=1e-6)
    likeliest = logits.argmax(-1)
    assert torch.equal(frozen.likeliest(states), likeliest if vocabulary is None else vocabulary[likeliest])


def test_no_target_at_all_is_no_loss() -> None:
    """As where none of a batch's targets is in the cut head: nothing is learnt, and nothing is infinite."""
    states = random(1, 3, 6).requires_grad_()
    loss = FrozenHead(random(20, 6), torch.tensor([4])).loss(states, torch.tensor([[1, 2, -100]]))
    loss.backward()
    assert loss == 0
    assert states.grad is not None
    assert not states.grad.any()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
@pytest.mark.parametrize(("prefix", "rate"), [("residual", 4), ("direct", 4), ("direct", 1)])
def test_a_model_learns_the_same_with_it(fresh: MakeModel, family: str, prefix: str, rate: int) -> None:
    """Loss, gradients and likeliest tokens, where it reads its own predictions too."""
    model = fresh(family, prefix=prefix)
    assert FrozenHead.fits(model)
    context, prompt = torch.tensor([tokens(32)]), torch.tensor([tokens(12, 1)])
    batch: dict[str, Any] = {
        "context_ids": context,
        "rate": rate,
        "labels": prompt,
        "logits_to_keep": torch.arange(2, 11),
    }
    if rate > 1:
        batch["predicted"] = (torch.arange(12) > 6).long()[None]
    weight = model.decoder.get_output_embeddings().weight
    results = []
    for loss_head in (None, FrozenHead(weight), FrozenHead(weight, torch.arange(VOCABULARY))):
        loss = TrainingLoss(head=loss_head)
        model.zero_grad()
        out = training_pass(model, TrainingBatch(prompt, **batch), loss)
        assert (out.logits is None) == (loss_head is not None)
        out.loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.loss.detach(), likeliest(out, loss), gradients))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_where_it_cannot_be(fresh: MakeModel) -> None:
    """A head that learns is not one."""
    assert not FrozenHead.fits(fresh(share=False))
