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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...data.haystack import POSITIONS, VARIANTS, Text, is_right, make_text, prose_sentences
from ...errors import InputError, WindowError
from ...model import segments as segmenting
from ...model.compressor import ReadProgress
from ...model.encoder import BATCH_TOKENS, remembering
from ...model.rcc import RCCForCausalLM
from ...runtime import memory
from ...text.counts import show_count
from ...text.tokens import token_ids
from .. import plots
from ..results import Case, Key, Results, Skipped, interval, markdown, show

BY = ("variant", "rate", "length", "position", "context")
"""What tells cells apart. The context is the `whole` text, or one in which the key's own segments are `replaced`."""
PAPER = {2**15: (99, 100, 100), 2**17: (100,) * 3, 2**18: (100,) * 3, 2**19: (98, 100, 100), 2**20: (100,) * 3}
"""Length → % found at start, middle and end: the paper's Transformer encoder at 512×, after both stages."""
ANSWER = 12
"""Tokens that are written at least, so that a number with more digits than five shows."""


def passkey(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    rates: Sequence[int] = (),
    keys: int = 5,
    controls: int = 1,
    positions: Sequence[str] = tuple(POSITIONS),
    variants: Sequence[str] = ("plain",),
    prose: Mapping[str, str] | None = None,
    seed: int = 0,
    batch_tokens: int | None = None,
    limit: int | None = None,
    folder: Path | None = None,
    progress: ReadProgress | None = None,
) -> Results:
    """Ask for keys hidden in long texts; a cell whose prefix does not fit the decoder's window says so.

    Args:
        lengths: tokens of a text.
        rates: none: for each length the lowest trained one at which the prefix fits.
        keys: samples of a cell: a variant, rate, length and position.
        controls: of those, how many are asked again with the key's own segments replaced.
        prose: {name: text}, the filler of the variant `prose`.
        batch_tokens: how much is read at once. None: 4,096 tokens of prose; of filler that repeats itself, of whose
            segments few are different, up to 65,536, as long as the decoder takes 1,024 positions at once at most.
        limit: keys and controls of a cell, at most.
        folder: where results are kept, and are gone on with. None: nowhere.
        progress: called with tokens done and tokens in all.

    Raises:
        InputError: an argument that cannot be used, or the folder holds something else.
    """
    for wanted, known, what in ((variants, VARIANTS, "variant"), (positions, POSITIONS, "position")):
        for name in wanted:
            if name not in known:
                raise InputError(f"{what} {name!r} is unknown: use some of {', '.join(known)}.")
    for number, least, what in (
        (keys, 1, "keys"),
        (controls, 0, "controls"),
        (1 if limit is None else limit, 1, "limit"),
    ):
        if number < least:
            raise InputError(f"{what} must be at least {least}, not {number}.")
    for rate in rates:
        model.config.check_rate(rate)
    shortest, segment = min(lengths, default=0), model.config.segment_length
    if shortest < segment:
        raise InputError(f"a length of {shortest:,} tokens is less than one segment: give at least {segment:,}.")
    filler = _prose_ids(tokenizer, prose or {}, max(lengths)) if any(VARIANTS[v].prose for v in variants) else []
    run = _Run(model, tokenizer, filler, seed, batch_tokens, progress)
    for variant in variants:  # refuse before the work is done, not after; a million tokens have room for anything
        run.text({"variant": variant, "position": positions[0], "length": min(shortest, 2**20), "sample": 0})
    settings = {
        "model": model.config.name,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "lengths": sorted(lengths),
        "rates": list(rates),
        "keys": keys,
        "controls": controls,
        "positions": list(positions),
        "variants": list(variants),
        "prose": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in (prose or {}).items()},
        "seed": seed,
        "batch_tokens": batch_tokens,
    }
    results = Results("passkey", settings, folder)
    counts = {"whole": min(keys, limit or keys), "replaced": min(controls, limit or controls)}
    cases = run.cases(rates, sorted(lengths), variants, positions, counts)
    with remembering():
        results.collect(cases, run.done)
    results.notes += _notes(results, model)
    return results


