"""Dry runs: what a recipe would train, on what, and roughly at what cost, without training.

Weights need not be at hand: the model is made without storage from the backbones' configurations.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from .. import checkpoints
from ..config import RCCConfig
from ..errors import FileError, InputError, ModelError
from ..model import backbones
from ..model.freezing import GROUPS, group_of
from ..model.rcc import RCCForCausalLM
from ..planning import shapes
from ..planning.activations import Batch, activations
from ..planning.blueprint import Blueprint, learning_bytes
from ..runtime.precision import computing
from .batches import Corpora, Samples
from .recipe import Recipe
from .setup import attention, load_tokenizer, prepare
from .stage import Stage
from .tasks.base import Task, describe

SUSTAINED = 0.45
"""Share of the machine's matrix rate that training is taken to reach; measured 0.4 to 0.5 for the default model."""
BIG = 300e12
"""FLOP/s that a large GPU of 2024 sustains in such training; for a figure beside this machine's."""


def plan(recipe: Recipe, init: str | None, console: Console) -> None:
    """Print the plan of a recipe.

    Raises:
        ModelError: a backbone is neither at hand nor described in model.shapes.
    """
    whole = blueprint(recipe, init)
    model = whole.build()
    _say(console, f"{recipe.name}: {len(recipe.stages)} stage(s), seed {recipe.seed}")
    start = init or "the base, with new projections" + (
        " and LoRA" if any("lora_" in n for n, _ in model.named_parameters()) else ""
    )
    _say(console, f"starts from {start}")
    rate = _matrix_rate()
    for number, stage in enumerate(recipe.stages):
        trained = copy.deepcopy(model)
        # compiling and attention make no difference to what is counted
        settings = copy.deepcopy(recipe)
        settings.run.compile = False
        prepare(trained, stage, settings, torch.device("cpu"))
        _stage(console, recipe, number, whole, trained, rate)
    _samples(console, recipe, init)


def blueprint(recipe: Recipe, init: str | None) -> Blueprint:
    """Return the recipe's model, whose weights need not be at hand.

    Raises:
        ModelError: a backbone is neither at hand nor known, nor described in model.shapes.
    """
    settings = recipe.model
    named: dict[str, tuple[str, Path | None]]
    if init is not None:
        folder = checkpoints.resolve_model(init)
        config = RCCConfig.load(folder)
        config.segment_length = settings.config.segment_length
        named = {side: (base.source, folder) for side, base in config.base.items()}
    else:
        config = settings.named(recipe.name)
        config.decide(one_base=settings.decoder is None)
        named = {"decoder": (settings.decoder or settings.encoder, None)}
        if not config.share_base:
            named["encoder"] = (settings.encoder, None)
    sides = {side: _shape(recipe, *name) for side, name in named.items()}
    dtype, device = getattr(torch, recipe.run.dtype), torch.device(recipe.run.device or "cpu")
    return Blueprint(config, sides["decoder"], sides.get("encoder"), dtype, attention(recipe, device))


def _shape(recipe: Recipe, name: str, relative_to: Path | None) -> PreTrainedConfig:
    """Return a backbone's configuration: from its folder, or from what is known or the recipe says of it."""
    try:
        shape = shapes.find(name, recipe.model.shapes, relative_to)
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}: describe it in model.shapes to plan without it.") from None
    if recipe.model.max_position_embeddings is not None:
        shape.max_position_embeddings = recipe.model.max_position_embeddings
    return shape


def flops(model: RCCForCausalLM, stage: Stage) -> float:
    """Return the FLOP of a batch of a prepared stage, forward and backward, at the mean over its lengths and rates.

    A forward pass takes 2 FLOP a weight and token, the way back 2 more for the activations and 2 for weights that
    learn.
    """
    rows = read = prefix = projected = total = 0.0
    for (_, length, compression), share in stage.kinds().items():
        samples = stage.rows(length)
        rows += share * samples
        prefix += share * samples * length / compression
        if not stage.plain and not (model.config.direct and compression == 1):  # else the decoder itself reads
            read += share * samples * length
            projected += share * samples * length / compression
    tokens = {"encoder": read, "decoder": prefix + rows * stage.target_tokens}
    for side, body in (("encoder", model.encoder), ("decoder", backbones.body(model.decoder))):
        weights = learning = 0
        for p in {id(p): p for b in backbones.blocks(body) for p in b.parameters()}.values():
            weights += p.numel()
            learning += p.numel() if p.requires_grad else 0
        passes = 2 * weights
        if side == "decoder" or learning:  # gradients pass through a decoder that does not learn
            passes += 2 * weights + 2 * learning + (2 * weights if stage.gradient_checkpointing else 0)
        total += tokens[side] * passes
    head: int = model.decoder.config.vocab_size * model.decoder.config.hidden_size
    projections = sum(p.numel() for p in model.projections.parameters())
    return total + rows * stage.target_tokens * 4 * head + projected * 4 * projections


def stage_activations(model: Blueprint, stage: Stage) -> int:
    """Return the most bytes that a batch of a stage keeps; see :func:`rcc.planning.activations.activations`."""
    sizes = [
        activations(model, Batch(stage.rows(n), n, r, stage.target_tokens), stage.frozen)
        for n, r in {(length, rate) for _, length, rate in stage.kinds()}
    ]
    return max(one.checkpointed if stage.gradient_checkpointing else one.kept for one in sizes)


