"""Runs that were killed, stopped or ran out of disk go on to the same digits."""

from __future__ import annotations

import random
import re
import shlex
import signal
from functools import partial
from pathlib import Path

import pytest

from rcc.training import checkpointing
from training_runs import (
    TRAINING_STEP,
    RunningTraining,
    Settings,
    TrainingResult,
    assert_same,
    at,
    changed,
    checkpoints_of,
    dies,
    fill_disk,
    go_on,
    kill_after,
    send,
    start,
    train,
)

pytestmark = pytest.mark.usefixtures("world")


POINTS: dict[str, tuple[str, int]] = {
    "while the first checkpoint is written": ("rcc.training.checkpointing:_flush", 2),
    "before a checkpoint gets its name": ("rcc.training.checkpointing:os.rename", 2),
    "while the second is written": ("rcc.training.checkpointing:_flush", 9),
    "within a step": (TRAINING_STEP, 6),
    "before the first stage's model is written": ("rcc.training.run:make_model", 2),
    "between the two copies of the first stage's model": ("rcc.model.rcc:RCCForCausalLM.save_pretrained", 2),
    "between the stages": ("rcc.training.run:make_model", 3),
    "in the second stage": (TRAINING_STEP, 12),
    "while the last model is written": ("rcc.config:RCCConfig.save", 3),
    "between the two copies of the last": ("rcc.model.rcc:RCCForCausalLM.save_pretrained", 4),
}


@pytest.fixture(scope="module")
def killed(shared: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, TrainingResult]]:
    """Runs that were killed with -9, each at one of POINTS, and resumed."""
    folder = tmp_path_factory.mktemp("killed")
    outputs = {name: folder / str(i) for i, name in enumerate(POINTS)}
    begun = [start(shared, outputs[name], faults=[partial(at, *POINTS[name], dies)]) for name in POINTS]
    assert [process.end().code for process in begun] == [-signal.SIGKILL] * len(POINTS)
    resumed = {name: start(shared, outputs[name], "--resume") for name in POINTS}
    return {name: (outputs[name], process.end()) for name, process in resumed.items()}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_goes_on_to_the_same_digits(
    killed: dict[str, tuple[Path, TrainingResult]], finished: Path, point: str
) -> None:
    output, result = killed[point]
    result.ok()
    assert_same(output, finished)
    assert not list(output.rglob("*.tmp"))


@pytest.mark.parametrize("kind", ["separate", "direct"])
def test_a_run_that_is_killed_again_and_again(separate: Settings, direct: Settings, tmp_path: Path, kind: str) -> None:
    """At any moment, wherever it is."""
    recipe = changed({"separate": separate, "direct": direct}[kind], stages__0__max_steps=24, run__save_steps=3)
    random.seed(5)
    whole, output = start(recipe, tmp_path / "whole"), tmp_path / "run"
    for moment in [random.uniform(0, 0.3) for _ in range(4)]:
        fault = partial(at, TRAINING_STEP, 1, partial(kill_after, moment))
        assert go_on(recipe, output, faults=[fault]).end().code == -signal.SIGKILL
    go_on(recipe, output).end().ok()
    whole.end().ok()
    assert_same(output, tmp_path / "whole")


@pytest.mark.parametrize("n", [1, 5])
def test_a_signal_saves_first(shared: Settings, finished: Path, tmp_path: Path, n: int) -> None:
    """Also where the signal reaches processes that load data; before the first step there is nothing to save.

    What it advises goes on with the recipe as the run was begun, overridden settings included.
    """
    function = TRAINING_STEP if n > 1 else "rcc.training.run:make_model"
    begun = {}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        group = number == signal.SIGINT
        recipe = changed(shared, run__workers=1) if n > 1 and group else shared
        fault = partial(at, function, n, partial(send, number, group))
        begun[code] = start(changed(recipe, name="other"), tmp_path / str(code), "--set", "name=tiny", faults=[fault])
    for code, process in begun.items():
        result = process.end()
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        if n > 1:
            stage = tmp_path / str(code) / "stages/1-short"
            assert checkpoints_of(stage) == ["checkpoint-2", "checkpoint-3"]  # within the third step of two batches
            advice = re.search(r"^rcc: interrupted; rcc (train .* --resume) goes on\.$", result.err, re.M)
            assert advice, result.err
            begun[code] = RunningTraining(shlex.split(advice[1]), tmp_path / f"{code}.again")
        else:
            begun[code] = go_on(shared, tmp_path / str(code))
    for code, process in begun.items():
        process.end().ok()
        assert_same(tmp_path / str(code), finished)


def test_a_signal_ends_the_first_measurement(shared: Settings, finished: Path, tmp_path: Path) -> None:
    """Held-out samples of a large model take minutes, and before the first step there is nothing to save."""
    fault = partial(at, "rcc.training.held_out:_measure_kind", 2, partial(send, signal.SIGTERM))
    result = start(shared, tmp_path / "run", faults=[fault]).end()
    assert result.code == 143, result.err
    assert "held out at" not in result.err
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    go_on(shared, tmp_path / "run").end().ok()
    assert_same(tmp_path / "run", finished)


def test_a_damaged_checkpoint_is_passed_over(shared: Settings, finished: Path, tmp_path: Path) -> None:
    fault = partial(at, TRAINING_STEP, 9, dies)
    train(shared, tmp_path / "run", faults=[fault])
    stage = tmp_path / "run/stages/1-short"
    assert checkpoints_of(stage) == ["checkpoint-2", "checkpoint-4"]
    with (stage / "checkpoints/checkpoint-4" / checkpointing.STATE).open("r+b") as file:
        file.truncate(1000)
    (stage / "checkpoints/.checkpoint-6.tmp").mkdir()
    result = train(shared, tmp_path / "run", "--resume").ok()
    assert re.search(r"checkpoint-4 is passed over: state.pt has 1,000 bytes instead of [0-9,]+\.", result.err)
    assert "short: going on at step 2" in result.err
    assert_same(tmp_path / "run", finished)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_full_disk_loses_nothing(shared: Settings, finished: Path, tmp_path: Path) -> None:
    fault = partial(at, "rcc.training.checkpointing:write", 2, partial(fill_disk, 20_000))
    result = train(shared, tmp_path / "run", faults=[fault])
    stage = tmp_path / "run/stages/1-short"
    result.refused(str(stage / "checkpoints/checkpoint-4"), "cannot be written")
    assert checkpoints_of(stage) == ["checkpoint-2"]
    train(shared, tmp_path / "run", "--resume").ok()
    assert_same(tmp_path / "run", finished)
