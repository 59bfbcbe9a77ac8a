"""A training recipe: the YAML file as dataclasses, validated where they are made.

    name: my-model
    model: {encoder: …, segment_length: 2048, rates: [32]}     # what is trained
    data: {text: [{path: books.jsonl}], questions: []}         # from what
    stages: [{name: short, tasks: {reconstruction: {}}, …}]    # how, one after the other
    run: {save_minutes: 10}                                    # what changes no result

Every key has a default or is asked for by name; an unknown one is an error that names the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import RCCConfig
from ..data.sources import Source
from ..errors import FileError, InputError
from ..runtime import atomic, plain
from .settings import TwiceError, build, check, override, parse
from .stage import BUDGETS, Stage

_OF_A_MODEL = ("name", "base", "weights_sha256", "fingerprint")
"""What RCCConfig says of a model once it is made."""


@dataclass
class ModelSettings:
    """Say what is trained.

    Args:
        encoder, decoder: folders, hub ids or names of bases; without a decoder the encoder's base is shared.
        config: the model's configuration, whose settings stand in the same table as these.
        max_position_embeddings: positions that both backbones shall address, where that is more than they were
            pretrained with; their own weights must be trained.
        shapes: for planning, where a backbone is neither at hand nor in :data:`rcc.planning.shapes.SHAPES`: {its
            name: what its config.json says of its shape}.
    """

    encoder: str = ""
    decoder: str | None = None
    config: RCCConfig = field(default_factory=RCCConfig, metadata=plain.inline(without=_OF_A_MODEL))
    max_position_embeddings: int | None = None
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.encoder:
            raise InputError("model.encoder is missing: name a folder, a hub id or a base.")
        frozen = self.decoder is None or any(map(self.config.is_frozen, self.config.sides))
        if self.max_position_embeddings is not None and frozen:
            raise InputError(
                "model.max_position_embeddings is for backbones that are trained themselves: name a decoder and"
                " leave out LoRA, or leave it out."
            )

    def named(self, name: str) -> RCCConfig:
        """Return the configuration of a model of that name, not yet joined with its bases."""
        return replace(self.config, name=name)


@dataclass
class DataSettings:
    """Say what is read.

    Args:
        text: sources of running text (reconstruction, continuation).
        questions: sources of rows with context, question and answers (instruction).
        evaluation_text, evaluation_questions: held-out sources of their own. Rows of the sources above with the same
            content are not trained on.
        held_out: the share of rows kept out of training where there is no evaluation source, 0 to below 1; chosen by
            a hash of the content.
    """

    text: list[Source] = field(default_factory=list)
    questions: list[Source] = field(default_factory=list)
    evaluation_text: list[Source] = field(default_factory=list)
    evaluation_questions: list[Source] = field(default_factory=list)
    held_out: float = 0.01

    def __post_init__(self) -> None:
        check(0 <= self.held_out < 1, "data.held_out", self.held_out, "a share from 0 to below 1")


@dataclass
class RunSettings:
    """Say what a run does beside learning; nothing here changes a loss beyond rounding, but for `vocabulary`.

    Args:
        device: cpu, cuda, …; None: a GPU if there is one.
        attention: transformers' attn_implementation; None: eager on a CPU where segments have at most 256 tokens (its
            backward pass is faster there), else sdpa.
        compile: torch.compile on the blocks; None: on a GPU.
        threads: of a process on a CPU; 0: torch's choice, or an equal part of the cores for each of several.
        workers: processes that prepare batches; None: 4 on a GPU, none on a CPU.
        fsdp: shard weights, gradients and optimiser over the processes of torchrun (FSDP2) instead of copying (DDP).
        save_minutes, save_steps: how often a checkpoint is written (0: only at the end and on a signal).
        keep: checkpoints kept.
        log_steps: steps between two lines of progress.
        evaluate_minutes, evaluate_steps: how often held-out samples are measured (0: at each stage's end only).
        evaluation_samples: of each task, rate and length; 0 measures nothing.
        vocabulary: `all`, or `data`: the decoder's head has, in training and in what is measured then, only the tokens
            that occur in the data. Faster where the vocabulary is large; losses are a little lower than over `all`, and
            what is saved has the whole head. Needs LoRA on the decoder, and no distillation.
        dtype: of frozen weights, of the computation, and of what is saved. On a CPU that has no bfloat16 the first two
            are float32.
    """

    device: str | None = None
    attention: str | None = None
    compile: bool | None = None
    threads: int = 0
    workers: int | None = None
    fsdp: bool = False
    save_minutes: float = 5.0
    save_steps: int = 0
    keep: int = 2
    log_steps: int = 10
    evaluate_minutes: float = 0.0
    evaluate_steps: int = 0
    evaluation_samples: int = 16
    vocabulary: str = "all"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for key in (
            "save_minutes",
            "save_steps",
            "evaluate_minutes",
            "evaluate_steps",
            "evaluation_samples",
            "threads",
        ):
            check(getattr(self, key) >= 0, f"run.{key}", getattr(self, key), "a number that is not negative")
        good = self.workers is None or self.workers >= 0
        check(good, "run.workers", self.workers, "a whole number that is not negative")
        for key in ("keep", "log_steps"):
            check(getattr(self, key) > 0, f"run.{key}", getattr(self, key), "a positive whole number")
        known = ("all", "data")
        check(self.vocabulary in known, "run.vocabulary", self.vocabulary, f"one of {', '.join(known)}")
        dtypes = ("bfloat16", "float32")
        check(self.dtype in dtypes, "run.dtype", self.dtype, f"one of {', '.join(dtypes)}")
        attentions = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
        check(self.attention in attentions, "run.attention", self.attention, f"one of {', '.join(attentions[1:])}")


@dataclass
class Recipe:
    """Everything that one training run needs to know.

    Args:
        name: what contexts and messages call the model.
        init: a trained model to start from instead of new projections and LoRA.
        seed: of the samples, their order and LoRA's start.
    """

    model: ModelSettings
    stages: list[Stage]
    data: DataSettings = field(default_factory=DataSettings)
    run: RunSettings = field(default_factory=RunSettings)
    name: str = "rcc"
    init: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to below 2**32")
        check(bool(self.stages), "stages", self.stages, "at least one stage")
        names = [stage.name for stage in self.stages]
        check(len(set(names)) == len(names), "stages", names, "stages of different names")
        if self.run.vocabulary == "data" and any(stage.distillation for stage in self.stages):
            raise InputError("run.vocabulary=data compares no teacher's logits: leave out distillation, or use all.")
        known = self.model.config.rates
        for i, stage in enumerate(self.stages):
            stage.rates = [1] if stage.plain else stage.rates or list(known)
            used = {f"stages.{i}.rates": stage.rates}
            for name, task in stage.tasks.items():
                for option in task.rate_options:
                    used[f"stages.{i}.tasks.{name}.{option}"] = getattr(task, option)
            for key, rates in {} if stage.plain else used.items():
                for rate in rates:
                    check(rate in known, key, rate, f"some of model.rates ({known})")
            for name, task in stage.tasks.items():
                for option in task.pass_options if self.run.fsdp else ():
                    # processes that do not run the same passes wait for each other's shards for ever
                    value = getattr(task, option)
                    check(not value, f"stages.{i}.tasks.{name}.{option}", value, "0 with run.fsdp")
                if task.reads and not getattr(self.data, task.reads):
                    raise InputError(f"stages.{i}.tasks.{name} needs data.{task.reads}, which is empty: add a source.")

    def reads_exactly(self, rate: int) -> bool:
        """Return whether the decoder itself reads contexts at a rate, as they are: 1 with a direct prefix."""
        return self.model.config.decoder_reads(rate)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Recipe:
        """Read a YAML file.

        Args:
            path: the recipe's file.
            overrides: `key.path=value`, where a list's entries go by number; the value is YAML.

        Raises:
            FileError: it cannot be read. InputError: it is not YAML, or holds what cannot be used.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
        try:
            data = parse(text)
        except TwiceError as error:
            raise InputError(f"{path}: {error}") from None
        except RecursionError:
            raise InputError(f"{path} is nested too deep to be a recipe: check its brackets.") from None
        except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
            raise InputError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}.") from None
        for setting in overrides or []:
            override(data, setting)
        if isinstance(data, dict):
            _one_budget(data, overrides or [])
        return build(cls, data, "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, from which the same recipe can be built."""
        data: dict[str, Any] = plain.to_plain(self)
        return data

    def save(self, path: Path) -> None:
        """Write it as YAML, every default spelt out."""
        atomic.write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def _one_budget(data: dict[str, Any], overrides: list[str]) -> None:
    """Drop a stage's budget of the file where another one was set from outside."""
    given = [setting.partition("=")[0].split(".") for setting in overrides]
    stages = data.get("stages")
    for i, stage in enumerate(stages if isinstance(stages, list) else []):
        chosen = {path[2] for path in given if path[:2] == ["stages", str(i)] and path[2:] and path[2] in BUDGETS}
        for key in BUDGETS if chosen and isinstance(stage, dict) else ():
            if key not in chosen:
                stage.pop(key, None)
