"""One stage of training, on Hugging Face's Trainer.

Trainer's loop is kept; what is ours is handed to it: batches that know their number, groups of parameters with
schedules of their own, checkpoints that are whole or not there, budgets in tokens, steps or minutes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..errors import ModelError
from ..runtime.provenance import commit, libraries
from . import checkpointing
from .batches import Batches, Samples
from .checkpointing import ABOUT, STATE, TRAINER_STATE, load_about, load_state, random_state, set_random_state
from .distributed import Process, Wrapped, agree, gather, sharded_like, unsharded
from .groups import make_optimizer, make_schedule
from .held_out import kinds_of, measure
from .objective import Objective
from .progress import Log, Progress
from .recipe import Recipe

AGAIN = "start a new run with a lower learning rate (init goes on from a finished stage's model)"
FOREVER = 2**31 - 1
"""Steps of a stage whose budget is minutes."""


class Interrupted(Exception):  # noqa: N818  # no error: the run was told to stop
    """Training was told to stop by a signal, and has saved what it had."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StageTrainer(Trainer):
    """Trainer for one stage.

    Args:
        objective: the model and its loss.
        weights: all that any stage learns, by name.
        samples: the stage's; `held_out` those to measure on, None where there are none.
        log, display: where losses go, and what the user sees.
    """

    objective: Objective
    tokens: int
    spent: float

    def __init__(
        self,
        objective: Objective,
        weights: dict[str, nn.Parameter],
        recipe: Recipe,
        number: int,
        process: Process,
        samples: Samples,
        held_out: Samples | None,
        folder: Path,
        log: Log,
        display: Progress,
    ):
        self.recipe, self.number, self.stage, self.process = recipe, number, recipe.stages[number], process
        self.objective, self.weights, self.samples, self.held_out = objective, weights, samples, held_out
        self.folder, self.journal, self.display = folder, log, display
        self.tokens = self.first_batch = 0
        self.spent = 0.0
        self.pending: list[tuple[int, int, str, Tensor]] = []  # step, tokens, kinds, loss: written a few at a time
        self.running: list[tuple[str, Tensor]] = []  # of the step being taken
        self.stopped_by: int | None = None
        self.over = False  # the budget is spent
        self.figures: dict[str, dict[str, float]] = {}
        stage, device = self.stage, process.device
        minutes = stage.max_minutes is not None
        settings = TrainingArguments(
            output_dir=str(folder),
            max_steps=FOREVER if minutes else samples.schedule.steps(process.world),
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
            ddp_backend=None if process.world == 1 else "nccl" if device.type == "cuda" else "gloo",
            # a batch that is read exactly reaches neither encoder nor projections
            ddp_find_unused_parameters=any(recipe.reads_exactly(rate) for rate in stage.all_rates),
        )
        super().__init__(model=objective, args=settings, callbacks=[_Steps(self)])
        self.remove_callback(transformers.PrinterCallback)
        if process.first:
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                from transformers.integrations.integration_utils import TensorBoardCallback

                board = folder.parents[1] / "tensorboard" / stage.name
                self.add_callback(TensorBoardCallback(SummaryWriter(str(board))))

    # -------- what Trainer asks for
    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the stage's batches from :attr:`first_batch` on, made in workers."""
        cuda = self.process.device.type == "cuda"
        workers = self.recipe.run.workers
        workers = (4 if cuda else 0) if workers is None else workers
        batches = Batches(self.samples, self.first_batch, self.process.rank, self.process.world)
        ahead: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _alone} if workers else {}
        return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=cuda, **ahead)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        # Trainer takes a model other than its own for one that needs no wrapping
        return Wrapped(self.objective) if self.recipe.run.fsdp and self.process.world > 1 else self.objective

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer of the stage's groups."""
        self.optimizer = make_optimizer(self.objective.model, self.stage, fused=not self.recipe.run.fsdp)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make a schedule for each group, over the part of the budget that is spent."""
        self.lr_scheduler = make_schedule(self._own_optimizer, self.stage, self.part)
        return self.lr_scheduler

    @property
    def _own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return cast("torch.optim.Optimizer", getattr(self.optimizer, "optimizer", self.optimizer))

    @property
    def _schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rates' schedule, which Trainer makes with the optimizer."""
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def part(self, step: int) -> float:
        """Return the part of the stage's budget that is spent."""
        if self.stage.max_minutes is not None:
            return self.spent / 60 / self.stage.max_minutes
        return step / self.args.max_steps

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute loss and gradients of a batch, and note the loss for the log."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.running.append((inputs["kind"], loss))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write what is due to the log and to the display.

        Raises:
            ModelError: the gradient is not finite: the weights are lost, and are not saved.
        """
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
        self.tokens += self.process.world * sum(schedule.tokens(first + i) for i in range(self.stage.accumulation))
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
        if self.process.world > 1:
            dist.all_reduce(losses)
            losses /= self.process.world
        for (step, tokens, kinds, _), loss in zip(self.pending, losses.tolist(), strict=True):
            row = {"stage": self.stage.name, "step": step, "tokens": tokens, "kind": kinds, "loss": loss}
            self.journal.write({**row, "seconds": round(self.spent, 2)})
            if not math.isfinite(loss):
                raise ModelError(f"the loss at step {step} is {loss}: {AGAIN}.")
        self.pending = []

    def measure(self) -> None:
        """Measure loss and token accuracy on held-out samples, by kind, and log them.

        Whoever asks for an end meanwhile need not wait for all kinds, unless they are the finished model's.
        """
        if self.held_out is None:
            return
        figures, count = {}, len(kinds_of(self.held_out))
        samples, device = self.recipe.run.evaluation_samples, self.process.device
        self.display.measuring(0, count)
        for kind, of_kind in measure(self.objective, self.held_out, samples, device):
            figures[kind] = of_kind
            self.display.measuring(len(figures), count)
            if self.stopped_by is not None and not self.over and self.process.world == 1:
                return
        self.figures = figures
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
        state = {
            "weights": {name: unsharded(p) for name, p in self.weights.items()},
            "optimizer": tree_map(unsharded, self._own_optimizer.state_dict()),
            "schedule": self._schedule.state_dict(),
            "random": gather(random_state()),
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
        if self.process.first:
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
        if self.process.world > 1:
            dist.barrier()
        self.display.saved(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Leave the weights as they are: they were loaded when the model was made, before it was sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint))
        inner = self._own_optimizer
        parameters = [p for group in inner.param_groups for p in group["params"]]
        for i, values in state["optimizer"]["state"].items():
            state["optimizer"]["state"][i] = {k: sharded_like(v, parameters[i]) for k, v in values.items()}
        inner.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = load_state(Path(checkpoint))["random"]
            set_random_state(states[self.process.rank % len(states)])

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
    """Set up a worker process, which the tokenizer's threads did not follow when it was forked."""
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
            if t.stopped_by is not None and t.process.world == 1:  # there is nothing to save
                raise Interrupted(t.stopped_by)
        self.saved = self.measured = time.perf_counter()
        self._start_clock()

    def _start_clock(self) -> None:
        self.mark = time.perf_counter(), time.process_time()

    def _since(self) -> float:
        """Return the seconds of training since the clock was started, without those that the process was stopped."""
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


@contextmanager
def _signals(trainer: StageTrainer) -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and a closed terminal ask for a checkpoint and an end; a second one ends at once."""

    def ask(number: int, frame: Any) -> None:
        if trainer.stopped_by is not None:
            raise KeyboardInterrupt
        trainer.stopped_by = number
        trainer.display.say("stopping: what has been learnt is saved first")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
