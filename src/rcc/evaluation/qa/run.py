"""Does it answer? Questions about texts, asked of a compressed context and of what a user might do instead (section
4.3 of the paper)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ... import engine
from ...errors import WindowError
from ...model.rcc import RCCForCausalLM
from ...planning import blueprint as planning
from .. import metrics
from ..results import Case, Skipped
from . import longbench
from .methods import Held, Method
from .methods.compressed import Compressed
from .methods.no_context import NoContext
from .methods.plain import Plain
from .methods.retrieved import Retrieved
from .methods.truncated import Truncated
from .questions import Question, Texts, bucket, choose, digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BY = ("method", "mode", "rate")
BASELINES = {
    "plain": "the base reads the text as it is",
    "truncated": "the base reads the beginning and the end, as many tokens as the context has positions",
    "bm25": "the base reads the passages that BM25 finds for the question, as many tokens as the context has positions",
    "no-context": "the model's decoder reads the question alone",
}
TUNED = "plain-tuned"
HINT = "Answer in a few words."
"""What a base that was not trained to answer shortly is told behind each question."""


@dataclass(frozen=True)
class Protocol:
    """What is asked.

    Args:
        rates: of the methods that compress.
        limit: questions of each set, chosen by `seed`; None: all.
        pad_to: other questions' texts are put around each, up to so many tokens; 0: none.
        max_new_tokens: of an answer, where its set does not say.
        hint: see :data:`HINT`.
        seed: of what is chosen and what stands around it.
    """

    rates: Sequence[int]
    limit: int | None = None
    pad_to: int = 0
    max_new_tokens: int = 64
    hint: str = HINT
    seed: int = 0


def make_methods(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    modes: Sequence[str],
    baselines: Sequence[str],
    *,
    tuned: RCCForCausalLM | None = None,
    beside: dict[str, RCCForCausalLM] | None = None,
    hint: str = HINT,
    room: int = 512,
) -> list[Method]:
    """The methods to be measured, in the order of the table.

    Args:
        modes: of :mod:`rcc.text.prompting`, in which compressed contexts are asked.
        baselines: some of :data:`BASELINES`.
        tuned: a model whose decoder learnt to answer from plain text.
        beside: other RCC models by name, with the same tokenizer.
        room: positions that plain text leaves for a question and its answer.
    """
    methods: list[Method] = [Compressed(model, tokenizer, mode) for mode in modes]
    for name, other in (beside or {}).items():
        methods += [Compressed(other, tokenizer, mode, name) for mode in modes]
    kinds = {"truncated": Truncated, "bm25": Retrieved, "plain": Plain}
    for name in baselines:
        if name == "no-context":
            methods.append(NoContext(model))
        else:
            methods.append(kinds[name](model, tokenizer, name=name, hint=hint, room=room))
    if tuned is not None:
        methods.append(Plain(tuned, tokenizer, name=TUNED, tuned=True, room=room))
    return methods


class _Clock(BaseStreamer):
    """When the first token was written."""

    def __init__(self) -> None:
        self.start, self.first, self._prompt = time.perf_counter(), 0.0, True

    def put(self, value: Tensor) -> None:
        if not self._prompt and not self.first:
            self.first = time.perf_counter() - self.start
        self._prompt = False

    def end(self) -> None:
        pass


class QA:
    """Questions asked of all methods.

    Args:
        questions: of which the protocol's limit is chosen.
        methods: as from :func:`make_methods`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        methods: Sequence[Method],
        protocol: Protocol,
    ):
        self.tokenizer, self.methods, self.protocol = tokenizer, methods, protocol
        self.questions = choose(questions, protocol.limit, protocol.seed)
        self.text = Texts(questions, tokenizer, protocol.pad_to, protocol.seed)
        self.data_sha256 = digest(questions)
        self._held: dict[tuple[str, int], tuple[str, Held, float]] = {}
        self._position_bytes: dict[int, int] = {}

    def settings(self, data: dict[str, Any]) -> dict[str, Any]:
        """All that a sample depends on beside its key. Methods, modes, rates and questions can be added to a folder.

        Args:
            data: where the questions came from, so that others can be asked them too.
        """
        main = self.methods[0].model
        return {
            "model": main.config.name,
            "fingerprint": main.fingerprint,
            "dtype": str(main.dtype).removeprefix("torch."),
            "trained_rates": main.config.rates,
            "data": data,
            "data_sha256": self.data_sha256,
            "pad_to": self.protocol.pad_to,
            "max_new_tokens": self.protocol.max_new_tokens,
            "hint": self.protocol.hint,
            "seed": self.protocol.seed,
        }

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.questions) * sum(len(self._rates(method)) for method in self.methods)

    def _rates(self, method: Method) -> Sequence[int]:
        return self.protocol.rates if method.compresses else [0]

    def cases(self) -> Iterator[Case]:
        """A case for each question, method and rate; those about one text one after the other."""
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
                asked = method.prompt(question)
                clock = _Clock()
                instruction, written = engine.ask(
                    method.model,
                    self.tokenizer,
                    held.context,
                    asked,
                    question.tokens or self.protocol.max_new_tokens,
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
            "bytes": held.positions * self._bytes(method.model),
            "cut": float(held.cut),
            "compress_seconds": 0.0 if method.by_question else seconds,
            "first_token_seconds": clock.first + (seconds if method.by_question else 0.0),
        }

    def _hold(self, question: Question, text: Tensor, method: Method, rate: int) -> tuple[Held, float]:
        """What a method holds of a text, and the seconds that it took; kept for the next question about it."""
        name = (method.name, rate)
        found = self._held.get(name)
        if found is not None and found[0] == question.context:
            return found[1:]
        self._held.pop(name, None)  # before the next one is made
        start = time.perf_counter()
        held = method.hold(text, rate, question)
        seconds = time.perf_counter() - start
        if not method.by_question:
            self._held[name] = (question.context, held, seconds)
        return held, seconds

    def _bytes(self, model: RCCForCausalLM) -> int:
        if id(model) not in self._position_bytes:
            with torch.no_grad():
                self._position_bytes[id(model)] = planning.position_bytes(model)
        return self._position_bytes[id(model)]


def key_of(question: Question, method: str, mode: str, rate: int, tokens: int) -> dict[str, Any]:
    """What tells a sample from others; rate 0: nothing is compressed.

    Args:
        tokens: of the text.
    """
    key = {"method": method, "mode": mode, "rate": rate, "set": question.set, "bucket": bucket(tokens)}
    text = hashlib.sha256(question.context.encode()).hexdigest()[:12]
    return {**key, "text": text, "question": question.id}


def score(question: Question, written: str) -> dict[str, Any]:
    """An answer's figures, 0 to 1, with what they are of."""
    return {
        "score": longbench.METRICS[question.metric](written, question.answers, question.classes),
        "f1": metrics.f1(written, question.answers),
        "exact_match": metrics.exact_match(written, question.answers),
        "rouge_l": longbench.best_rouge(written, question.answers),
        "asked": question.question,
        "answers": list(question.answers),
        "written": written,
    }