def _own(task: Task) -> str:
    """Return the lengths and rates of a task that are not its stage's, as text."""
    own = [f"{n:,} tokens" for n in dict.fromkeys(task.lengths)] + [f"{r}×" for r in dict.fromkeys(task.rates)]
    return f" ({', '.join(own)})" if own else ""


def _stage(console: Console, recipe: Recipe, number: int, whole: Blueprint, model: RCCForCausalLM, rate: float) -> None:
    stage = recipe.stages[number]
    _say(console, f"\nstage {number + 1}: {stage.name}", style="bold")
    _say(console, "  group        learns          frozen          learning rate")
    base = {id(p) for p in model.decoder.parameters()} & {id(p) for p in model.encoder.parameters()}
    for group in GROUPS:
        learns = frozen = 0
        for name, p in model.named_parameters():
            if group_of(name) == group and id(p) not in base:
                learns, frozen = (learns + p.numel(), frozen) if p.requires_grad else (learns, frozen + p.numel())
        how = stage.group(group)
        rate_of = f"{how.learning_rate:g} {how.schedule}" if learns else "–"
        _say(console, f"  {group:13}{learns:<16,}{frozen:<16,}{rate_of}")
    if base:
        shared = sum(p.numel() for p in model.parameters() if id(p) in base)
        _say(console, f"  shared base  {0:<16}{shared:<16,}–")
    samples = {n: stage.rows(n) for n in stage.all_lengths}
    shares = sum(task.share for task in stage.tasks.values())
    tasks = [f"{name} {task.share / shares:.0%}{_own(task)}" for name, task in stage.tasks.items()]
    _say(console, "  tasks        " + ", ".join(tasks))
    _say(console, f"  contexts     {', '.join(f'{n:,} tokens ({s} a batch)' for n, s in samples.items())}")
    rates = ", ".join(f"{r}×" for r in stage.all_rates)
    _say(console, f"  rates        {'none: the decoder reads the text as it is' if stage.plain else rates}")
    one = flops(model, stage)
    read = sum(share * samples[n] * n for (_, n, _), share in stage.kinds().items()) * stage.accumulation
    if stage.max_minutes is not None:
        _say(console, f"  budget       {stage.max_minutes:g} minutes")
        speed = read / stage.accumulation / one * rate * SUSTAINED
        _say(console, f"  speed        about {speed:,.0f} context tokens/s here ({_rate(rate)})")
    else:
        steps = stage.max_steps or -(-int(stage.max_tokens or 0) // int(read))
        compute = steps * stage.accumulation * one
        here, big = compute / (rate * SUSTAINED) / 3600, compute / BIG / 3600
        _say(console, f"  budget       {steps * read:,.0f} context tokens in {steps:,} steps of one process")
        _say(console, f"  compute      {compute:.2g} FLOP: about {_hours(here)} hours here ({_rate(rate)}),")
        _say(
            console,
            f"               {_hours(big)} hours where {BIG / 1e12:.0f} TFLOP/s are sustained (an H100 or H200)",
        )
    gb = [x / 1e9 for x in (learning_bytes(model), stage_activations(whole, stage))]
    _say(console, f"  memory       about {gb[0]:.1f} GB weights, gradients, optimiser; {gb[1]:.1f} GB activations")
    if recipe.run.fsdp:
        _say(console, "               (the first part is divided among processes, but for a base under LoRA)")


def _rate(rate: float) -> str:
    return f"{SUSTAINED:.0%} of its measured {rate / 1e12:.2g} TFLOP/s"


def _hours(hours: float) -> str:
    """Return two significant digits, written out."""
    return f"{float(f'{hours:.2g}'):,.10g}"


def _matrix_rate() -> float:
    """Measure for a moment the FLOP/s of matrix products on this machine, in bfloat16 or what replaces it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(2048, 2048, device=device, dtype=computing(torch.bfloat16, device))
    best = float("inf")
    for _ in range(4):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def _samples(console: Console, recipe: Recipe, init: str | None) -> None:
    """Print a decoded sample of every task of every stage, where tokenizer and data are at hand."""
    try:
        tokenizer = load_tokenizer(recipe, init)
        console.print()
    except (ModelError, FileError):
        name, _ = next(iter(checkpoints.BASES.items()))
        if not (checkpoints.home() / "bases" / name).is_dir():
            _say(console, "\nno samples are shown, because the tokenizer is not at hand")
            return
        tokenizer = checkpoints.load_tokenizer(checkpoints.resolve_base(name))
        _say(console, f"\nthe tokenizer is not at hand: the samples are made with that of {name}\n")
    for number, stage in enumerate(recipe.stages):
        for name, task in stage.tasks.items():
            only = copy.deepcopy(recipe)
            only.stages = [copy.deepcopy(stage)]
            only.stages[0].tasks = {name: task}
            try:
                samples = Samples(only, 0, Corpora(only, tokenizer), tokenizer)
                text = describe(samples.sample(0, 0), tokenizer)
            except (InputError, FileError, ModelError) as error:
                text = f"{name}\n  no sample: {error}"
            _say(console, f"stage {number + 1}, {text}")


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False)
