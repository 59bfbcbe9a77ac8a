"""`rcc eval`: one thin function a task."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..console import (
    Device,
    Dtype,
    Json,
    Model,
    err,
    load_model,
    out,
    parse_choices,
    parse_counts,
    print_json,
    progress,
    status,
)

app = typer.Typer(
    help="Measure a model, or compare two measurements.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


Output = Annotated[Path | None, typer.Option("--output", "-o", help="A folder for samples, figures and plots.")]


@app.command()
def reconstruction(
    model: Model = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Texts: a file, folder or glob, as for training; may be repeated (default: the example)."),
    ] = None,
    field: Annotated[str, typer.Option(help="The field that holds a text, in JSON lines.")] = "text",
    rates: Annotated[str | None, typer.Option(help="Such as 4,8,16 (default: those that the model learnt).")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens a document, such as 512,2k (default: 512, at least a segment).")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Places in a document to go on from.")] = 5,
    target_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write behind each (default: 500 of 2,048, in proportion).")
    ] = None,
    controls: Annotated[str, typer.Option(help="shuffled,wrong,no-context,plain-text, or all, or none.")] = "all",
    limit: Annotated[int, typer.Option(min=1, help="Documents of each length.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of documents and of the shuffled order.")] = 0,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure how much of a text its compressed context gives back, beside controls.

    The paper's protocol is --lengths 2k --limit 100.
    """
    from .results import Results, need

    need("sacrebleu", "rouge_score", *([] if output is None else ["matplotlib"]))
    wanted = {"rates": rates, "lengths": lengths}
    numbers = {name: None if text is None else parse_counts(text, f"--{name}") for name, text in wanted.items()}
    with status("loading torch and transformers"):
        from . import reconstruction as measuring
        from .reconstruction_report import Report
    known = list(measuring.CONTROLS)
    some = {"all": known, "none": []}
    chosen = some[controls] if controls in some else parse_choices(controls, "--controls", known)
    rcc, tokenizer = load_model(model, device, dtype)
    protocol = measuring.Protocol(
        rates=numbers["rates"] or rcc.config.rates,
        lengths=numbers["lengths"] or [max(512, rcc.config.segment_length)],
        prompts=prompts,
        target_tokens=target_tokens,
        controls=chosen,
        documents=limit,
        batch=batch,
        seed=seed,
    )
    protocol.check(rcc.config)
    with status("reading the texts"):
        run = measuring.Reconstruction(rcc, tokenizer, measuring.open_texts(data or [], field, tokenizer), protocol)
    found = Results("reconstruction", run.settings(), output, cluster="document", notes=run.notes())
    with progress("reconstructing", len(run), "samples") as advance:
        found.collect(run.cases(), advance)
    report = Report(found, rcc.config)
    report.finish()
    if as_json:
        print_json(found.summary(measuring.BY, report.more()))
        return
    out.print("\n".join([report.table(), *(f"{note}\n" for note in found.notes)]), end="", markup=False)
    if output is not None:
        err.print(f"{output}: results.json, samples.jsonl, table.md and plots", markup=False)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A folder that `rcc eval` wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same task.")],
    as_json: Json = False,
) -> None:
    """Put two evaluations side by side: the differences, sample by sample, with their intervals."""
    from . import compare as comparing

    found, notes = comparing.compare(a, b)
    if as_json:
        print_json({"differences": [asdict(d) for d in found], "notes": notes})
        return
    out.print(comparing.table(found, a.name or str(a), b.name or str(b)), markup=False)
    for note in notes:
        out.print(note, markup=False)
