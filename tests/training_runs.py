"""Runs of `rcc train` on tiny random backbones, in processes of their own; fixtures shared by the tests of training.

Processes are forked from one that has torch loaded, so that they can be killed at any moment without paying for its
start each time.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conftest import VOCABULARY, make_backbone
from rcc import RCCForCausalLM
from rcc.cli import app as cli
from rcc.runtime import allocator
from rcc.training import checkpointing
from rcc.training.batches import Corpora, Samples
from rcc.training.recipe import Recipe
from rcc.training.settings import build
from rcc.training.trainer import StageTrainer

HERE = Path(__file__).resolve().parents[1]
EXAMPLE = HERE / "examples" / "simple-susan.txt"
LIMIT = 120  # seconds a process may take; other tests may be running beside it

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    ["rcc.cli.app", "rcc.training.run", "peft", "pytest", "torch.utils.tensorboard"]
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


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    return folder


@contextlib.contextmanager
def at_home(folder: Path) -> Iterator[None]:
    """Have rcc keep what it makes in a world's folder, and fetch nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(folder / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(world_folder: Path) -> Iterator[Path]:
    """The folder with backbones, a text and questions, where rcc also keeps what it makes."""
    with at_home(world_folder):
        yield world_folder


Settings = dict[str, Any]


def changed(recipe: Settings, **changes: Any) -> Settings:
    """A copy with other values: `stages__0__max_steps=3`."""
    recipe = copy.deepcopy(recipe)
    for path, value in changes.items():
        *parents, last = path.split("__")
        table: Any = recipe
        for key in parents:
            table = table[int(key) if isinstance(table, list) else key]
        table[int(last) if isinstance(table, list) else last] = value
    return recipe


@pytest.fixture(scope="session")
def shared(world_folder: Path) -> Settings:
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
        "model": {"encoder": str(world_folder / "llama"), "segment_length": 16, "rates": [4, 8], **lora},
        "data": {
            "text": [{"path": str(world_folder / "text.jsonl")}],
            "questions": [{"path": str(world_folder / "questions.jsonl")}],
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


@pytest.fixture(scope="session")
def separate(world_folder: Path, shared: Settings) -> Settings:
    """Two backbones, all weights trained, in bfloat16."""
    encoder, decoder = (str(world_folder / name) for name in ("upper", "lower"))
    model = {"encoder": encoder, "decoder": decoder, "segment_length": 16, "rates": [4]}
    stage = {**shared["stages"][0], "gradient_checkpointing": True}
    run = {**shared["run"], "dtype": "bfloat16"}
    return {**shared, "model": model, "stages": [stage], "run": run}


@pytest.fixture(scope="session")
def direct(shared: Settings) -> Settings:
    """The first stage of `shared` with a direct prefix: some batches are read exactly, others in tasks that could hand
    over several texts or read predictions."""
    tasks = {"reconstruction": {"share": 2, "predicted": 0.5}, "instruction": {"share": 2, "own_segment": 1.0}}
    recipe = changed(shared, stages=copy.deepcopy(shared["stages"][:1]), stages__0__tasks=tasks)
    recipe = changed(recipe, model__prefix="direct", model__rates=[4, 1], model__rate_embeddings=True)
    return changed(recipe, run__vocabulary="data")


# ---------------------------------------------------------------- running it
@dataclass
class TrainingResult:
    code: int
    err: str

    def ok(self) -> TrainingResult:
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


class RunningTraining:
    """`rcc …` in a process of its own; what it says goes to `log`.err."""

    def __init__(self, arguments: Sequence[Any], log: Path, faults: Sequence[Fault] = (), **env: str) -> None:
        self.log = log
        keep = {k: os.environ[k] for k in ("RCC_HOME", "HF_HUB_OFFLINE")} | {"OMP_WAIT_POLICY": "passive"}
        self.process = _forks.Process(target=_child, args=([*map(os.fspath, arguments)], str(log), keep | env, faults))
        self.process.start()

    def kill(self) -> None:
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)

    def end(self) -> TrainingResult:
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"more than {LIMIT} s: {self.log}.err")
        return TrainingResult(self.process.exitcode, Path(f"{self.log}.err").read_text(encoding="utf-8"))


