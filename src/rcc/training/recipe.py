"""A training recipe: the YAML file as dataclasses, validated where they are made.

    name: my-model
    model: {encoder: …, segment_length: 2048, rates: [32]}     # what is trained
    data: {text: [{path: books.jsonl}], questions: []}         # from what
    stages: [{name: short, tasks: {reconstruction: {}}, …}]    # how, one after the other
    run: {save_minutes: 10}                                    # what changes no result

Every key has a default or is asked for by name; an unknown one is an error that names the nearest.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import RCCConfig
from ..data.sources import Source
from ..errors import FileError, InputError
from ..runtime import atomic
from .tasks import TASKS
from .tasks.base import Task

BUDGETS = ("max_tokens", "max_steps", "max_minutes")
GROUPS = ("encoder", "projections", "decoder")
"""Groups of parameters, each with a learning rate and a schedule of its own: memory tokens and rate embeddings belong
to the encoder, the sink of a direct prefix to the projections."""


@dataclass
class ModelSettings:
    """What is trained. All but the backbones are :class:`RCCConfig`'s settings and defaults.

    Args:
        encoder, decoder: folders, hub ids or names of bases; without a decoder the encoder's base is shared.
        max_position_embeddings: positions that both backbones shall address, where that is more than they were
            pretrained with; their own weights must be trained.
        shapes: for `--dry-run` where a backbone is neither at hand nor in :data:`rcc.planning.shapes.SHAPES`: {its
            name: what its config.json says of its shape}.
    """

    encoder: str = ""
    decoder: str | None = None
    segment_length: int = 2048
    rates: list[int] = field(default_factory=lambda: [32])
    prefix: str = "residual"
    sink_token: int | None = None
    states: str = "all"
    readout: str = "strided"
    rate_embeddings: bool = False
    layer_map: str = "duplicate"
    segment_padding: str = "none"
    share_base: bool | None = None
    encoder_lora_rank: int | None = None
    decoder_lora_rank: int | None = None
    lora_alpha: float | None = None
    max_position_embeddings: int | None = None
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.encoder:
            raise InputError("model.encoder is missing: name a folder, a hub id or a base.")
        config = self.config("check")
        if self.max_position_embeddings is not None:
            lora = config.encoder_lora_rank or config.decoder_lora_rank
            if lora or config.share_base or self.decoder is None:
                raise InputError(
                    "model.max_position_embeddings is for backbones that are trained themselves: name a decoder and"
                    " leave out LoRA, or leave it out."
                )

    def config(self, name: str) -> RCCConfig:
        """The model's configuration, not yet joined with its bases."""
        own = {f.name for f in dataclasses.fields(RCCConfig)} & {f.name for f in dataclasses.fields(self)}
        return RCCConfig(name=name, **{key: getattr(self, key) for key in own})


@dataclass
class DataSettings:
    """What is read.

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
        _check(0 <= self.held_out < 1, "data.held_out", self.held_out, "a share from 0 to below 1")


@dataclass
class Group:
    """How one group of parameters learns.

    Args:
        learning_rate: the peak.
        schedule: `constant`, `linear` or `cosine`, down to `floor` of the peak at the end of the stage.
        warmup_steps: steps at the beginning over which that rises from zero.
        floor: what is left of the rate at the end of the stage, as a share of the peak.
        weight_decay: AdamW's.
    """

    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 20
    floor: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "a number above 0")
        schedules = ("constant", "linear", "cosine")
        _check(self.schedule in schedules, "schedule", self.schedule, f"one of {', '.join(schedules)}")
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "a whole number that is not negative")
        _check(0 <= self.floor <= 1, "floor", self.floor, "a share from 0 to 1")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number that is not negative")

    def factor(self, step: int, part: float) -> float:
        """What share of the peak holds at a step, counted from 0, once `part` of the stage's budget is spent."""
        part = min(1.0, part)
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        shape = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}[self.schedule]
        return warm * (self.floor + (1 - self.floor) * shape)


