"""The task `passkey`: find a number in a text that says nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...data import haystack
from ...errors import InputError
from .base import Draw, Marks, Sample, Task


@dataclass
class Passkey(Task):
    """Find a number of five digits in a text that says nothing else (the paper's section 4.2)."""

    name: ClassVar[str] = "passkey"
    fixed_texts: ClassVar[tuple[str, ...]] = (
        *(haystack.OPENING, *haystack.FILLER, haystack.HIDDEN.format(key="0123456789"), haystack.QUESTION),
        *(f" {digit}" for digit in "0123456789"),
    )

    def sample(self, draw: Draw, rng: np.random.Generator, length: int, targets: int, marks: Marks) -> Sample:
        """Hide a number in the paper's filler, and ask for it.

        Raises:
            InputError: `targets` leaves no room for question and answer, or `length` none for the number.
        """
        key = int(rng.integers(10_000, 100_000))
        context = haystack.passkey_ids(key, rng.random(), length, marks.encode)
        prompt, target = marks.encode(haystack.QUESTION), np.append(marks.encode(f" {key}."), marks.eos)
        if len(prompt) + len(target) > targets:
            raise InputError(
                f"target_tokens={targets} has no room for the passkey's question and answer:"
                f" give at least {len(prompt) + len(target)}."
            )
        return Sample((context,), prompt, target, self.name)
