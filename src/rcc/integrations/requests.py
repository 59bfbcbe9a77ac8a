"""The requests of lm-eval, in the form in which they are put to an RCC model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ..errors import InputError


class Parts(NamedTuple):
    """A prompt: what is compressed of it (empty: nothing), how many tokens that is, and what stays text."""

    head: str
    tokens: int
    tail: str


@dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        number: its index among what the harness asked.
        parts: of the prompt.
        rate: for the head; None where nothing is compressed.
        ids: tokens of the prompt that stay text, at least one.
        answer: tokens to score after them; none where an answer is to be written.
        settings: of generation, JSON; requests of a batch have the same.
    """

    number: int
    parts: Parts
    rate: int | None
    ids: list[int]
    answer: list[int]
    settings: str = ""


class Until(StoppingCriteria):
    """Stops a row once a stop string stands in what was written.

    Args:
        until: the stop strings; empty ones stop nothing.
        start: tokens of the prompt, before what is written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: list[str], start: int):
        self.tokenizer, self.until, self.start = tokenizer, [text for text in until if text], start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for each row whether it is done, bool [B]."""
        written = self.tokenizer.batch_decode(input_ids[:, self.start :])
        done = [any(text in row for text in self.until) for row in written]
        return torch.tensor(done, device=input_ids.device)


def positive(value: Any, name: str) -> int:
    """Return a whole number above 0, which lm-eval may hand over as text.

    Raises:
        InputError: it is something else.
    """
    text = str(value)
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InputError(f"{name}={value} is no whole number above 0.")
    return int(text)
