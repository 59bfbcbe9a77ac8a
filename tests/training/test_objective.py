"""What is minimised: the distance to a teacher, and what a pass with gradients keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import VOCABULARY, MakeModel, randomise
from equality import run_training_pass
from rcc import RCCForCausalLM
from rcc.model import training_pass as passes
from rcc.model.freezing import group_of, learned
from rcc.training.batches import Samples
from rcc.training.objective import Objective, divergence
from rcc.training.recipe import Recipe
from rcc.training.settings import build
from rcc.training.setup import make_model
from rcc.training.stage import Distillation
from training_runs import (
    Settings,
    changed,
)

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(temperature: float) -> None:
    """Against its definition in 64 bits; the likeliest tokens alone bound it from below, ever more closely."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 31, generator=generator) for _ in range(2))
    p, q = ((x.double() / temperature).exp() for x in (teacher, student))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    whole = float((p * (p / q).log()).sum(-1).mean())
    values = {k: float(divergence(student, teacher, Distillation(1.0, k, temperature))) for k in (0, 31, 99, 1, 4, 16)}
    assert values[0] == values[31] == values[99] == pytest.approx(whole, rel=1e-5)
    for k in (1, 4, 16):
        most, index = p.topk(k, -1)
        ours = q.gather(-1, index)
        rest = (1 - most.sum(-1)) * ((1 - most.sum(-1)) / (1 - ours.sum(-1))).log()
        assert values[k] == pytest.approx(float(((most * (most / ours).log()).sum(-1) + rest).mean()), rel=1e-4)
    assert 0 < values[1] < values[4] < values[16] < values[0]
    assert float(divergence(student, student, Distillation(1.0, 4, temperature))) == pytest.approx(0, abs=1e-6)


def new_model(recipe: Settings) -> RCCForCausalLM:
    """A model by a recipe, whose projections and LoRA all matter, as a stage without frozen groups trains it."""
    made = build(Recipe, copy.deepcopy(recipe), "")
    model = make_model(made, None, torch.device("cpu"))
    return randomise(model)


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("task", ["continuation", "instruction"])
def test_the_teacher_is_the_base_reading_the_plain_text(
    samples_of: Callable[..., Samples], world: Path, shared: Settings, separate: Settings, kind: str, task: str
) -> None:
    recipe = changed({"shared": shared, "separate": separate}[kind], run__dtype="float32")
    recipe = changed(recipe, stages__0__tasks={task: 1}, stages__0__target_tokens=96)
    recipe = changed(recipe, stages__0__distillation={"weight": 1, "top_k": 0}, stages__0__lengths=[48])
    samples, settings = samples_of(recipe), Distillation(weight=1, top_k=0)
    model = new_model(recipe)
    objective = Objective(model, torch.float32, settings)
    if kind == "separate":  # whose decoder itself is trained
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(1.1)
    base = AutoModelForCausalLM.from_pretrained(world / {"shared": "llama", "separate": "lower"}[kind])
    batch = samples.batch(0)
    out = objective(**batch)
    distances = []
    for b in range(len(batch["input_ids"])):
        sample = samples.sample(0, b)
        plain = np.concatenate([*sample.pieces, sample.prompt]) if sample.plain is None else sample.plain
        target = sample.target
        wanted = (
            base(torch.from_numpy(np.concatenate([plain, target]))[None])
            .logits[0, len(plain) - 1 : -1]
            .double()
            .log_softmax(-1)
        )
        positions = batch["logits_to_keep"].tolist()
        columns = [positions.index(len(sample.prompt) - 1 + i) for i in range(len(target))]
        ours = out["logits"][b, columns].double().log_softmax(-1)
        distances.append((wanted.exp() * (wanted - ours)).sum(-1))
    assert out["loss"].item() == pytest.approx(torch.cat(distances).mean().item(), rel=1e-5)

    out["loss"].backward()
    learning = learned(model)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())
    rest = {id(p): p for p in [*model.parameters(), *objective._teacher[0].parameters()]}
    assert [p for p in rest.values() if p.grad is not None and not p.requires_grad] == []
    taught = {id(p) for p in objective._teacher[0].parameters()}
    assert not taught & {id(p) for p in learning.values()}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_texts_of_a_row_are_as_if_appended(tiny: MakeModel, family: str, share: bool) -> None:
    """And the logits that are kept are those of the whole pass."""
    model = tiny(family, share=share, dtype=torch.float64)
    pieces = [
        [random(21, seed=1), random(9, seed=2)],
        [random(30, seed=3)],
        [random(3, seed=4), random(16, seed=5), random(6)],
    ]
    ids, numbers = torch.zeros(3, 32, dtype=torch.long), torch.zeros(3, 32, dtype=torch.long)
    for b, row in enumerate(pieces):
        length = sum(map(len, row))
        ids[b, :length] = torch.cat(row)
        numbers[b, :length] = torch.cat([torch.full((len(p),), i) for i, p in enumerate(row, 1)])
    prompt = random(3, 7, seed=6)
    labels = prompt.masked_fill(torch.arange(7) < 4, -100)
    keep = torch.tensor([3, 4, 5])
    with torch.no_grad():
        whole = run_training_pass(model, prompt, context_ids=ids, context_mask=numbers, rate=4, labels=labels)
        part = run_training_pass(
            model, prompt, context_ids=ids, context_mask=numbers, rate=4, labels=labels, logits_to_keep=keep
        )
    torch.testing.assert_close(part.logits, whole.logits[:, keep])
    torch.testing.assert_close(part.loss, whole.loss)
    for b, row in enumerate(pieces):
        context = None
        for piece in row:
            context = model.compress(piece[None], rate=4, context=context)
        torch.testing.assert_close(model(prompt[b : b + 1], context=context).logits[0], whole.logits[b])


