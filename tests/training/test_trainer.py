"""What a stage learns: rates, groups, accumulation, budgets; and what ends it."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from conftest import MakeModel
from rcc import RCCForCausalLM
from rcc.model.freezing import freeze, group_of, learned
from rcc.training import checkpointing
from rcc.training.recipe import Recipe
from rcc.training.setup import make_model
from training_runs import (
    RunningTraining,
    Settings,
    TrainingResult,
    changed,
    losses,
    note_rates,
    start,
    state_of,
)

pytestmark = pytest.mark.usefixtures("world")


Runs = dict[str, tuple[Path, TrainingResult]]


@pytest.fixture(scope="module")
def runs(shared: Settings, separate: Settings, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs that several tests look at, side by side: their folders and what they said."""
    folder = tmp_path_factory.mktemp("runs")
    groups = {
        "encoder": {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 0},
        "projections": {"learning_rate": 2e-3, "schedule": "linear", "warmup_steps": 3, "floor": 0.25},
        "decoder": {"learning_rate": 4e-3, "schedule": "cosine", "warmup_steps": 1, "floor": 0.1},
    }
    lone = changed(shared, stages=[{**shared["stages"][0], "rates": [4, 8]}], run__evaluation_samples=0)
    plain = changed(lone, stages__0__tasks={"reconstruction": 1}, stages__0__lengths=[32], stages__0__rates=[4])
    once = changed(plain, stages__0__accumulation=1, stages__0__batch_tokens=192)
    whole = changed(separate, run__dtype="float32", run__evaluation_samples=0, run__save_steps=1, run__keep=9)
    whole = changed(whole, stages__0__groups=groups, stages__0__accumulation=1, stages__0__max_steps=8)
    minutes = {"stages__0__max_steps": None, "stages__0__max_minutes": 0.05}
    infinite = {"stages__0__groups__all__learning_rate": 1e30, "run__save_steps": 1, "run__log_steps": 1}
    plan = {
        "separate": (separate, ()),
        "groups": (whole, [partial(note_rates, str(folder / "rates"))]),
        "frozen": (changed(whole, stages__0__frozen=["projections", "decoder"], stages__0__max_steps=2), ()),
        "accumulated": (changed(plain, stages__0__accumulation=2), ()),
        "at once": (once, ()),
        "compiled": (changed(once, run__compile=True), ()),
        "minutes": (changed(lone, **minutes), ()),
        "infinite": (changed(lone, **infinite), ()),
    }
    begun = {name: start(recipe, folder / name, faults=faults) for name, (recipe, faults) in plan.items()}
    ended = {name: (folder / name, process.end()) for name, process in begun.items()}
    return {"shared": (finished, TrainingResult(0, "")), **ended}


def test_learning_rates_by_group(runs: Runs) -> None:
    """As the recipe's words say, computed anew: warm-up, shape over the whole stage, floor."""
    output, result = runs["groups"]
    result.ok()
    steps = [json.loads(line) for line in (output.parent / "rates").read_text().splitlines()]
    wanted = []
    for step in range(8):
        done = step / 8
        linear = 0.25 + 0.75 * (1 - done)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        warm = [1 / 3, 2 / 3][step] if step < 2 else 1
        wanted.append({"encoder": 1e-3, "projections": 2e-3 * warm * linear, "decoder": 4e-3 * cosine})
    assert steps == [pytest.approx(rates, rel=1e-9) for rates in wanted]


def test_a_first_step_is_as_long_as_the_learning_rate(runs: Runs) -> None:
    """AdamW's first step moves every weight by its group's rate, up or down."""
    output, _ = runs["groups"]
    recipe = Recipe.load(output / "recipe.yaml")
    model = make_model(recipe, None, torch.device("cpu"))
    after = state_of(output / "stages/1-short/checkpoints/checkpoint-1")
    before = learned(model)
    assert set(before) == set(after)
    moved: dict[str, float] = {}
    for name, value in before.items():
        group = group_of(name)
        moved[group] = max(moved.get(group, 0.0), (after[name] - value).abs().max().item())
    assert moved == pytest.approx({"encoder": 1e-3, "projections": 2e-3 / 3, "decoder": 4e-3}, rel=1e-3)