@dataclass
class Distillation:
    """Learn from the decoder's own base, reading the plain text, beside the targets (token-level KL divergence).

    Args:
        weight: share of the KL term in the loss; the rest is the targets' cross-entropy.
        top_k: the teacher's likeliest tokens that are compared, the others counting as one; 0: the whole vocabulary.
        temperature: of both distributions.
        tasks: the tasks it is used for.
    """

    weight: float = 0.5
    top_k: int = 64
    temperature: float = 1.0
    tasks: list[str] = field(default_factory=lambda: ["continuation", "instruction"])

    def __post_init__(self) -> None:
        _check(0 < self.weight <= 1, "weight", self.weight, "a share above 0, at most 1")
        _check(self.top_k >= 0, "top_k", self.top_k, "a whole number that is not negative")
        _check(self.temperature > 0, "temperature", self.temperature, "a number above 0")
        for name in self.tasks:
            _check(name in TASKS, "tasks", name, f"some of {', '.join(TASKS)}")


@dataclass
class Stage:
    """One stage of training; the next one goes on from its result.

    Args:
        name: of its folder and in the log.
        tasks: {task: its options}; `share` is its part of the batches.
        lengths: context tokens; one is drawn for each batch, in equal shares. A task's own go before these.
        rates: compression rates, drawn likewise; all of the model's for none. A task's own go before these.
        target_tokens: the most decoder tokens of a sample, prompt included.
        batch_tokens: context tokens that one process reads before a backward pass (at least one sample).
        accumulation: such batches a step.
        max_tokens, max_steps, max_minutes: exactly one of them is the budget: context tokens, all processes together,
            steps, or minutes of training. Only the first two can be resumed to the same losses.
        groups: how each group learns; `all` sets those that are not named.
        frozen: groups that do not learn, rounded to run.dtype. A frozen encoder's vectors are computed without
            gradients.
        betas, max_grad_norm: AdamW's, and where gradients are clipped.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        distillation: see :class:`Distillation`.
        plain: the decoder alone learns, and reads the context as it is: the model that compressed contexts are compared
            with (`rcc eval qa --tuned`). Encoder and projections are frozen.
    """

    name: str = "train"
    tasks: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [2048])
    rates: list[int] = field(default_factory=list)
    target_tokens: int = 512
    batch_tokens: int = 4096
    accumulation: int = 1
    max_tokens: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    groups: dict[str, Group] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    distillation: Distillation | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        _check(bool(self.name) and not set(self.name) & set("/\\"), "name", self.name, "a name for a folder")
        _check(bool(self.tasks), "tasks", self.tasks, f"some of {', '.join(TASKS)}")
        for name, options in self.tasks.items():
            if name not in TASKS:
                raise InputError(_unknown(f"tasks.{name}", name, TASKS))
            if not isinstance(options, Task):  # `reconstruction: 0.9` is short for its share
                options = {"share": options} if isinstance(options, (int, float, str)) else options
                self.tasks[name] = build(TASKS[name], options or {}, f"tasks.{name}")
        for key in ("lengths", "rates"):
            values = getattr(self, key)
            _check(all(v > 0 for v in values), key, values, "positive whole numbers")
        _check(bool(self.lengths), "lengths", self.lengths, "at least one length")
        for key in ("target_tokens", "batch_tokens", "accumulation"):
            _check(getattr(self, key) > 0, key, getattr(self, key), "a positive whole number")
        _check(self.target_tokens > 16, "target_tokens", self.target_tokens, "more than 16, for prompt and target")
        budgets = {k: getattr(self, k) for k in BUDGETS}
        given = [k for k, v in budgets.items() if v is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise InputError(f"budget must be exactly one of {', '.join(BUDGETS)}, not {found}.")
        _check(budgets[given[0]] > 0, given[0], budgets[given[0]], "a positive number")
        for key, known in (("groups", (*GROUPS, "all")), ("frozen", GROUPS)):
            for name in getattr(self, key):
                if name not in known:
                    raise InputError(_unknown(f"{key}.{name}", name, known))
        if self.plain:
            _check(self.distillation is None, "distillation", "given", "left out where plain is true")
            self.frozen = sorted({*self.frozen, "encoder", "projections"})
        _check(set(self.frozen) < set(GROUPS), "frozen", self.frozen, "less than all groups")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _check(good, "betas", self.betas, "two numbers from 0 to below 1")
        _check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "a number above 0")

    def group(self, name: str) -> Group:
        """How a group learns in this stage."""
        return self.groups.get(name) or self.groups.get("all") or Group()

    def kinds(self) -> dict[tuple[str, int, int], float]:
        """Every (task, length, rate) that a batch can have, and its share of the batches."""
        shares = sum(task.share for task in self.tasks.values())
        found: dict[tuple[str, int, int], float] = {}
        for name, task in self.tasks.items():
            lengths, rates = task.lengths or self.lengths, self.rates if self.plain else task.rates or self.rates
            for kind in itertools.product([name], lengths, rates):  # what is listed twice counts twice
                found[kind] = found.get(kind, 0.0) + task.share / shares / len(lengths) / len(rates)
        return found

    def rows(self, length: int) -> int:
        """Samples of that many context tokens in a batch of one process."""
        return max(1, self.batch_tokens // length)

    @property
    def all_lengths(self) -> list[int]:
        """The context lengths of all tasks."""
        return list(dict.fromkeys(length for _, length, _ in self.kinds()))

    @property
    def all_rates(self) -> list[int]:
        """The rates of all tasks."""
        return list(dict.fromkeys(rate for _, _, rate in self.kinds()))

    @property
    def budget(self) -> str:
        """Which of the budgets is set."""
        return next(k for k in BUDGETS if getattr(self, k) is not None)


@dataclass
class RunSettings:
    """What a run does beside learning; nothing here changes a loss beyond rounding, but for `vocabulary`.

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
            _check(getattr(self, key) >= 0, f"run.{key}", getattr(self, key), "a number that is not negative")
        good = self.workers is None or self.workers >= 0
        _check(good, "run.workers", self.workers, "a whole number that is not negative")
        for key in ("keep", "log_steps"):
            _check(getattr(self, key) > 0, f"run.{key}", getattr(self, key), "a positive whole number")
        known = ("all", "data")
        _check(self.vocabulary in known, "run.vocabulary", self.vocabulary, f"one of {', '.join(known)}")
        dtypes = ("bfloat16", "float32")
        _check(self.dtype in dtypes, "run.dtype", self.dtype, f"one of {', '.join(dtypes)}")
        attentions = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
        _check(self.attention in attentions, "run.attention", self.attention, f"one of {', '.join(attentions[1:])}")


@dataclass
class Recipe:
    """Everything that one run of `rcc train` needs to know.

    Args:
        name: what contexts and messages call the model.
        init: a trained model to start from instead of new projections and LoRA; `--init` sets it.
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
        _check(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to below 2**32")
        _check(bool(self.stages), "stages", self.stages, "at least one stage")
        names = [stage.name for stage in self.stages]
        _check(len(set(names)) == len(names), "stages", names, "stages of different names")
        if self.run.vocabulary == "data" and any(stage.distillation for stage in self.stages):
            raise InputError("run.vocabulary=data compares no teacher's logits: leave out distillation, or use all.")
        for i, stage in enumerate(self.stages):
            stage.rates = [1] if stage.plain else stage.rates or list(self.model.rates)
            used = {f"stages.{i}.rates": stage.rates}
            for name, task in stage.tasks.items():
                for option in task.rate_options:
                    used[f"stages.{i}.tasks.{name}.{option}"] = getattr(task, option)
            for key, rates in {} if stage.plain else used.items():
                for rate in rates:
                    _check(rate in self.model.rates, key, rate, f"some of model.rates ({self.model.rates})")
            for name, task in stage.tasks.items():
                for option in task.pass_options if self.run.fsdp else ():
                    # processes that do not run the same passes wait for each other's shards for ever
                    value = getattr(task, option)
                    _check(not value, f"stages.{i}.tasks.{name}.{option}", value, "0 with run.fsdp")
                if task.reads and not getattr(self.data, task.reads):
                    raise InputError(f"stages.{i}.tasks.{name} needs data.{task.reads}, which is empty: add a source.")

    def reads_exactly(self, rate: int) -> bool:
        """Whether contexts at a rate are read by the decoder itself, as they are: 1 with a direct prefix."""
        return self.model.prefix == "direct" and rate == 1

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Recipe:
        """Read a YAML file.

        Args:
            overrides: `key.path=value`, where a list's entries go by number; the value is YAML.

        Raises:
            FileError: it cannot be read. InputError: it is not YAML, or holds what cannot be used.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
        try:
            data = yaml.load(text, _Loader)
        except _TwiceError as error:
            raise InputError(f"{path}: {error}") from None
        except RecursionError:
            raise InputError(f"{path} is nested too deep to be a recipe: check its brackets.") from None
        except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
            raise InputError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}.") from None
        for override in overrides or []:
            _override(data, override)
        if isinstance(data, dict):
            _one_budget(data, overrides or [])
        return build(cls, data, "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which the same recipe can be built."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write it as YAML, every default spelt out."""
        atomic.write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


# ---------------------------------------------------------------- YAML
class _TwiceError(Exception):
    """A table names a setting twice."""


class _Loader(yaml.SafeLoader):
    """YAML without the rule that of two settings of one name the last one counts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = (key.tag, key.value) if isinstance(key.value, str) else id(key), key.start_mark.line + 1
            if name in lines:
                raise _TwiceError(
                    f"{key.value!r} stands twice in one table, in lines {lines[name]} and {line}: leave one."
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


# ---------------------------------------------------------------- data → dataclasses
def build(cls: Any, data: Any, where: str) -> Any:
    """A dataclass from plain data, checked key by key.

    Raises:
        InputError: one sentence that names the key, and the nearest known one where it is unknown.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where or 'the recipe'} must be a table of settings, not {data!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise InputError(_unknown(_join(where, key), key, known))
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()}
    nothing = dataclasses.MISSING
    for key, f in known.items():
        if key not in values and f.default is nothing and f.default_factory is nothing:
            raise InputError(f"{_join(where, key)} is missing.")
    try:
        return cls(**values)
    except InputError as error:
        message = str(error)
        prefix = f"{where}." if where and not message.startswith(where.partition(".")[0]) else ""
        raise InputError(prefix + message) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, {} if value is None else value, where)
    if origin is list:
        if not isinstance(value, list):
            value = [value]  # one entry may stand alone
        return [_convert(arguments[0], v, f"{where}.{i}") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a table of settings, not {value!r}.")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and not isinstance(value, (dict, list, bool)) and value is not None:
        return str(value)
    if hint in (int, float) and not isinstance(value, bool):
        try:  # YAML reads 1e-4, without a point, as text
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if hint is float and number == number:
            return number
        if hint is int and number == number and number.is_integer():
            return int(number)
    words = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    raise InputError(f"{where} must be {words[hint]}, not {value!r}.")


def _override(data: Any, override: str) -> None:
    """Set one value in plain data: `stages.0.max_tokens=1e6`."""
    path, found, text = override.partition("=")
    if not found or not path:
        raise InputError(f"--set {override}: write it as key=value, for instance stages.0.max_tokens=1e6.")
    try:
        value = yaml.load(text, _Loader)
    except _TwiceError as error:
        raise InputError(f"--set {path}: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError):
        value = text
    *parents, last = path.split(".")
    place = data
    for i, key in enumerate([*parents, last]):
        if isinstance(place, list):
            if not key.isdigit() or int(key) > len(place) - (i < len(parents)):
                raise InputError(f"--set {override}: there is no entry {key} (there are {len(place)}, from 0).")
            index: Any = int(key)
            if index == len(place):
                place.append(None)  # one more entry
        elif isinstance(place, dict):
            index = key
            if i < len(parents) and place.get(key) is None:
                place[key] = {}
        else:
            raise InputError(f"--set {override}: {'.'.join(path.split('.')[:i])} has no settings inside.")
        if i < len(parents):
            place = place[index]
    place[index] = value


def _one_budget(data: dict, overrides: list[str]) -> None:
    """A budget that was set from outside takes the place of the file's."""
    given = [override.partition("=")[0].split(".") for override in overrides]
    stages = data.get("stages")
    for i, stage in enumerate(stages if isinstance(stages, list) else []):
        chosen = {path[2] for path in given if path[:2] == ["stages", str(i)] and path[2:] and path[2] in BUDGETS}
        for key in BUDGETS if chosen and isinstance(stage, dict) else ():
            if key not in chosen:
                stage.pop(key, None)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _unknown(where: str, key: Any, known: Any) -> str:
    near = difflib.get_close_matches(str(key), list(known), 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}."
    return f"{where} is unknown: {hint}"


def _check(good: bool, key: str, value: Any, wanted: str) -> None:
    if not good:
        raise InputError(f"{key} must be {wanted}, not {value!r}.")
