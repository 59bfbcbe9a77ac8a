"""`rcc eval`: one thin function a task."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..documents.plain import read_text
from ..errors import InputError
from ..evaluation.example import example_text
from ..text.counts import parse_choices, parse_count, parse_counts
from . import evaluation_options as options
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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..evaluation.evaluation import Report
    from ..evaluation.results import Results

app = typer.Typer(
    help="Measure a model, or compare two measurements.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _show(text: str, data: dict[str, Any] | None, output: Path | None) -> None:
    """Print an evaluation's table and notes and say what the folder holds; or only its figures, where they are wanted
    as JSON."""
    if data is not None:
        print_json(data)
        return
    out.print(text, end="", markup=False)
    if output is not None:
        err.print(f"{output}: results.json, samples.jsonl, table.md and plots", markup=False)


def _need(output: Path | None, *packages: str) -> None:
    """Refuse before anything is loaded where a package is missing; plots, which a folder holds, take another one."""
    from ..evaluation.results import need

    need(*packages, *(["matplotlib"] if output is not None else []))


def _show_report(results: Results, report: Report, by: Sequence[str], output: Path | None, as_json: bool) -> None:
    """Print a table and its notes, each on a line of its own, or the figures with those that no sample has."""
    text = "\n".join([report.table(), *(f"{note}\n" for note in results.notes)])
    _show(text, results.summary(by, report.more()) if as_json else None, output)


def _finish(results: Results, report: Report, by: Sequence[str], output: Path | None, as_json: bool) -> None:
    """Write an evaluation's table and plots into its folder, and print them or its figures."""
    table = report.table()
    results.finish(by, table, report.plots())
    _show("\n".join([table, *results.notes]) + "\n", results.summary(by) if as_json else None, output)


