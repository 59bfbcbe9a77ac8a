"""The base's own KV pairs, chosen by a rule, as many for each head as a compressed context has positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ....context.pieces import Piece
from ....model.rcc import RCCForCausalLM
from ....model.selection.selection import Selection
from ....text.prompting import Prompt
from ...uncompressed import base_decoder
from ..questions import Question
from . import Held
from .plain_text import PlainText


class Selected(PlainText):
    """A selection of the KV pairs that the model's base makes of a text.

    Args:
        rule: a name in :data:`rcc.model.selection.rules.RULES`.
    """

    compresses = True

    def __init__(self, model: RCCForCausalLM, tokenizer: PreTrainedTokenizerBase, *, rule: str, **options: Any):
        super().__init__(model, tokenizer, **options)
        # made within it, the copy of the decoder that reads is without LoRA for good
        with base_decoder(model):
            self.selection = Selection(
                model.decoder, tokenizer, model.config.name, rule, weights_sha256=model.fingerprint
            )

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Keep as many of the text's pairs, for each head, as a compressed context has positions."""
        context = self.selection.compress(text[None], rate=rate)
        # as a cache it is like any other of this decoder
        cache = self.selection.as_cache(context)
        piece = Piece(len(text), len(cache), rate, "")
        own = replace(cache, pieces=((piece,),), fingerprint=self.model.fingerprint, compressor="")
        return Held(own, len(context))

    def prompt(self, question: Question) -> Prompt:
        """Put the question, and the hint, in the base's own chat form."""
        return self.selection.chat.prompt(question.question, hint=self.hint)
