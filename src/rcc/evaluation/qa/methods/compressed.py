"""An RCC model: the text is compressed once, and its context asked."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....model.rcc import RCCForCausalLM
from ....text import prompting
from ....text.prompting import Prompt
from ....text.tokens import token_ids
from ..questions import Question
from . import Held


class Compressed:
    """The compressed context of the text.

    Args:
        mode: of :mod:`rcc.text.prompting`, in which questions are put.
        name: of the model in tables.
    """

    compresses = True

    def __init__(self, model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, mode: str, name: str = "rcc"):
        self.model, self.tokenizer, self.mode, self.name = model, tokenizer, mode, name
        self.by_question = prompting.joins(model.config, prompting.build("x", mode))

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Compress the text, with the question where the model reads both as one."""
        if self.by_question:
            asked = token_ids(self.tokenizer, prompting.build(question.question, self.mode).encoder_text)
            text = torch.cat([text, asked[0]])
        context = self.model.compress(text[None], rate=rate)
        return Held(context, len(context))

    def prompt(self, question: Question) -> Prompt:
        """Put the question in the model's mode."""
        asked = prompting.build(question.question, self.mode)
        # the encoder has read it with the text
        return Prompt(asked.mode, "", asked.decoder_parts, asked.ends) if self.by_question else asked

    def decoder(self) -> AbstractContextManager[None]:
        """Leave the decoder as it was trained."""
        return contextlib.nullcontext()
