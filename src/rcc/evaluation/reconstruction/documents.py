"""The documents that are reconstructed: texts as tokens, cut to one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ..example import EXAMPLE, example_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ...data.corpus import Corpus


def open_texts(paths: Sequence[str], field: str, tokenizer: PreTrainedTokenizerBase) -> list[Corpus]:
    """Open texts as tokens, as the trainer's sources are; without a path, the example text of the repository.

    Args:
        paths: files, folders or globs.
        field: that holds a text, in JSON lines.
        tokenizer: the model's.

    Raises:
        InputError: a file has no row that can be used, or there is no path and no repository.
        FileError: a file is missing or damaged.
    """
    from ...data.corpus import open_text
    from ...data.sources import Source

    if not paths:
        example = example_text()
        if example is None:
            raise InputError(f"no texts are named, and {EXAMPLE} of rcc's repository is not here: name a file of text.")
        paths = [str(example)]
    return [open_text(Source(path, text=field), tokenizer) for path in paths]


class Documents:
    """The documents of one length, by number.

    Each text that has `length` tokens gives its first ones; a single text is cut into as many documents as it gives.

    Attributes:
        order: their numbers, shuffled by the seed: those to be measured come first.
        too_short: how many texts have fewer tokens.

    Raises:
        InputError: no text is long enough.
    """

    def __init__(self, corpora: Sequence[Corpus], length: int, seed: int):
        self.length = length
        texts = [(corpus, row, int(n)) for corpus in corpora for row, n in enumerate(corpus.lengths)]
        most = None if len(texts) == 1 else 1
        self._starts = [(c, row, i * length) for c, row, n in texts for i in range(n // length)[:most]]
        self.too_short = sum(n < length for _, _, n in texts)
        if not self._starts:
            longest = max(n for _, _, n in texts)
            raise InputError(
                f"no text has {length:,} tokens, the longest has {longest:,}: use longer texts or lower lengths."
            )
        self.order = np.random.default_rng(seed).permutation(len(self._starts)).tolist()

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._starts)

    def __getitem__(self, number: int) -> Tensor:
        """Return a document's token ids, int64 [length]."""
        corpus, row, start = self._starts[number]
        return torch.from_numpy(corpus.document(row)[start : start + self.length].astype(np.int64))

    def another(self, number: int) -> int:
        """Return the number of the document that comes next in the order, after the last one the first."""
        return int(self.order[(self.order.index(number) + 1) % len(self)])
