"""Memory and time of reading a text and of asking its context, by the text's length: the paper's memory table.

Without weights everything is computed, from the passes themselves on tensors without storage
(:mod:`rcc.planning.blueprint`).
With weights every figure is measured, in a process of its own (:mod:`rcc.evaluation.resources.process`).
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ... import checkpoints
from ...config import RCCConfig
from ...context.cache import SPARE
from ...errors import InputError, WindowError
from ...model import backbones, segments
from ...model.encoder import BATCH_TOKENS, batch_tokens_on
from ...model.rcc import RCCForCausalLM
from ...planning import blueprint as planning
from ...planning import shapes
from ...planning.reading import Reading
from ...runtime import memory
from ...text.counts import show_count
from .. import plots
from ..results import Case, Interval, Results, Skipped, markdown
from . import process as resources_process
from .process import Job

BY = ("reader", "length", "rate")
"""What tells cells apart. The reader is `rcc`, or `plain`: the same base reading the text as it is, without a rate."""
RATES = (8, 32)
"""Of a shape, unless others are asked for."""
PAPER_RATE = 32
PAPER = {
    "rcc": {
        0: 7_664, 2**11: 7_788, 2**13: 7_910, 2**14: 8_182, 2**16: 9_302, 2**18: 13_300, 2**20: 29_944, 2**21: 64_858
    },
    "plain": {0: 4_078, 2**11: 6_322, 2**13: 11_752, 2**14: 19_914, 2**15: 33_240, 2**16: 61_928},
}  # fmt: skip
"""Length → MB of GPU memory that the paper gives for Pythia-1.4B (A800, batch 1); 0: with the weights alone."""


# ---------------------------------------------------------------- what is looked at
@dataclass(frozen=True)
class Subject:
    """A model, or the shape of one.

    Attributes:
        blueprint: what it is made of.
        fingerprint: of a trained model, which can be loaded by `name`; None: a shape.
    """

    name: str
    blueprint: planning.Blueprint
    fingerprint: str | None = None

    @cached_property
    def model(self) -> RCCForCausalLM:
        """Without storage."""
        return self.blueprint.build()

    @cached_property
    def reading(self) -> Reading:
        return Reading(self.blueprint)

    @cached_property
    def position_bytes(self) -> int:
        return planning.position_bytes(self.model)

    def positions(self, tokens: int, rate: int) -> int:
        return segments.positions(tokens, rate, self.blueprint.config)

    @property
    def is_the_papers(self) -> bool:
        """Whether the paper's figures are of this model: two models of Pythia-1.4B's shape, read in 2,048 tokens."""
        plan, known = self.blueprint, shapes.find("pythia-1.4b").to_dict()
        sides = plan.decoder, plan.encoder
        return all(s is not None and s.to_dict() == known for s in sides) and plan.config.segment_length == 2048


def trained(name: str, dtype: torch.dtype | None = None) -> Subject:
    """A trained model, by what its folder and its bases' say.

    Raises:
        ModelError: there is no such model or base. FileError: a base cannot be fetched.
    """
    folder = checkpoints.resolve_model(name)
    config = RCCConfig.load(folder)
    sides = {
        side: shapes.find(checkpoints.resolve_base(base.source, relative_to=folder))
        for side, base in config.base.items()
    }
    stored = dtype or getattr(sides["decoder"], "dtype", None) or torch.float32
    blueprint = planning.Blueprint(config, sides["decoder"], sides.get("encoder"), stored)
    return Subject(name, blueprint, config.fingerprint)


def shaped(
    name: str,
    encoder_name: str | None = None,
    *,
    share_base: bool = False,
    rates: Sequence[int] = RATES,
    segment_length: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
) -> Subject:
    """A model of known shape: a decoder and an encoder with all their weights, as the paper's (section 4).

    Args:
        name, encoder_name: see :func:`rcc.planning.shapes.find`; without an encoder's, both sides have the same shape.
        share_base: one base for both sides instead, under LoRA of rank 16.

    Raises:
        ModelError: a shape that is not known or not supported. InputError: settings that cannot be used.
    """
    rank = 16 if share_base else 0
    config = RCCConfig(
        segment_length=segment_length,
        rates=list(rates),
        share_base=share_base,
        encoder_lora_rank=rank,
        decoder_lora_rank=rank,
        name=name,
    )
    upper = None if share_base else shapes.find(encoder_name or name)
    subject = Subject(name, planning.Blueprint(config, shapes.find(name), upper, dtype))
    assert subject.model is not None  # which refuses what cannot be made
    return subject


def repeat_text(ids: np.ndarray, length: int, segment: int) -> np.ndarray:
    """Token ids [T] repeated up to `length`, each time from one token further on: so that segments differ, of which
    equal ones in a batch would be read once."""
    ids = ids[: len(ids) // segment * segment] if len(ids) >= segment else ids
    return np.concatenate([np.roll(ids, -i) for i in range(-(-length // len(ids)))])[:length].astype(np.int32)


# ---------------------------------------------------------------- the run
def resources(
    subject: Subject,
    lengths: Sequence[int],
    *,
    rates: Sequence[int] = (),
    measured: bool = True,
    question_tokens: int = 32,
    plain: bool = True,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    batch_tokens: int | None = None,
    text: np.ndarray | None = None,
    limit: int | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Results:
    """Memory and time by length and rate; a cell that cannot be made says why.

    Args:
        lengths: tokens of a text.
        rates: none: of a trained model, for each length the lowest trained one at which the prefix fits; of a shape,
            its own.
        measured: with real weights, or random ones of a shape, whose decoder's window is widened as needed. False:
            computed, without weights.
        question_tokens: behind which the first token is written.
        plain: also the same base reading the text as it is, in batches of `batch_tokens`.
        dtype: of a trained model; None: as it is stored.
        batch_tokens: that are read at once. None: :func:`rcc.model.encoder.batch_tokens_on` the device.
        text: [T] token ids, repeated if need be. None: random ids.
        limit: lengths at most, the shortest ones.
        folder: where results are kept, and are gone on with. None: nowhere.
        progress: called with cells done and cells in all.

    Raises:
        InputError: an argument that cannot be used, or the folder holds something else.
    """
    segment = subject.blueprint.config.segment_length
    sizes = sorted(lengths)[:limit]
    if not sizes or sizes[0] < segment:
        raise InputError(f"a length of {min(lengths, default=0):,} tokens is less than a segment of {segment:,}.")
    for rate in rates:
        subject.blueprint.config.check_rate(rate)
    if question_tokens < 1:
        raise InputError(f"question_tokens must be at least 1, not {question_tokens}.")
    batch = batch_tokens or (batch_tokens_on(torch.device(device)) if measured else BATCH_TOKENS)
    settings = {
        "model": subject.name,
        "fingerprint": subject.fingerprint,
        "decoder": _digest(subject.blueprint.decoder),
        "encoder": _digest(subject.blueprint.encoder),
        "segment_length": segment,
        "window": subject.model.window,
        "dtype": str(subject.blueprint.dtype).removeprefix("torch."),
        "lengths": sizes,
        "rates": list(rates),
        "measured": measured,
        "device": torch.device(device).type if measured else None,
        "question_tokens": question_tokens,
        "plain": plain,
        "batch_tokens": batch,
        "text": "random token ids" if text is None else segments.piece_of(torch.tensor(text), 1, RCCConfig()).sha256,
        "paper": subject.is_the_papers,
    }
    results = Results("resources", settings, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".contexts-") as temporary:
        run = _Run(subject, results, measured, Path(temporary), question_tokens, device, dtype, batch, text)
        cases = run.cases(sizes, rates, plain)
        results.collect(cases, None if progress is None else lambda done: progress(done, len(cases)))
    results.notes += _notes(results, subject)
    return results


def _digest(shape: PreTrainedConfig | None) -> str | None:
    return None if shape is None else hashlib.sha256(shape.to_json_string().encode()).hexdigest()


@dataclass
class _Run:
    subject: Subject
    results: Results
    measured: bool
    folder: Path
    question: int
    device: str
    dtype: torch.dtype | None
    batch_tokens: int
    text: np.ndarray | None

    def cases(self, lengths: Sequence[int], rates: Sequence[int], plain: bool) -> list[Case]:
        """Plain cells first: others are compared with them."""
        found = []
        if plain:
            fits = self.subject.model.window - self.question
            random = self.subject.fingerprint is None
            readable = [n for n in lengths if n <= fits or random or not self.measured]
            beyond = [n for n in lengths if n not in readable]
            if beyond and len(readable) < 3:  # what they are extrapolated from
                readable = sorted({*readable, *(n for n in (fits // 4, fits // 2, fits) if n)})
            found += [Case({"reader": "plain", "length": n}, partial(self.plain, n)) for n in readable]
            found += [Case({"reader": "plain", "length": n}, partial(self.extrapolated, n)) for n in beyond]
        for n in lengths:
            for rate in rates or self.rates(n):
                found.append(Case({"reader": "rcc", "length": n, "rate": rate}, partial(self.rcc, n, rate)))
        return found

    def rates(self, length: int) -> list[int]:
        own = self.subject.blueprint.config.rates
        if self.subject.fingerprint is None:
            return own
        try:
            return [self.subject.model.fitting_rate([length], reserve=max(SPARE, self.question + 1))]
        except WindowError:
            return [max(own)]

    # ------------------------------------------------------------ one cell
    def rcc(self, length: int, rate: int) -> dict[str, Any]:
        subject = self.subject
        n = subject.positions(length, rate)
        beyond = n + self.question + 1 > subject.model.window
        if beyond and subject.fingerprint is not None:
            raise Skipped(f"{n:,} positions and a question do not fit the decoder's window of {subject.model.window:,}")
        weights, kv = planning.stored_bytes(subject.model), n * subject.position_bytes
        if not self.measured:
            peak = weights + subject.reading.compress(length, rate, self.batch_tokens)
            row: dict[str, Any] = {"positions": n, "weights_bytes": weights, "kv_bytes": kv, "file_bytes": kv}
            row |= {"compress_peak_bytes": peak, "ratio": peak / (weights + kv)}
            return {**row, "source": "computed", "beyond_window": beyond}
        self.check(weights + kv)
        job = self.job("compress", length, rate)
        try:
            row = resources_process.measure(job)
            row |= resources_process.measure(replace(job, task="ask"))
        finally:
            job.context.unlink(missing_ok=True)
        floor = row["weights_bytes"] + row["kv_bytes"]
        for what in ("compress", "ask"):
            if f"{what}_peak_bytes" in row:
                name = "ratio" if what == "compress" else "ask_ratio"
                row[name] = row[f"{what}_peak_bytes"] / floor
        base = self.row({"reader": "plain", "length": length})
        if "plain_first_token_seconds" in base:
            row["first_token_ratio"] = base["plain_first_token_seconds"] / row["first_token_seconds"]
        return {**row, "source": "measured", "beyond_window": beyond}

    def plain(self, length: int) -> dict[str, Any]:
        if not self.measured:
            return {**self.plain_memory(length), "source": "computed"}
        row = self.plain_memory(length, count=False)
        self.check(row["weights_bytes"] + row["kv_bytes"])
        row |= resources_process.measure(self.job("plain", length, 1))
        return {**row, "source": "measured"}

    def extrapolated(self, length: int) -> dict[str, Any]:
        """A text that the base cannot read: its memory computed, its time from the shorter ones'."""
        rows = [row for row in self.results.rows if row["key"]["reader"] == "plain" and row.get("source") == "measured"]
        points = [(row["key"]["length"], row["plain_first_token_seconds"]) for row in rows]
        if not points:
            raise Skipped("beyond the base's window, with nothing to extrapolate from")
        seconds = extrapolate(points, length)
        return {**self.plain_memory(length), "plain_first_token_seconds": seconds, "source": "extrapolated"}

    def plain_memory(self, length: int, count: bool = True) -> dict[str, Any]:
        subject = self.subject
        weights = planning.stored_bytes(subject.model.decoder, adapters=False)
        row: dict[str, Any] = {"weights_bytes": weights, "kv_bytes": length * subject.position_bytes}
        if count:
            row["plain_peak_bytes"] = weights + subject.reading.prefill(length, self.batch_tokens)
        return {**row, "beyond_window": length + self.question > subject.model.window}

    # ------------------------------------------------------------ what it takes
    def check(self, floor: int) -> None:
        free = memory.available(torch.device(self.device))
        if free is not None and floor > free:
            raise Skipped(f"weights and KV cache take {floor / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free")

    def job(self, task: str, length: int, rate: int) -> Job:
        subject, model = self.subject, self.subject.name
        made: str | planning.Blueprint = model
        if subject.fingerprint is None:
            shape = copy.deepcopy(subject.blueprint.decoder)
            needed = (length if task == "plain" else subject.positions(length, rate)) + self.question + SPARE
            shape.max_position_embeddings = max(shape.max_position_embeddings, needed)
            made = replace(subject.blueprint, decoder=shape)
        text, context = self.folder / f"{length}.npy", self.folder / "context.rcc"
        if not text.exists():
            np.save(text, self.ids(max(length, self.question)))
        return Job(task, made, text, context, length, rate, self.question, self.device, self.dtype, self.batch_tokens)

    def ids(self, length: int) -> np.ndarray:
        if self.text is not None:
            return repeat_text(self.text, length, self.subject.blueprint.config.segment_length)
        sides = self.subject.model.encoder, self.subject.model.decoder
        vocabulary = min(side.get_input_embeddings().num_embeddings for side in sides)
        return np.random.default_rng(length).integers(1, vocabulary, length, dtype=np.int32)

    def row(self, key: Mapping[str, Any]) -> dict[str, Any]:
        return next((row for row in self.results.rows if row["key"] == key), {})


