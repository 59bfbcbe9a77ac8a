"""Groups of parameters: how each learns in a stage, and the optimizer that is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..model.freezing import GROUPS, group_of
from .settings import check

if TYPE_CHECKING:
    from ..model.rcc import RCCForCausalLM
    from .stage import Stage


@dataclass
class Group:
    """Say how one group of parameters learns.

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
        check(0 < self.learning_rate < float("inf"), "learning_rate", self.learning_rate, "a number above 0")
        schedules = ("constant", "linear", "cosine")
        check(self.schedule in schedules, "schedule", self.schedule, f"one of {', '.join(schedules)}")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "a whole number that is not negative")
        check(0 <= self.floor <= 1, "floor", self.floor, "a share from 0 to 1")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number that is not negative")

    def factor(self, step: int, part: float) -> float:
        """Return the share of the peak at a step, counted from 0, once `part` of the stage's budget is spent."""
        part = min(1.0, part)
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        shape = {"constant": 1.0, "linear": 1 - part, "cosine": 0.5 * (1 + math.cos(math.pi * part))}[self.schedule]
        return warm * (self.floor + (1 - self.floor) * shape)


def make_optimizer(model: RCCForCausalLM, stage: Stage, fused: bool) -> torch.optim.AdamW:
    """Return AdamW over what learns in a model, a group of parameters for each that does.

    Args:
        model: prepared for the stage: what requires gradients learns.
        stage: its groups' rates and weight decay, and AdamW's betas.
        fused: one kernel a step, also on a CPU; not for sharded weights.
    """
    groups = []
    for name in GROUPS:
        parameters = [p for n, p in model.named_parameters() if p.requires_grad and group_of(n) == name]
        if parameters:
            how = stage.group(name)
            settings = {"lr": how.learning_rate, "weight_decay": how.weight_decay, "name": name}
            groups.append({"params": parameters, **settings})
    return torch.optim.AdamW(groups, betas=(stage.betas[0], stage.betas[1]), fused=fused)


def make_schedule(
    optimizer: torch.optim.Optimizer, stage: Stage, spent: Callable[[int], float]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of an optimizer that :func:`make_optimizer` made.

    Args:
        optimizer: its groups have the names of the stage's.
        stage: says how each group learns.
        spent: step → the part of the stage's budget that is spent.
    """
    groups = [stage.group(group["name"]) for group in optimizer.param_groups]
    rates: list[Any] = [lambda step, how=how: how.factor(step, spent(step)) for how in groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