def test_frozen_groups_do_not_change(runs: Runs, finished: Path) -> None:
    output, result = runs["frozen"]
    result.ok()
    recipe = Recipe.load(output / "recipe.yaml")
    before = make_model(recipe, None, torch.device("cpu")).state_dict()
    cases = [(before, output / "stages/1-short", {"encoder"})]
    earlier = RCCForCausalLM.from_pretrained(finished / "stages/1-short").state_dict()
    cases.append((earlier, finished / "stages/2-long", {"projections", "decoder"}))
    for old, folder, learning in cases:
        new = RCCForCausalLM.from_pretrained(folder).state_dict()
        assert {group_of(name) for name in new if not torch.equal(old[name], new[name])} == learning


def test_accumulated_batches_count_as_one(runs: Runs) -> None:
    """Their targets are equally long, so that the mean of their losses is the mean over all tokens."""
    parts, whole = (losses(runs[name][0]) for name in ("accumulated", "at once"))
    assert len(parts) == len(whole) == 5
    for a, b in zip(parts, whole, strict=True):
        assert (a["step"], a["tokens"], a["kind"]) == (b["step"], b["tokens"], f"{b['kind']} {b['kind']}")
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_or_not_the_same_is_learnt(runs: Runs) -> None:
    runs["compiled"][1].ok()
    compiled, plain = (losses(runs[name][0]) for name in ("compiled", "at once"))
    assert [row["loss"] for row in compiled] == pytest.approx([row["loss"] for row in plain], rel=2e-3)


def test_a_budget_of_minutes(runs: Runs) -> None:
    output, result = runs["minutes"]
    result.ok()
    seconds = [json.loads(line)["seconds"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert len(seconds) > 1
    assert seconds[-1] >= 3
    RCCForCausalLM.from_pretrained(output)


def test_a_loss_that_is_no_number(runs: Runs) -> None:
    output, result = runs["infinite"]
    result.refused("the loss at step 2 is nan")
    newest = checkpointing.newest(output / "stages/1-short/checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-1"
    assert not (output / "config.json").exists()
    assert all(bool(value.isfinite().all()) for value in state_of(newest).values())


def test_the_sink_learns_with_the_projections(fresh: MakeModel) -> None:
    """And is frozen with them."""
    model = fresh(prefix="direct", rate_embeddings=True)
    groups = {name.partition(".")[0]: group_of(name) for name in learned(model)}
    assert groups["sink"] == groups["projections"] == "projections"
    assert groups["rate_embeddings"] == "encoder"
    freeze(model, ["projections"], torch.float32)
    assert not model.sink.requires_grad


@pytest.mark.parametrize("name", ["shared", "separate"])
def test_the_result_of_every_stage(runs: Runs, name: str) -> None:
    """It loads, and holds the last checkpoint's weights in the precision of the run."""
    output, result = runs[name]
    result.ok()
    recipe = Recipe.load(output / "recipe.yaml")
    last = output / "stages" / f"{len(recipe.stages)}-{recipe.stages[-1].name}"
    dtype = getattr(torch, recipe.run.dtype)
    for folder in (last, output):
        model = RCCForCausalLM.from_pretrained(folder)
        parameters = dict(model.named_parameters())
        assert model.config.name == recipe.name
        newest = checkpointing.newest(last / "checkpoints")
        assert newest is not None
        state = state_of(newest)
        assert set(state) == set(learned(model))
        for key, value in state.items():
            assert value.dtype == torch.float32, key
            assert parameters[key].dtype == dtype, key
            assert torch.equal(parameters[key], value.to(dtype)), key
    for number in range(len(recipe.stages) - 1):
        folder = output / "stages" / f"{number + 1}-{recipe.stages[number].name}"
        RCCForCausalLM.from_pretrained(folder)
        assert not (folder / "checkpoints").exists()


def test_ask_works_on_a_trained_model(runs: Runs, world: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the door is red.")
    asked = [
        RunningTraining(
            ["ask", text, "which?", "--model", runs[name][0], "--max-new-tokens", "3", "--json"], tmp_path / name
        )
        for name in ("shared", "separate")
    ]
    for process in asked:
        process.end().ok()
        said = json.loads(Path(f"{process.log}.out").read_text())
        assert (said["model"], said["answers"][0]["question"]) == ("tiny", "which?")
