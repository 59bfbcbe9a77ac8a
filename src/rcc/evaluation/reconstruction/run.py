"""How much of a text its compressed context gives back (section 4.1 of the paper)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...context.context import CompressedContext
from ...context.vectors import CompressedVectors
from ...model import answering
from ...model.compressor import Compressor
from ...model.rcc import RCCForCausalLM
from ...text.tokens import decode
from .. import metrics
from ..evaluation import Progress, model_settings, untrained
from ..results import Case, Results, Skipped
from ..uncompressed import base_decoder, read_plain
from .documents import Documents
from .settings import BY, CONTROLS, REAL, ReconstructionSettings
from .table import ReconstructionReport
from .teacher_forcing import PROMPT, predictions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...data.corpus import Corpus

Figures = dict[str, Any]
"""What is measured of one sample, by name."""


class ReconstructionEvaluation:
    """Reconstruction of documents by one model.

    Args:
        corpora: as from :func:`rcc.evaluation.reconstruction.documents.open_texts`.
        asked: what is asked of each document.

    Raises:
        InputError: what is asked does not fit the model or the texts.
    """

    kind, by, cluster = "reconstruction", BY, "document"
    verb, unit = "reconstructing", "samples"

    def __init__(
        self,
        model: Compressor,
        tokenizer: PreTrainedTokenizerBase,
        corpora: Sequence[Corpus],
        asked: ReconstructionSettings,
    ):
        asked.check(model)
        self.model, self.tokenizer, self.corpora, self.asked = model, tokenizer, corpora, asked
        self.documents = {length: Documents(corpora, length, asked.seed) for length in asked.lengths}
        # a document's context is also the wrong one of the document before it
        self._compressed = lru_cache(2 * len(asked.rates))(self._contexts)

    def settings(self) -> dict[str, Any]:
        """Return all that a sample depends on beside its key. Rates, lengths and documents can be added to a folder."""
        asked = self.asked
        digest = hashlib.sha256()
        for corpus in self.corpora:
            digest.update(np.ascontiguousarray(corpus.hashes).tobytes())
        return {
            **model_settings(self.model),
            "data": [Path(corpus.source.path).name for corpus in self.corpora],
            "data_sha256": digest.hexdigest(),
            "prompts": asked.prompts,
            "prompt_tokens": PROMPT,
            "target_tokens": asked.target_tokens,
            "seed": asked.seed,
            "bleu": metrics.bleu_settings(),
            **({} if asked.kv is None else {"kv": asked.kv}),
        }

    def __len__(self) -> int:
        """Return the number of cases."""
        return sum(1 for _ in self.cases())

    def work(self, cases: int) -> int:
        """Return the number of cases: each is a unit."""
        return cases

    def measuring(self, results: Results, progress: Progress) -> AbstractContextManager[None]:
        """Return an empty context: nothing is held beside the last documents' contexts."""
        return contextlib.nullcontext()

    def notes(self, results: Results) -> list[str]:
        """Return what to know about the figures, all of which is known before anything is measured."""
        model, asked = self.model, self.asked
        notes = [
            f"Prompts of {PROMPT} tokens; written greedily. BLEU-4: mean over samples of sacrebleu's"
            f" {metrics.bleu_settings()}. Exact: share of the tokens written that stand at their place; run: tokens"
            " before the first error. Accuracy and loss (nats a token): teacher forced. Intervals: 95 %, bootstrap over"
            " documents."
        ]
        if asked.controls:
            notes.append("Contexts: " + "; ".join(f"{kind}: {CONTROLS[kind]}" for kind in asked.controls) + ".")
        for rate in untrained(model, asked.rates):
            trained = ", ".join(f"{r}×" for r in model.rates)
            notes.append(f"{model.name} was not trained at {rate}×, only at {trained}: expect little of it.")
        for length, documents in self.documents.items():
            if documents.too_short:
                count = documents.too_short + len(documents)
                notes.append(f"{documents.too_short:,} of {count:,} texts have fewer than {length:,} tokens.")
        return notes

    def report(self, results: Results) -> ReconstructionReport:
        """Return the figures as tables and plots."""
        return ReconstructionReport(results, self.model)

    # ---------------------------------------------------------------- what is measured
    def cases(self) -> Iterator[Case]:
        """Yield a case for each document, prompt, rate and context.

        Those of one document and rate are measured together, when the first of them is.
        """
        asked = self.asked
        at_each_rate = [REAL, *(kind for kind in ("shuffled", "wrong") if kind in asked.controls)]
        groups: list[tuple[int | None, list[str]]] = [(rate, at_each_rate) for rate in asked.rates]
        groups += [(None, [kind]) for kind in ("no-context", "plain-text") if kind in asked.controls]
        for length, documents in self.documents.items():
            for number in documents.order[: asked.documents]:
                for rate, kinds in groups:
                    reasons = {kind: self._impossible(kind, length, rate) for kind in kinds}
                    possible = [kind for kind in kinds if reasons[kind] is None]
                    measured = cache(partial(self._measure, length, number, rate, possible))
                    for kind in kinds:
                        for start in asked.starts(length):
                            key = {"length": length, "rate": rate, "document": number, "start": start, "context": kind}
                            if rate is None:  # the same at every rate
                                del key["rate"]
                            yield Case(key, partial(_one_of, measured, kind, start, reasons[kind]))

    def _impossible(self, kind: str, length: int, rate: int | None) -> str | None:
        """Say why a control cannot be made, or a context not be read at this length and rate; None: it can."""
        model = self.model
        positions = length if kind == "plain-text" else 0
        if rate is not None:
            positions = model.positions(length, rate)
        before = model.sink_positions + (len(model.header) if rate is None else 0)
        tokens = max(end - start for start, end in self.asked.spans(length))
        if before + positions + tokens > model.window:
            return (
                f"{positions:,} positions of context and {tokens:,} tokens of prompt and answer are more than the"
                f" decoder's window of {model.window:,}"
            )
        if kind == "shuffled" and positions == 1:
            return "one vector has no order"
        if kind == "wrong" and len(self.documents[length]) == 1:
            return "there is no other document"
        return None

    def _contexts(self, length: int, number: int, rate: int) -> tuple[CompressedVectors | None, CompressedContext]:
        """Return a document's vectors, where the order of its positions matters to their making, and its context."""
        model, ids = self.model, self.documents[length][number][None]
        if isinstance(model, RCCForCausalLM) and not model.config.direct:
            vectors = model.encode(ids, rate=rate)
            return vectors, model.prefix(vectors).to(dtype=self.asked.kv)
        return None, model.compress(ids, rate=rate).to(dtype=self.asked.kv)

    def _context(self, kind: str, length: int, number: int, rate: int | None) -> CompressedContext | None:
        """Return what the decoder is given in place of a document."""
        header = self.model.header
        if kind == "plain-text":
            return read_plain(self.model, torch.cat([header, self.documents[length][number]]))
        if rate is None:
            return read_plain(self.model, header) if len(header) else None
        if kind == "wrong":
            number = self.documents[length].another(number)
        vectors, context = self._compressed(length, number, rate)
        if kind != "shuffled":
            return context
        order = another_order(len(context), self.asked.seed)
        if vectors is None:
            return context.take(order)
        assert isinstance(self.model, RCCForCausalLM)
        return reordered(self.model, vectors, order)

    def _measure(self, length: int, number: int, rate: int | None, kinds: list[str]) -> dict[tuple[str, int], Figures]:
        """Return figures by kind of context and start of the prompt."""
        ids = self.documents[length][number]
        asked = [(kind, start, ids[start:end]) for kind in kinds for start, end in self.asked.spans(length)]
        figures = {}
        with base_decoder(self.model) if kinds == ["plain-text"] else contextlib.nullcontext():
            contexts = {kind: self._context(kind, length, number, rate) for kind in kinds}
            for first in range(0, len(asked), self.asked.batch):
                batch = asked[first : first + self.asked.batch]
                context = _together([contexts[kind] for kind, _, _ in batch])
                spans = [span for _, _, span in batch]
                written = self._write(context, spans)
                forced = predictions(self.model, context, spans)
                for (kind, start, span), new, (right, losses) in zip(batch, written, forced, strict=True):
                    figures[kind, start] = self._figures(span, new, right, losses)
        return figures

    def _write(self, context: CompressedContext | None, spans: list[Tensor]) -> list[list[int]]:
        """Return what the decoder writes after each span's prompt, greedily, as many tokens as the span has."""
        prompts = torch.stack([span[:PROMPT] for span in spans])
        out = self.model.generate(
            prompts,
            torch.ones_like(prompts),  # or transformers takes every token 0 for padding
            context=context,
            max_new_tokens=max(map(len, spans)) - PROMPT,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some bases come with another, which forbids to copy
            eos_token_id=answering.NEVER,
            pad_token_id=0,
        )
        return [row[PROMPT : len(span)].tolist() for row, span in zip(out, spans, strict=True)]

    def _figures(self, span: Tensor, new: list[int], right: Tensor, losses: Tensor) -> Figures:
        truth = span[PROMPT:].tolist()
        exact, run = metrics.matching(new, truth)
        texts: dict[str, list[int]] = {"prompt": span[:PROMPT].tolist(), "written": new, "truth": truth}
        said = {name: decode(self.tokenizer, ids) for name, ids in texts.items()}
        return {
            "bleu": metrics.bleu(said["written"], said["truth"]),
            "rouge_l": metrics.rouge_l(said["written"], said["truth"]),
            "exact": exact,
            "run": run,
            "accuracy": float(right.float().mean()),
            "loss": float(losses.mean()),
            **said,
            "recalled": "".join("1" if token else "0" for token in right.tolist()),
        }


def another_order(count: int, seed: int) -> Tensor:
    """Return a random order of at least two positions, [count], that is not their own."""
    generator, own = torch.Generator().manual_seed(seed), torch.arange(count)
    order = own
    while torch.equal(order, own):
        order = torch.randperm(len(own), generator=generator)
    return order


def reordered(model: RCCForCausalLM, vectors: CompressedVectors, order: Tensor) -> CompressedContext:
    """Return the context of one text's compressed vectors in another order.

    Position j has the states of vector order[j], of all layers together.
    """
    states = vectors.states[:, order.to(vectors.states.device)]
    return model.prefix(replace(vectors, states=states))


def _one_of(
    measured: Callable[[], dict[tuple[str, int], Figures]], kind: str, start: int, reason: str | None
) -> Figures:
    if reason is not None:
        raise Skipped(reason)
    return measured()[kind, start]


def _together(contexts: list[CompressedContext | None]) -> CompressedContext | None:
    """Return contexts of one text each as one batch; None for no contexts."""
    given = [context for context in contexts if context is not None]
    if not given:
        return None
    if all(context is given[0] for context in given):
        return given[0].expand(len(given))
    return CompressedContext.stack(given)