@pytest.mark.parametrize("share", [True, False])
def test_a_frozen_encoder_keeps_nothing(fresh: MakeModel, monkeypatch: pytest.MonkeyPatch, share: bool) -> None:
    """No tensor for a backward pass, no activations beyond a chunk's, and the same vectors as in one piece."""
    model = fresh("llama", share=share)
    learning = learned(model)
    inside, saved, widest = False, 0, 0

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def see(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal widest
        widest = max(widest, args[0].numel())

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += inside
        return tensor

    model.encoder.register_forward_pre_hook(enter)
    model.projections[0].register_forward_pre_hook(leave)
    for block in model.encoder.layers:
        block.register_forward_pre_hook(see)

    def read(tokens: int) -> tuple[int, int, torch.Tensor]:
        nonlocal saved, widest
        saved = widest = 0
        mask = (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 21]])).long()
        mask[:, 20:] *= 2  # two texts a row
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run_training_pass(
                model,
                random(2, 5),
                context_ids=random(2, tokens, seed=1),
                context_mask=mask,
                rate=4,
                labels=random(2, 5),
            )
        out.loss.backward()
        return saved, widest, out.logits.detach()

    monkeypatch.setattr(passes, "BATCH_TOKENS", 64)
    open_small, open_large = read(64), read(256)
    assert open_small[0] > 0
    assert open_small[1] < open_large[1]
    for name, parameter in learning.items():
        parameter.grad = None
        parameter.requires_grad_(group_of(name) != "encoder")
    small, large = read(64), read(256)
    assert small[0] == large[0] == 0
    assert small[1] == large[1] == 2 * 2 * 16 * 48  # two segments of each row
    for chunked, at_once in ((small, open_small), (large, open_large)):
        torch.testing.assert_close(chunked[2], at_once[2], rtol=1e-5, atol=1e-5)
    for name, parameter in learning.items():
        assert (parameter.grad is None) == (group_of(name) == "encoder"), name
