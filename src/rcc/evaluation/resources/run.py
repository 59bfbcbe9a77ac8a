"""Memory and time of reading a text and of asking its context, by the text's length: the paper's memory table.

Without weights everything is computed, from the passes themselves on tensors without storage
(:mod:`rcc.planning.blueprint`).
With weights every figure is measured, in a process of its own (:mod:`rcc.evaluation.resources.process`).
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...config import RCCConfig
from ...context.cache import SPARE
from ...errors import WindowError
from ...model import segments
from ...model.encoder import BATCH_TOKENS, batch_tokens_on
from ...planning import blueprint as planning
from ...runtime import memory
from ..evaluation import Progress
from ..results import Case, Key, Results, Skipped
from . import process
from .process import Job
from .settings import BY, ResourcesSettings
from .subject import Subject
from .table import ResourcesReport


class ResourcesEvaluation:
    """Memory and time of one model, or of a shape.

    Raises:
        InputError: what is asked does not fit the model.
    """

    kind, by, cluster = "resources", BY, None
    verb, unit = "measuring", "cells"

    def __init__(self, subject: Subject, asked: ResourcesSettings):
        asked.check(subject.model)
        self.subject, self.asked = subject, asked
        self.batch_tokens = asked.batch_tokens or self._default_batch_tokens()
        self._results: Results | None = None
        self._folder: Path | None = None

    def settings(self) -> dict[str, Any]:
        """Return all that a cell depends on beside its key, and what was asked for."""
        subject, asked = self.subject, self.asked
        text = None if asked.text is None else segments.piece_of(torch.tensor(asked.text), 1, RCCConfig()).sha256
        return {
            "model": subject.name,
            "fingerprint": subject.fingerprint,
            **({"compressor": subject.model.compressor} if subject.model.compressor else {}),
            **subject.digests(),
            "segment_length": subject.model.segment_length,
            **({"prefix": "direct"} if subject.blueprint.config.direct else {}),
            "window": subject.model.window,
            "dtype": str(subject.blueprint.dtype).removeprefix("torch."),
            "lengths": asked.sizes,
            "rates": list(asked.rates),
            "measured": asked.measured,
            "device": torch.device(asked.device).type if asked.measured else None,
            "question_tokens": asked.question_tokens,
            "plain": asked.plain,
            "batch_tokens": self.batch_tokens,
            "text": text or "random token ids",
            "paper": subject.is_the_papers,
        }

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self._cases)

    def cases(self) -> list[Case]:
        """Return a case for each cell, plain ones first: others are compared with them."""
        return self._cases

    @cached_property
    def _cases(self) -> list[Case]:
        cases = []
        lengths, window = self.asked.sizes, self.subject.model.window
        if self.asked.plain:
            fits = window - self.asked.question_tokens
            random = self.subject.fingerprint is None
            readable = [n for n in lengths if n <= fits or random or not self.asked.measured]
            beyond = [n for n in lengths if n not in readable]
            if beyond and len(readable) < 3:  # what they are extrapolated from
                readable = sorted({*readable, *(n for n in (fits // 4, fits // 2, fits) if n)})
            cases += [Case({"reader": "plain", "length": n}, partial(self._plain, n)) for n in readable]
            cases += [Case({"reader": "plain", "length": n}, partial(self._extrapolated, n)) for n in beyond]
        for n in lengths:
            for rate in self.asked.rates or self._rates(n):
                cases.append(Case({"reader": "rcc", "length": n, "rate": rate}, partial(self._rcc, n, rate)))
        return cases

    def _default_batch_tokens(self) -> int:
        return batch_tokens_on(torch.device(self.asked.device)) if self.asked.measured else BATCH_TOKENS

    def _rates(self, length: int) -> list[int]:
        own = self.subject.model.rates
        if self.subject.fingerprint is None:
            return list(own)
        try:
            return [self.subject.model.fitting_rate([length], reserve=max(SPARE, self.asked.question_tokens + 1))]
        except WindowError:
            return [max(own)]

    def work(self, cases: int) -> int:
        """Return the number of cases: each is a unit."""
        return cases

    @contextlib.contextmanager
    def measuring(self, results: Results, progress: Progress) -> Iterator[None]:
        """Keep texts and contexts in a folder of their own until all cells are measured."""
        with tempfile.TemporaryDirectory(dir=results.folder, prefix=".contexts-") as folder:
            self._results, self._folder = results, Path(folder)
            yield

    def notes(self, results: Results) -> list[str]:
        """Return what to know about the figures."""
        encoder = self.subject.blueprint.encoder or self.subject.blueprint.decoder
        return self.report(results).notes(self.subject.sides, encoder.model_type)

    def report(self, results: Results) -> ResourcesReport:
        """Return the figures as tables and a plot."""
        return ResourcesReport(results)

    # ---------------------------------------------------------------- one cell
    def _rcc(self, length: int, rate: int) -> dict[str, Any]:
        subject, question = self.subject, self.asked.question_tokens
        n = subject.model.positions(length, rate)
        beyond = subject.model.sink_positions + n + question + 1 > subject.model.window
        if beyond and subject.fingerprint is not None:
            raise Skipped(f"{n:,} positions and a question do not fit the decoder's window of {subject.model.window:,}")
        weights, kv = subject.weights_bytes, n * subject.position_bytes
        if not self.asked.measured:
            peak = weights + subject.reading.compress(length, rate, self.batch_tokens)
            row: dict[str, Any] = {"positions": n, "weights_bytes": weights, "kv_bytes": kv, "file_bytes": kv}
            row |= {"compress_peak_bytes": peak, "ratio": peak / (weights + kv)}
            return {**row, "source": "computed", "beyond_window": beyond}
        self._check_memory(weights + kv)
        job = self._job("compress", length, rate)
        try:
            row = process.measure(job)
            row |= process.measure(replace(job, task="ask"))
        finally:
            job.context.unlink(missing_ok=True)
        floor = row["weights_bytes"] + row["kv_bytes"]
        for what in ("compress", "ask"):
            if f"{what}_peak_bytes" in row:
                name = "ratio" if what == "compress" else "ask_ratio"
                row[name] = row[f"{what}_peak_bytes"] / floor
        base = self._measured_row({"reader": "plain", "length": length})
        if "plain_first_token_seconds" in base:
            row["first_token_ratio"] = base["plain_first_token_seconds"] / row["first_token_seconds"]
        return {**row, "source": "measured", "beyond_window": beyond}

    def _plain(self, length: int) -> dict[str, Any]:
        if not self.asked.measured:
            return {**self._plain_memory(length), "source": "computed"}
        row = self._plain_memory(length, count=False)
        self._check_memory(row["weights_bytes"] + row["kv_bytes"])
        row |= process.measure(self._job("plain", length, 1))
        return {**row, "source": "measured"}

    def _extrapolated(self, length: int) -> dict[str, Any]:
        """Return figures of a text that the base cannot read: memory computed, time from the shorter ones'."""
        assert self._results is not None
        rows = [
            row for row in self._results.rows if row["key"]["reader"] == "plain" and row.get("source") == "measured"
        ]
        points = [(row["key"]["length"], row["plain_first_token_seconds"]) for row in rows]
        if not points:
            raise Skipped("beyond the base's window, with nothing to extrapolate from")
        seconds = extrapolate(points, length)
        return {**self._plain_memory(length), "plain_first_token_seconds": seconds, "source": "extrapolated"}

    def _plain_memory(self, length: int, count: bool = True) -> dict[str, Any]:
        subject = self.subject
        weights = planning.stored_bytes(subject.model.decoder, adapters=False)
        row: dict[str, Any] = {"weights_bytes": weights, "kv_bytes": length * subject.position_bytes}
        if count:
            row["plain_peak_bytes"] = weights + subject.reading.prefill(length, self.batch_tokens)
        return {**row, "beyond_window": length + self.asked.question_tokens > subject.model.window}

    # ---------------------------------------------------------------- what it takes
    def _check_memory(self, floor: int) -> None:
        """Skip a cell that needs more bytes than are free."""
        free = memory.available(torch.device(self.asked.device))
        if free is not None and floor > free:
            raise Skipped(f"weights and KV cache take {floor / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free")

    def _job(self, task: str, length: int, rate: int) -> Job:
        subject, asked = self.subject, self.asked
        made: str | planning.Blueprint = subject.name
        if subject.fingerprint is None:
            shape = copy.deepcopy(subject.blueprint.decoder)
            positions = length if task == "plain" else subject.model.positions(length, rate)
            needed = positions + asked.question_tokens + SPARE
            shape.max_position_embeddings = max(shape.max_position_embeddings, needed)
            made = replace(subject.blueprint, decoder=shape)
        assert self._folder is not None
        text, context = self._folder / f"{length}.npy", self._folder / "context.rcc"
        if not text.exists():
            np.save(text, self._ids(max(length, asked.question_tokens)))
        return Job(
            task,
            made,
            text,
            context,
            length,
            rate,
            asked.question_tokens,
            asked.device,
            subject.blueprint.dtype,
            self.batch_tokens,
            subject.compressor,
        )

    def _ids(self, length: int) -> np.ndarray:
        if self.asked.text is not None:
            return repeat_text(self.asked.text, length, self.subject.model.segment_length)
        vocabulary = min(self.subject.model.vocabulary, self.subject.model.decoder_vocabulary)
        return np.random.default_rng(length).integers(1, vocabulary, length, dtype=np.int32)

    def _measured_row(self, key: Key | Mapping[str, Any]) -> dict[str, Any]:
        assert self._results is not None
        return next((row for row in self._results.rows if row["key"] == key), {})


