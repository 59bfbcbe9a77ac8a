"""The decoder reads the text as it is: what compression is measured against."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....errors import WindowError
from ....model.compressor import Compressor
from ....text.chat import CHATML, chat_form
from ....text.prompting import Prompt, with_hint
from ....text.tokens import token_ids
from ...uncompressed import base_decoder, read_plain
from ..questions import Question
from . import Held


class PlainText:
    """The whole text, of one longer than the window without its middle, as in LongBench.

    Args:
        tuned: the model's decoder as it was trained, instead of its base.
        hint: what an untrained decoder is told after the question.
        room: positions for a question and its answer.
    """

    mode = ""
    compresses = False
    by_question = False

    def __init__(
        self,
        model: Compressor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "plain",
        tuned: bool = False,
        hint: str = "",
        room: int = 512,
    ):
        self.model, self.name, self.tuned, self.hint = model, name, tuned, hint
        self.chat = CHATML if tuned else chat_form(tokenizer)
        self.header = token_ids(tokenizer, self.chat.header, allow_special=True)[0]
        self.room = model.window - len(self.header) - room

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Keep the keys and values of the text's own tokens, one position each, after the chat's header."""
        if self.room < 1:
            raise WindowError(f"the decoder's window of {self.model.window:,} has no room for a text and an answer.")
        read = ends(text, self.room)
        return Held(read_plain(self.model, torch.cat([self.header, read])), len(read), len(read) < len(text))

    def prompt(self, question: Question) -> Prompt:
        """Put the question after the text in the same message."""
        return self.chat.prompt(with_hint(question.question, self.hint))

    def decoder(self) -> AbstractContextManager[None]:
        """Take the base without LoRA, unless the decoder learnt to read plain text."""
        return contextlib.nullcontext() if self.tuned else base_decoder(self.model)


def ends(text: Tensor, most: int) -> Tensor:
    """Return a text's first and last tokens, half of `most` each; all of a text that has no more."""
    return text if len(text) <= most else torch.cat([text[: most - most // 2], text[len(text) - most // 2 :]])
