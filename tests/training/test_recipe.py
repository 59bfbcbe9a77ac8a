"""Recipes: what is refused, overridden and written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rcc.training.groups import Group
from rcc.training.recipe import Recipe
from rcc.training.settings import build
from rcc.training.stage import Distillation
from training_runs import (
    HERE,
    Settings,
    changed,
)

pytestmark = pytest.mark.usefixtures("world")


def full(shared: Settings) -> Settings:
    """`shared`, with something in every place that can hold something."""
    recipe = changed(shared, data__text__0__weight=2, model__lora_alpha=4)
    recipe["stages"][0]["tasks"]["reconstruction"] = {"share": 2, "prompt_tokens": 5}
    return recipe


def load(recipe: Settings | str, folder: Path, *overrides: str) -> Recipe:
    file = folder / "loaded.yaml"
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return Recipe.load(file, list(overrides))


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("modell", "model"),
        ("model__segment_lenght", "segment_length"),
        ("data__txt", "text"),
        ("data__text__0__wieght", "weight"),
        ("stages__0__lenghts", "lengths"),
        ("stages__0__tasks__reconstruct", "reconstruction"),
        ("stages__0__tasks__reconstruction__prompt_token", "prompt_tokens"),
        ("stages__0__groups__encoders", "encoder"),
        ("stages__0__groups__all__learningrate", "learning_rate"),
        ("stages__1__distillation__topk", "top_k"),
        ("run__treads", "threads"),
    ],
)
def test_an_unknown_key_names_the_nearest(refusal: Callable[..., str], shared: Settings, path: str, near: str) -> None:
    recipe = changed(full(shared), **{path: {} if "groups" in path or "tasks" in path else 1})
    assert refusal(recipe) == f"rcc: {path.replace('__', '.')} is unknown: did you mean {near}?"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("seed", "x", "seed must be a whole number, not 'x'"),
        ("seed", -1, "seed must be"),
        ("seed", 2**32, "seed must be"),
        ("name", ["a"], "name must be a text, not ['a']"),
        ("stages", [], "stages must be at least one stage"),
        ("stages", 5, "stages"),
        ("data", 5, "data must be a table of settings, not 5"),
        ("model__encoder", "", "model.encoder is missing"),
        ("model__segment_length", True, "model.segment_length must be a whole number, not True"),
        ("model__segment_length", 0, "model.segment_length must be a positive whole number"),
        ("model__rates", [3], "model.rate=3 does not divide the segment of 16 tokens"),
        ("model__states", "some", "model.states='some' is unknown: use one of all, last"),
        ("model__encoder_lora_rank", -1, "model.encoder_lora_rank must be a whole number"),
        ("data__text", [], "stages.0.tasks.reconstruction needs data.text, which is empty: add a source"),
        ("data__questions", [], "stages.0.tasks.instruction needs data.questions"),
        ("data__held_out", 1, "data.held_out must be a share from 0 to below 1, not 1.0"),
        ("data__text__0__weight", 0, "data.text.0.weight"),
        ("stages__0__name", "a/b", "stages.0.name must be a name for a folder, not 'a/b'"),
        ("stages__1__name", "short", "stages must be stages of different names"),
        ("stages__0__tasks", {}, "stages.0.tasks must be some of reconstruction"),
        (
            "stages__0__tasks__reconstruction",
            -1,
            "stages.0.tasks.reconstruction.share must be a number above 0, not -1",
        ),
        ("stages__0__lengths", [], "stages.0.lengths must be at least one length"),
        ("stages__0__lengths", [0], "stages.0.lengths must be positive whole numbers, not [0]"),
        ("stages__0__lengths", [1.5], "stages.0.lengths.0 must be a whole number, not 1.5"),
        ("stages__0__rates", [2], "stages.0.rates must be some of model.rates ([4, 8]), not 2"),
        (
            "stages__0__tasks__reconstruction",
            {"rates": [4, 2]},
            "stages.0.tasks.reconstruction.rates must be some of model.rates ([4, 8]), not 2",
        ),
        (
            "stages__0__tasks__reconstruction",
            {"predicted_rates": [2]},
            "stages.0.tasks.reconstruction.predicted_rates must be some of model.rates ([4, 8]), not 2",
        ),
        (
            "stages__0__tasks__reconstruction",
            {"lengths": [0]},
            "stages.0.tasks.reconstruction.lengths must be positive whole numbers, not [0]",
        ),
        ("stages__0__target_tokens", 16, "stages.0.target_tokens must be more than 16"),
        ("stages__0__accumulation", 0, "stages.0.accumulation must be a positive whole number, not 0"),
        ("stages__0__max_steps", 0, "stages.0.max_steps must be a positive number, not 0"),
        (
            "stages__0__max_steps",
            None,
            "stages.0.budget must be exactly one of max_tokens, max_steps, max_minutes, not none",
        ),
        ("stages__0__max_minutes", 1, "not max_steps and max_minutes"),
        ("stages__0__frozen", ["encoder", "projections", "decoder"], "stages.0.frozen must be less than all groups"),
        ("stages__0__frozen", ["encoders"], "stages.0.frozen"),
        ("stages__0__betas", [0.9], "stages.0.betas must be two numbers from 0 to below 1, not [0.9]"),
        ("stages__0__betas", [0.9, 1], "stages.0.betas"),
        ("stages__0__max_grad_norm", 0, "stages.0.max_grad_norm must be a number above 0"),
        ("stages__0__groups__all__learning_rate", 0, "stages.0.groups.all.learning_rate must be a number above 0"),
        ("stages__0__groups__all__learning_rate", "fast", "learning_rate must be a number, not 'fast'"),
        ("stages__0__groups__all__learning_rate", math.nan, "learning_rate must be a number, not nan"),
        ("stages__0__groups__all__schedule", "step", "schedule must be one of constant, linear, cosine, not 'step'"),
        ("stages__0__groups__all__floor", 2, "stages.0.groups.all.floor must be a share from 0 to 1"),
        ("stages__1__distillation__tasks", ["chat"], "distillation.tasks must be some of"),
        ("stages__1__distillation__weight", 0, ": stages.1.distillation.weight must"),
        ("run__keep", 0, "run.keep must be a positive whole number, not 0"),
        ("run__save_minutes", -1, "run.save_minutes must be a number that is not negative"),
        ("run__workers", -1, "run.workers must be"),
        ("run__device", "gpu", "run.device"),
        ("run__dtype", "float8", "run.dtype must be one of bfloat16, float32"),
        ("run__fsdp", "perhaps", "run.fsdp must be true or false, not 'perhaps'"),
    ],
)
def test_impossible_values(refusal: Callable[..., str], shared: Settings, path: str, value: Any, words: str) -> None:
    refusal(changed(full(shared), **{path: value}), words=[words])


def test_predictions_are_not_for_shards(refusal: Callable[..., str], shared: Settings) -> None:
    tasks = {"reconstruction": {"share": 1, "predicted": 0.5}}
    wanted = "stages.0.tasks.reconstruction.predicted must be 0 with run.fsdp, not 0.5"
    refusal(changed(full(shared), stages__0__tasks=tasks, run__fsdp=True), words=[wanted])


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\tname: x", "just words"])
def test_what_is_no_recipe(refusal: Callable[..., str], text: str) -> None:
    refusal(text)


def test_numbers_as_people_write_them(shared: Settings, tmp_path: Path) -> None:
    """YAML takes 1e-4 for a text."""
    text = yaml.safe_dump(changed(shared, stages__0__max_steps=None), sort_keys=False)
    text = text.replace("learning_rate: 0.003", "learning_rate: 1e-4").replace("max_steps: null", "max_tokens: 1e6")
    stage = load(text, tmp_path).stages[0]
    assert (stage.max_tokens, stage.groups["all"].learning_rate) == (1_000_000, 1e-4)
    assert isinstance(stage.max_tokens, int)


def test_set(shared: Settings, tmp_path: Path) -> None:
    def stage(*overrides: str, number: int = 0) -> Any:
        return load(shared, tmp_path, *overrides).stages[number]

    assert stage("stages.0.max_tokens=1e6").max_tokens == 1_000_000
    assert stage("stages.0.max_tokens=1e6").max_steps is None  # one budget takes the other's place
    assert stage("stages.1.max_tokens=1e6").max_steps == 5
    assert stage("stages.0.lengths=[16, 64]").lengths == [16, 64]
    assert stage("stages.0.lengths.1=64").lengths == [32, 64]
    assert stage("stages.0.lengths.2=64").lengths == [32, 48, 64]
    assert stage("stages.0.tasks={passkey: 2}").tasks["passkey"].share == 2
    assert stage("stages.0.groups.encoder.floor=0.5").groups["encoder"] == Group(floor=0.5)
    assert stage("stages.0.distillation.weight=0.25").distillation == Distillation(weight=0.25)
    assert stage("stages.1.distillation=null", number=1).distillation is None
    assert stage("stages.0.name=a=b").name == "a=b"
    both = load(shared, tmp_path, "seed=3", "seed=4", "run.device=cpu", "data.text.1={path: b.txt}")
    assert (both.seed, both.run.device, [source.path for source in both.data.text][1]) == (4, "cpu", "b.txt")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("sed=3", "sed is unknown: did you mean seed?"),
        ("stages.2.name=x", "there is no entry 2 (there are 2, from 0)"),
        ("stages.-1.name=x", "there is no entry -1"),
        ("stages.name=x", "there is no entry name"),
        ("stages.0.lengths.3=64", "there is no entry 3 (there are 2, from 0)"),
        ("stages.0.max_steps.x=1", "stages.0.max_steps has no settings inside"),
        ("stages.0.max_steps=many", "stages.0.max_steps must be a whole number, not 'many'"),
    ],
)
def test_set_wrongly(refusal: Callable[..., str], shared: Settings, override: str, words: str) -> None:
    refusal(shared, "--set", override, words=[words])


def test_a_recipe_survives_being_written_down(shared: Settings, separate: Settings, tmp_path: Path) -> None:
    shipped = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(HERE.glob("recipes/*.yaml"))]
    assert shipped
    for data in (full(shared), separate, *shipped):
        recipe = load(data, tmp_path)
        assert build(Recipe, recipe.to_dict(), "") == recipe
        recipe.save(tmp_path / "saved.yaml")
        assert Recipe.load(tmp_path / "saved.yaml") == recipe