def repeat_text(ids: np.ndarray, length: int, segment: int) -> np.ndarray:
    """Repeat token ids [T] up to a length, each time from one token further on.

    So segments differ, of which equal ones in a batch would be read once.
    """
    ids = ids[: len(ids) // segment * segment] if len(ids) >= segment else ids
    return np.concatenate([np.roll(ids, -i) for i in range(-(-length // len(ids)))])[:length].astype(np.int32)


def extrapolate(points: Sequence[tuple[int, float]], length: int) -> float:
    """Return the seconds at another length, by a · length + b · length² fitted to shorter ones.

    a, b ≥ 0, by least squares of the relative errors: matrix products grow with the length, attention with its square.

    Args:
        points: (length in tokens, seconds) each.
        length: in tokens.
    """
    sizes, seconds = np.array(points, dtype=np.float64).T
    scaled = np.stack([sizes, sizes**2], 1) / seconds[:, None]
    fits = []
    for columns in ([0, 1], [0], [1]):
        if len(points) < len(columns):
            continue
        factors = np.zeros(2)
        factors[columns] = np.linalg.lstsq(scaled[:, columns], np.ones(len(points)), rcond=None)[0]
        if (factors >= 0).all():
            fits.append((float(((scaled @ factors - 1) ** 2).sum()), tuple(factors)))
    _, (a, b) = min(fits)
    return float(a * length + b * length**2)
