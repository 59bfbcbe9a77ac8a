"""The README.md of a trained model: what it was trained on, how, and how well it did."""

from __future__ import annotations

import json

from .recipe import Recipe


def card(
    recipe: Recipe,
    number: int,
    bases: list[str],
    tokens: int,
    figures: dict[str, dict[str, float]],
    versions: dict[str, str],
) -> str:
    """Return Markdown for the model that stage `number` (from 0) left.

    Args:
        recipe: of the whole run; it is printed in full.
        number: of the stage, from 0.
        bases: where the backbones came from.
        tokens: context tokens of that stage.
        figures: held-out loss and accuracy by kind of batch.
        versions: of the libraries, and the commit.
    """
    config = recipe.model.config
    base = " and ".join(dict.fromkeys(bases)) or recipe.model.encoder
    rates = ", ".join(f"{rate}×" for rate in config.rates)
    lines = [
        "---",
        "tags: [rcc, context-compression]",
        "---",
        f"# {recipe.name}",
        "",
        f"Recurrent Context Compression (arXiv 2406.06110) over {base}: segments of {config.segment_length:,} tokens,"
        f" rates {rates}.",
        "",
        f"Trained with `rcc train`, started from {recipe.init or 'the base'}, by these stages:",
        "",
        "| stage | tasks | context tokens | lengths | rates | frozen |",
        "|---|---|---:|---|---|---|",
    ]
    for i, stage in enumerate(recipe.stages[: number + 1]):
        shares = sum(task.share for task in stage.tasks.values())
        tasks = ", ".join(f"{name} {task.share / shares:.0%}" for name, task in stage.tasks.items())
        seen = f"{tokens:,}" if i == number else f"budget: {getattr(stage, stage.budget):,} {stage.budget[4:]}"
        lengths, rates = (", ".join(map(str, values)) for values in (stage.all_lengths, stage.all_rates))
        lines.append(f"| {stage.name} | {tasks} | {seen} | {lengths} | {rates} | {', '.join(stage.frozen) or '–'} |")
    lines += ["", "Data:", "", *_data(recipe, number)]
    if figures:
        lines += [
            "",
            "Held-out samples of the last stage (teacher forced):",
            "",
            "| task@length/rate | loss | token accuracy |",
        ]
        lines += ["|---|---:|---:|"]
        lines += [f"| {kind} | {f['loss']:.3f} | {f['accuracy']:.1%} |" for kind, f in figures.items()]
    made = ", ".join(f"{k} {v}" for k, v in versions.items())
    lines += ["", f"Made with {made}. The recipe:", "", "```json", json.dumps(recipe.to_dict(), indent=1), "```", ""]
    return "\n".join(lines)


def _data(recipe: Recipe, number: int) -> list[str]:
    """Return a line for each source of the stages up to a number."""
    lines = []
    tasks_done = [task for stage in recipe.stages[: number + 1] for task in stage.tasks.values()]
    for kind in ("text", "questions"):
        # instructions take prose from the text to put between their passages
        used = any(task.reads == kind or (kind == "text" and task.reads) for task in tasks_done)
        for source in getattr(recipe.data, kind) if used else []:
            chosen = f", only {', '.join(source.include)}" if source.include else ""
            chosen += f", without {', '.join(source.exclude)}" if source.exclude else ""
            lines.append(f"- {kind}: {source.path} (weight {source.weight:g}{chosen})")
    if any(task.name == "passkey" for task in tasks_done):
        lines.append("- the generated passkey task")
    return lines
