"""The beginning and the end of the text, as many tokens as a compressed context has positions."""

from __future__ import annotations

from torch import Tensor

from ..questions import Question
from . import Held
from .plain_text import PlainText, ends


class Truncated(PlainText):
    """The text without its middle, as many tokens as there are positions."""

    compresses = True

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Keep the keys and values of the text's two ends."""
        return super().hold(ends(text, -(-len(text) // rate)), 1, question)
