"""`rcc train` on tiny random backbones: resuming to the same digits, checkpoints, folders, groups, processes.

Runs are processes of their own, forked from one that has torch loaded, so that they can be killed at any moment
without paying for its start each time; one of the last tests starts torchrun as users do.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import VOCABULARY, make_backbone, randomise
from rcc import InputError, RCCForCausalLM
from rcc.cli import app as cli
from rcc.model import rcc as modeling
from rcc.runtime import allocator
from rcc.text import prompting
from rcc.training import checkpointing, trainer
from rcc.training.batches import Batches, Corpora, Samples, Schedule, used_tokens
from rcc.training.groups import freeze, group_of, learned
from rcc.training.objective import Objective, divergence
from rcc.training.recipe import Distillation, Group, Recipe, build
from rcc.training.tasks import Marks

HERE = Path(__file__).resolve().parents[2]
EXAMPLE = HERE / "examples" / "simple-susan.txt"
LIMIT = 120  # seconds a process may take; other tests may be running beside it

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["rcc.cli.app", "rcc.training.trainer", "peft", "pytest", "torch.utils.tensorboard"]
    + [f"transformers.models.{family}.modeling_{family}" for family in ("llama", "gpt_neox")]
)


# ---------------------------------------------------------------- what is trained, on what
def make_tokenizer() -> PreTrainedTokenizerFast:
    """About two letters a token."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s?\S+|\s"), "isolated")
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    how = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    inner.train_from_iterator([EXAMPLE.read_text(encoding="utf-8")], how)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>", eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Backbones, a text and questions in one folder, where rcc also keeps what it makes."""
    forkserver.ensure_running()  # it takes seconds to load torch, while other tests run here
    folder = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer()
    for name, family, seed in (("llama", "llama", 1), ("upper", "gpt_neox", 2), ("lower", "gpt_neox", 3)):
        make_backbone(family, layers=2, hidden=32, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    text = EXAMPLE.read_text(encoding="utf-8")
    documents = [{"text": text[i : i + 600]} for i in range(0, 60 * 600, 600)]
    colours = ["red", "blue", "green", "grey"] * 8
    rows = [{"context": f"{i} is {c}.", "question": f"{i}?", "answers": [c]} for i, c in enumerate(colours)]
    for name, lines in (("text", documents), ("questions", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(folder / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        yield folder
        torch.set_num_threads(threads)


Settings = dict[str, Any]


def changed(recipe: Settings, **changes: Any) -> Settings:
    """A copy with other values: `stages__0__max_steps=3`."""
    recipe = copy.deepcopy(recipe)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = recipe
        for key in parents:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = value
    return recipe


@pytest.fixture(scope="module")
def shared(world: Path) -> Settings:
    """LoRA over a shared base, in two stages: everything in the first, a frozen encoder and a teacher in the second."""
    lora = {"encoder_lora_rank": 2, "decoder_lora_rank": 2}
    first = {
        "name": "short",
        "tasks": {"reconstruction": 2, "continuation": 1, "instruction": 1},
        "lengths": [32, 48],
        "target_tokens": 32,
        "batch_tokens": 96,
        "accumulation": 2,
        "max_steps": 5,
        "groups": {"all": {"learning_rate": 3e-3, "warmup_steps": 2}},
    }
    second = {
        "name": "long",
        "tasks": {"continuation": 1},
        "lengths": [64],
        "rates": [8],
        "target_tokens": 32,
        "batch_tokens": 128,
        "max_tokens": 500,
        "frozen": ["encoder"],
        "groups": {"all": {"learning_rate": 3e-3}, "decoder": {"learning_rate": 1e-3, "schedule": "linear"}},
        "distillation": {"weight": 0.5, "top_k": 8},
    }
    return {
        "name": "tiny",
        "model": {"encoder": str(world / "llama"), "segment_length": 16, "rates": [4, 8], **lora},
        "data": {
            "text": [{"path": str(world / "text.jsonl")}],
            "questions": [{"path": str(world / "questions.jsonl")}],
            "held_out": 0.2,
        },
        "stages": [first, second],
        "run": {
            "dtype": "float32",
            "threads": 1,
            "save_minutes": 0,
            "save_steps": 2,
            "log_steps": 3,
            "evaluation_samples": 1,
        },
    }


@pytest.fixture(scope="module")
def separate(world: Path, shared: Settings) -> Settings:
    """Two backbones, all weights trained, in bfloat16."""
    model = {"encoder": str(world / "upper"), "decoder": str(world / "lower"), "segment_length": 16, "rates": [4]}
    stage = {**shared["stages"][0], "gradient_checkpointing": True}
    run = {**shared["run"], "dtype": "bfloat16"}
    return {**shared, "model": model, "stages": [stage], "run": run}


@pytest.fixture(scope="module")
def direct(shared: Settings) -> Settings:
    """The first stage of `shared` with a direct prefix: some batches are read exactly, others in tasks that could hand
    over several texts or read predictions."""
    tasks = {"reconstruction": {"share": 2, "predicted": 0.5}, "instruction": {"share": 2, "own_segment": 1.0}}
    recipe = changed(shared, stages=copy.deepcopy(shared["stages"][:1]), stages__0__tasks=tasks)
    recipe = changed(recipe, model__prefix="direct", model__rates=[4, 1], model__rate_embeddings=True)
    return changed(recipe, run__vocabulary="data")


# ---------------------------------------------------------------- running it
@dataclass
class Result:
    code: int
    err: str

    def ok(self) -> Result:
        assert self.code == 0, self.err
        return self

    def refused(self, *words: str) -> str:
        """Exit code 2 and, last of all, one sentence that says all of `words`."""
        assert self.code == 2, self
        assert "Traceback" not in self.err
        last = self.err.splitlines()[-1]
        assert re.fullmatch(r"rcc: [^\n]+[.?]", last), self.err
        for word in words:
            assert word in last, (word, last)
        return last


Fault = Callable[[], None]


def _child(arguments: list[str], log: str, env: dict[str, str], faults: Sequence[Fault]) -> None:
    os.setsid()
    gc.freeze()  # Trainer collects garbage, which is quicker without all that was loaded before
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    multiprocessing.set_start_method("fork", force=True)  # for loading data, as in a process from the shell
    sys.argv = ["rcc", *arguments]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for fault in faults:
        fault()
    cli.main()


class Process:
    """`rcc …` in a process of its own; what it says goes to `log`.err."""

    def __init__(self, arguments: Sequence[Any], log: Path, faults: Sequence[Fault] = (), **env: str):
        self.log = log
        keep = {k: os.environ[k] for k in ("RCC_HOME", "HF_HUB_OFFLINE")} | {"OMP_WAIT_POLICY": "passive"}
        self.process = _forks.Process(target=_child, args=([*map(os.fspath, arguments)], str(log), keep | env, faults))
        self.process.start()

    def kill(self) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)

    def end(self) -> Result:
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"more than {LIMIT} s: {self.log}.err")
        return Result(self.process.exitcode, Path(f"{self.log}.err").read_text(encoding="utf-8"))


def start(recipe: Settings, output: Path, *options: Any, faults: Sequence[Fault] = (), **env: str) -> Process:
    """Begin `rcc train` with a recipe."""
    file = output.with_suffix(".yaml")
    if env.get("RANK", "0") == "0":
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    log = output.with_suffix(f".{env.get('RANK', 0)}")
    return Process(["train", file, "-o", output, *options], log, faults, **env)


def train(recipe: Settings, output: Path, *options: Any, faults: Sequence[Fault] = ()) -> Result:
    """`rcc train` with a recipe, to its end."""
    return start(recipe, output, *options, faults=faults).end()


def go_on(recipe: Settings, output: Path, faults: Sequence[Fault] = ()) -> Process:
    """Begin a run, or resume it if it was begun."""
    return start(recipe, output, *(["--resume"] if output.exists() else []), faults=faults)


@pytest.fixture
def refusal(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`rcc train` inside this process → the one sentence with which it refuses."""
    monkeypatch.setattr(allocator, "configure", lambda: True)  # it would change this process's memory for good

    def run(recipe: Settings | str, *options: Any, words: Sequence[str] = (), output: Path | None = None) -> str:
        """Without `output` nothing may have been made."""
        file = tmp_path / "refused.yaml"
        file.write_text(
            recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8"
        )
        target = output or tmp_path / "refused"
        monkeypatch.setattr(sys, "argv", ["rcc", "train", str(file), "-o", str(target), *map(os.fspath, options)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not target.exists() or output is not None
        return Result(int(stop.value.code or 0), capsys.readouterr().err).refused(*words)

    return run


# -------- what goes wrong in a run: each is called in its process before it begins
def at(where: str, n: int, what: Fault) -> None:
    """Do something when `module:name` is about to be called for the n-th time."""
    module, _, path = where.partition(":")
    *parents, name = path.split(".")
    place: Any = importlib.import_module(module)
    for parent in parents:
        place = getattr(place, parent)
    real, calls = getattr(place, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            what()
        return real(*args, **kwargs)

    setattr(place, name, wrapped)


def send(number: int, group: bool = False) -> None:
    """A signal to this process, or to all that it has started too, as a terminal sends it."""
    os.kill(0 if group else os.getpid(), number)


def fill_disk(size: int) -> None:
    """From now on no file can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def note_rates(path: str) -> None:
    """Write down the learning rates with which each step is taken."""
    real = trainer.StageTrainer.training_step

    def noted(self: Any, *args: Any) -> Any:
        with open(path, "a") as file:
            file.write(json.dumps({g["name"]: g["lr"] for g in self.optimizer.param_groups}) + "\n")
        return real(self, *args)

    trainer.StageTrainer.training_step = noted  # type: ignore[method-assign]


def kill_after(seconds: float) -> None:
    threading.Timer(seconds, send, [signal.SIGKILL]).start()


dies = partial(send, signal.SIGKILL)
TRAINING_STEP = "rcc.training.trainer:StageTrainer.training_step"


# -------- what a run leaves
def losses(output: Path) -> list[Settings]:
    """The log, without what depends on the clock."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(folder: Path) -> dict[str, bytes]:
    """Everything that a run's result is made of, byte by byte."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("config.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / trainer.STATE, weights_only=True)["weights"]


def checkpoints_of(stage: Path) -> list[str]:
    return sorted(p.name for p in (stage / "checkpoints").iterdir())


def assert_same(output: Path, reference: Path) -> None:
    """The same losses and measurements, digit for digit, and the same models."""
    assert losses(output) == losses(reference)
    found, wanted = weights(output), weights(reference)
    assert set(found) == set(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


Runs = dict[str, tuple[Path, Result]]


@pytest.fixture(scope="module")
def runs(shared: Settings, separate: Settings, tmp_path_factory: pytest.TempPathFactory) -> Runs:
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
        "shared": (shared, ()),
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
    return {name: (folder / name, process.end()) for name, process in begun.items()}


@pytest.fixture(scope="module")
def finished(runs: Runs) -> Path:
    """A run of `shared` that nothing disturbed."""
    runs["shared"][1].ok()
    return runs["shared"][0]


# ---------------------------------------------------------------- recipes
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
def test_an_unknown_key_names_the_nearest(refusal, shared: Settings, path: str, near: str) -> None:
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
def test_impossible_values(refusal, shared: Settings, path: str, value: Any, words: str) -> None:
    refusal(changed(full(shared), **{path: value}), words=[words])


def test_predictions_are_not_for_shards(refusal, shared: Settings) -> None:
    tasks = {"reconstruction": {"share": 1, "predicted": 0.5}}
    wanted = "stages.0.tasks.reconstruction.predicted must be 0 with run.fsdp, not 0.5"
    refusal(changed(full(shared), stages__0__tasks=tasks, run__fsdp=True), words=[wanted])


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\tname: x", "just words"])
def test_what_is_no_recipe(refusal, text: str) -> None:
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
def test_set_wrongly(refusal, shared: Settings, override: str, words: str) -> None:
    refusal(shared, "--set", override, words=[words])


def test_a_recipe_survives_being_written_down(shared: Settings, separate: Settings, tmp_path: Path) -> None:
    shipped = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(HERE.glob("recipes/*.yaml"))]
    assert shipped
    for data in (full(shared), separate, *shipped):
        recipe = load(data, tmp_path)
        assert build(Recipe, recipe.to_dict(), "") == recipe
        recipe.save(tmp_path / "saved.yaml")
        assert Recipe.load(tmp_path / "saved.yaml") == recipe


# ---------------------------------------------------------------- which batch holds what
@pytest.fixture(scope="module")
def tokenizer(world: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(world / "llama")


@pytest.fixture(scope="module")
def corpora(shared: Settings, tokenizer: Any) -> Corpora:
    return Corpora(build(Recipe, shared, ""), tokenizer)


@pytest.fixture(scope="module")
def samples_of(corpora: Corpora, tokenizer: Any) -> Callable[..., Samples]:
    """The samples of a recipe's first stage, made anew."""
    return lambda recipe, part="train": Samples(build(Recipe, copy.deepcopy(recipe), ""), 0, corpora, tokenizer, part)


def same(a: Settings, b: Settings) -> bool:
    tensors = [k for k in a if isinstance(a[k], torch.Tensor)]
    plain = all(a[k] == b[k] for k in a if k not in tensors)
    return set(a) == set(b) and plain and all(torch.equal(a[k], b[k]) for k in tensors)


def test_shares_are_exact(shared: Settings) -> None:
    """In every 1,024 batches from a multiple of that on; of the rates, in as many of one task and length."""
    stage = build(Recipe, shared, "").stages[0]
    schedule = Schedule(stage, 7)
    kinds = [schedule.at(i)[0] for i in range(2 * 1024)]
    for block in (kinds[:1024], kinds[1024:]):
        count = Counter((kind.task, kind.length) for kind in block)
        shares = {"reconstruction": 256, "continuation": 128, "instruction": 128}
        assert count == {(task, n): share for task, share in shares.items() for n in (32, 48)}
    rates = [
        kind.rate for i in range(4096) for kind in [schedule.at(i)[0]] if str(kind).startswith("reconstruction@32")
    ]
    assert Counter(rates[:1024]) == {4: 512, 8: 512}
    order = [kind.task for kind in kinds]
    assert order != sorted(order)
    other = Schedule(stage, 8)
    assert order != [other.at(i)[0].task for i in range(2 * 1024)]


def test_a_task_with_lengths_and_rates_of_its_own(shared: Settings) -> None:
    """They go before the stage's, and an entry that stands there twice is drawn twice as often."""
    tasks = {"reconstruction": 0.5, "instruction": {"share": 0.5, "lengths": [32, 48, 48], "rates": [8]}}
    stage = {**shared["stages"][0], "tasks": tasks, "lengths": [32], "rates": [4]}
    built = build(Recipe, changed(shared, stages=[stage]), "").stages[0]
    schedule = Schedule(built, 7)
    count = Counter(str(schedule.at(i)[0]) for i in range(3 * 1024))
    assert count["reconstruction@32/4x"] == 1536
    assert count["instruction@32/8x"] + count["instruction@48/8x"] == 1536
    assert abs(count["instruction@32/8x"] - 512) <= 3  # a block rounds thirds
    assert (built.all_lengths, built.all_rates) == ([32, 48], [4, 8])


def test_predictions_at_some_rates_only(samples_of, shared: Settings) -> None:
    """Elsewhere the batches are those of a task without predictions."""

    def batches(**options: Any) -> list[Settings]:
        samples = samples_of(changed(shared, stages__0__tasks={"reconstruction": {"share": 1, **options}}))
        return [samples.batch(i) for i in range(16)]

    none, everywhere = batches(), batches(predicted=1)
    low = batches(predicted=1, predicted_rates=[4])
    assert {batch["rate"] for batch in none} == {4, 8}
    for i, batch in enumerate(low):
        assert same(batch, (everywhere if batch["rate"] == 4 else none)[i])
        assert "predicted" in everywhere[i]
        assert ("predicted" in batch) == (batch["rate"] == 4)


def test_what_is_read_exactly_is_one_text_without_predictions(samples_of, direct: Settings) -> None:
    """At rate 1 of a direct prefix: the same tokens otherwise, and at 4x what the task made of them."""
    tasks = {"reconstruction": {"share": 1, "predicted": 1}, "instruction": {"share": 1, "modes": {"compress": 1}}}
    tasks["instruction"] |= {"own_segment": 1, "distractors": 0}
    recipe = changed(direct, stages__0__tasks=tasks, stages__0__lengths=[48])
    exact, whole = samples_of(recipe), samples_of(changed(recipe, model__prefix="residual"))
    apart = set()
    for i in range(32):
        got, wanted = exact.batch(i), whole.batch(i)
        parts = int(wanted.get("context_mask", torch.ones(1)).max())
        if got["rate"] == 1:
            assert "predicted" not in got
            assert int(got.get("context_mask", torch.ones(1)).max()) == 1
            wanted.pop("predicted", None)
            keys = [key for key in wanted if key != "context_mask"]
            assert same({k: got[k] for k in keys}, {k: wanted[k] for k in keys})
            apart.add((got["kind"].partition("@")[0], parts))
        else:
            assert same(got, wanted)
    assert apart == {("reconstruction", 1), ("instruction", 2)}


def test_a_budget_of_tokens(shared: Settings) -> None:
    """As many steps as bring the context tokens of all processes to the budget."""
    for lengths, world in (([32], 1), ([32, 40], 1), ([32, 40], 3)):
        stage = {**shared["stages"][0], "lengths": lengths, "max_steps": None, "max_tokens": 5000}
        schedule = Schedule(build(Recipe, changed(shared, stages=[stage]), "").stages[0], 1)
        steps = schedule.steps(world)
        rows = {32: 3, 40: 2}
        step = [sum(rows[n] * n for n in [schedule.at(i)[0].length for i in (2 * k, 2 * k + 1)]) for k in range(steps)]
        assert world * sum(step[:-1]) < 5000 <= world * sum(step)


def test_a_batch_depends_on_its_number_alone(samples_of, shared: Settings) -> None:
    first = samples_of(shared)
    seen = [first.batch(i) for i in range(48)]
    assert len({batch["kind"] for batch in seen}) == 12  # all there are
    again = samples_of(shared)
    assert all(same(again.batch(i), seen[i]) for i in reversed(range(48)))
    other = samples_of(changed(shared, seed=1))
    assert not any(same(other.batch(i), seen[i]) for i in range(48))
    held_out = samples_of(shared, "held_out")
    assert not any(same(held_out.batch(i), seen[i]) for i in range(48))


def test_loading_processes_do_not_change_the_order(samples_of, shared: Settings) -> None:
    samples = samples_of(shared)
    for start_at in (0, 5):
        batches_of = Batches(samples, start_at, 0, 1)
        loaders = [iter(DataLoader(batches_of, batch_size=None, num_workers=n)) for n in (0, 2)]
        for i in range(start_at, start_at + 7):
            none, two = (next(loader) for loader in loaders)
            assert same(none, two)
            assert same(none, samples.batch(i))


def test_processes_share_out_what_one_would_read(samples_of, shared: Settings) -> None:
    def rows(batch: Settings) -> list[tuple]:
        """Each row without its padding, which the end token is."""
        found = []
        for b in range(len(batch["input_ids"])):
            ids = [batch[key][b].tolist() for key in ("context_ids", "input_ids", "labels")]
            while ids[0][-1] == 2:
                ids[0].pop()
            while ids[2][-1] == -100:
                ids[1].pop(), ids[2].pop()
            found.append((batch["rate"], batch["kind"], *map(tuple, ids)))
        return found

    one = samples_of(changed(shared, stages__0__batch_tokens=192))
    two = samples_of(shared)
    for i in range(24):
        halves = [rows(two.batch(i, rank, 2)) for rank in (0, 1)]
        assert rows(one.batch(i)) == halves[0] + halves[1]
        assert not set(halves[0]) & set(halves[1])


# ---------------------------------------------------------------- what is minimised
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(temperature: float) -> None:
    """Against its definition in 64 bits; the likeliest tokens alone bound it from below, ever more closely."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 31, generator=generator) for _ in range(2))
    p, q = ((x.double() / temperature).exp() for x in (teacher, student))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    whole = float((p * (p / q).log()).sum(-1).mean())
    found = {k: float(divergence(student, teacher, Distillation(1.0, k, temperature))) for k in (0, 31, 99, 1, 4, 16)}
    assert found[0] == found[31] == found[99] == pytest.approx(whole, rel=1e-5)
    for k in (1, 4, 16):
        most, index = p.topk(k, -1)
        ours = q.gather(-1, index)
        rest = (1 - most.sum(-1)) * ((1 - most.sum(-1)) / (1 - ours.sum(-1))).log()
        assert found[k] == pytest.approx(float(((most * (most / ours).log()).sum(-1) + rest).mean()), rel=1e-4)
    assert 0 < found[1] < found[4] < found[16] < found[0]
    assert float(divergence(student, student, Distillation(1.0, 4, temperature))) == pytest.approx(0, abs=1e-6)


def new_model(recipe: Settings) -> RCCForCausalLM:
    """A model by a recipe, whose projections and LoRA all matter, as a stage without frozen groups trains it."""
    made = build(Recipe, copy.deepcopy(recipe), "")
    model = trainer.make_model(made, None, trainer.Place(torch.device("cpu"), 0, 1))
    return randomise(model)


@pytest.mark.parametrize("kind", ["shared", "separate"])
@pytest.mark.parametrize("task", ["continuation", "instruction"])
def test_the_teacher_is_the_base_reading_the_plain_text(samples_of, world, shared, separate, kind, task) -> None:
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
        kept = batch["logits_to_keep"].tolist()
        columns = [kept.index(len(sample.prompt) - 1 + i) for i in range(len(target))]
        ours = out["logits"][b, columns].double().log_softmax(-1)
        distances.append((wanted.exp() * (wanted - ours)).sum(-1))
    assert out["loss"].item() == pytest.approx(torch.cat(distances).mean().item(), rel=1e-5)

    out["loss"].backward()
    learning = trainer.learned(model)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning.values())
    rest = {id(p): p for p in [*model.parameters(), *objective._teacher[0].parameters()]}
    assert [p for p in rest.values() if p.grad is not None and not p.requires_grad] == []
    taught = {id(p) for p in objective._teacher[0].parameters()}
    assert not taught & {id(p) for p in learning.values()}


def test_tokens_of_the_data(corpora: Corpora, tokenizer: Any) -> None:
    """All that any row holds, the chat marks, and no more than the tasks' own words beside."""
    used = used_tokens(corpora, Marks.of(tokenizer))
    there = {int(t) for group in corpora.sources.values() for corpus in group for t in np.unique(corpus._tokens)}
    marks = {int(t) for text in (prompting.HEADER, prompting.TURN, prompting.END) for t in tokenizer.encode(text)}
    assert there | marks <= set(used.tolist())
    assert list(used) == sorted(set(used.tolist()))


def test_a_cut_head_needs_lora_and_no_teacher(refusal, shared: Settings, separate: Settings, tmp_path: Path) -> None:
    recipe = changed(separate, run__vocabulary="data")
    refusal(recipe, words=["run.vocabulary=data needs LoRA on the decoder"], output=tmp_path / "run")
    refusal(changed(shared, run__vocabulary="data"), words=["run.vocabulary=data", "leave out distillation"])


# ---------------------------------------------------------------- the training pass
def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_texts_of_a_row_are_as_if_appended(tiny, family: str, share: bool) -> None:
    """And the logits that are kept are those of the whole pass."""
    model = tiny(family, share=share, dtype=torch.float64)
    pieces = [[some(21, seed=1), some(9, seed=2)], [some(30, seed=3)], [some(3, seed=4), some(16, seed=5), some(6)]]
    ids, numbers = torch.zeros(3, 32, dtype=torch.long), torch.zeros(3, 32, dtype=torch.long)
    for b, row in enumerate(pieces):
        length = sum(map(len, row))
        ids[b, :length] = torch.cat(row)
        numbers[b, :length] = torch.cat([torch.full((len(p),), i) for i, p in enumerate(row, 1)])
    prompt = some(3, 7, seed=6)
    labels = prompt.masked_fill(torch.arange(7) < 4, -100)
    keep = torch.tensor([3, 4, 5])
    with torch.no_grad():
        whole = model(prompt, context_ids=ids, context_mask=numbers, rate=4, labels=labels)
        kept = model(prompt, context_ids=ids, context_mask=numbers, rate=4, labels=labels, logits_to_keep=keep)
    torch.testing.assert_close(kept.logits, whole.logits[:, keep])
    torch.testing.assert_close(kept.loss, whole.loss)
    for b, row in enumerate(pieces):
        context = None
        for piece in row:
            context = model.compress(piece[None], rate=4, context=context)
        torch.testing.assert_close(model(prompt[b : b + 1], context=context).logits[0], whole.logits[b])


@pytest.mark.parametrize("share", [True, False])
def test_a_frozen_encoder_keeps_nothing(fresh, monkeypatch: pytest.MonkeyPatch, share: bool) -> None:
    """No tensor for a backward pass, no activations beyond a chunk's, and the same vectors as in one piece."""
    model = fresh("llama", share=share)
    learning = trainer.learned(model)
    inside, saved, widest = False, 0, 0

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def see(module: Any, args: tuple) -> None:
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
            out = model(some(2, 5), context_ids=some(2, tokens, seed=1), context_mask=mask, rate=4, labels=some(2, 5))
        out.loss.backward()
        return saved, widest, out.logits.detach()

    monkeypatch.setattr(modeling, "BATCH_TOKENS", 64)
    open_small, open_large = read(64), read(256)
    assert open_small[0] > 0
    assert open_small[1] < open_large[1]
    for name, parameter in learning.items():
        parameter.grad = None
        parameter.requires_grad_(trainer.group_of(name) != "encoder")
    small, large = read(64), read(256)
    assert small[0] == large[0] == 0
    assert small[1] == large[1] == 2 * 2 * 16 * 48  # two segments of each row
    for chunked, at_once in ((small, open_small), (large, open_large)):
        torch.testing.assert_close(chunked[2], at_once[2], rtol=1e-5, atol=1e-5)
    for name, parameter in learning.items():
        assert (parameter.grad is None) == (trainer.group_of(name) == "encoder"), name


# ---------------------------------------------------------------- groups and schedules
def test_learning_rates_by_group(runs: Runs) -> None:
    """As the recipe's words say, computed anew: warm-up, shape over the whole stage, floor."""
    output, result = runs["groups"]
    result.ok()
    found = [json.loads(line) for line in (output.parent / "rates").read_text().splitlines()]
    wanted = []
    for step in range(8):
        done = step / 8
        linear = 0.25 + 0.75 * (1 - done)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        warm = [1 / 3, 2 / 3][step] if step < 2 else 1
        wanted.append({"encoder": 1e-3, "projections": 2e-3 * warm * linear, "decoder": 4e-3 * cosine})
    assert found == [pytest.approx(rates, rel=1e-9) for rates in wanted]


def test_a_first_step_is_as_long_as_the_learning_rate(runs: Runs) -> None:
    """AdamW's first step moves every weight by its group's rate, up or down."""
    output, _ = runs["groups"]
    recipe = Recipe.load(output / "recipe.yaml")
    model = trainer.make_model(recipe, None, trainer.Place(torch.device("cpu"), 0, 1))
    after = state_of(output / "stages/1-short/checkpoints/checkpoint-1")
    before = trainer.learned(model)
    assert set(before) == set(after)
    moved: dict[str, float] = {}
    for name, value in before.items():
        group = trainer.group_of(name)
        moved[group] = max(moved.get(group, 0.0), (after[name] - value).abs().max().item())
    assert moved == pytest.approx({"encoder": 1e-3, "projections": 2e-3 / 3, "decoder": 4e-3}, rel=1e-3)


def test_frozen_groups_do_not_change(runs: Runs, finished: Path) -> None:
    output, result = runs["frozen"]
    result.ok()
    recipe = Recipe.load(output / "recipe.yaml")
    before = trainer.make_model(recipe, None, trainer.Place(torch.device("cpu"), 0, 1)).state_dict()
    cases = [(before, output / "stages/1-short", {"encoder"})]
    earlier = RCCForCausalLM.from_pretrained(finished / "stages/1-short").state_dict()
    cases.append((earlier, finished / "stages/2-long", {"projections", "decoder"}))
    for old, folder, learning in cases:
        new = RCCForCausalLM.from_pretrained(folder).state_dict()
        assert {trainer.group_of(name) for name in new if not torch.equal(old[name], new[name])} == learning


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


# ---------------------------------------------------------------- what a run leaves
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
        found = dict(model.named_parameters())
        assert model.config.name == recipe.name
        newest = checkpointing.newest(last / "checkpoints")
        assert newest is not None
        kept = state_of(newest)
        assert set(kept) == set(trainer.learned(model))
        for key, value in kept.items():
            assert value.dtype == torch.float32, key
            assert found[key].dtype == dtype, key
            assert torch.equal(found[key], value.to(dtype)), key
    for number in range(len(recipe.stages) - 1):
        folder = output / "stages" / f"{number + 1}-{recipe.stages[number].name}"
        RCCForCausalLM.from_pretrained(folder)
        assert not (folder / "checkpoints").exists()


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


def test_ask_works_on_a_trained_model(runs: Runs, world: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the door is red.")
    asked = [
        Process(["ask", text, "which?", "--model", runs[name][0], "--max-new-tokens", "3", "--json"], tmp_path / name)
        for name in ("shared", "separate")
    ]
    for process in asked:
        process.end().ok()
        said = json.loads(Path(f"{process.log}.out").read_text())
        assert (said["model"], said["answers"][0]["question"]) == ("tiny", "which?")


def test_the_sink_learns_with_the_projections(fresh) -> None:
    """And is frozen with them."""
    model = fresh(prefix="direct", rate_embeddings=True)
    groups = {name.partition(".")[0]: group_of(name) for name in learned(model)}
    assert groups["sink"] == groups["projections"] == "projections"
    assert groups["rate_embeddings"] == "encoder"
    freeze(model, ["projections"], torch.float32)
    assert not model.sink.requires_grad


# ---------------------------------------------------------------- going on after an end
POINTS: dict[str, tuple[str, int]] = {
    "while the first checkpoint is written": ("rcc.training.checkpointing:_flush", 2),
    "before a checkpoint gets its name": ("rcc.training.checkpointing:os.rename", 2),
    "while the second is written": ("rcc.training.checkpointing:_flush", 9),
    "within a step": (TRAINING_STEP, 6),
    "before the first stage's model is written": ("rcc.training.trainer:make_model", 2),
    "between the two copies of the first stage's model": ("rcc.model.rcc:RCCForCausalLM.save_pretrained", 2),
    "between the stages": ("rcc.training.trainer:make_model", 3),
    "in the second stage": (TRAINING_STEP, 12),
    "while the last model is written": ("rcc.model.rcc:RCCConfig.save", 3),
    "between the two copies of the last": ("rcc.model.rcc:RCCForCausalLM.save_pretrained", 4),
}


@pytest.fixture(scope="module")
def killed(shared: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Result]]:
    """Runs that were killed with -9, each at one of POINTS, and resumed."""
    folder = tmp_path_factory.mktemp("killed")
    outputs = {name: folder / str(i) for i, name in enumerate(POINTS)}
    begun = [start(shared, outputs[name], faults=[partial(at, *POINTS[name], dies)]) for name in POINTS]
    assert [process.end().code for process in begun] == [-signal.SIGKILL] * len(POINTS)
    resumed = {name: start(shared, outputs[name], "--resume") for name in POINTS}
    return {name: (outputs[name], process.end()) for name, process in resumed.items()}


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_goes_on_to_the_same_digits(killed, finished: Path, point: str) -> None:
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


def test_loading_processes_end_with_their_stage(shared: Settings, tmp_path: Path) -> None:
    """Without persuasion: torch waits five seconds for one that does not."""
    recipe = changed(shared, stages=shared["stages"][:1], run__workers=2)
    train(recipe, tmp_path / "run").ok()
    assert time.time() - (tmp_path / "run/log.jsonl").stat().st_mtime < 4.5


@pytest.mark.parametrize("n", [1, 5])
def test_a_signal_saves_first(shared: Settings, finished: Path, tmp_path: Path, n: int) -> None:
    """Also where the signal reaches processes that load data; before the first step there is nothing to save."""
    where = TRAINING_STEP if n > 1 else "rcc.training.trainer:make_model"
    begun = {}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        group = number == signal.SIGINT
        recipe = changed(shared, run__workers=1) if n > 1 and group else shared
        fault = partial(at, where, n, partial(send, number, group))
        begun[code] = start(recipe, tmp_path / str(code), faults=[fault])
    for code, process in begun.items():
        result = process.end()
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        if n > 1:
            stage = tmp_path / str(code) / "stages/1-short"
            assert checkpoints_of(stage) == ["checkpoint-2", "checkpoint-3"]  # within the third step of two batches
            advice = re.search(r"^rcc: interrupted; rcc (train .* --resume) goes on\.$", result.err, re.M)
            assert advice, result.err
            begun[code] = Process(shlex.split(advice[1]), tmp_path / f"{code}.again")
        else:
            begun[code] = go_on(shared, tmp_path / str(code))
    for code, process in begun.items():
        process.end().ok()
        assert_same(tmp_path / str(code), finished)


def test_what_an_interrupted_run_advises_works(shared: Settings, tmp_path: Path) -> None:
    fault = partial(at, TRAINING_STEP, 1, partial(send, signal.SIGTERM))
    result = train(shared, tmp_path / "run", "--set", "name=other", faults=[fault])
    advice = re.search(r"^rcc: interrupted; rcc (train .*) goes on\.$", result.err, re.M)
    assert advice, result.err
    Process(shlex.split(advice[1]), tmp_path / "again").end().ok()


def test_a_damaged_checkpoint_is_passed_over(shared: Settings, finished: Path, tmp_path: Path) -> None:
    fault = partial(at, TRAINING_STEP, 9, dies)
    train(shared, tmp_path / "run", faults=[fault])
    stage = tmp_path / "run/stages/1-short"
    assert checkpoints_of(stage) == ["checkpoint-2", "checkpoint-4"]
    with (stage / "checkpoints/checkpoint-4" / trainer.STATE).open("r+b") as file:
        file.truncate(1000)
    (stage / "checkpoints/.checkpoint-6.tmp").mkdir()
    result = train(shared, tmp_path / "run", "--resume").ok()
    assert re.search(r"checkpoint-4 is passed over: state.pt has 1,000 bytes instead of [0-9,]+\.", result.err)
    assert "short: going on at step 2" in result.err
    assert_same(tmp_path / "run", finished)
    assert not list((tmp_path / "run").rglob("*.tmp"))


# ---------------------------------------------------------------- checkpoints
def checkpoint(folder: Path, step: int, keep: int = 9, size: int = 50) -> Path:
    files = {name: lambda path: path.write_bytes(b"x" * size) for name in ("a", "b")}
    return checkpointing.write(folder, step, files, keep)


@pytest.mark.parametrize(
    "damage", ["truncated", "longer", "emptied", "a file", "all files", "listing", "half a listing"]
)
def test_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    old, new = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)  # by number, not by name
    assert checkpointing.newest(tmp_path) == new
    assert not caplog.records
    match damage:
        case "truncated" | "longer" | "emptied":
            (new / "b").write_bytes(b"x" * {"truncated": 49, "longer": 51, "emptied": 0}[damage])
        case "a file":
            (new / "b").unlink()
        case "all files":
            shutil.rmtree(new)
            new.mkdir()
        case "listing":
            (new / checkpointing.LISTING).unlink()
        case "half a listing":
            (new / checkpointing.LISTING).write_text('{"a": 5')
    assert checkpointing.newest(tmp_path) == old
    [warning] = caplog.messages
    assert warning.startswith(f"{new} is passed over: ")
    assert warning.endswith(".")


def test_as_many_checkpoints_as_wanted(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    (tmp_path / "checkpoint-old").mkdir()  # somebody else's
    for step in (8, 9, 10, 11):
        checkpoint(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-old"]


def test_a_new_checkpoint_is_kept_beside_a_damaged_one_of_a_later_step(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 9) / "b").unlink()
    new = checkpoint(tmp_path, 4, keep=1)
    assert checkpointing.newest(tmp_path) == new


def test_a_full_disk_loses_nothing(shared: Settings, finished: Path, tmp_path: Path) -> None:
    fault = partial(at, "rcc.training.checkpointing:write", 2, partial(fill_disk, 20_000))
    result = train(shared, tmp_path / "run", faults=[fault])
    stage = tmp_path / "run/stages/1-short"
    result.refused(str(stage / "checkpoints/checkpoint-4"), "cannot be written")
    assert checkpoints_of(stage) == ["checkpoint-2"]
    train(shared, tmp_path / "run", "--resume").ok()
    assert_same(tmp_path / "run", finished)


def fill_around(log: str) -> None:
    fill_disk(os.path.getsize(log) + 5)


@pytest.mark.parametrize("what", ["model.safetensors", "log.jsonl"])
def test_a_full_disk_elsewhere(shared: Settings, tmp_path: Path, what: str) -> None:
    log = str(tmp_path / "run/log.jsonl")
    fault = {
        "model.safetensors": partial(at, "rcc.model.rcc:_write_weights", 1, partial(fill_disk, 4_000)),
        "log.jsonl": partial(at, "rcc.training.progress:Log.write", 3, partial(fill_around, log)),
    }[what]
    result = train(changed(shared, stages=shared["stages"][:1]), tmp_path / "run", faults=[fault])
    result.refused(str(tmp_path / "run"), "cannot be written")


def test_a_loss_that_is_no_number(runs: Runs) -> None:
    output, result = runs["infinite"]
    result.refused("the loss at step 2 is nan")
    newest = checkpointing.newest(output / "stages/1-short/checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-1"
    assert not (output / "config.json").exists()
    assert all(bool(value.isfinite().all()) for value in state_of(newest).values())


# ---------------------------------------------------------------- the folder of a run
def test_a_finished_run_has_nothing_left_to_do(shared: Settings, finished: Path) -> None:
    """And what changes no result may be changed."""
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished.rglob("*") if p.is_file()}
    before.pop(finished / "recipe.yaml")
    train(changed(shared, run__keep=5, run__log_steps=1), finished, "--resume").ok()
    after = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in finished.rglob("*") if p.is_file()}
    after.pop(finished / "recipe.yaml")
    assert after == before


def test_folders_that_are_refused(refusal, shared: Settings, finished: Path, world: Path, tmp_path: Path) -> None:
    refusal(shared, output=finished, words=[f"{finished} holds a run already: add --resume"])
    other = changed(shared, stages__0__max_steps=6)
    refusal(other, "--resume", output=finished, words=["stages.0.max_steps differs", str(finished / "recipe.yaml")])
    refusal(shared, "--resume", "--set", "seed=1", output=finished, words=["seed differs"])
    refusal(shared, "--resume", words=["holds no run to resume: leave out --resume"])
    refusal(shared, output=world / "llama", words=["holds a model already: name another folder"])
    refusal(shared, output=world / "text.jsonl", words=["is not a folder"])


# ---------------------------------------------------------------- starting from a model
def test_a_run_starts_from_a_model(shared: Settings, finished: Path, tmp_path: Path) -> None:
    """Which a run that learns next to nothing leaves as it was."""
    recipe = changed(shared, stages=shared["stages"][1:], stages__0__max_tokens=100, stages__0__groups={})
    recipe = changed(recipe, stages__0__groups__all={"learning_rate": 1e-12})
    train(recipe, tmp_path / "run", "--init", finished).ok()
    before, after = (RCCForCausalLM.from_pretrained(folder).state_dict() for folder in (finished, tmp_path / "run"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert str(finished) in (tmp_path / "run/README.md").read_text()


def test_a_model_of_another_make_is_refused(refusal, shared: Settings, finished: Path, tmp_path: Path) -> None:
    rank, states = changed(shared, model__encoder_lora_rank=3), changed(shared, model__states="last")
    words = [f"model.encoder_lora_rank is 3, but {finished} was made with 2"]
    refusal(rank, "--init", finished, words=words, output=tmp_path / "rank")
    words = [f"model.states is 'last', but {finished} was made with 'all'"]
    refusal(states, "--init", finished, words=words, output=tmp_path / "states")


@pytest.mark.parametrize(("prefix", "other"), [("direct", "residual"), ("residual", "direct")])
def test_a_model_with_another_prefix_is_refused(direct: Settings, tmp_path: Path, prefix: str, other: str) -> None:
    place = trainer.Place(torch.device("cpu"), 0, 1)
    made, wanted = (build(Recipe, changed(direct, model__prefix=p), "") for p in (other, prefix))
    trainer.make_model(made, None, place).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"model.prefix is '{prefix}', but .* was made with '{other}'"):
        trainer.make_model(wanted, str(tmp_path), place)
    assert trainer.make_model(made, str(tmp_path), place).config.prefix == other


def test_what_cannot_begin_leaves_no_folder(refusal, shared: Settings, finished: Path) -> None:
    """Otherwise the corrected command would be told that there is a run already."""
    refusal(changed(shared, model__states="last"), "--init", finished)


def test_a_run_goes_on_from_the_model_it_was_begun_with(shared: Settings, finished: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint: without --init, which it remembers, it would start from the base."""
    recipe = changed(shared, stages=shared["stages"][:1], run__evaluation_samples=0)
    whole = start(recipe, tmp_path / "whole", "--init", finished)
    fault = partial(at, TRAINING_STEP, 1, dies)
    train(recipe, tmp_path / "run", "--init", finished, faults=[fault])
    train(recipe, tmp_path / "run", "--resume").ok()
    whole.end().ok()
    assert_same(tmp_path / "run", tmp_path / "whole")


# ---------------------------------------------------------------- several processes
@dataclass
class Several:
    """Two-stage runs of one process and of two, which read the same."""

    one: dict[str, Path]
    two: dict[str, Path]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def pair(recipe: Settings, output: Path, *options: Any, faults: Sequence[Fault] = ()) -> list[Process]:
    """Two processes, as torchrun starts them."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        start(recipe, output, *options, faults=faults, RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in (0, 1)
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


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_read_exactly(direct: Settings, tmp_path: Path, fsdp: bool) -> None:
    """Batches that reach neither encoder nor projections, among others that do."""
    tasks = {"reconstruction": {"share": 1}, "continuation": {"share": 1}}
    recipe = changed(direct, stages__0__tasks=tasks, stages__0__lengths=[32], run__fsdp=fsdp)
    begun = pair(recipe, tmp_path / "two")
    begun.append(start(changed(recipe, stages__0__batch_tokens=192, run__fsdp=False), tmp_path / "one"))
    for process in begun:
        process.end().ok()
    kinds = {kind.partition("/")[2] for row in losses(tmp_path / "one") for kind in row.get("kind", "").split()}
    assert kinds == {"1x", "4x"}
    assert_close(tmp_path / "two", tmp_path / "one")


def assert_close(output: Path, reference: Path) -> None:
    """The same losses, steps and weights, but for rounding."""
    outputs = output, reference
    two, one = (losses(folder) for folder in outputs)
    for a, b in zip(two, one, strict=True):
        assert (a["stage"], a["step"], a["tokens"], a.get("kind")) == (
            b["stage"],
            b["step"],
            b["tokens"],
            b.get("kind"),
        )
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=2e-5)
        for name, figures in b.get("held_out", {}).items():
            assert a["held_out"][name]["loss"] == pytest.approx(figures["loss"], abs=3e-4)
    found, wanted = (RCCForCausalLM.from_pretrained(output).state_dict() for output in outputs)
    for name, value in wanted.items():
        if not name.endswith("query_key_value.bias"):  # attention does not depend on the keys' part: all is rounding
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4, msg=name)