@dataclass
class _Run:
    model: RCCForCausalLM
    tokenizer: PreTrainedTokenizerBase
    prose: Sequence[np.ndarray]
    seed: int
    batch_tokens: int | None
    progress: ReadProgress | None
    ends: Sequence[int] = (0,)
    """Tokens up to the end of each case, the first of them before any."""

    def encode(self, text: str) -> np.ndarray:
        return token_ids(self.tokenizer, text)[0].numpy()

    def segments(self, text: Text) -> tuple[torch.Tensor, ...]:
        """The positions of the tokens of each segment that the model cuts a text into."""
        return segmenting.split(torch.arange(len(text.ids)), self.model.config)

    def text(self, key: Any) -> Text:
        return make_text(
            key["variant"], key["position"], key["length"], key["sample"], self.encode, self.seed, self.prose
        )

    def cases(
        self,
        rates: Sequence[int],
        lengths: Sequence[int],
        variants: Sequence[str],
        positions: Sequence[str],
        counts: dict[str, int],
    ) -> list[Case]:
        """Shorter texts first: a process seldom gives memory back, and its peak should be that of the length."""
        keys: list[Key] = [
            dict(zip((*BY, "sample"), (variant, rate, length, position, context, sample), strict=True))
            for length, variant in itertools.product(lengths, variants)
            for rate in rates or [self.fitting_rate(length)]
            for position, context in itertools.product(positions, counts)
            for sample in range(counts[context])
        ]
        self.ends = [0, *itertools.accumulate(int(key["length"]) for key in keys)]
        return [Case(key, partial(self.measure, key, self.ends[i])) for i, key in enumerate(keys)]

    def fitting_rate(self, length: int) -> int:
        try:
            return self.model.fitting_rate([length])
        except WindowError:
            return max(self.model.config.rates)  # its cell will say so

    def done(self, cases: int) -> None:
        if self.progress is not None:
            self.progress(self.ends[cases], self.ends[-1])

    def read(self, before: int, done: int, _: int) -> None:
        if self.progress is not None:
            self.progress(before + done, self.ends[-1])

    def check_window(self, length: int, rate: int, rest: int) -> None:
        positions = segmenting.positions(length, rate, self.model.config)
        if positions + rest > self.model.window:
            raise Skipped(
                f"{show_count(length)} tokens at {rate}× take {positions:,} positions, with the question and the answer"
                f" more than the decoder's window of {self.model.window:,}"
            )

    def measure(self, key: Any, before: int) -> dict[str, Any]:
        model, length, rate = self.model, key["length"], key["rate"]
        self.check_window(length, rate, 1)  # a text that cannot be read at all is not even written
        text = self.text(key)
        question = token_ids(self.tokenizer, text.question)
        new = max(ANSWER, len(self.encode(f" {text.key}")) + 2)
        self.check_window(length, rate, question.shape[1] + new)
        ids = text.ids if key["context"] == "whole" else text.replaced(self.segments(text))
        memory.reset_peak(model.device)
        start = time.perf_counter()
        with _counted(model) as segments:
            context = model.compress(
                torch.from_numpy(ids)[None],
                rate=rate,
                batch_tokens=self.batch_tokens or batch_of(key["variant"], rate),
                progress=partial(self.read, before),
            )
        out = model.generate(question, context=context, max_new_tokens=new, do_sample=False, pad_token_id=0)
        written = self.tokenizer.decode(out[0, question.shape[1] :], skip_special_tokens=True)
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
    """Tokens that are read at once, unless told otherwise: more where filler repeats itself."""
    return BATCH_TOKENS if VARIANTS[variant].prose else max(BATCH_TOKENS, min(2**16, 1024 * rate))


def _prose_ids(tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], length: int) -> list[np.ndarray]:
    """The first sentences of the texts, as many as the longest context holds; they are repeated where it holds more."""
    found, tokens = [], 0
    for sentence in itertools.chain.from_iterable(map(prose_sentences, texts.values())):
        ids = token_ids(tokenizer, sentence)[0].numpy()
        found.append(ids)
        tokens += len(ids)
        if tokens >= length:
            break
    if not found:
        raise InputError("the variant prose needs prose for its filler: give --filler-data a text file.")
    return found