def extrapolate(points: Sequence[tuple[int, float]], length: int) -> float:
    """Seconds at another length, by a · length + b · length² with a, b ≥ 0 fitted to shorter ones (least squares of
    the relative errors): matrix products grow with the length, attention with its square.

    Args:
        points: (length, seconds) each.
    """
    sizes, seconds = np.array(points, dtype=np.float64).T
    scaled = np.stack([sizes, sizes**2], 1) / seconds[:, None]
    ways = []
    for columns in ([0, 1], [0], [1]):
        if len(points) < len(columns):
            continue
        found = np.zeros(2)
        found[columns] = np.linalg.lstsq(scaled[:, columns], np.ones(len(points)), rcond=None)[0]
        if (found >= 0).all():
            ways.append((float(((scaled @ found - 1) ** 2).sum()), tuple(found)))
    _, (a, b) = min(ways)
    return float(a * length + b * length**2)


# ---------------------------------------------------------------- for reading
def _notes(results: Results, subject: Subject) -> list[str]:
    s = results.settings
    notes = []
    copies = "one base under LoRA" if subject.blueprint.encoder is None else "an encoder and a decoder of their own"
    facts = f"{s['dtype']}, {copies}, segments of {s['segment_length']:,} tokens, {s['batch_tokens']:,} read at once"
    sources = {row.get("source") for row in results.rows}
    if s["measured"]:
        random = "" if subject.fingerprint else " with random weights, its window widened as needed"
        what = (
            "GPU memory that tensors take"
            if s["device"] == "cuda"
            else "memory of the process at most, less what it held once all libraries were loaded"
        )
        notes.append(f"{subject.name}{random} ({facts}), measured, each figure in a process of its own. Peak: {what}.")
        text = s["text"] if s["text"].startswith("random") else "the given text, repeated with its segments shifted"
        notes.append(
            f"The text: {text}. First token: the context file loaded (mapped) and a question of"
            f" {s['question_tokens']} tokens read; plain: the text and the question read."
        )
    else:
        notes.append(
            f"{subject.name} ({facts}), computed without weights: the sizes of all tensors that the passes make."
            " File: without its header of some kB."
        )
        if subject.model.encoder.config.model_type in backbones.STATE_SPACE:
            notes.append(
                "Of the encoder's blocks, what they hold while they read is estimated (34 bytes · width a token)."
            )
    if "extrapolated" in sources:
        notes.append(
            f"≈ beyond the base's window of {s['window']:,}: time extrapolated by a·n + b·n² from the shorter texts,"
            " memory computed."
        )
    if any(row.get("beyond_window") and row["source"] != "extrapolated" for row in results.rows):
        notes.append(f"* more positions than the window of {s['window']:,} that the base was trained with.")
    if s["paper"]:
        notes.append("Paper: its own figures, of Pythia-1.4B on an A800, batch 1, at 32×.")
    return notes


