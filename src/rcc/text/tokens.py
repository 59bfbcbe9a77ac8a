"""Text → token ids, a long text in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .parts import PromptPart

PIECE, OVERLAP = 200_000, 8_000
"""Characters of a long text that the tokenizer is given at once, and how many of them it was given before."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, allow_special: bool = False) -> Tensor:
    """Return the token ids of a text, [1, T], without the special tokens that some tokenizers add.

    Args:
        tokenizer: the model's; a slow one, in Python, is given a long text whole.
        text: a document, a question, or a part of a prompt.
        allow_special: whether marks such as `<|im_end|>` in the text are the special tokens that they name. Otherwise
            they are read as the characters that they are written with: a document cannot speak as the user.

    Raises:
        InputError: the text holds what is not Unicode, such as an argument in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the question or prompt is not UTF-8 text: give it in UTF-8.") from None
    split = not allow_special and holds_special(tokenizer, text)
    pieces = _in_pieces(tokenizer, text, split) if len(text) > PIECE and tokenizer.is_fast else None
    if pieces is None:
        pieces = [_read(tokenizer, text, split)["input_ids"]]
    return torch.cat([torch.as_tensor(piece, dtype=torch.long) for piece in pieces])[None]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, parts: Sequence[PromptPart], allow_special: bool = False) -> Tensor:
    """Return the token ids of a prompt, [1, T], read as one text where no part needs to be read otherwise.

    Args:
        tokenizer: as for :func:`token_ids`.
        parts: of the chat form, whose marks are special tokens, and of a user, whose marks are not.
        allow_special: whether a user's marks are special tokens, too.

    Raises:
        InputError: a part holds what is not Unicode.
    """
    if allow_special or not any(part.given and holds_special(tokenizer, part.text) for part in parts):
        return token_ids(tokenizer, "".join(part.text for part in parts), allow_special=True)
    rows = [token_ids(tokenizer, part.text, allow_special=not part.given) for part in parts if part.text]
    return torch.cat(rows, 1)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int], skip_special: bool = False) -> str:
    """Return the text of token ids.

    Args:
        tokenizer: that gave the ids.
        ids: [T], of one text.
        skip_special: whether special tokens, such as `<|im_end|>`, are left out.
    """
    text = tokenizer.decode(ids, skip_special_tokens=skip_special)
    assert isinstance(text, str)  # a list only for several texts
    return text


def holds_special(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text holds a mark that the tokenizer has a special token for."""
    return any(token.special and token.content in text for token in tokenizer.added_tokens_decoder.values())


def _read(tokenizer: PreTrainedTokenizerBase, text: str, split: bool, **options: Any) -> Any:
    """Tokenise a text; `split`: its marks into the characters that they are written with."""
    if split:
        options["split_special_tokens"] = True
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str, split: bool) -> list[np.ndarray] | None:
    """Return the token ids [T] of a long text's pieces, which together are those of the whole.

    None where they would not be.

    A tokenizer holds more than half a kilobyte for every token while it works. So it is given overlapping pieces, and
    each two are joined where, far from where they were cut, their tokens are the same: they depend on what is near.
    """

    def read(start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        encoding = _read(tokenizer, text[start:end], split, return_offsets_mapping=True)
        return np.array(encoding["input_ids"]), start + np.array(encoding["offset_mapping"])[:, 0]

    done, end = [], PIECE
    ids, starts = read(0, end)
    while end < len(text):
        start, middle, last = end - OVERLAP, end - OVERLAP // 2, end - OVERLAP // 4
        end = start + PIECE
        more, their_starts = read(start, end)
        ours = np.flatnonzero((starts >= middle) & (starts < last))
        theirs = np.flatnonzero((their_starts >= middle) & (their_starts < last))
        if not len(ours) or not np.array_equal(starts[ours], their_starts[theirs]) or (ids[ours] != more[theirs]).any():
            return None
        done.append(ids[: ours[0]])
        ids, starts = more[theirs[0] :], their_starts[theirs[0] :]
    return [*done, ids]
