"""Does it answer? Questions about texts, asked of a compressed context and of what a user might do instead.

Section 4.3 of the paper.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ...errors import WindowError
from ...model import answering
from ...model.compressor import Compressor
from ...model.rcc import RCCForCausalLM
from ...model.selection.names import compressor_name, rule_of
from .. import metrics
from ..evaluation import Progress, model_settings
from ..results import Case, Results, Skipped
from . import longbench
from .methods import Held, Method
from .methods.compressed import Compressed
from .methods.no_context import NoContext
from .methods.plain_text import PlainText
from .methods.retrieved import Retrieved
from .methods.selected import Selected
from .methods.truncated import Truncated
from .questions import Question, bucket, choose, digest
from .settings import BY, HINT, SELECTIONS, TUNED, QASettings
from .table import QAReport
from .texts import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_methods(
    model: Compressor,
    tokenizer: PreTrainedTokenizerBase,
    modes: Sequence[str],
    baselines: Sequence[str],
    *,
    tuned: RCCForCausalLM | None = None,
    beside: dict[str, RCCForCausalLM] | None = None,
    hint: str = HINT,
    room: int = 512,
) -> list[Method]:
    """Return the methods to be measured, in the order of the table.

    Args:
        model: compresses, and lends its decoder to the baselines.
        tokenizer: the model's.
        modes: of :mod:`rcc.text.prompting`, in which compressed contexts are asked.
        baselines: any of :data:`rcc.evaluation.qa.settings.BASELINES` and `SELECTIONS`.
        tuned: a model whose decoder learnt to answer from plain text.
        beside: other RCC models by name, with the same tokenizer.
        hint: what a model that was not trained for rcc is told after each question.
        room: positions that plain text leaves for a question and its answer.
    """
    own = compressor_name(model.compressor)
    methods: list[Method] = [Compressed(model, tokenizer, mode, own, hint) for mode in modes]
    for name, other in (beside or {}).items():
        methods += [Compressed(other, tokenizer, mode, name) for mode in modes]
    kinds = {"truncated": Truncated, "bm25": Retrieved, "plain": PlainText}
    for name in baselines:
        if name == "no-context":
            methods.append(NoContext(model, tokenizer, hint))
        elif name in SELECTIONS and name != own:
            methods.append(Selected(model, tokenizer, rule=rule_of(name), name=name, hint=hint))
        elif name in kinds:
            methods.append(kinds[name](model, tokenizer, name=name, hint=hint, room=room))
    if tuned is not None:
        methods.append(PlainText(tuned, tokenizer, name=TUNED, tuned=True, room=room))
    return methods


class _Clock(BaseStreamer):
    """The seconds from its making to the first token written."""

    def __init__(self) -> None:
        self.start, self.first, self._prompt = time.perf_counter(), 0.0, True

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token as it is written."""
        if not self._prompt and not self.first:
            self.first = time.perf_counter() - self.start
        self._prompt = False

    def end(self) -> None:
        """Do nothing."""


