"""What is read for a question: its text, among other questions' texts if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...text import prompting
from ...text.tokens import token_ids
from .questions import Question, choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Texts:
    """The token ids that are read for questions: their texts alone, or in packs of several.

    A pack is read once for all questions about its texts. The texts of a set come in the order in which :func:`choose`
    takes its questions, one of each set after another: a greater limit keeps the packs of a smaller one.

    Args:
        questions: all that there are, whose texts may stand in a pack.
        pad_to: tokens of a pack, at most; 0: each text is read alone.
        seed: of the order of the texts.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, pad_to: int = 0, seed: int = 0
    ):
        self._tokenizer, self._pad_to = tokenizer, pad_to
        self._encode = cache(self._encoded)
        self._separator = self._encode(prompting.SEPARATOR)
        self._texts = _in_turns(choose(questions, None, seed)) if pad_to else []
        self._packs = self._filled()
        """The first text of each pack, and the one after its last whole one."""
        self._pack_of = {
            text: number for number, (start, stop) in enumerate(self._packs) for text in self._texts[start:stop]
        }

    def __call__(self, question: Question) -> Tensor:
        """Return the token ids, int64 [T], of what is read for a question."""
        if not self._pad_to:
            return torch.from_numpy(self._encode(question.context))
        start, stop = self._packs[self.pack(question)]
        parts = [self._encode(text) for text in self._texts[start:stop]]
        left = self._pad_to - self._length(parts) - len(self._separator)
        if left > 0 and stop < len(self._texts):
            parts.append(self._encode(self._texts[stop])[:left])
        separated = chain.from_iterable((self._separator, part) for part in parts)
        return torch.from_numpy(np.concatenate([*separated][1:]))

    def pack(self, question: Question) -> int:
        """Return the number of the pack that holds a question's text; 0 where each is read alone."""
        return self._pack_of.get(question.context, 0)

    def _encoded(self, text: str) -> np.ndarray:
        return token_ids(self._tokenizer, text)[0].numpy()

    def _length(self, parts: Sequence[np.ndarray]) -> int:
        return sum(map(len, parts)) + len(self._separator) * (len(parts) - 1)

    def _filled(self) -> list[tuple[int, int]]:
        packs, start, length = [], 0, 0
        for number, text in enumerate(self._texts):
            more = len(self._separator) + len(self._encode(text))
            if number > start and length + more > self._pad_to + len(self._separator):
                packs.append((start, number))
                start, length = number, 0
            length += more
        return [*packs, (start, len(self._texts))]


def _in_turns(questions: Sequence[Question]) -> list[str]:
    """Return the questions' texts, each once: the first of each set, then the second of each, and so on."""
    sets: dict[str, dict[str, None]] = {}
    for question in questions:
        sets.setdefault(question.set, {})[question.context] = None
    turns = chain.from_iterable(zip_longest(*sets.values()))
    return list(dict.fromkeys(text for text in turns if text is not None))
