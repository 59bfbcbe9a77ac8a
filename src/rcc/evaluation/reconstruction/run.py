"""How much of a text its compressed context gives back (section 4.1 of the paper)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ... import engine
from ...config import RCCConfig
from ...context.context import CompressedContext
from ...context.vectors import CompressedVectors
from ...errors import InputError
from ...model import segments
from ...model.rcc import RCCForCausalLM
from .. import metrics
from ..example import EXAMPLE, example_text
from ..plain import base_decoder, read_plain
from ..results import Case, Skipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...data.corpus import Corpus

PROMPT = 10
"""Tokens of a span that the decoder is given before it continues it (section 4.1 of the paper)."""

TEXT, LAST, WRITTEN = 2048, 1200, 500
"""The paper's measure: texts of 2,048 tokens, five prompts 300 tokens apart, of which the last begins at token 1,200,
and about 500 tokens written behind each. Texts of other lengths are measured in proportion."""

REAL = "real"
CONTROLS = {
    "shuffled": "its own compressed vectors in a random order, each with all its layers",
    "wrong": "the context of another document",
    "no-context": "the prompt alone",
    "plain-text": "the text itself, token by token, read by the decoder's base (without LoRA, where it has LoRA)",
}
"""What the decoder is given in place of a text's own context, and what that is."""

BY = ("length", "rate", "context")


# ---------------------------------------------------------------- teacher forcing
@dataclass(frozen=True)
class Recovery:
    """Teacher-forced reconstruction: `correct` of `tokens` predicted right, mean `loss` in nats a token."""

    tokens: int
    correct: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens


