"""The base's own KV pairs, chosen by a rule, as many for each head as a compressed context has positions."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers import PreTrainedTokenizerBase

from ....model.compressor import Compressor
from ....model.selection.selection import Selection
from ...uncompressed import base_decoder
from .compressed import Compressed


class Selected(Compressed):
    """A selection of the KV pairs that a model's base makes of a text, asked in the base's own chat form.

    Args:
        base: whose decoder it is, without LoRA.
        rule: a name in :data:`rcc.model.selection.rules.RULES`.
        name: in tables.
        hint: what the base is told after the question.
    """

    def __init__(self, base: Compressor, tokenizer: PreTrainedTokenizerBase, *, rule: str, name: str, hint: str):
        # made within it, the copy of the decoder that reads is without LoRA for good
        with base_decoder(base):
            selection = Selection(base.decoder, tokenizer, base.name, rule, weights_sha256=base.fingerprint)
        super().__init__(selection, tokenizer, "human", name, hint)
        self.base = base

    def decoder(self) -> AbstractContextManager[None]:
        """Take the base without LoRA."""
        return base_decoder(self.base)
