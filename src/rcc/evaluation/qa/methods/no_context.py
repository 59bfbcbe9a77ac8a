"""The model's decoder asked without a text: what it knows or guesses."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....model.compressor import Compressor
from ....text.chat import CHATML, chat_form
from ....text.prompting import Prompt, with_hint
from ..questions import Question
from . import Held


class NoContext:
    """Nothing of the text: a question that is answered all the same tests the decoder's knowledge.

    Args:
        hint: what a model that was not trained for rcc is told after the question.
    """

    name = "no-context"
    mode = ""
    compresses = False
    by_question = False

    def __init__(self, model: Compressor, tokenizer: PreTrainedTokenizerBase, hint: str):
        self.model = model
        self.chat, self.hint = (CHATML, "") if model.trained else (chat_form(tokenizer), hint)

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Keep nothing."""
        return Held(None, 0)

    def prompt(self, question: Question) -> Prompt:
        """Put the question as a chat's first message."""
        return self.chat.first(with_hint(question.question, self.hint))

    def decoder(self) -> AbstractContextManager[None]:
        """Leave the decoder as it is."""
        return contextlib.nullcontext()
