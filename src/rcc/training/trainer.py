"""`rcc train`: the stages of a recipe, one after the other, on Hugging Face's Trainer.

Trainer's loop is kept; what is ours is handed to it: batches that know their number, groups of parameters with
schedules of their own, checkpoints that are whole or not there, budgets in tokens, steps or minutes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .. import checkpoints
from ..errors import FileError, InputError, ModelError, brief
from ..model import backbones
from ..model.rcc import RCCForCausalLM, token_loss
from ..runtime import atomic
from ..runtime.locks import FolderLock
from ..runtime.precision import computing
from ..runtime.provenance import commit, libraries
from . import checkpointing
from .batches import Batches, Corpora, Kind, Samples, used_tokens
from .card import card
from .groups import freeze, group_of, learned
from .head import FrozenHead, chunk_loss
from .objective import Objective
from .progress import Log, Progress
from .recipe import GROUPS, Recipe, Stage

logger = logging.getLogger(__name__)

STATE, TRAINER_STATE, ABOUT = "state.pt", "trainer_state.json", "about.json"
AGAIN = "start a new run with a lower learning rate (--init goes on from a finished stage's model)"
FOREVER = 2**31 - 1
"""Steps of a stage whose budget is minutes."""


class Interrupted(Exception):
    """Training was told to stop by a signal, and has saved."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


