"""The beginning and the end of the text, as many tokens as a compressed context has positions."""

from __future__ import annotations

from torch import Tensor

from ..questions import Question
from . import Held
from .plain_text import PlainText, ends


class Truncated(PlainText):
    compresses = True

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        kept = ends(text, -(-len(text) // rate))
        return super().hold(kept, 1, question)
