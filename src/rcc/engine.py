"""One model, ready to compress texts and to answer questions: what the command line calls, and a server would.

Texts and answers are strings here; tokens, prompts, the choice of a rate and the store of contexts are this file's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .answers import Answer, AnswerStream, Usage, WrittenText
from .context.context import CompressedContext
from .context.information import in_one_line
from .context.pieces import longest_head
from .context.recognition import is_context
from .context.store import ContextStore
from .defaults import BUDGET
from .documents.plain import read_text
from .errors import InputError, ModelError
from .model.answering import NEVER, Pieces, generate, write
from .model.compressor import Compressor
from .model.opening import ALL_GPUS, open_compressor
from .model.rcc import RCCForCausalLM
from .runtime.precision import parse_device, parse_dtype
from .text.prompting import Prompt
from .text.tokens import decode, prompt_ids, token_ids

Say = Callable[[str], None]
Progress = Callable[[int, int], None]


class Engine:
    """A model and its tokenizer, with a store of the contexts that it made.

    Threads may share one: what computes takes turns.

    Args:
        compressor: the model that compresses and generates.
        tokenizer: the decoder's.
        store: where :meth:`open` keeps the contexts of texts; None: nowhere.
        allow_special: whether chat marks such as `<|im_end|>` in texts and questions are the special tokens that they
            name. Otherwise they are read as the characters that they are written with, so that a document cannot
            speak as the user. The published checkpoint's texts are always read with them.
    """

    def __init__(
        self,
        compressor: Compressor,
        tokenizer: PreTrainedTokenizerBase,
        store: ContextStore | None = None,
        allow_special: bool = False,
    ) -> None:
        self.compressor, self.tokenizer, self.store = compressor, tokenizer, store
        self.allow_special = allow_special or compressor.reads_special
        self._turn = threading.RLock()

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        store: ContextStore | None = None,
        allow_special: bool = False,
        *,
        adapters: str = "merged",
        compressor: str | None = None,
        made: str | Path | None = None,
        progress: Say | None = None,
    ) -> Engine:
        """Load a model.

        Args:
            model: a shipped model's name, a folder, or a hub id, of an RCC model or of any language model, or a GGUF
                file; None: the one that made the context `made`, or without that :func:`default_model`.
            device: cpu, cuda, …; auto: all GPUs, for a selection alone; None: a GPU if there is one.
            dtype: bfloat16, float16 or float32; None: as stored, or float32 on a CPU without bfloat16.
            store: where contexts of texts are kept; None: nowhere.
            allow_special: whether chat marks in texts and questions are special tokens, as in :class:`Engine`.
            adapters: of an RCC model, `"merged"` or `"separate"`: the latter needs less memory where a text is
                compressed, and takes longer.
            compressor: see :func:`rcc.model.opening.open_compressor`; None: as the model is, or as `made` was made.
            made: a context file, which is checked before the model is loaded for it.
            progress: is told what is being done where that takes long, such as fetching a base.

        Raises:
            InputError: `device` or `dtype` cannot be used.
            ModelError: the model cannot be found or loaded.
            ContextError, FileError: `made` is damaged or cannot be read.
        """
        target, precision = device if device == ALL_GPUS else parse_device(device), parse_dtype(dtype)
        opened = open_compressor(
            model, target, precision, adapters=adapters, compressor=compressor, made=made, progress=progress
        )
        return cls(*opened, store, allow_special)

    @property
    def rcc(self) -> RCCForCausalLM:
        """The model, where only one that was trained for rcc will do.

        Raises:
            ModelError: it was not.
        """
        if not isinstance(self.compressor, RCCForCausalLM):
            raise ModelError(f"{self.name} was not trained for rcc, which this needs: name an RCC model.")
        return self.compressor

    @property
    def name(self) -> str:
        """The model's name."""
        return self.compressor.name

    @property
    def fingerprint(self) -> str:
        """What tells contexts of this model from those of others."""
        return self.compressor.fingerprint

    def reads_with_question(self, mode: str) -> bool:
        """Return whether a text at hand is read anew with each question (the published checkpoint's rule)."""
        return self.compressor.joins(self.compressor.prompt("?", mode))

    # ---------------------------------------------------------------- texts
    def compress(
        self,
        source: str | Sequence[str],
        rate: int | str = "auto",
        context: CompressedContext | None = None,
        *,
        budget: int = BUDGET,
        progress: Progress | None = None,
    ) -> CompressedContext:
        """Compress one text, or several one after another, each from a segment of its own.

        Args:
            source: the text or texts.
            rate: tokens a position; `"auto"`: the lowest trained rate that keeps all of them within `budget`.
            context: append to this one, which stays as it is.
            budget: positions that `"auto"` lets the context take, if a trained rate allows it.
            progress: is told tokens read, and tokens in all.

        Returns:
            A context in the precision that the model is stored in, whatever it is computed in.

        Raises:
            InputError: an empty text or an unusable rate. WindowError: more positions than the decoder has.
            ContextError: `context` was made by another model.
        """
        rows = [self._tokens(text) for text in ([source] if isinstance(source, str) else source)]
        return self._compress(rows, self._rate(rows, rate, context, budget), context, progress)

    def open(
        self,
        source: str | Path,
        rate: int | str = "auto",
        *,
        budget: int = BUDGET,
        progress: Progress | None = None,
        notice: Say | None = None,
    ) -> CompressedContext:
        """Return the context in a file, or of a text: from the store, if the text was compressed before.

        Args:
            source: a path: of a context file or of a text; a string: the text itself.
            rate: of a text, as in :meth:`compress`.
            budget: likewise.
            progress: likewise.
            notice: is told, of a text, what was read from the store or kept there, or why it was not.

        Raises:
            FileError: the file cannot be read. ContextError: it is damaged, or another model's.
            InputError, WindowError: as in :meth:`compress`.
        """
        if isinstance(source, Path):
            if is_context(source):
                return CompressedContext.load(source, model=self.compressor)
            source = read_text(source)
        row = self._tokens(source)
        tokens_a_position = self._rate([row], rate, None, budget)
        if self.store is None:
            return self._compress([row], tokens_a_position, None, progress)
        notice = notice or (lambda message: None)
        digest = self.compressor.piece(row[0], tokens_a_position).sha256
        address = self.store.address(self.compressor.fingerprint, tokens_a_position, [digest], self.compressor.dtype)
        if (context := self.store.get(address, self.compressor)) is not None:
            notice(f"read {self.store.path(address)}: {in_one_line(context)}")
            return context
        context = self._compress([row], tokens_a_position, None, progress)
        try:
            notice(f"kept as {self.store.put(address, context)}: {in_one_line(context)}")
        except OSError as error:  # the answer does not need the file
            notice(f"not kept for the next time: {error}")
        return context

    def _tokens(self, text: str) -> Tensor:
        """Return the token ids of a text, [1, T]."""
        return token_ids(self.tokenizer, text, self.allow_special)

    def _prompt_tokens(self, prompt: Prompt) -> Tensor:
        """Return the token ids that the decoder reads of a prompt, [1, T]."""
        return prompt_ids(self.tokenizer, prompt.decoder_parts, self.allow_special)

    def _rate(self, rows: list[Tensor], rate: int | str, context: CompressedContext | None, budget: int) -> int:
        if isinstance(rate, int):
            return rate
        if rate != "auto":
            raise InputError(f'rate {rate!r} is not a rate: use a whole number such as 8, or "auto".')
        return self.compressor.fitting_rate([row.shape[1] for row in rows], context, budget=budget)

    def _compress(
        self, rows: list[Tensor], rate: int, context: CompressedContext | None, progress: Progress | None
    ) -> CompressedContext:
        done, total = 0, sum(row.shape[1] for row in rows)
        with self._turn:
            for ids in rows:
                tell = None if progress is None else partial(_add, progress, done, total)
                context = self.compressor.compress(ids, rate=rate, context=context, progress=tell)
                context = self._with_special_tokens(context, ids)
                done += ids.shape[1]
        if context is None:
            raise InputError("source holds no text: give at least one.")
        return context.to(dtype=self.compressor.stored_dtype)

    def _with_special_tokens(self, context: CompressedContext, ids: Tensor) -> CompressedContext:
        """Return the context, which says of its last text whether chat marks in it were read as special tokens."""
        special = [number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        if not bool(torch.isin(ids, torch.tensor(special, dtype=ids.dtype)).any()):
            return context
        *before, last = context.pieces[0]
        return replace(context, pieces=((*before, replace(last, special_tokens=True)),))

    # ---------------------------------------------------------------- questions
    def ask(
        self,
        context: CompressedContext | str,
        question: str,
        mode: str = "human",
        *,
        history: Sequence[tuple[str, str]] = (),
        rate: int | str = "auto",
        budget: int = BUDGET,
        max_new_tokens: int = 128,
        on_text: Say | None = None,
        **generation: Any,
    ) -> Answer:
        """Ask a context one question.

        Args:
            context: of one text; or a text, which is opened first, or, by a model that reads text and question as
                one (:func:`rcc.text.prompting.joins`), read together with the question.
            question: what to ask.
            mode: `human`, `reconstruct` or `compress` (section 3.3 of the paper).
            history: earlier questions and answers of a chat (`human`); the oldest are left out where there is no room.
            rate: of a text, as in :meth:`compress`.
            budget: likewise.
            max_new_tokens: the longest answer.
            on_text: is given the answer piece by piece as it is written.
            **generation: goes to :meth:`RCCForCausalLM.generate` (`do_sample`, `temperature`, …).

        Raises:
            InputError: an unknown mode or an empty question.
            WindowError: the question and the answer do not fit after the context.
        """
        prompt = self.compressor.prompt(question, mode)
        if isinstance(context, str):
            if self.compressor.joins(prompt):
                context = self.compress(f"{context}{prompt.encoder_text}", rate, budget=budget)
                prompt = replace(prompt, encoder_text="")
            else:
                context = self.open(context, rate, budget=budget)
        if history:
            prompt = self._with_history(context, question, history, max_new_tokens)
        if on_text is not None:
            generation["streamer"] = Pieces(self.tokenizer, lambda text: prompt.parse(text)[1], on_text)
        with self._turn:
            written, prompt_tokens = write(
                self.compressor, self.tokenizer, context, prompt, max_new_tokens, self.allow_special, **generation
            )
        return self._answer(context, prompt, written, prompt_tokens)

    def ask_many(
        self,
        context: CompressedContext,
        questions: Sequence[str],
        mode: str = "human",
        *,
        max_new_tokens: int = 128,
        **generation: Any,
    ) -> list[Answer]:
        """Ask a context several questions, in `human` mode as one batch that shares the context's positions.

        Raises:
            InputError, WindowError: as in :meth:`ask`.
        """
        prompts = [self.compressor.prompt(question, mode) for question in questions]
        if len(prompts) < 2 or mode != "human":  # elsewhere each question makes a context of its own
            options = {"max_new_tokens": max_new_tokens, **generation}
            return [self.ask(context, question, mode, **options) for question in questions]
        rows = [self._prompt_tokens(prompt)[0] for prompt in prompts]
        width = max(len(row) for row in rows)
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):  # on the left, so that every answer begins at the same place
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        with self._turn:
            written = generate(
                self.compressor,
                self.tokenizer,
                ids,
                context.expand(len(rows)),
                prompts[0],
                max_new_tokens,
                attention_mask=mask,
                **generation,
            )
        return [
            self._answer(context, prompt, out, len(row))
            for prompt, row, out in zip(prompts, rows, written, strict=True)
        ]

    def stream(
        self, context: CompressedContext | str, question: str, mode: str = "human", **options: Any
    ) -> AnswerStream:
        """Ask as :meth:`ask` does, and return an iterator over the answer's pieces.

        The question is asked in a thread of its own. Closing the iterator ends it after the token at hand.
        """
        return AnswerStream(partial(self.ask, context, question, mode, **options))

    def _with_history(
        self, context: CompressedContext, question: str, history: Sequence[tuple[str, str]], max_new_tokens: int
    ) -> Prompt:
        """Make the prompt with as much of a chat as there is room for: a long talk forgets its beginning."""
        held = longest_head(context.pieces[0])
        room = self.compressor.window - self.compressor.sink_positions - held - max_new_tokens
        for first in range(len(history) + 1):
            prompt = self.compressor.prompt(question, "human", history[first:])
            if self._prompt_tokens(prompt).shape[1] <= room:
                break
        return prompt

    def _answer(self, context: CompressedContext, prompt: Prompt, written: Tensor, prompt_tokens: int) -> Answer:
        instruction, answer = prompt.parse(decode(self.tokenizer, written))
        return Answer(answer, instruction, Usage(len(context), prompt_tokens, len(written)))

    # ---------------------------------------------------------------- the text itself
    def reconstruct(
        self, context: CompressedContext, prompt: str | None = None, tokens: int = 200, on_text: Say | None = None
    ) -> WrittenText:
        """Write back what a context holds, greedily.

        Args:
            context: of one text.
            prompt: words to go on from; None: the first ten tokens of the text.
            tokens: how many to write.
            on_text: is given the prompt and what follows, piece by piece.

        Raises:
            InputError: the prompt is empty.
        """
        ids = torch.tensor([context.pieces[0][0].opening]) if prompt is None else self._tokens(prompt)
        if ids.shape[1] == 0:
            raise InputError("the prompt is empty: give some words to go on from.")
        streamer = None if on_text is None else Pieces(self.tokenizer, str, on_text, skip_prompt=False)
        with self._turn:
            out = self.compressor.generate(
                ids,
                context=context,
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.0,  # a base's own settings may forbid what a text repeats
                eos_token_id=NEVER,
                pad_token_id=0,
                streamer=streamer,
            )[0].tolist()
        start = ids.shape[1]
        before, written = (decode(self.tokenizer, ids) for ids in (out[:start], out[start:]))
        return WrittenText(out[:start], out[start:], before, written)


# ---------------------------------------------------------------- files
def _add(progress: Progress, before: int, all_texts: int, done: int, total: int) -> None:
    progress(before + done, all_texts)