# ---------------------------------------------------------------- processes and devices
@dataclass(frozen=True)
class Place:
    """Where this process computes, and which of how many it is."""

    device: torch.device
    rank: int
    world: int

    @classmethod
    def of(cls, recipe: Recipe) -> Place:
        """Join the processes that torchrun started, if it did; pick the device."""
        rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        name = recipe.run.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise InputError(f"run.device={name!r} is unknown: use cpu or cuda.") from None
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise InputError(f"run.device is {name}, but there is no GPU here: use cpu.")
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(recipe.run.threads or max(1, len(os.sched_getaffinity(0)) // _local_world()))
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(device, rank, world)

    @property
    def first(self) -> bool:
        return self.rank == 0


def _local_world() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def agree(values: list[float]) -> list[float]:
    """What process 0 says: decisions by clock or signal must be the same everywhere."""
    if not dist.is_initialized():
        return values
    box: list[Any] = [values]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# ---------------------------------------------------------------- the model
def make_model(recipe: Recipe, init: str | None, place: Place) -> RCCForCausalLM:
    """The recipe's model as training starts: new, or with the weights of `init`.

    Raises:
        ModelError: a backbone or `init` cannot be loaded. InputError: `init` is made otherwise than the recipe says.
    """
    settings = recipe.model
    torch.manual_seed(recipe.seed)  # LoRA starts at random, the same in every process
    dtype = precision(recipe, place.device)
    load: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention(recipe, place.device)}
    config = settings.config(recipe.name)
    if settings.max_position_embeddings is not None:
        load["max_position_embeddings"] = settings.max_position_embeddings
    if init is None:
        model = RCCForCausalLM.from_base(settings.encoder, settings.decoder, config, **load)
    else:
        model = RCCForCausalLM.from_pretrained(init, **load)
        for key in ("prefix", "states", "readout", "layer_map", "segment_padding"):
            _same(key, getattr(config, key), getattr(model.config, key), init)
        for key in ("share_base", "encoder_lora_rank", "decoder_lora_rank", "lora_alpha", "sink_token"):
            if getattr(config, key) is not None:  # not set: as it is there
                _same(key, getattr(config, key), getattr(model.config, key), init)
        model.config.name, model.config.segment_length = config.name, config.segment_length
        model.set_rates(config.rates, config.rate_embeddings)
    return model.to(place.device)


def _same(key: str, wanted: Any, found: Any, init: str) -> None:
    if wanted != found:
        raise InputError(f"model.{key} is {wanted!r}, but {init} was made with {found!r}: use that, or no --init.")


def attention(recipe: Recipe, device: torch.device) -> str:
    """transformers' attn_implementation for a run."""
    if recipe.run.attention is not None:
        return recipe.run.attention
    longest = max(n // rate + stage.target_tokens for stage in recipe.stages for _, n, rate in stage.kinds())
    short = recipe.model.segment_length <= 256 and longest <= 768
    return "eager" if device.type == "cpu" and short else "sdpa"


def precision(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What a run computes in."""
    return computing(getattr(torch, recipe.run.dtype), device)


def prepare(
    model: RCCForCausalLM, stage: Stage, recipe: Recipe, device: torch.device, vocabulary: Tensor | None = None
) -> None:
    """Set a model up for a stage: frozen, checkpointed and compiled as it says.

    Args:
        vocabulary: token ids, ascending, that can be targets, where a head for losses is to know no others.

    Raises:
        InputError: there is no such head, because the decoder's learns or a teacher's logits are compared with its.
    """
    freeze(model, stage.frozen, precision(recipe, device))
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = device.type == "cuda" if recipe.run.compile is None else recipe.run.compile
    if compiled:
        for block in (*backbones.blocks(model.encoder), *backbones.blocks(model.decoder.base_model)):
            # only the block's own code: the hooks around it take objects that dynamo need not see; batches have
            # many shapes, more than dynamo would make a graph for each
            block.forward = torch.compile(block.forward, dynamic=True)
        # in one piece it never holds a vocabulary of float32 for every target: at 1,000 targets 0.2 instead of 1.2 GB
        model.token_loss = torch.compile(token_loss, dynamic=True)
    if FrozenHead.fits(model) and stage.distillation is None:
        step = torch.compile(chunk_loss, dynamic=True) if compiled else chunk_loss
        model.loss_head = FrozenHead(model.decoder.get_output_embeddings().weight, vocabulary, step)
    elif vocabulary is not None:
        raise InputError("run.vocabulary=data needs LoRA on the decoder: use all.")


def shard(objective: Objective, place: Place) -> None:
    """FSDP2: shard what learns, block by block; a base under LoRA, which both sides may share, stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = objective.model
    mesh = init_device_mesh(place.device.type, (place.world,))
    whole: set[nn.Parameter] = set()
    for side in ("encoder", "decoder"):
        if model.config.share_base or getattr(model.config, f"{side}_lora_rank"):
            whole |= {p for p in getattr(model, side).parameters() if not p.requires_grad}
    # the encoder stops before a block that feeds nothing, where sharding would wait for its end
    read = backbones.blocks(model.encoder)[: model.projections.states[-1]]
    for block in (*read, *backbones.blocks(model.decoder.base_model)):
        if any(p not in whole for p in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(objective, mesh=mesh, ignored_params=whole)


def _whole(tensor: Any) -> Any:
    """A sharded tensor put together, on the CPU; every process must call this."""
    if not isinstance(tensor, Tensor):
        return tensor
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu()


def _like(value: Any, like: Tensor) -> Any:
    """A whole tensor sharded as another is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


# ---------------------------------------------------------------- one stage
class StageTrainer(Trainer):
    """Trainer for one stage.

    Args:
        objective: the model and its loss.
        weights: all that any stage learns, by name.
        samples: the stage's; `held_out` those to measure on, None where there are none.
        log, display: where losses go, and what the user sees.
    """

    def __init__(
        self,
        objective: Objective,
        weights: dict[str, nn.Parameter],
        recipe: Recipe,
        number: int,
        place: Place,
        samples: Samples,
        held_out: Samples | None,
        folder: Path,
        log: Log,
        display: Progress,
    ):
        self.recipe, self.number, self.stage, self.place = recipe, number, recipe.stages[number], place
        self.objective, self.weights, self.samples, self.held_out = objective, weights, samples, held_out
        self.folder, self.journal, self.display = folder, log, display
        self.tokens = self.first_batch = 0
        self.spent = 0.0
        self.pending: list[tuple[int, int, str, Tensor]] = []  # step, tokens, kinds, loss: written a few at a time
        self.running: list[tuple[str, Tensor]] = []  # of the step being taken
        self.stopped_by: int | None = None
        self.over = False  # the budget is spent
        self.figures: dict[str, dict[str, float]] = {}
        stage, device = self.stage, place.device
        minutes = stage.max_minutes is not None
        settings = TrainingArguments(
            output_dir=str(folder),
            max_steps=FOREVER if minutes else samples.schedule.steps(place.world),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=stage.accumulation,
            max_grad_norm=stage.max_grad_norm,
            logging_steps=recipe.run.log_steps,
            logging_nan_inf_filter=False,  # it would wait for the GPU at every step; a loss that is none ends training
            save_strategy="no",  # what is saved when is decided here
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            ignore_data_skip=True,  # batches know their numbers
            seed=recipe.seed,
            use_cpu=device.type == "cpu",
            ddp_backend=None if place.world == 1 else "nccl" if device.type == "cuda" else "gloo",
            # a batch that is read exactly reaches neither encoder nor projections
            ddp_find_unused_parameters=any(recipe.reads_exactly(rate) for rate in stage.all_rates),
        )
        super().__init__(model=objective, args=settings, callbacks=[_Steps(self)])
        self.remove_callback(transformers.PrinterCallback)
        if place.first:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                from transformers.integrations import TensorBoardCallback

                board = folder.parents[1] / "tensorboard" / stage.name
                self.add_callback(TensorBoardCallback(SummaryWriter(str(board))))

    # -------- what Trainer asks for
    def get_train_dataloader(self) -> DataLoader:
        cuda = self.place.device.type == "cuda"
        workers = self.recipe.run.workers
        workers = (4 if cuda else 0) if workers is None else workers
        batches = Batches(self.samples, self.first_batch, self.place.rank, self.place.world)
        ahead: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _alone} if workers else {}
        return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=cuda, **ahead)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Trainer takes a model other than its own for one that needs no wrapping
        return _Sharded(self.objective) if self.recipe.run.fsdp and self.place.world > 1 else self.objective

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        groups = []
        for name in GROUPS:
            parameters = [
                p for n, p in self.objective.model.named_parameters() if p.requires_grad and group_of(n) == name
            ]
            if parameters:
                how = self.stage.group(name)
                settings = {"lr": how.learning_rate, "weight_decay": how.weight_decay, "name": name}
                groups.append({"params": parameters, **settings})
        fused = not self.recipe.run.fsdp  # one kernel a step, also on a CPU
        self.optimizer = torch.optim.AdamW(groups, betas=(self.stage.betas[0], self.stage.betas[1]), fused=fused)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper, unwrapped
        groups = [self.stage.group(group["name"]) for group in inner.param_groups]
        rates: list[Any] = [lambda step, how=how: how.factor(step, self.part(step)) for how in groups]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(inner, rates)
        return self.lr_scheduler

    def part(self, step: int) -> float:
        """The part of the stage's budget that is spent."""
        if self.stage.max_minutes is not None:
            return self.spent / 60 / self.stage.max_minutes
        return step / self.args.max_steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.running.append((inputs["kind"], loss))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs and "held_out" not in str(logs):
            return  # Trainer's summary at the end counts samples that we do not have
        super().log(logs, start_time)
        if "grad_norm" in logs:
            self.flush()
            if not math.isfinite(logs["grad_norm"]):  # the weights are lost: they must not be saved
                raise ModelError(f"the gradient at step {self.state.global_step} is not finite: {AGAIN}.")
            self.display.update(self, logs)

    # -------- losses
    def step_done(self) -> None:
        """Note a step's loss; it is read from the device later, with others."""
        first = (self.state.global_step - 1) * self.stage.accumulation
        schedule = self.samples.schedule
        self.tokens += self.place.world * sum(schedule.tokens(first + i) for i in range(self.stage.accumulation))
        kinds = " ".join(kind for kind, _ in self.running)
        loss = torch.stack([loss for _, loss in self.running]).sum()  # Trainer has divided them
        self.pending.append((self.state.global_step, self.tokens, kinds, loss))
        self.running = []

    def flush(self) -> None:
        """Write the losses of the last steps to the log; in all processes, the mean over them.

        Raises:
            ModelError: one is not a number.
        """
        if not self.pending:
            return
        losses = torch.stack([loss for *_, loss in self.pending])
        if self.place.world > 1:
            dist.all_reduce(losses)
            losses /= self.place.world
        for (step, tokens, kinds, _), loss in zip(self.pending, losses.tolist(), strict=True):
            row = {"stage": self.stage.name, "step": step, "tokens": tokens, "kind": kinds, "loss": loss}
            self.journal.write({**row, "seconds": round(self.spent, 2)})
            if not math.isfinite(loss):
                raise ModelError(f"the loss at step {step} is {loss}: {AGAIN}.")
        self.pending = []

    def measure(self) -> None:
        """Loss and token accuracy on held-out samples, by kind, into the log."""
        if self.held_out is None:
            return
        self.figures = measure(self.objective, self.held_out, self.recipe.run.evaluation_samples, self.place.device)
        step = {"stage": self.stage.name, "step": self.state.global_step, "tokens": self.tokens}
        self.journal.write({**step, "held_out": self.figures})
        self.display.say(
            f"held out at {self.tokens / 1e6:.2f}M tokens: "
            + ", ".join(f"{kind} {f['loss']:.3f} ({f['accuracy']:.1%})" for kind, f in self.figures.items())
        )
        self.log({f"held_out/{kind}/{key}": value for kind, f in self.figures.items() for key, value in f.items()})

    # -------- checkpoints
    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        self.flush()
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        state = {
            "weights": {name: _whole(p) for name, p in self.weights.items()},
            "optimizer": tree_map(_whole, inner.state_dict()),
            "schedule": self.lr_scheduler.state_dict(),
            "random": _gather(_random_state()),
            "tokens": self.tokens,
            "spent": self.spent,
        }
        about = {
            "stage": self.stage.name,
            "step": self.state.global_step,
            "batch": self.state.global_step * self.stage.accumulation,
            "over": self.over,
            "held_out": self.figures,
            "recipe": self.recipe.to_dict(),
            "versions": {**libraries(), **commit()},
        }
        if self.place.first:
            self.state.log_history = []  # it is in log.jsonl
            checkpointing.write(
                self.folder / "checkpoints",
                self.state.global_step,
                {
                    STATE: lambda path: torch.save(state, path),
                    TRAINER_STATE: lambda path: self.state.save_to_json(str(path)),
                    ABOUT: lambda path: path.write_text(json.dumps(about, indent=2), encoding="utf-8"),
                },
                self.recipe.run.keep,
            )
        if self.place.world > 1:
            dist.barrier()
        self.display.saved(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights were loaded when the model was made, before it was sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint))
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        parameters = [p for group in inner.param_groups for p in group["params"]]
        for i, values in state["optimizer"]["state"].items():
            state["optimizer"]["state"][i] = {k: _like(v, parameters[i]) for k, v in values.items()}
        inner.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = load_state(Path(checkpoint))["random"]
            _set_random_state(states[self.place.rank % len(states)])

    def go(self, checkpoint: Path | None) -> None:
        """Train to the end of the stage, from a checkpoint of it if there is one."""
        if checkpoint is not None:
            state = load_state(checkpoint)
            about = load_about(checkpoint)
            self.tokens, self.spent, self.first_batch = state["tokens"], state["spent"], about["batch"]
            if about.get("over"):  # all but the model is there
                self.figures = about["held_out"]
                return
        with _signals(self):
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if self.stopped_by is not None:
            raise Interrupted(self.stopped_by)


def _alone(worker: int) -> None:
    """In a worker process: the tokenizer's threads did not come along when it was forked."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


class _Steps(TrainerCallback):
    """After every step: count, and decide whether to save, to measure or to stop."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.trainer
        t.display.start(t)
        if state.global_step == 0:
            t.measure()
        self.saved = self.measured = time.perf_counter()
        self._start_clock()

    def _start_clock(self) -> None:
        self.mark = time.perf_counter(), time.process_time()

    def _since(self) -> float:
        """Seconds of training since the clock was started, without those that the process was stopped for."""
        wall, busy = time.perf_counter() - self.mark[0], time.process_time() - self.mark[1]
        return wall if busy > wall / 10 else busy

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, run = self.trainer, self.trainer.recipe.run
        t.step_done()
        now = time.perf_counter()
        spent = t.spent + self._since()
        step = state.global_step
        save = bool(run.save_minutes and now - self.saved >= 60 * run.save_minutes)
        measure = bool(run.evaluate_minutes and now - self.measured >= 60 * run.evaluate_minutes)
        decided = agree([spent, save, measure, t.stopped_by or 0])
        t.spent, save, measure, stop = decided[0], bool(decided[1]), bool(decided[2]), int(decided[3])
        t.stopped_by = stop or None
        t.over = over = step >= state.max_steps or (t.stage.max_minutes is not None and t.part(step) >= 1)
        control.should_training_stop = bool(over or stop)
        control.should_save = bool(over or stop or save or (run.save_steps and step % run.save_steps == 0))
        control.should_log = control.should_log or control.should_save
        if over or measure or (run.evaluate_steps and step % run.evaluate_steps == 0):
            t.flush()
            t.measure()
            self.measured = time.perf_counter()
        self._start_clock()  # measuring does not count

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False  # the end of Trainer's epoch would do it again
        self.saved = time.perf_counter()
        self._start_clock()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.flush()


class _Sharded(nn.Module):
    """A module that Trainer leaves as it is."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)


@contextmanager
def _signals(trainer: StageTrainer) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a terminal that is closed ask for a checkpoint and an end; a second one is not waited for."""

    def ask(number: int, frame: Any) -> None:
        if trainer.stopped_by is not None:
            raise KeyboardInterrupt
        trainer.stopped_by = number
        trainer.display.say("stopping after this step; a checkpoint is written first")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@torch.no_grad()
def measure(objective: Objective, samples: Samples, count: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Teacher-forced loss (nats a token) and token accuracy over `count` samples of every kind of a stage.

    Always the same samples: the first ones of each of the stage's streams.
    """
    figures = {}
    was_training = objective.training
    objective.eval()
    for number, (task, length) in enumerate(samples.schedule.streams):
        rows = min(samples.stage.rows(length), count)
        for rate in samples.schedule.rates[task, length]:
            kind = Kind(task, length, rate)
            loss = correct = tokens = 0.0
            for first in range(0, count, rows):
                drawn = [samples.sample(number, k) for k in range(first, min(first + rows, count))]
                batch = {
                    key: value.to(device) if isinstance(value, Tensor) else value
                    for key, value in samples.collate(drawn, kind).items()
                    if not key.startswith("teacher")  # what counts is what was to be written, not who it sounds like
                }
                out = objective(**batch)
                targets = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, batch["logits_to_keep"] + 1]
                real = targets != -100
                n = int(real.sum())
                loss += n * float(out["loss"])
                correct += float((out["tokens"] == targets)[real].sum())
                tokens += n
            figures[str(kind)] = {"loss": round(loss / tokens, 4), "accuracy": round(correct / tokens, 4)}
    objective.train(was_training)
    return figures


# ---------------------------------------------------------------- random states, versions
def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def _gather(value: Any) -> list[Any]:
    """The values of all processes."""
    if not dist.is_initialized():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def load_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's tensors and numbers, on the CPU.

    Raises:
        FileError: it cannot be read.
    """
    try:
        return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file ends in whatever its bytes look like to the unpickler
        raise FileError(f"{checkpoint / STATE} is damaged or cannot be read ({brief(error)}).") from error


def load_about(checkpoint: Path) -> dict[str, Any]:
    """What `about.json` says of a checkpoint; what transformers reads beside it is checked as well.

    Raises:
        FileError: one of the two is damaged or cannot be read.
    """
    name = ABOUT
    try:
        about = json.loads((checkpoint / ABOUT).read_text(encoding="utf-8"))
        if type(about["batch"]) is not int or (about.get("over") and not isinstance(about["held_out"], dict)):
            raise TypeError("it lacks what a run goes on from")
        name = TRAINER_STATE
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        steps = (state.global_step, state.logging_steps, state.eval_steps, state.save_steps)
        counts = (*steps, state.train_batch_size)
        if not all(isinstance(count, (int, float)) and math.isfinite(count) for count in counts):
            raise TypeError("it counts no steps")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{checkpoint / name} is damaged or cannot be read ({brief(error)}).") from error
    return about


# ---------------------------------------------------------------- a whole run
@dataclass
class Run:
    """A recipe being carried out in a folder.

    Args:
        output: the run's folder: `recipe.yaml`, `log.jsonl`, `tensorboard/`, `stages/N-NAME/` and, at its top, the
            model as the last finished stage left it.
        resume: go on with what is there.
        init: takes the place of the recipe's.
    """

    recipe: Recipe
    output: Path
    resume: bool = False
    init: str | None = None
    quiet: bool = False
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        self.init = self.recipe.init = self.init or self.recipe.init

    def go(self) -> None:
        """Train all stages, alone in the folder.

        Raises:
            InputError, FileError, ModelError: what the message says. Interrupted: by a signal, after saving.
        """
        self._check_output()
        self.place = Place.of(self.recipe)
        with FolderLock(self.output) if self.place.first else nullcontext():
            self._check_output()  # another process may have been at work until now
            self._go()

    def _go(self) -> None:
        first = self.place.first
        display = Progress(self.recipe, quiet=self.quiet or not first)
        with display:
            display.phase("opening the sources")
            tokenizer = load_tokenizer(self.recipe, self.init)
            corpora = Corpora(self.recipe, tokenizer, display.phase)
            every = [Samples(self.recipe, i, corpora, tokenizer) for i in range(len(self.recipe.stages))]
            log = Log(self.output / "log.jsonl" if first else None)
            before: Path | None = None
            for number in range(len(self.recipe.stages)):
                folder = self.folder(number)
                if not (folder / "config.json").is_file():
                    self._stage(number, folder, before, every[number], log, display)
                before = folder
            display.say(f"done: {self.output} holds the model")

    def folder(self, number: int) -> Path:
        return self.output / "stages" / f"{number + 1}-{self.recipe.stages[number].name}"

    def _stage(
        self, number: int, folder: Path, before: Path | None, samples: Samples, log: Log, display: Progress
    ) -> None:
        stage, place = self.recipe.stages[number], self.place
        checkpoint = checkpointing.newest(folder / "checkpoints")
        model = make_model(self.recipe, self.init, place)
        if place.first:
            self._begin()  # not before: what cannot be made leaves no folder
        weights = learned(model)
        source = checkpoint or (None if before is None else checkpointing.newest(before / "checkpoints"))
        if source is not None:
            put(weights, load_state(source)["weights"], source)
        elif before is not None:
            raise FileError(f"{before / 'checkpoints'} holds no whole checkpoint to go on from: start a new run.")
        vocabulary = None
        if self.recipe.run.vocabulary == "data":
            vocabulary = torch.from_numpy(used_tokens(samples.corpora, samples.marks))
            display.say(f"{len(vocabulary):,} of the vocabulary's tokens can be targets")
        prepare(model, stage, self.recipe, place.device, vocabulary)
        objective = Objective(model, precision(self.recipe, self.place.device), stage.distillation)
        if self.recipe.run.fsdp and place.world > 1:
            shard(objective, place)
            weights = {name: p for name, p in model.named_parameters() if name in weights}  # sharding replaced them
        log.rewind(stage.name, 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
        trainer = StageTrainer(
            objective, weights, self.recipe, number, place, samples, self._held_out(samples), folder, log, display
        )
        trainer.go(checkpoint)
        state = {name: _whole(p) for name, p in trainer.weights.items()}
        if place.first:
            display.say(f"writing {folder}")
            result = make_model(self.recipe, self.init, Place(torch.device("cpu"), 0, 1))
            put(learned(result), state, folder)
            bases = [base.source for base in result.config.base.values()]
            text = card(self.recipe, number, bases, trainer.tokens, trainer.figures, {**libraries(), **commit()})
            for target in (self.output, folder):  # the stage's own last: then it is done
                with suppress(FileNotFoundError):
                    (target / "config.json").unlink()  # it is written last: without it the folder is no model
                target.mkdir(parents=True, exist_ok=True)
                atomic.write_text(target / "README.md", text)
                result.save_pretrained(target, dtype=getattr(torch, self.recipe.run.dtype))
            if before is not None:
                shutil.rmtree(before / "checkpoints", ignore_errors=True)
        if place.world > 1:
            dist.barrier()

    def _held_out(self, samples: Samples) -> Samples | None:
        if not self.recipe.run.evaluation_samples:
            return None
        try:
            return Samples(self.recipe, samples.number, samples.corpora, samples.tokenizer, "held_out")
        except InputError as error:
            logger.warning("nothing held out can be measured (data.held_out, data.evaluation_text): %s", error)
            return None

    def _check_output(self) -> None:
        """Refuse before the work what would destroy or mix up a run."""
        stored = self.output / "recipe.yaml"
        if self.output.exists() and not self.output.is_dir():
            raise FileError(f"{self.output} is not a folder: name one for the run.")
        if not self.resume:
            if stored.exists():
                raise FileError(f"{self.output} holds a run already: add --resume to go on, or name another folder.")
            if (self.output / "config.json").exists():
                raise FileError(f"{self.output} holds a model already: name another folder.")
            return
        if not stored.exists():
            raise FileError(f"{self.output} holds no run to resume: leave out --resume.")
        begun = Recipe.load(stored)
        self.init = self.recipe.init = self.init or begun.init
        differences = sorted(set(_flat(begun.to_dict()).items()) ^ set(_flat(self.recipe.to_dict()).items()))
        changed = [key for key, _ in differences if not key.startswith("run.")]
        if changed:
            raise InputError(
                f"the recipe is not the one that {self.output} was begun with ({changed[0]} differs): resume with that"
                f" one, {stored}, or start a new run."
            )

    def _begin(self) -> None:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.recipe.save(self.output / "recipe.yaml")
        except OSError as error:
            raise FileError(f"{self.output} cannot be written: {error.strerror or error}.") from error


def put(weights: dict[str, nn.Parameter], values: dict[str, Tensor], source: Path) -> None:
    """Copy a checkpoint's weights into a model's.

    Raises:
        ModelError: they are not the same ones.
    """
    if set(weights) != set(values):
        odd = sorted(set(weights) ^ set(values))[0]
        raise ModelError(f"the weights in {source} are of another model ({odd}).")
    for name, parameter in weights.items():
        # a checkpoint may be more exact than the model as made
        parameter.data = values[name].to(parameter.device, torch.promote_types(values[name].dtype, parameter.dtype))


def load_tokenizer(recipe: Recipe, init: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that both sides read with."""
    if init is not None:
        return checkpoints.load_tokenizer(init)
    return checkpoints.load_tokenizer(
        checkpoints.resolve_base(recipe.model.decoder or recipe.model.encoder, weights=False)
    )


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Nested settings → {path: text}."""
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in _flat(value[key], f"{path}.{key}".lstrip(".")).items()}
    if isinstance(value, list) and value:
        return {k: v for i, entry in enumerate(value) for k, v in _flat(entry, f"{path}.{i}").items()}
    return {path: repr(value)}
