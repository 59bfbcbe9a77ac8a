"""The passages that BM25 finds for the question, as many tokens as a compressed context has positions.

It needs the whole text at hand for every question; what it holds is what the decoder reads.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....model.compressor import Compressor
from ....text.tokens import decode
from ..questions import Question
from . import Held
from .plain_text import PlainText

PASSAGE = 64
"""Tokens of a passage; fewer where no more are to be read in all."""


class Retrieved(PlainText):
    """As many of the likeliest passages as there are positions, in the order of the text; the last may be cut."""

    compresses = True
    by_question = True

    def __init__(self, model: Compressor, tokenizer: PreTrainedTokenizerBase, **options: Any):
        super().__init__(model, tokenizer, **options)
        self.tokenizer = tokenizer

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Keep the keys and values of the passages that BM25 ranks first for this question."""
        most = -(-len(text) // rate)
        passages = text.split(min(PASSAGE, most))
        chosen: list[int] = []
        left = most
        for number in ranked([decode(self.tokenizer, ids) for ids in passages], question.question):
            if left < 1:
                break
            chosen.append(number)
            left -= len(passages[number])
        # in the order of the text; the least of them gives way where they are too many
        read = {number: passages[number] for number in chosen}
        if left < 0:
            read[chosen[-1]] = read[chosen[-1]][:left]
        return super().hold(torch.cat([read[number] for number in sorted(read)]), 1, question)


def ranked(passages: list[str], question: str) -> list[int]:
    """Return the numbers of passages, what BM25 ranks first for the question first; of equal ones the first."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    words = bm25s.tokenize([*passages, question], stopwords="en", show_progress=False, return_ids=False)
    index = bm25s.BM25()
    index.index([passage or [""] for passage in words[:-1]], show_progress=False)
    scores = index.get_scores(words[-1]) if words[-1] else torch.zeros(len(passages)).numpy()
    return sorted(range(len(passages)), key=lambda number: -scores[number])