@contextlib.contextmanager
def _counted(model: RCCForCausalLM) -> Iterator[list[int]]:
    """How many segments each pass of the encoder takes."""
    seen: list[int] = []

    def count(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        seen.append(len(next(iter(inputs.values()))))  # input_ids or inputs_embeds

    handle = model.encoder.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ---------------------------------------------------------------- what it comes to
def _groups(results: Results) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """{(variant, length, rate): rows}, as tables show them."""
    order = results.settings["variants"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in sorted(results.rows, key=lambda row: (order.index(row["key"]["variant"]), row["key"]["length"])):
        groups.setdefault((row["key"]["variant"], row["key"]["length"], row["key"]["rate"]), []).append(row)
    return groups


def _right(rows: list[dict[str, Any]], context: str, position: str | None = None) -> list[float]:
    return [
        float(row["right"])
        for row in rows
        if "right" in row and row["key"]["context"] == context and position in (None, row["key"]["position"])
    ]


def table(results: Results) -> str:
    """Accuracy by length and position with its 95 % interval, the control's, time and memory; and the paper's rows."""
    positions = results.settings["positions"]
    header = ["variant", "tokens", "rate", *positions, "key replaced", "s a sample", "peak MB", "segments read"]
    lines = []
    for (variant, length), groups in itertools.groupby(_groups(results).items(), lambda item: item[0][:2]):
        for (*_, rate), rows in groups:
            line = [variant, show_count(length), f"{rate}×"]
            made = [row for row in rows if "right" in row]
            if not made:
                lines.append([*line, *("does not fit" for _ in positions), *"––––"])
                continue
            shares = [_right(rows, "whole", position) for position in positions]
            line += [show(interval(share), percent=True) if share else "–" for share in shares]
            control = _right(rows, "replaced")
            line.append(f"{sum(control):.0f} of {len(control)}" if control else "–")
            line.append(f"{np.mean([row['seconds'] for row in made]):.2f}")
            peaks = [row["peak_mb"] for row in made if "peak_mb" in row]
            line.append(f"{max(peaks):,.0f}" if peaks else "–")
            most = max(made, key=lambda row: row["segments_read"])
            lines.append([*line, f"{most['segments_read']:,} of {most['text']['segments']:,}"])
        if variant == "plain" and length in PAPER:
            theirs = dict(zip(POSITIONS, PAPER[length], strict=True))
            found = [f"{theirs[position]}%" for position in positions]
            lines.append(["plain, the paper's", show_count(length), "512×", *found, *"––––"])
    return markdown(header, lines)


def figures(results: Results) -> dict[str, Callable[[Path], None]]:
    """Heat maps of accuracy by length and position, one a variant: {file name: draw it there}."""
    positions = results.settings["positions"]
    found: dict[str, Callable[[Path], None]] = {}
    for variant in results.settings["variants"]:
        rows = {key[1:]: rows for key, rows in _groups(results).items() if key[0] == variant}
        shares = [[_right(some, "whole", position) for position in positions] for some in rows.values()]
        found[f"passkey-{variant}.png"] = partial(
            plots.heat_map,
            values=[[float(np.mean(share)) if share else None for share in line] for line in shares],
            rows=[f"{show_count(length)}, {rate}×" for length, rate in rows],
            columns=positions,
            title=f"{results.settings['model']}: {variant}",
            x="place of the key in the text",
            y="tokens, rate",
        )
    return found


def _notes(results: Results, model: RCCForCausalLM) -> list[str]:
    """What to know about the figures, each thing once."""
    settings = results.settings
    seen = [(row["key"]["variant"], row["key"]["rate"]) for row in results.rows if "skipped" not in row]
    notes = list(dict.fromkeys(f"Not measured: {row['skipped']}." for row in results.rows if "skipped" in row))
    notes += [
        f"{model.config.name} was not trained at {rate}×, only at {', '.join(f'{r}×' for r in model.config.rates)}:"
        " expect little there."
        for rate in sorted({rate for _, rate in seen} - set(model.config.rates))
    ]
    if any(not VARIANTS[variant].prose for variant, _ in seen):
        notes.append(
            "Segments read: a segment's vectors depend on nothing but its tokens, so those that repeat (filler) were"
            " read once; the context is the same up to rounding."
        )
    if settings["prose"]:
        notes.append(f"Prose: {', '.join(settings['prose'])}, begun at any sentence, and again from its beginning.")
    if any(row["key"]["context"] == "replaced" and "right" in row for row in results.rows):
        notes.append(
            "Key replaced: the control, all positions together. Every segment that holds a token of the key gave way to"
            " the text without it; what is found then was guessed."
        )
    if any("peak_mb" in row for row in results.rows):
        gpu = model.device.type == "cuda"
        held = "tensors on the GPU, the model's included" if gpu else "resident memory, model and libraries included"
        notes.append(f"Peak MB: {held}; the most of any sample, shorter texts first.")
    if any(row["key"]["variant"] == "plain" and row["key"]["length"] in PAPER for row in results.rows):
        notes.append(
            "The paper's: its own figures (arXiv 2406.06110, section 4.2), not measured here: Pythia-1.4B, segments of"
            " 8,192 tokens, 512×."
        )
    return notes