@torch.no_grad()
def predictions(
    model: RCCForCausalLM, context: CompressedContext | None, spans: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Predict every token of spans behind their first :data:`PROMPT`, from the context and the true tokens before it.

    Args:
        context: of as many texts as there are spans, or None.
        spans: each [T] token ids, of more than :data:`PROMPT`.

    Returns:
        For each span, whether the likeliest token is the true one, bool [T - PROMPT], and the loss in nats a token,
        float32 [T - PROMPT]; on the CPU.
    """
    x = torch.nn.utils.rnn.pad_sequence(list(spans), batch_first=True).to(model.device)
    places = torch.arange(PROMPT - 1, x.shape[1] - 1, device=model.device)
    # causal: what pads a shorter span on the right cannot reach what is measured
    logits = model(x, context=context, logits_to_keep=places).logits
    found = []
    for row, span in zip(logits, spans, strict=True):  # one by one, as float32 logits are large
        truth = span[PROMPT:].to(model.device)
        guess = row[: len(truth)].float()
        loss = torch.nn.functional.cross_entropy(guess, truth, reduction="none")
        found.append(((guess.argmax(-1) == truth).cpu(), loss.cpu()))
    return found


def teacher_forced(
    model: RCCForCausalLM,
    context: CompressedContext,
    ids: Tensor,
    span: int = 256,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """Next-token accuracy over a whole text, the context being its only source besides the span itself.

    The text is cut into spans; the decoder reads a span's first ten tokens, then predicts each next one from the
    context and the true tokens before it in the span. Every token but the tens is predicted once.

    Args:
        context: of one text, which need not be `ids` (a control).
        ids: [T] token ids.
        span: tokens a span, prompt included.
        batch: spans at a time; each needs a copy of the context's keys and values.

    Raises:
        InputError: the text is too short to predict anything.
    """
    spans = [piece for piece in ids.split(span) if len(piece) > PROMPT]
    if not spans:
        raise InputError(f"the text has {len(ids)} tokens: at least {PROMPT + 1} are needed to measure recovery.")
    tokens = correct = 0
    loss = 0.0
    for start in range(0, len(spans), batch):
        rows = spans[start : start + batch]
        for right, losses in predictions(model, context.expand(len(rows)) if len(rows) > 1 else context, rows):
            tokens, correct, loss = tokens + len(right), correct + int(right.sum()), loss + float(losses.sum())
        if progress is not None:
            progress(min(start + batch, len(spans)), len(spans))
    return Recovery(tokens, correct, loss / tokens)


# ---------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class Protocol:
    """What is asked of each document.

    Args:
        rates, lengths: every rate is measured at every length, in tokens.
        prompts: places in a text that the decoder is asked to go on from.
        target_tokens: to write behind each, at most; fewer where the text ends. None: as many as the paper's 500 in
            2,048, in proportion to the text, and at most 500.
        controls: some of :data:`CONTROLS`.
        documents: at most so many of each length, chosen by `seed`.
        batch: prompts at a time; each needs a copy of its context's keys and values.
        seed: of the choice of documents and of the shuffled order.
    """

    rates: Sequence[int]
    lengths: Sequence[int]
    prompts: int = 5
    target_tokens: int | None = None
    controls: Sequence[str] = tuple(CONTROLS)
    documents: int = 10
    batch: int = 16
    seed: int = 0

    def starts(self, length: int) -> list[int]:
        """Where the prompts begin in a text of `length` tokens: evenly spread, as far as the paper's."""
        last = length * LAST / TEXT
        return [round(i * last / max(1, self.prompts - 1)) for i in range(self.prompts)]

    def spans(self, length: int) -> list[tuple[int, int]]:
        """For each prompt, where it begins and where the target behind it ends."""
        target = self.target_tokens or min(WRITTEN, round(WRITTEN * length / TEXT))
        return [(start, min(start + PROMPT + target, length)) for start in self.starts(length)]

    def check(self, config: RCCConfig) -> None:
        """Raise InputError where a model of this configuration cannot be asked so."""
        for rate in self.rates:
            config.check_rate(rate)
        for length in self.lengths:
            if length < config.segment_length:
                raise InputError(
                    f"a length of {length} tokens is below one segment: use at least {config.segment_length}."
                )
            starts = self.starts(length)
            if length <= starts[-1] + PROMPT:
                raise InputError(
                    f"of {length} tokens none is left to write behind the prompt of {PROMPT} at token {starts[-1]}:"
                    " use a greater length."
                )
            if len(set(starts)) < self.prompts:
                raise InputError(f"{length} tokens have no room for {self.prompts} prompts: use fewer.")


def open_texts(paths: Sequence[str], field: str, tokenizer: PreTrainedTokenizerBase) -> list[Corpus]:
    """Texts as tokens, opened as the trainer's sources are; with no path, the example text of the repository.

    Raises:
        InputError: a file has no row that can be used, or there is no path and no repository.
        FileError: a file is missing or damaged.
    """
    from ...data.corpus import open_text
    from ...data.sources import Source

    if not paths:
        example = example_text()
        if example is None:
            raise InputError(f"--data is missing, and {EXAMPLE} of rcc's repository is not here: name a file of text.")
        paths = [str(example)]
    return [open_text(Source(path, text=field), tokenizer) for path in paths]


class Documents:
    """The documents of one length, by number.

    Each text that has `length` tokens gives its first ones; a single text is cut into as many documents as it gives.

    Attributes:
        order: their numbers, shuffled by the seed: those to be measured come first.
        too_short: how many texts have fewer tokens.

    Raises:
        InputError: no text is long enough.
    """

    def __init__(self, corpora: Sequence[Corpus], length: int, seed: int):
        self.length = length
        texts = [(corpus, row, int(n)) for corpus in corpora for row, n in enumerate(corpus.lengths)]
        most = None if len(texts) == 1 else 1
        self._places = [(c, row, i * length) for c, row, n in texts for i in range(n // length)[:most]]
        self.too_short = sum(n < length for _, _, n in texts)
        if not self._places:
            longest = max(n for _, _, n in texts)
            raise InputError(
                f"no text has {length:,} tokens, the longest has {longest:,}: use longer texts or lower --lengths."
            )
        self.order = np.random.default_rng(seed).permutation(len(self._places)).tolist()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Tensor:
        """Token ids int64 [length]."""
        corpus, row, start = self._places[number]
        return torch.from_numpy(corpus.document(row)[start : start + self.length].astype(np.int64))

    def another(self, number: int) -> int:
        """The document that comes next in the order, the first one behind the last."""
        return self.order[(self.order.index(number) + 1) % len(self)]


# ---------------------------------------------------------------- measuring
class Reconstruction:
    """Reconstruction of documents by one model.

    Args:
        corpora: as from :func:`open_texts`.

    Raises:
        InputError: the protocol does not fit the model or the texts.
    """

    def __init__(
        self,
        model: RCCForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        corpora: Sequence[Corpus],
        protocol: Protocol,
    ):
        protocol.check(model.config)
        self.model, self.tokenizer, self.corpora, self.protocol = model, tokenizer, corpora, protocol
        self.documents = {length: Documents(corpora, length, protocol.seed) for length in protocol.lengths}
        # a document's context is also the wrong one of the document before it
        self._compressed = lru_cache(2 * len(protocol.rates))(self._compress)

    def settings(self) -> dict[str, Any]:
        """All that a sample depends on beside its key. Rates, lengths and documents can be added to a folder."""
        config, protocol = self.model.config, self.protocol
        digest = hashlib.sha256()
        for corpus in self.corpora:
            digest.update(np.ascontiguousarray(corpus.hashes).tobytes())
        return {
            "model": config.name,
            "fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "data": [Path(corpus.source.path).name for corpus in self.corpora],
            "data_sha256": digest.hexdigest(),
            "prompts": protocol.prompts,
            "prompt_tokens": PROMPT,
            "target_tokens": protocol.target_tokens,
            "seed": protocol.seed,
            "bleu": metrics.bleu_settings(),
        }

    def __len__(self) -> int:
        """Number of cases."""
        return sum(1 for _ in self.cases())

    def cases(self) -> Iterator[Case]:
        """A case for each document, prompt, rate and context. Those of one document and rate are measured together,
        when the first of them is."""
        protocol = self.protocol
        behind = [REAL, *(kind for kind in ("shuffled", "wrong") if kind in protocol.controls)]
        groups: list[tuple[int | None, list[str]]] = [(rate, behind) for rate in protocol.rates]
        groups += [(None, [kind]) for kind in ("no-context", "plain-text") if kind in protocol.controls]
        for length, documents in self.documents.items():
            for number in documents.order[: protocol.documents]:
                for rate, kinds in groups:
                    reasons = {kind: self._impossible(kind, length, rate) for kind in kinds}
                    possible = [kind for kind in kinds if reasons[kind] is None]
                    measured = cache(partial(self._measure, length, number, rate, possible))
                    for kind in kinds:
                        for start in protocol.starts(length):
                            key = {"length": length, "rate": rate, "document": number, "start": start, "context": kind}
                            if rate is None:  # the same at every rate
                                del key["rate"]
                            yield Case(key, partial(_one_of, measured, kind, start, reasons[kind]))

    def _impossible(self, kind: str, length: int, rate: int | None) -> str | None:
        """Why a control cannot be made, or a context not be read at this length and rate."""
        held = length if kind == "plain-text" else 0
        if rate is not None:
            held = segments.positions(length, rate, self.model.config)
        tokens = max(end - start for start, end in self.protocol.spans(length))
        if held + tokens > self.model.window:
            return (
                f"{held:,} positions of context and {tokens:,} tokens of prompt and answer are more than the decoder's"
                f" window of {self.model.window:,}"
            )
        if kind == "shuffled" and held == 1:
            return "one vector has no order"
        if kind == "wrong" and len(self.documents[length]) == 1:
            return "there is no other document"
        return None

    def _compress(self, length: int, number: int, rate: int) -> tuple[CompressedVectors | None, CompressedContext]:
        """A document's vectors, where the order of its positions matters to their making, and its context."""
        ids = self.documents[length][number][None]
        if self.model.config.direct:
            return None, self.model.compress(ids, rate=rate)
        vectors = self.model.encode(ids, rate=rate)
        return vectors, self.model.prefix(vectors)

    def _context(self, kind: str, length: int, number: int, rate: int | None) -> CompressedContext | None:
        """What the decoder is given in place of a document."""
        if kind == "plain-text":
            return read_plain(self.model, self.documents[length][number])
        if rate is None:
            return None
        if kind == "wrong":
            number = self.documents[length].another(number)
        vectors, context = self._compressed(length, number, rate)
        if kind != "shuffled":
            return context
        order = another_order(len(context), self.protocol.seed)
        return context.take(order) if vectors is None else reordered(self.model, vectors, order)

    def _measure(
        self, length: int, number: int, rate: int | None, kinds: list[str]
    ) -> dict[tuple[str, int], dict[str, Any]]:
        """Figures by kind of context and start of the prompt."""
        ids = self.documents[length][number]
        asked = [(kind, start, ids[start:end]) for kind in kinds for start, end in self.protocol.spans(length)]
        found = {}
        with base_decoder(self.model) if kinds == ["plain-text"] else contextlib.nullcontext():
            contexts = {kind: self._context(kind, length, number, rate) for kind in kinds}
            for first in range(0, len(asked), self.protocol.batch):
                batch = asked[first : first + self.protocol.batch]
                context = _together([contexts[kind] for kind, _, _ in batch])
                spans = [span for _, _, span in batch]
                written = self._write(context, spans)
                forced = predictions(self.model, context, spans)
                for (kind, start, span), new, (right, losses) in zip(batch, written, forced, strict=True):
                    found[kind, start] = self._figures(span, new, right, losses)
        return found

    def _write(self, context: CompressedContext | None, spans: list[Tensor]) -> list[list[int]]:
        """What the decoder writes behind each span's prompt: the likeliest token each time, as many as the span has."""
        prompts = torch.stack([span[:PROMPT] for span in spans])
        out = self.model.generate(
            prompts,
            torch.ones_like(prompts),  # or transformers takes every token 0 for padding
            context=context,
            max_new_tokens=max(map(len, spans)) - PROMPT,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some bases come with another, which forbids to copy
            eos_token_id=engine.NEVER,
            pad_token_id=0,
        )
        return [row[PROMPT : len(span)].tolist() for row, span in zip(out, spans, strict=True)]

    def _figures(self, span: Tensor, new: list[int], right: Tensor, losses: Tensor) -> dict[str, Any]:
        truth = span[PROMPT:].tolist()
        exact, run = metrics.matching(new, truth)
        texts = {"prompt": span[:PROMPT].tolist(), "written": new, "truth": truth}
        said = {name: self.tokenizer.decode(ids) for name, ids in texts.items()}
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

    def notes(self) -> list[str]:
        """What to know about the figures."""
        config, protocol = self.model.config, self.protocol
        notes = [
            f"Prompts of {PROMPT} tokens; written greedily. BLEU-4: mean over samples of sacrebleu's"
            f" {metrics.bleu_settings()}. Exact: share of the tokens written that stand at their place; run: tokens"
            " before the first error. Accuracy and loss (nats a token): teacher forced. Intervals: 95 %, bootstrap over"
            " documents."
        ]
        if protocol.controls:
            notes.append("Contexts: " + "; ".join(f"{kind}: {CONTROLS[kind]}" for kind in protocol.controls) + ".")
        for rate in protocol.rates:
            if rate not in config.rates:
                trained = ", ".join(f"{r}×" for r in config.rates)
                notes.append(f"{config.name} was not trained at {rate}×, only at {trained}: expect little of it.")
        for length, documents in self.documents.items():
            if documents.too_short:
                count = documents.too_short + len(documents)
                notes.append(f"{documents.too_short:,} of {count:,} texts have fewer than {length:,} tokens.")
        return notes


def another_order(count: int, seed: int) -> Tensor:
    """A random order of at least two positions, [count], that is not their own."""
    generator, own = torch.Generator().manual_seed(seed), torch.arange(count)
    order = own
    while torch.equal(order, own):
        order = torch.randperm(len(own), generator=generator)
    return order


def reordered(model: RCCForCausalLM, vectors: CompressedVectors, order: Tensor) -> CompressedContext:
    """The context of one text's compressed vectors in another order: position j reads the states of vector
    order[j], of all layers together."""
    states = vectors.states[:, order.to(vectors.states.device)]
    return model.prefix(replace(vectors, states=states))


def _one_of(
    measured: Callable[[], dict[tuple[str, int], dict[str, Any]]], kind: str, start: int, reason: str | None
) -> dict[str, Any]:
    if reason is not None:
        raise Skipped(reason)
    return measured()[kind, start]


def _together(contexts: list[CompressedContext | None]) -> CompressedContext | None:
    """Contexts of one text each as one batch."""
    given = [context for context in contexts if context is not None]
    if not given:
        return None
    if all(context is given[0] for context in given):
        return given[0].expand(len(given))
    return CompressedContext.stack(given)
