"""What is read for a question: its text, with other questions' texts around it if asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...text import prompting
from ...text.tokens import token_ids
from .questions import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts:
    """The token ids of questions' texts, tokenised once each, with other questions' texts around them if asked for.

    Args:
        questions: all that there are, whose texts may stand around another.
        pad_to: tokens that a text and those around it come to, at most; 0: the text alone.
        seed: of what stands around a text, and where in it the text stands.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, pad_to: int = 0, seed: int = 0
    ):
        self._tokenizer, self._pad_to, self._seed = tokenizer, pad_to, seed
        self._pool = list(dict.fromkeys(question.context for question in questions))
        self._ids: dict[str, np.ndarray] = {}
        self._separator = self._encode(prompting.SEPARATOR)

    def _encode(self, text: str) -> np.ndarray:
        if text not in self._ids:
            self._ids[text] = token_ids(self._tokenizer, text)[0].numpy()
        return self._ids[text]

    def __call__(self, question: Question) -> Tensor:
        """Return the token ids, int64 [T], of what is read for a question."""
        own = self._encode(question.context)
        # the same for all questions about a text
        digest = hashlib.sha256(question.context.encode()).digest()
        rng = np.random.default_rng([self._seed, int.from_bytes(digest[:8], "big")])
        around: list[np.ndarray] = []
        for other in self._others(question, rng):
            left = self._pad_to - len(own) - sum(len(part) + len(self._separator) for part in around)
            left -= len(self._separator)
            if left <= 0:
                break
            around.append(self._encode(other)[:left])
        around.insert(int(rng.integers(len(around) + 1)), own)
        parts = [part for text in around for part in (self._separator, text)]
        return torch.from_numpy(np.concatenate(parts[1:]))

    def _others(self, question: Question, rng: np.random.Generator) -> Iterator[str]:
        if self._pad_to:
            for number in rng.permutation(len(self._pool)):
                if self._pool[number] != question.context:
                    yield self._pool[number]
