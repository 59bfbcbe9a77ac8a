"""A compressor, an RCC model or another: the text is compressed once, and its context asked."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....model.compressor import Compressor
from ....text.prompting import Prompt, with_hint
from ....text.tokens import token_ids
from ..questions import Question
from . import Held


class Compressed:
    """The compressed context of the text.

    Args:
        mode: of :mod:`rcc.text.prompting`, in which questions are put.
        name: of the model in tables.
        hint: what a model that was not trained for rcc is told after the question.
    """

    compresses = True

    def __init__(
        self, model: Compressor, tokenizer: PreTrainedTokenizerBase, mode: str, name: str = "rcc", hint: str = ""
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.mode = mode if len(model.modes) > 1 else ""
        self._asked_in, self._hint = mode, "" if model.trained else hint
        self.by_question = model.joins(model.prompt("x", mode))

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Compress the text, with the question where the model reads both as one."""
        if self.by_question:
            asked = token_ids(self.tokenizer, self._prompt(question).encoder_text)
            text = torch.cat([text, asked[0]])
        context = self.model.compress(text[None], rate=rate)
        return Held(context, len(context))

    def prompt(self, question: Question) -> Prompt:
        """Put the question in the model's mode."""
        asked = self._prompt(question)
        # the encoder has read it with the text
        return Prompt(asked.mode, "", asked.decoder_parts, asked.ends) if self.by_question else asked

    def _prompt(self, question: Question) -> Prompt:
        return self.model.prompt(with_hint(question.question, self._hint), self._asked_in)

    def decoder(self) -> AbstractContextManager[None]:
        """Leave the decoder as it is."""
        return contextlib.nullcontext()