def table(results: Results) -> str:
    """Memory by length and rate and, where it was measured, time."""
    cells = {(c["key"]["reader"], c["key"]["length"], c["key"].get("rate")): c for c in results.cells(BY)}
    source = {(r["key"]["reader"], r["key"]["length"]): r.get("source") for r in results.rows}
    paper, measured = results.settings["paper"], results.settings["measured"]
    how = "" if measured else " (computed)"
    header = ["tokens", "rate", "positions", f"weights + KV, MB{how}", f"RCC, peak MB{how}", "beyond, MB", "ratio"]
    header += ["asking, peak MB", "ratio"] if measured else []
    header += [f"file, MB{how}", f"plain, peak MB{how}", *(["paper, RCC", "paper, plain"] if paper else [])]
    rows, times = [], []

    def published(reader: str, length: int, rate: int = PAPER_RATE) -> str:
        value = PAPER[reader].get(length) if rate == PAPER_RATE else None
        return "–" if value is None else f"{value:,}"

    if not measured:  # with nothing read yet
        weights = {reader: _value(c, "weights_bytes") for (reader, _, _), c in cells.items() if "skipped" not in c}
        own = _mb(weights.get("rcc"))
        row = ["none", "–", "0", own, own, "0", "1.00", "–", _mb(weights.get("plain"))]
        rows.append([*row, *([published("rcc", 0), published("plain", 0)] if paper else [])])
    for (reader, length, rate), cell in cells.items():
        if reader != "rcc":
            continue
        name = [show_count(length), f"{rate}×"]
        base = cells.get(("plain", length, None), {})
        about = "≈ " if source.get(("plain", length)) == "extrapolated" else ""
        star = "*" if not measured and _value(base, "beyond_window") else ""
        plain = f"{about}{_mb(_value(base, 'plain_peak_bytes'))}{star}"
        if "skipped" in cell:
            rows.append([*name, cell["skipped"], *[""] * (len(header) - 3)])
            continue
        floor = _value(cell, "weights_bytes") + _value(cell, "kv_bytes")
        peak = _value(cell, "compress_peak_bytes")
        star = "*" if _value(cell, "beyond_window") else ""
        row = [*name, f"{_value(cell, 'positions'):,.0f}{star}", _mb(floor), _mb(peak)]
        row += ["–" if peak is None else _mb(peak - floor), _number(_value(cell, "ratio"))]
        if measured:
            row += [_mb(_value(cell, "ask_peak_bytes")), _number(_value(cell, "ask_ratio"))]
        row += [_mb(_value(cell, "file_bytes")), plain]
        rows.append([*row, *([published("rcc", length, rate), published("plain", length)] if paper else [])])
        if measured:
            line = [_number(_value(cell, f"{what}_seconds"), 2) for what in ("compress", "save")]
            line.append(_number(_value(cell, "load_seconds"), 1, 1000))
            line.append(_number(_value(cell, "load_full_seconds"), 2))
            line.append(_number(_value(cell, "first_token_seconds"), 3))
            line.append(about + _number(_value(base, "plain_first_token_seconds"), 2))
            ratio = _value(cell, "first_token_ratio")
            times.append([*name, *line, "–" if ratio is None else f"{about}{ratio:,.0f}×"])
    text = markdown(header, rows)
    if times:
        header = ["tokens", "rate", "compress, s", "save, s", "load (mapped), ms", "load (checked), s"]
        text += "\n" + markdown([*header, "first token, s", "plain, first token, s", "plain / stored"], times)
    short = [
        [show_count(length), _mb(_value(c, "plain_peak_bytes")), _number(_value(c, "plain_first_token_seconds"), 2)]
        for (reader, length, _), c in cells.items()
        if reader == "plain" and length not in results.settings["lengths"] and "skipped" not in c
    ]
    if short:
        text += "\nplain, extrapolated from:\n\n" + markdown(["tokens", "peak MB", "first token, s"], short)
    return text


