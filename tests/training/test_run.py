"""The folder of a run: what it holds, what is refused, and where a run starts from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from rcc import InputError, RCCForCausalLM
from rcc.training.recipe import Recipe
from rcc.training.settings import build
from rcc.training.setup import make_model
from training_runs import (
    TRAINING_STEP,
    Settings,
    assert_same,
    at,
    changed,
    dies,
    fill_disk,
    losses,
    start,
    train,
)

pytestmark = pytest.mark.usefixtures("world")


def test_the_card_names_data_and_stages(finished: Path, shared: Settings) -> None:
    first, second, whole = ((finished / f / "README.md").read_text() for f in ("stages/1-short", "stages/2-long", "."))
    assert second == whole
    assert "# tiny" in whole
    for word in (shared["model"]["encoder"], shared["data"]["text"][0]["path"], shared["data"]["questions"][0]["path"]):
        assert word in first
        assert word in whole
    assert "| short | reconstruction 50%, continuation 25%, instruction 25% | 960 | 32, 48 | 4, 8 | – |" in first
    assert "| long |" not in first
    assert "| short |" in whole
    assert "| long | continuation 100% | 512 | 64 | 8 | encoder |" in whole
    held_out = losses(finished)[-1]["held_out"]["continuation@64/8x"]
    assert f"| continuation@64/8x | {held_out['loss']:.3f} | {held_out['accuracy']:.1%} |" in whole


def test_loading_processes_end_with_their_stage(shared: Settings, tmp_path: Path) -> None:
    """Without persuasion: torch waits five seconds for one that does not."""
    recipe = changed(shared, stages=shared["stages"][:1], run__workers=2)
    train(recipe, tmp_path / "run").ok()
    assert time.time() - (tmp_path / "run/log.jsonl").stat().st_mtime < 4.5


def test_a_finished_run_has_nothing_left_to_do(shared: Settings, finished: Path) -> None:
    """And what changes no result may be changed."""
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished.rglob("*") if p.is_file()}
    before.pop(finished / "recipe.yaml")
    train(changed(shared, run__keep=5, run__log_steps=1), finished, "--resume").ok()
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished.rglob("*") if p.is_file()}
    after.pop(finished / "recipe.yaml")
    assert after == before


def test_folders_that_are_refused(
    refusal: Callable[..., str], shared: Settings, finished: Path, world: Path, tmp_path: Path
) -> None:
    refusal(shared, output=finished, words=[f"{finished} holds a run already: set resume=True"])
    other = changed(shared, stages__0__max_steps=6)
    refusal(other, "--resume", output=finished, words=["stages.0.max_steps differs", str(finished / "recipe.yaml")])
    refusal(shared, "--resume", "--set", "seed=1", output=finished, words=["seed differs"])
    refusal(shared, "--resume", words=["holds no run to resume: leave out resume"])
    refusal(shared, output=world / "llama", words=["holds a model already: name another folder"])
    refusal(shared, output=world / "text.jsonl", words=["is not a folder"])


def test_a_cut_head_needs_lora_and_no_teacher(
    refusal: Callable[..., str], shared: Settings, separate: Settings, tmp_path: Path
) -> None:
    recipe = changed(separate, run__vocabulary="data")
    refusal(recipe, words=["run.vocabulary=data needs LoRA on the decoder"], output=tmp_path / "run")
    refusal(changed(shared, run__vocabulary="data"), words=["run.vocabulary=data", "leave out distillation"])


def fill_around(log: str) -> None:
    fill_disk(os.path.getsize(log) + 5)


@pytest.mark.parametrize("what", ["model.safetensors", "log.jsonl"])
def test_a_full_disk_elsewhere(shared: Settings, tmp_path: Path, what: str) -> None:
    log = str(tmp_path / "run/log.jsonl")
    fault = {
        "model.safetensors": partial(at, "rcc.model.loading:_write_weights", 1, partial(fill_disk, 4_000)),
        "log.jsonl": partial(at, "rcc.training.progress:Log.write", 3, partial(fill_around, log)),
    }[what]
    result = train(changed(shared, stages=shared["stages"][:1]), tmp_path / "run", faults=[fault])
    result.refused(str(tmp_path / "run"), "cannot be written")


def test_a_model_of_another_make_is_refused(
    refusal: Callable[..., str], shared: Settings, finished: Path, tmp_path: Path
) -> None:
    rank, states = changed(shared, model__encoder_lora_rank=3), changed(shared, model__states="last")
    words = [f"model.encoder_lora_rank is 3, but {finished} was made with 2"]
    refusal(rank, "--init", finished, words=words, output=tmp_path / "rank")
    words = [f"model.states is 'last', but {finished} was made with 'all'"]
    refusal(states, "--init", finished, words=words, output=tmp_path / "states")


@pytest.mark.parametrize(("prefix", "other"), [("direct", "residual"), ("residual", "direct")])
def test_a_model_with_another_prefix_is_refused(direct: Settings, tmp_path: Path, prefix: str, other: str) -> None:
    device = torch.device("cpu")
    made, wanted = (build(Recipe, changed(direct, model__prefix=p), "") for p in (other, prefix))
    make_model(made, None, device).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"model.prefix is '{prefix}', but .* was made with '{other}'"):
        make_model(wanted, str(tmp_path), device)
    assert make_model(made, str(tmp_path), device).config.prefix == other


def test_what_cannot_begin_leaves_no_folder(refusal: Callable[..., str], shared: Settings, finished: Path) -> None:
    """Otherwise the corrected command would be told that there is a run already."""
    refusal(changed(shared, model__states="last"), "--init", finished)


def test_a_run_starts_from_a_model_and_goes_on_from_it(shared: Settings, finished: Path, tmp_path: Path) -> None:
    """A run that learns next to nothing leaves the model as it was. Killed before its first checkpoint, and resumed
    without --init, it remembers the model: otherwise it would start from the base."""
    recipe = changed(shared, stages=shared["stages"][1:], stages__0__max_tokens=100, stages__0__groups={})
    recipe = changed(recipe, stages__0__groups__all={"learning_rate": 1e-12})
    whole = start(recipe, tmp_path / "whole", "--init", finished)
    fault = partial(at, TRAINING_STEP, 1, dies)
    train(recipe, tmp_path / "run", "--init", finished, faults=[fault])
    train(recipe, tmp_path / "run", "--resume").ok()
    whole.end().ok()
    before, after = (RCCForCausalLM.from_pretrained(folder).state_dict() for folder in (finished, tmp_path / "whole"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert str(finished) in (tmp_path / "whole/README.md").read_text()
    assert_same(tmp_path / "run", tmp_path / "whole")
