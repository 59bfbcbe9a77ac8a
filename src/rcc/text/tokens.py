"""Text → token ids, a long text in pieces."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError

PIECE, OVERLAP = 200_000, 8_000
"""Characters of a long text that the tokenizer is given at once, and how many of them it was given before."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Text → [1, T] token ids, without the special tokens that some tokenizers add.

    Raises:
        InputError: the text holds what is not Unicode, such as an argument in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the question or prompt is not UTF-8 text: give it in UTF-8.") from None
    pieces = _in_pieces(tokenizer, text) if len(text) > PIECE and tokenizer.is_fast else None
    if pieces is None:
        pieces = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return torch.cat([torch.as_tensor(piece, dtype=torch.long) for piece in pieces])[None]


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[np.ndarray] | None:
    """The token ids [T] of a long text's pieces, which together are those of the whole; None where they would not be.

    A tokenizer holds more than half a kilobyte for every token while it works. So it is given overlapping pieces, and
    each two are joined where, far from where they were cut, their tokens are the same: they depend on what is near.
    """

    def read(start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        found = tokenizer(text[start:end], add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return np.array(found["input_ids"]), start + np.array(found["offset_mapping"])[:, 0]

    done, end = [], PIECE
    ids, places = read(0, end)
    while end < len(text):
        start, middle, last = end - OVERLAP, end - OVERLAP // 2, end - OVERLAP // 4
        end = start + PIECE
        more, those = read(start, end)
        ours = np.flatnonzero((places >= middle) & (places < last))
        theirs = np.flatnonzero((those >= middle) & (those < last))
        if not len(ours) or not np.array_equal(places[ours], those[theirs]) or (ids[ours] != more[theirs]).any():
            return None
        done.append(ids[: ours[0]])
        ids, places = more[theirs[0] :], those[theirs[0] :]
    return [*done, ids]
