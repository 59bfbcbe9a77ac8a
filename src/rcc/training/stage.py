"""One stage of training: its tasks, sizes, budget and how each group of parameters learns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..model.freezing import GROUPS
from .groups import Group
from .settings import build, check, unknown
from .tasks import TASKS
from .tasks.base import Task

BUDGETS = ("max_tokens", "max_steps", "max_minutes")


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
        check(0 < self.weight <= 1, "weight", self.weight, "a share above 0, at most 1")
        check(self.top_k >= 0, "top_k", self.top_k, "a whole number that is not negative")
        check(self.temperature > 0, "temperature", self.temperature, "a number above 0")
        for name in self.tasks:
            check(name in TASKS, "tasks", name, f"some of {', '.join(TASKS)}")


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
            with. Encoder and projections are frozen.
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
        check(bool(self.name) and not set(self.name) & set("/\\"), "name", self.name, "a name for a folder")
        check(bool(self.tasks), "tasks", self.tasks, f"some of {', '.join(TASKS)}")
        for name, options in self.tasks.items():
            if name not in TASKS:
                raise InputError(unknown(f"tasks.{name}", name, TASKS))
            if not isinstance(options, Task):  # `reconstruction: 0.9` is short for its share
                options = {"share": options} if isinstance(options, (int, float, str)) else options
                self.tasks[name] = build(TASKS[name], options or {}, f"tasks.{name}")
        for key in ("lengths", "rates"):
            values = getattr(self, key)
            check(all(v > 0 for v in values), key, values, "positive whole numbers")
        check(bool(self.lengths), "lengths", self.lengths, "at least one length")
        for key in ("target_tokens", "batch_tokens", "accumulation"):
            check(getattr(self, key) > 0, key, getattr(self, key), "a positive whole number")
        check(self.target_tokens > 16, "target_tokens", self.target_tokens, "more than 16, for prompt and target")
        budgets = {k: getattr(self, k) for k in BUDGETS}
        given = [k for k, v in budgets.items() if v is not None]
        if len(given) != 1:
            names = " and ".join(given) or "none of them"
            raise InputError(f"budget must be exactly one of {', '.join(BUDGETS)}, not {names}.")
        check(budgets[given[0]] > 0, given[0], budgets[given[0]], "a positive number")
        for key, known in (("groups", (*GROUPS, "all")), ("frozen", GROUPS)):
            for name in getattr(self, key):
                if name not in known:
                    raise InputError(unknown(f"{key}.{name}", name, known))
        if self.plain:
            check(self.distillation is None, "distillation", "given", "left out where plain is true")
            self.frozen = sorted({*self.frozen, "encoder", "projections"})
        check(set(self.frozen) < set(GROUPS), "frozen", self.frozen, "less than all groups")
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        check(good, "betas", self.betas, "two numbers from 0 to below 1")
        check(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "a number above 0")

    def group(self, name: str) -> Group:
        """Return how a group learns in this stage."""
        return self.groups.get(name) or self.groups.get("all") or Group()

    def kinds(self) -> dict[tuple[str, int, int], float]:
        """Return every (task, length, rate) that a batch can have, and its share of the batches."""
        shares = sum(task.share for task in self.tasks.values())
        kinds: dict[tuple[str, int, int], float] = {}
        for name, task in self.tasks.items():
            lengths, rates = task.lengths or self.lengths, self.rates if self.plain else task.rates or self.rates
            for kind in itertools.product([name], lengths, rates):  # what is listed twice counts twice
                kinds[kind] = kinds.get(kind, 0.0) + task.share / shares / len(lengths) / len(rates)
        return kinds

    def rows(self, length: int) -> int:
        """Return how many samples of that many context tokens a batch of one process has."""
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
