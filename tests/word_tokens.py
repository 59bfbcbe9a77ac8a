"""A tokenizer of one token a word, for texts whose tokens can be told by looking at them."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `w7` is token 7."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


def words(ids: Iterable[int]) -> str:
    """The text of these tokens."""
    return " ".join(f"w{i}" for i in ids)
