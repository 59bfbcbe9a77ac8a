"""Passkey retrieval (section 4.2 of the paper): is a key found that is hidden in up to a million tokens?

A text is never held but as token ids. Filler that repeats itself gives few different segments, and the encoder reads
each of them once a batch (:mod:`rcc.model.encoder`): that is what makes a million tokens cheap.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...config import RCCConfig
from ...data.haystack import POSITIONS, VARIANTS, Text, is_right, make_text, prose_sentences
from ...errors import InputError, WindowError
from ...model import segments as segmenting
from ...model.encoder import BATCH_TOKENS, remembering
from ...model.rcc import RCCForCausalLM
from ...runtime import memory
from ...text.counts import show_count
from ...text.tokens import decode, token_ids
from ..evaluation import evaluate
from ..results import Case, Key, Results, Skipped
from .table import BY, PasskeyReport

ANSWER = 12
"""Tokens that are written at least, so that a number with more digits than five shows."""


@dataclass(frozen=True)
class PasskeySettings:
    """What is hidden, where, and how often.

    Args:
        lengths: tokens of a text.
        rates: none: for each length the lowest trained one at which the prefix fits.
        keys: samples of a cell: a variant, rate, length and position.
        controls: of those, how many are asked again with the key's own segments replaced.
        positions: any of :data:`rcc.data.haystack.POSITIONS`.
        variants: any of :data:`rcc.data.haystack.VARIANTS`.
        prose: {name: text}, the filler of the variant `prose`.
        seed: of keys and of where they stand.
        batch_tokens: how much is read at once. None: 4,096 tokens of prose; of filler that repeats itself, of whose
            segments few are different, up to 65,536, as long as the decoder takes 1,024 positions at once at most.
        limit: keys and controls of a cell, at most.

    Raises:
        InputError: a setting that cannot be used.
    """

    lengths: Sequence[int]
    rates: Sequence[int] = ()
    keys: int = 5
    controls: int = 1
    positions: Sequence[str] = tuple(POSITIONS)
    variants: Sequence[str] = ("plain",)
    prose: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    batch_tokens: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        for wanted, known, what in ((self.variants, VARIANTS, "variant"), (self.positions, POSITIONS, "position")):
            for name in wanted:
                if name not in known:
                    raise InputError(f"{what} {name!r} is unknown: use some of {', '.join(known)}.")
        for number, least, what in (
            (self.keys, 1, "keys"),
            (self.controls, 0, "controls"),
            (1 if self.limit is None else self.limit, 1, "limit"),
        ):
            if number < least:
                raise InputError(f"{what} must be at least {least}, not {number}.")

    def check(self, config: RCCConfig) -> None:
        """Check that a model of this configuration can be asked so.

        Raises:
            InputError: it cannot.
        """
        for rate in self.rates:
            config.check_rate(rate)
        shortest, segment = min(self.lengths, default=0), config.segment_length
        if shortest < segment:
            raise InputError(f"a length of {shortest:,} tokens is less than one segment: give at least {segment:,}.")

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each cell, by context."""
        return {
            "whole": min(self.keys, self.limit or self.keys),
            "replaced": min(self.controls, self.limit or self.controls),
        }