def _value(cell: Mapping[str, Any], name: str) -> Any:
    value = cell.get(name)
    return value.mean if isinstance(value, Interval) else None


def _mb(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.0f}"


def _number(value: float | None, digits: int = 2, unit: float = 1) -> str:
    return "–" if value is None else f"{value * unit:,.{digits}f}"


def figures(results: Results) -> dict[str, Callable[[Path], None]]:
    """{file name: draw it there}: peak memory by length."""
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for cell in results.cells(BY):
        key = cell["key"]
        plain = key["reader"] == "plain"
        peak = _value(cell, "plain_peak_bytes" if plain else "compress_peak_bytes")
        if peak is not None:
            lines.setdefault("plain" if plain else f"RCC {key['rate']}×", []).append(
                (key["length"], _point(peak / 1e6))
            )
    if results.settings["paper"]:
        for reader, name in (("rcc", "paper, RCC 32×"), ("plain", "paper, plain")):
            lines[name] = [(length, _point(mb)) for length, mb in PAPER[reader].items() if length]
    if not lines:
        return {}
    title = f"{results.settings['model']}: {'measured' if results.settings['measured'] else 'computed'}"
    lines = {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}
    return {
        "memory.png": partial(plots.curves, lines=lines, x="tokens", y="peak, MB", title=title, log=True, log_y=True)
    }


def _point(value: float) -> Interval:
    return Interval(value, value, value, 1)