def start(recipe: Settings, output: Path, *options: Any, faults: Sequence[Fault] = (), **env: str) -> RunningTraining:
    """Begin `rcc train` with a recipe."""
    file = output.with_suffix(".yaml")
    if env.get("RANK", "0") == "0":
        file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    log = output.with_suffix(f".{env.get('RANK', 0)}")
    return RunningTraining(["train", file, "-o", output, *options], log, faults, **env)


def train(recipe: Settings, output: Path, *options: Any, faults: Sequence[Fault] = ()) -> TrainingResult:
    """`rcc train` with a recipe, to its end."""
    return start(recipe, output, *options, faults=faults).end()


def go_on(recipe: Settings, output: Path, faults: Sequence[Fault] = ()) -> RunningTraining:
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
        return TrainingResult(int(stop.value.code or 0), capsys.readouterr().err).refused(*words)

    return run


# ---------------------------------------------------------------- faults, each called in its process before it begins
def at(function: str, n: int, what: Fault) -> None:
    """Do something when `module:name` is about to be called for the n-th time."""
    module, _, path = function.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n:
            what()
        return real(*args, **kwargs)

    setattr(owner, name, wrapped)


def send(number: int, group: bool = False) -> None:
    """A signal to this process, or to all that it has started too, as a terminal sends it."""
    os.kill(0 if group else os.getpid(), number)


def fill_disk(size: int) -> None:
    """From now on no file can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def note_rates(path: str) -> None:
    """Write down the learning rates with which each step is taken."""
    real = StageTrainer.training_step

    def noted(self: Any, *args: Any) -> Any:
        with open(path, "a") as file:
            file.write(json.dumps({g["name"]: g["lr"] for g in self.optimizer.param_groups}) + "\n")
        return real(self, *args)

    StageTrainer.training_step = noted  # type: ignore[method-assign, assignment]


def kill_after(seconds: float) -> None:
    threading.Timer(seconds, send, [signal.SIGKILL]).start()


dies = partial(send, signal.SIGKILL)
TRAINING_STEP = "rcc.training.trainer:StageTrainer.training_step"


# ---------------------------------------------------------------- what a run leaves
def losses(output: Path) -> list[Settings]:
    """The log, without what depends on the clock."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def weights(folder: Path) -> dict[str, bytes]:
    """Everything that a run's result is made of, byte by byte."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("config.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / checkpointing.STATE, weights_only=True)["weights"]


def checkpoints_of(stage: Path) -> list[str]:
    return sorted(p.name for p in (stage / "checkpoints").iterdir())


def assert_same(output: Path, reference: Path) -> None:
    """The same losses and measurements, digit for digit, and the same models."""
    assert losses(output) == losses(reference)
    got, wanted = weights(output), weights(reference)
    assert set(got) == set(wanted)
    assert [name for name in wanted if got[name] != wanted[name]] == []


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
    got, wanted = (RCCForCausalLM.from_pretrained(output).state_dict() for output in outputs)
    for name, value in wanted.items():
        if not name.endswith("query_key_value.bias"):  # attention does not depend on the keys' part: all is rounding
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.fixture(scope="session")
def finished(shared: Settings, world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `shared` that nothing disturbed."""
    output = tmp_path_factory.mktemp("finished") / "shared"
    with at_home(world_folder):
        train(shared, output).ok()
    return output


# ---------------------------------------------------------------- batches
@pytest.fixture(scope="session")
def tokenizer(world_folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(world_folder / "llama")


@pytest.fixture(scope="session")
def corpora(shared: Settings, world_folder: Path, tokenizer: Any) -> Corpora:
    with at_home(world_folder):
        return Corpora(build(Recipe, shared, ""), tokenizer)


@pytest.fixture(scope="session")
def samples_of(corpora: Corpora, tokenizer: Any) -> Callable[..., Samples]:
    """The samples of a recipe's first stage, made anew."""
    return lambda recipe, part="train": Samples(build(Recipe, copy.deepcopy(recipe), ""), 0, corpora, tokenizer, part)
