"""A run: the stages of a recipe, one after the other, in a folder."""

from __future__ import annotations

import logging
import shutil
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import FileError, InputError
from ..model.freezing import learned
from ..runtime import atomic
from ..runtime.locks import FolderLock
from ..runtime.provenance import commit, libraries
from . import checkpointing
from .batches import Corpora, Samples, used_tokens
from .card import card
from .checkpointing import load_state
from .distributed import Process, shard, unsharded
from .objective import Objective
from .progress import Log, Progress
from .recipe import Recipe
from .setup import copy_weights, load_tokenizer, make_model, precision, prepare
from .trainer import StageTrainer

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A recipe being carried out in a folder.

    Args:
        output: the run's folder: `recipe.yaml`, `log.jsonl`, `tensorboard/`, `stages/N-NAME/` and, at its top, the
            model as the last finished stage left it.
        resume: go on with the run that is there.
        init: replaces the recipe's.
    """

    recipe: Recipe
    output: Path
    resume: bool = False
    init: str | None = None
    quiet: bool = False
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        self.init = self.recipe.init = self.init or self.recipe.init

    def go(self) -> None:
        """Train all stages, alone in the folder.

        Raises:
            InputError, FileError, ModelError: what the message says. Interrupted: by a signal, after saving.
        """
        self._check_output()
        self.process = Process.join(self.recipe.run.device, self.recipe.run.threads)
        with FolderLock(self.output) if self.process.first else nullcontext():
            self._check_output()  # another process may have been at work until now
            self._go()

    def _go(self) -> None:
        first = self.process.first
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
        """Return the folder of a stage, by its number from 0."""
        return self.output / "stages" / f"{number + 1}-{self.recipe.stages[number].name}"

    def _stage(
        self, number: int, folder: Path, before: Path | None, samples: Samples, log: Log, display: Progress
    ) -> None:
        stage, process = self.recipe.stages[number], self.process
        checkpoint = checkpointing.newest(folder / "checkpoints")
        model = make_model(self.recipe, self.init, process.device)
        if process.first:
            self._begin()  # not before: what cannot be made leaves no folder
        weights = learned(model)
        source = checkpoint or (None if before is None else checkpointing.newest(before / "checkpoints"))
        if source is not None:
            copy_weights(weights, load_state(source)["weights"], source)
        elif before is not None:
            raise FileError(f"{before / 'checkpoints'} holds no whole checkpoint to go on from: start a new run.")
        vocabulary = None
        if self.recipe.run.vocabulary == "data":
            vocabulary = torch.from_numpy(used_tokens(samples.corpora, samples.marks))
            display.say(f"{len(vocabulary):,} of the vocabulary's tokens can be targets")
        loss = prepare(model, stage, self.recipe, process.device, vocabulary)
        objective = Objective(model, precision(self.recipe, self.process.device), stage.distillation, loss)
        if self.recipe.run.fsdp and process.world > 1:
            shard(objective, process)
            weights = {name: p for name, p in model.named_parameters() if name in weights}  # sharding replaced them
        log.rewind(stage.name, 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))
        trainer = StageTrainer(
            objective, weights, self.recipe, number, process, samples, self._held_out(samples), folder, log, display
        )
        trainer.go(checkpoint)
        state = {name: unsharded(p) for name, p in trainer.weights.items()}
        if process.first:
            display.say(f"writing {folder}")
            result = make_model(self.recipe, self.init, torch.device("cpu"))
            copy_weights(learned(result), state, folder)
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
        if process.world > 1:
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
                raise FileError(f"{self.output} holds a run already: set resume=True to go on, or name another folder.")
            if (self.output / "config.json").exists():
                raise FileError(f"{self.output} holds a model already: name another folder.")
            return
        if not stored.exists():
            raise FileError(f"{self.output} holds no run to resume: leave out resume.")
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


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """Return nested settings as {path: text}."""
    if isinstance(value, dict) and value:
        return {k: v for key in value for k, v in _flat(value[key], f"{path}.{key}".lstrip(".")).items()}
    if isinstance(value, list) and value:
        return {k: v for i, entry in enumerate(value) for k, v in _flat(entry, f"{path}.{i}").items()}
    return {path: repr(value)}
