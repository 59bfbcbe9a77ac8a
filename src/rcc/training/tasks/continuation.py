"""The task `continuation`: write what follows the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import Draw, Marks, Sample, TextTask, at_least


@dataclass
class Continuation(TextTask):
    """Write what follows the context.

    Args:
        prompt_tokens: how many of the tokens that follow are given.
    """

    prompt_tokens: int = 1
    name: ClassVar[str] = "continuation"

    def window(self, length: int, targets: int) -> int:
        """Return the tokens of text to draw: the context, and what follows it."""
        return length + targets

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        """Cut a text in two: what is compressed, and what is to be written."""
        text = at_least(3, draw.text()[: length + targets], marks)
        # of a text that is shorter than the window a quarter is left to be written, where targets allow it
        left = max(len(text) - length, min(targets, max(2, -(-len(text) // 4))))
        return self.begin(text[:-left], text[-left:])