@app.command()
def reconstruction(
    model: Model = None,
    data: options.Data = None,
    field: options.Field = "text",
    rates: options.Rates = None,
    lengths: options.Lengths = None,
    prompts: options.Prompts = 5,
    target_tokens: options.TargetTokens = None,
    controls: options.Controls = "all",
    limit: options.Limit = 10,
    batch: options.Batch = 16,
    seed: options.Seed = 0,
    output: options.Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure how much of a text its compressed context gives back, beside controls.

    The paper's protocol is --lengths 2k --limit 100.
    """
    _need(output, "sacrebleu", "rouge_score")
    wanted = {"rates": rates, "lengths": lengths}
    numbers = {name: None if text is None else parse_counts(text, f"--{name}") for name, text in wanted.items()}
    with status("loading torch and transformers"):
        from ..evaluation.evaluation import evaluate, finish
        from ..evaluation.reconstruction import settings as measuring
        from ..evaluation.reconstruction.documents import open_texts
        from ..evaluation.reconstruction.run import ReconstructionEvaluation
    known = list(measuring.CONTROLS)
    chosen = parse_choices(controls, "--controls", known, optional=True)
    engine = load_engine(model, device, dtype)
    rcc, tokenizer = engine.rcc, engine.tokenizer
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
    with progress("reconstructing", len(run), "samples") as advance:
        found = evaluate(run, output, advance)
    _show_report(found, finish(run, found), run.by, output, as_json)


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
    lengths: options.PasskeyLengths = "8k,32k",
    rates: options.PasskeyRates = "auto",
    keys: options.Keys = 5,
    controls: options.PasskeyControls = 1,
    positions: options.Positions = "start,middle,end",
    variants: options.Variants = "plain",
    filler_data: options.FillerData = None,
    seed: options.PasskeySeed = 0,
    batch_tokens: options.BatchTokens = None,
    limit: options.PasskeyLimit = None,
    output: options.Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask for keys hidden in long texts."""
    _need(output)
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
    rcc, tokenizer = engine.rcc, engine.tokenizer
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
    _finish(results, PasskeyReport(results), task.BY, output, as_json)


@app.command()
def qa(
    model: Model = None,
    data: options.QAData = None,
    suite: options.Suite = None,
    include: options.Include = None,
    modes: options.Modes = "human,compress,reconstruct",
    rates: options.QARates = None,
    baselines: options.Baselines = "all",
    tuned: options.Tuned = None,
    beside: options.Beside = None,
    pad_to: options.PadTo = None,
    max_new_tokens: options.MaxNewTokens = 64,
    hint: options.Hint = None,
    limit: options.QALimit = 100,
    seed: options.QASeed = 0,
    output: options.Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask questions of compressed contexts, and of what a user might do instead."""
    _need(output, "rouge_score", "bm25s")
    divisors = None if rates is None else parse_counts(rates, "--rates")
    padded = 0 if pad_to is None else parse_count(pad_to, "--pad-to")
    with status("loading torch and transformers"):
        from ..evaluation.evaluation import evaluate, finish
        from ..evaluation.qa import reading as questions
        from ..evaluation.qa import run as task
        from ..evaluation.qa import settings as qa_settings
        from ..text.prompting import MODES
    forms = parse_choices(modes, "--modes", MODES)
    named = [*qa_settings.BASELINES, *qa_settings.SELECTIONS]
    every = list(qa_settings.BASELINES) if baselines == "all" else None  # a selection is asked for by its name
    chosen = every or parse_choices(baselines, "--baselines", named, optional=True)
    others = _named_models(beside or [], {"rcc", qa_settings.TUNED, *named})
    with status("reading the questions"):
        some_ids = include.split(",") if include else []
        asked, notes = questions.open_questions(data, suite, some_ids)
    engine = load_engine(model, device, dtype)
    config = engine.rcc.config
    numbers = [config.check_rate(rate) for rate in divisors or config.rates]
    hint = qa_settings.HINT if hint is None else hint
    asking = qa_settings.QASettings(
        rates=numbers, limit=limit, pad_to=padded, max_new_tokens=max_new_tokens, hint=hint, seed=seed
    )
    methods = task.make_methods(
        engine.rcc,
        engine.tokenizer,
        forms,
        chosen,
        tuned=None if tuned is None else load_engine(tuned, device, dtype).rcc,
        beside={name: load_engine(folder, device, dtype).rcc for name, folder in others.items()},
        hint=hint,
    )
    source = {"paths": data, "suite": suite, "include": some_ids}
    run = task.QAEvaluation(engine.tokenizer, asked, methods, asking, source, notes)
    with progress("asking", len(run), "answers") as advance:
        found = evaluate(run, output, advance)
    _show_report(found, finish(run, found), run.by, output, as_json)


def _named_models(beside: list[str], taken: set[str]) -> dict[str, str]:
    """Return {name of a row: model} of what `--beside` was given."""
    others = dict(map(_name_and_model, beside))
    if both := sorted(taken & set(others)):
        raise InputError(f"--beside {both[0]}=… is the name of another row: use another name.")
    return others


def _name_and_model(text: str) -> tuple[str, str]:
    name, found, model = text.partition("=")
    if not (name and found and model):
        raise InputError(f"--beside {text} is not NAME=MODEL: name the row, then the model's folder.")
    return name, model


@app.command()
def resources(
    model: Model = None,
    shape: options.Shape = None,
    encoder: options.Encoder = None,
    share_base: options.ShareBase = False,
    random: options.Random = False,
    lengths: options.ResourcesLengths = "2k,8k,32k",
    rates: options.ResourcesRates = None,
    segment_length: options.SegmentLength = None,
    question_tokens: options.QuestionTokens = 32,
    plain: options.Plain = True,
    data: options.ResourcesData = None,
    batch_tokens: options.ResourcesBatchTokens = None,
    limit: options.ResourcesLimit = None,
    output: options.Output = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Measure, or compute without weights, the memory and time that texts take."""
    _need(output)
    _check_shape_options(model, shape, encoder, share_base, random, segment_length, device, data)
    sizes = parse_counts(lengths, "--lengths")
    divisors = [] if rates is None else parse_counts(rates, "--rates")
    batch = None if batch_tokens is None else parse_count(batch_tokens, "--batch-tokens")
    text = None if data is None else read_text(str(data))
    with status("loading torch and transformers"):
        from .. import checkpoints
        from ..defaults import default_model
        from ..evaluation.resources import run as task
        from ..evaluation.resources import subject as subjects
        from ..evaluation.resources.table import ResourcesReport
        from ..runtime.precision import parse_device, parse_dtype
        from ..text.tokens import token_ids
    kind = parse_dtype(dtype)
    if shape is None:
        subject = subjects.trained(model or default_model(), kind)
    else:
        numbers: Any = {"rates": divisors or subjects.RATES, "segment_length": segment_length or 2048}
        numbers |= {"dtype": kind} if kind else {}
        subject = subjects.shaped(shape, encoder, share_base=share_base, **numbers)
    measured = shape is None or random
    ids = text and token_ids(checkpoints.load_tokenizer(model or default_model()), text)[0].numpy()
    with progress("cells", 1, "cells") as advance:
        results = task.resources(
            subject,
            sizes,
            rates=divisors,
            measured=measured,
            question_tokens=question_tokens,
            plain=plain,
            device=parse_device(device) if measured else "cpu",
            dtype=kind,
            batch_tokens=batch,
            text=ids,
            limit=limit,
            folder=output,
            progress=advance,
        )
    _finish(results, ResourcesReport(results), task.BY, output, as_json)


def _check_shape_options(
    model: str | None,
    shape: str | None,
    encoder: str | None,
    share_base: bool,
    random: bool,
    segment_length: int | None,
    device: str | None,
    data: Path | None,
) -> None:
    """Refuse options of a shape without one, and the other way round."""
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
