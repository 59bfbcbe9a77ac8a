"""Several processes learn what one learns."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from training_runs import (
    LIMIT,
    TRAINING_STEP,
    Fault,
    RunningTraining,
    Settings,
    assert_close,
    at,
    changed,
    losses,
    send,
    start,
)

pytestmark = pytest.mark.usefixtures("world")


@dataclass
class Several:
    """Two-stage runs of one process and of two, which read the same."""

    one: dict[str, Path]
    two: dict[str, Path]


def free_port() -> str:
    """Return a port that nobody has, below those that the system gives to connections, which could take it."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return str(port)


def pair(recipe: Settings, output: Path, *options: Any, faults: Sequence[Fault] = ()) -> list[RunningTraining]:
    """Two processes, as torchrun starts them."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        start(recipe, output, *options, faults=faults, RANK=str(rank), LOCAL_RANK=str(rank), **rendezvous)
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def several(shared: Settings, separate: Settings, tmp_path_factory: pytest.TempPathFactory) -> Several:
    """All at once. Tasks whose targets are equally long, so that means of processes are means of tokens."""
    folder = tmp_path_factory.mktemp("several")
    lora = changed(shared, stages__0__tasks={"reconstruction": 1, "continuation": 1}, run__save_steps=0)
    lora = changed(lora, stages__1__max_tokens=1000)
    whole = changed(lora, model=separate["model"], stages__1__rates=[4])
    recipes = {"lora": lora, "whole": whole}
    double = {f"stages__{i}__batch_tokens": 2 * lora["stages"][i]["batch_tokens"] for i in (0, 1)}
    single = {name: start(changed(r, **double), folder / f"{name}-1") for name, r in recipes.items()}

    file = folder / "torchrun.yaml"
    file.write_text(yaml.safe_dump(lora, sort_keys=False))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["--master-addr=127.0.0.1", "-m", "rcc", "train", str(file), "-o", str(folder / "lora-ddp")]
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    sharded = {"run__fsdp": True}
    others = {
        "whole-ddp": pair(whole, folder / "whole-ddp"),
        "lora-fsdp": pair(changed(lora, **sharded), folder / "lora-fsdp"),
    }
    # told to stop in the second stage's second step, whose encoder is frozen
    fault = partial(at, TRAINING_STEP, 12, partial(send, signal.SIGTERM))
    stopped = pair(changed(whole, **sharded), folder / "whole-fsdp", faults=[fault])
    assert [process.end().code for process in stopped] == [143, 143]
    others["whole-fsdp"] = pair(changed(whole, **sharded), folder / "whole-fsdp", "--resume")
    for process in [*single.values(), *(p for both in others.values() for p in both)]:
        process.end().ok()
    _, said = torchrun.communicate(timeout=LIMIT)
    assert torchrun.returncode == 0, said
    assert said.count("holds the model") == 1  # one of them speaks
    return Several({n: folder / f"{n}-1" for n in recipes}, {n: folder / n for n in ("lora-ddp", *others)})


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_two_processes_learn_what_one_learns(several: Several, kind: str, how: str) -> None:
    """With twice the batch: the same losses, steps and weights, but for rounding."""
    assert len(losses(several.one[kind])) == 5 + 4 + 4
    assert_close(several.two[f"{kind}-{how}"], several.one[kind])


def test_two_processes_read_exactly(direct: Settings, tmp_path: Path) -> None:
    """Batches that reach neither encoder nor projections, among others that do; copied and sharded weights."""
    tasks = {"reconstruction": {"share": 1}, "continuation": {"share": 1}}
    recipe = changed(direct, stages__0__tasks=tasks, stages__0__lengths=[32])
    begun = [start(changed(recipe, stages__0__batch_tokens=192), tmp_path / "one")]
    for name, fsdp in (("copied", False), ("sharded", True)):
        begun += pair(changed(recipe, run__fsdp=fsdp), tmp_path / name)
    for process in begun:
        process.end().ok()
    kinds = {kind.partition("/")[2] for row in losses(tmp_path / "one") for kind in row.get("kind", "").split()}
    assert kinds == {"1x", "4x"}
    for name in ("copied", "sharded"):
        assert_close(tmp_path / name, tmp_path / "one")