def passkey(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Results:
    """Ask for keys hidden in long texts; a cell whose prefix does not fit the decoder's window says so.

    Args:
        model: compresses the texts and answers.
        tokenizer: the model's.
        lengths: tokens of a text.
        folder: where results are kept, and are gone on with. None: nowhere.
        progress: called with tokens done and tokens in all.
        **settings: the others of :class:`PasskeySettings`.

    Raises:
        InputError: an argument that cannot be used, or the folder holds something else.
    """
    evaluation = PasskeyEvaluation(model, tokenizer, PasskeySettings(lengths, **settings), progress)
    return evaluate(evaluation, folder, evaluation.show_cases)


class PasskeyEvaluation:
    """Keys asked for of one model.

    Args:
        progress: called with tokens read and tokens in all, also while a long text is read.

    Raises:
        InputError: what is asked does not fit the model.
    """

    kind, by, cluster = "passkey", BY, None

    def __init__(
        self,
        model: RCCForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        asked: PasskeySettings,
        progress: Callable[[int, int], None] | None = None,
    ):
        asked.check(model.config)
        self.model, self.tokenizer, self.asked, self.progress = model, tokenizer, asked, progress
        prose = any(VARIANTS[variant].prose for variant in asked.variants)
        self.prose = _prose_ids(tokenizer, asked.prose, max(asked.lengths)) if prose else []
        shortest = min(*asked.lengths, 2**20)  # a million tokens have room for anything
        for variant in asked.variants:  # refuse before the work is done, not after
            self.text({"variant": variant, "position": asked.positions[0], "length": shortest, "sample": 0})

    def settings(self) -> dict[str, Any]:
        """Return all that a sample depends on beside its key, and what was asked for."""
        asked = self.asked
        return {
            "model": self.model.config.name,
            "fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "lengths": sorted(asked.lengths),
            "rates": list(asked.rates),
            "keys": asked.keys,
            "controls": asked.controls,
            "positions": list(asked.positions),
            "variants": list(asked.variants),
            "prose": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in asked.prose.items()},
            "seed": asked.seed,
            "batch_tokens": asked.batch_tokens,
        }

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self._keys)

    @cached_property
    def _keys(self) -> list[Key]:
        """Shorter texts first: a process seldom gives memory back, and its peak should be that of the length."""
        asked = self.asked
        return [
            dict(zip((*BY, "sample"), (variant, rate, length, position, context, sample), strict=True))
            for length, variant in itertools.product(sorted(asked.lengths), asked.variants)
            for rate in asked.rates or [self._fitting_rate(length)]
            for position, context in itertools.product(asked.positions, asked.counts)
            for sample in range(asked.counts[context])
        ]

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens up to the end of each case, the first of them before any."""
        return [0, *itertools.accumulate(int(key["length"]) for key in self._keys)]

    def cases(self) -> list[Case]:
        """Return a case for each key to be asked for, those of shorter texts first."""
        return [Case(key, partial(self._measure, key, self._ends[i])) for i, key in enumerate(self._keys)]

    def measuring(self, results: Results) -> AbstractContextManager[Any]:
        """Return a context in which vectors of filler, once read, are remembered."""
        return remembering()

    def notes(self, results: Results) -> list[str]:
        """Return what to know about the figures, each thing once."""
        return self.report(results).notes(self.model.config.rates)

    def report(self, results: Results) -> PasskeyReport:
        """Return the figures as a table and heat maps."""
        return PasskeyReport(results)

    def show_cases(self, cases: int) -> None:
        """Show the progress after so many cases."""
        if self.progress is not None:
            self.progress(self._ends[cases], self._ends[-1])

    def _show_tokens(self, before: int, done: int, _: int) -> None:
        if self.progress is not None:
            self.progress(before + done, self._ends[-1])

    def _fitting_rate(self, length: int) -> int:
        try:
            return self.model.fitting_rate([length])
        except WindowError:
            return max(self.model.config.rates)  # its cell will say so

    # ---------------------------------------------------------------- one sample
    def encode(self, text: str) -> np.ndarray:
        """Return a text's token ids [T]."""
        return token_ids(self.tokenizer, text)[0].numpy()

    def text(self, key: Any) -> Text:
        """Return the text of a sample."""
        return make_text(
            key["variant"], key["position"], key["length"], key["sample"], self.encode, self.asked.seed, self.prose
        )

    def _segments(self, text: Text) -> tuple[torch.Tensor, ...]:
        """Return the positions of the tokens of each segment that the model cuts a text into."""
        return segmenting.split(torch.arange(len(text.ids)), self.model.config)

    def _check_window(self, length: int, rate: int, rest: int) -> None:
        positions = segmenting.positions(length, rate, self.model.config)
        if positions + rest > self.model.window:
            raise Skipped(
                f"{show_count(length)} tokens at {rate}× take {positions:,} positions, with the question and the answer"
                f" more than the decoder's window of {self.model.window:,}"
            )

    def _measure(self, key: Any, before: int) -> dict[str, Any]:
        model, length, rate = self.model, key["length"], key["rate"]
        self._check_window(length, rate, 1)  # a text that cannot be read at all is not even written
        text = self.text(key)
        question = token_ids(self.tokenizer, text.question)
        new = max(ANSWER, len(self.encode(f" {text.key}")) + 2)
        self._check_window(length, rate, question.shape[1] + new)
        ids = text.ids if key["context"] == "whole" else text.replaced(self._segments(text))
        memory.reset_peak(model.device)
        start = time.perf_counter()
        with counted_segments(model) as segments:
            context = model.compress(
                torch.from_numpy(ids)[None],
                rate=rate,
                batch_tokens=self.asked.batch_tokens or batch_of(key["variant"], rate),
                progress=partial(self._show_tokens, before),
            )
        out = model.generate(question, context=context, max_new_tokens=new, do_sample=False, pad_token_id=0)
        written = decode(self.tokenizer, out[0, question.shape[1] :], skip_special=True)
        seconds = time.perf_counter() - start
        peak = memory.peak_mb(model.device)
        return {
            "right": is_right(written, text.key),
            "answer": text.key,
            "written": written,
            "text": {
                "tokens": len(ids),
                "key_at": list(text.key_at),
                "segments": len(segmenting.split(torch.from_numpy(ids), model.config)),
                "positions": len(context),
            },
            "segments_read": sum(segments),
            "seconds": round(seconds, 3),
            **({} if peak is None else {"peak_mb": round(peak, 1)}),
        }


def batch_of(variant: str, rate: int) -> int:
    """Return the tokens that are read at once, unless told otherwise: more where filler repeats itself."""
    return BATCH_TOKENS if VARIANTS[variant].prose else max(BATCH_TOKENS, min(2**16, 1024 * rate))


def _prose_ids(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], length: int) -> list[np.ndarray]:
    """Return the first sentences of the texts, as many as the longest context holds.

    They are repeated where it holds more.
    """
    sentences, tokens = [], 0
    for sentence in itertools.chain.from_iterable(map(prose_sentences, texts.values())):
        ids = token_ids(tokenizer, sentence)[0].numpy()
        sentences.append(ids)
        tokens += len(ids)
        if tokens >= length:
            break
    if not sentences:
        raise InputError("the variant prose needs a text for its filler: give one in prose.")
    return sentences


@contextlib.contextmanager
def counted_segments(model: RCCForCausalLM) -> Iterator[list[int]]:
    """Count the segments that each pass of the encoder takes."""
    counts: list[int] = []

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        counts.append(len(next(iter(inputs.values()))))  # input_ids or inputs_embeds

    handle = model.encoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()