class QAEvaluation:
    """Questions asked of all methods.

    Args:
        questions: of which as many of each set are chosen as are asked.
        methods: as from :func:`make_methods`.
        source: the arguments of :func:`rcc.evaluation.qa.questions.open_questions`, so that others can be asked the
            same questions, too.
        reading_notes: what that function said of rows that cannot be used.
    """

    kind, by, cluster = "qa", BY, "text"
    verb, unit = "asking", "answers"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        methods: Sequence[Method],
        asked: QASettings,
        source: dict[str, Any] | None = None,
        reading_notes: Sequence[str] = (),
    ):
        self.tokenizer, self.methods, self.asked = tokenizer, methods, asked
        self.source, self.reading_notes = source, reading_notes
        self.text = Texts(questions, tokenizer, asked.pad_to, asked.seed)
        self.questions = sorted(choose(questions, asked.limit, asked.seed), key=self.text.pack)
        self.data_sha256 = digest(questions)
        self._held: dict[tuple[str, int], tuple[Tensor, Held, float]] = {}

    def settings(self) -> dict[str, Any]:
        """Return all that a sample depends on beside its key.

        Methods, modes, rates and questions can be added to a folder.
        """
        main = self.methods[0].model
        return {
            **model_settings(main),
            "trained_rates": list(main.rates),
            "data": self.source,
            "data_sha256": self.data_sha256,
            "pad_to": self.asked.pad_to,
            # folders from before texts shared a pack put other texts around each
            **({"packs": True} if self.asked.pad_to else {}),
            "max_new_tokens": self.asked.max_new_tokens,
            "hint": self.asked.hint,
            "seed": self.asked.seed,
            **({} if self.asked.kv is None else {"kv": self.asked.kv}),
        }

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.questions) * sum(len(self._rates(method)) for method in self.methods)

    def work(self, cases: int) -> int:
        """Return the number of cases: each is a unit."""
        return cases

    def measuring(self, results: Results, progress: Progress) -> AbstractContextManager[None]:
        """Return an empty context: nothing is held beside the last text."""
        return contextlib.nullcontext()

    def notes(self, results: Results) -> list[str]:
        """Return what to know about the figures, and about rows that could not be used."""
        return [*self.report(results).notes(), *self.reading_notes]

    def report(self, results: Results) -> QAReport:
        """Return the figures as tables and plots."""
        return QAReport(results)

    def _rates(self, method: Method) -> Sequence[int]:
        return self.asked.rates if method.compresses else [0]

    def cases(self) -> Iterator[Case]:
        """Yield a case for each question, method and rate; those of one text or pack one after the other."""
        for question in self.questions:
            text = self.text(question)
            for method in self.methods:
                for rate in self._rates(method):
                    key = key_of(question, method.name, method.mode, rate, len(text))
                    yield Case(key, partial(self._measure, question, text, method, rate))

    def _measure(self, question: Question, text: Tensor, method: Method, rate: int) -> dict[str, Any]:
        try:
            with method.decoder():
                held, seconds = self._hold(question, text, method, rate)
                prompt = method.prompt(question)
                clock = _Clock()
                instruction, written = answering.ask(
                    method.model,
                    self.tokenizer,
                    held.context,
                    prompt,
                    question.tokens or self.asked.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,  # some bases come with another
                    streamer=clock,
                )
        except WindowError as error:
            raise Skipped(str(error)) from None
        figures = score(question, written)
        if instruction is not None:
            figures["instruction_accuracy"] = metrics.exact_match(instruction, [question.question])
            figures["instruction"] = instruction
        return {
            **figures,
            "context_tokens": len(text),
            "positions": held.positions,
            "bytes": held.bytes,
            "cut": float(held.cut),
            "compress_seconds": 0.0 if method.by_question else seconds,
            "first_token_seconds": clock.first + (seconds if method.by_question else 0.0),
        }

    def _hold(self, question: Question, text: Tensor, method: Method, rate: int) -> tuple[Held, float]:
        """Return what a method holds of a text, kept for the next question that reads it, and the seconds it took."""
        name = (method.name, rate)
        before = self._held.get(name)
        if before is not None and torch.equal(before[0], text):
            return before[1:]
        self._held.pop(name, None)  # before the next one is made
        start = time.perf_counter()
        held = method.hold(text, rate, question)
        if self.asked.kv is not None and method.compresses and held.context is not None:
            held = replace(held, context=held.context.to(dtype=self.asked.kv))
        seconds = time.perf_counter() - start
        if not method.by_question:
            self._held[name] = (text, held, seconds)
        return held, seconds


def key_of(question: Question, method: str, mode: str, rate: int, tokens: int) -> dict[str, Any]:
    """Return the key of a sample.

    Args:
        question: gives the set, the text and the question.
        method: its name in tables.
        mode: in which it asks; empty where it has no choice.
        rate: 0: nothing is compressed.
        tokens: of the text.
    """
    key = {"method": method, "mode": mode, "rate": rate, "set": question.set, "bucket": bucket(tokens)}
    text = hashlib.sha256(question.context.encode()).hexdigest()[:12]
    return {**key, "text": text, "question": question.id}


def score(question: Question, written: str) -> dict[str, Any]:
    """Return an answer's figures, 0 to 1, with what they are of."""
    return {
        "score": longbench.METRICS[question.metric](written, question.answers, question.classes),
        "f1": metrics.f1(written, question.answers),
        "exact_match": metrics.exact_match(written, question.answers),
        "rouge_l": longbench.best_rouge(written, question.answers),
        "asked": question.question,
        "answers": list(question.answers),
        "written": written,
    }
