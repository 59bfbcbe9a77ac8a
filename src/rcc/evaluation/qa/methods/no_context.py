"""The RCC model's decoder asked without a text: what it knows or guesses."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from torch import Tensor

from ....model.rcc import RCCForCausalLM
from ....text import prompting
from ....text.prompting import Prompt
from ..questions import Question
from . import Held


class NoContext:
    """Nothing of the text: a question that is answered all the same tests the decoder's knowledge."""

    name = "no-context"
    mode = ""
    compresses = False
    by_question = False

    def __init__(self, model: RCCForCausalLM):
        self.model = model

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Keep nothing."""
        return Held(None, 0)

    def prompt(self, question: Question) -> Prompt:
        """Put the question as a chat's first message."""
        return prompting.build(question.question, "human")

    def decoder(self) -> AbstractContextManager[None]:
        """Leave the decoder as it was trained."""
        return contextlib.nullcontext()
