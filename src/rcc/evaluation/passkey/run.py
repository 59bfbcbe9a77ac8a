"""Passkey retrieval (section 4.2 of the paper): is a key found that is hidden in up to a million tokens?

A text is never held but as token ids. Filler that repeats itself gives few different segments, and the encoder reads
each of them once a batch (:mod:`rcc.model.encoder`): that is what makes a million tokens cheap.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...data.haystack import VARIANTS, Text, is_right, make_text, prose_sentences
from ...errors import InputError, WindowError
from ...model.compressor import Compressor
from ...model.encoder import BATCH_TOKENS, remembering
from ...model.rcc import RCCForCausalLM
from ...runtime import memory
from ...text.counts import show_count
from ...text.tokens import decode, token_ids
from ..evaluation import Progress, ignore, model_settings, untrained
from ..results import Case, Key, Results, Skipped
from .settings import BY, PasskeySettings
from .table import PasskeyReport

ANSWER = 12
"""Tokens that are written at least, so that a number with more digits than five shows."""


class PasskeyEvaluation:
    """Keys asked for of one model.

    Raises:
        InputError: what is asked does not fit the model.
    """

    kind, by, cluster = "passkey", BY, None
    verb, unit = "reading", "tokens"

    def __init__(self, model: Compressor, tokenizer: PreTrainedTokenizerBase, asked: PasskeySettings):
        asked.check(model)
        self.model, self.tokenizer, self.asked = model, tokenizer, asked
        self._progress: Progress = ignore
        prose = any(VARIANTS[variant].prose for variant in asked.variants)
        self.prose = _prose_ids(tokenizer, asked.prose, max(asked.lengths)) if prose else []
        shortest = min(*asked.lengths, 2**20)  # a million tokens have room for anything
        for variant in asked.variants:  # refuse before the work is done, not after
            self.text({"variant": variant, "position": asked.positions[0], "length": shortest, "sample": 0})

    def settings(self) -> dict[str, Any]:
        """Return all that a sample depends on beside its key, and what was asked for."""
        asked = self.asked
        return {
            **model_settings(self.model),
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

    def work(self, cases: int) -> int:
        """Return the tokens of the texts of the first so many cases."""
        return self._ends[cases]

    @contextlib.contextmanager
    def measuring(self, results: Results, progress: Progress) -> Iterator[None]:
        """Remember the vectors of filler that was read once, and show the tokens of a long text as they are read."""
        self._progress = progress
        with remembering():
            yield

    def notes(self, results: Results) -> list[str]:
        """Return what to know about the figures, each thing once."""
        rates = sorted({row["key"]["rate"] for row in results.rows if "skipped" not in row})
        return self.report(results).notes(untrained(self.model, rates), self.model.rates)

    def report(self, results: Results) -> PasskeyReport:
        """Return the figures as a table and heat maps."""
        return PasskeyReport(results)

    def _show_tokens(self, before: int, done: int, _: int) -> None:
        self._progress(before + done)

    def _fitting_rate(self, length: int) -> int:
        try:
            return self.model.fitting_rate([length])
        except WindowError:
            return max(self.model.rates)  # its cell will say so

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
        return self.model.split(torch.arange(len(text.ids)))

    def _check_window(self, length: int, rate: int, rest: int) -> None:
        positions = self.model.positions(length, rate)
        if self.model.sink_positions + positions + rest > self.model.window:
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
                "segments": len(model.split(torch.from_numpy(ids))),
                "positions": len(context),
            },
            **({"segments_read": sum(segments)} if model.trained else {}),
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
def counted_segments(model: Compressor) -> Iterator[list[int]]:
    """Count the segments that each pass of the encoder takes; a model without one reads every segment."""
    counts: list[int] = []
    if not isinstance(model, RCCForCausalLM):
        yield counts
        return

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        counts.append(len(next(iter(inputs.values()))))  # input_ids or inputs_embeds

    handle = model.encoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()
