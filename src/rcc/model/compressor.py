"""Compressor: what makes compressed contexts and answers from them. `RCCForCausalLM` is one, `Selection` another.

The engine and the evaluations know of models what stands here, and nothing else of most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..context.cache import SPARE
from ..context.context import CompressedContext
from ..context.pieces import Piece
from ..text.prompting import Prompt
from .generating import Generates

ReadProgress = Callable[[int, int], None]
"""Called with tokens read so far and tokens in all."""


class Compressor(Generates, Protocol):
    """Token ids, a rate and an earlier context in; a context out, and what is written after it."""

    @property
    def name(self) -> str:
        """What contexts and messages call the model."""
        ...

    @property
    def compressor(self) -> str:
        """What a context's file calls the way in which it was made; empty: by an RCC model."""
        ...

    @property
    def trained(self) -> bool:
        """Whether the model was trained for rcc: at certain rates, and to answer shortly."""
        ...

    @property
    def has_base(self) -> bool:
        """Whether the decoder without its adapters is at hand."""
        ...

    @property
    def header(self) -> Tensor:
        """Tokens [h] that a text stands after where it is read as it is: attention rests on the first. May be none."""
        ...

    @property
    def modes(self) -> Sequence[str]:
        """Those of :data:`rcc.text.prompting.MODES` that contexts can be asked in."""
        ...

    @property
    def rates(self) -> Sequence[int]:
        """What `auto` chooses from, and evaluations measure: the trained rates, where it was trained."""
        ...

    @property
    def segment_length(self) -> int:
        """Tokens of a text that are read at once: a segment, or a selection's chunk."""
        ...

    @property
    def stored_dtype(self) -> torch.dtype:
        """Precision that its weights are stored in, and that a context is kept in."""
        ...

    @property
    def sink_positions(self) -> int:
        """Positions that stand in the decoder's cache before a context's."""
        ...

    @property
    def reads_special(self) -> bool:
        """Whether chat marks in texts are always the special tokens that they name."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids that texts may have."""
        ...

    @property
    def window(self) -> int:
        """Positions that the decoder can address: prefix, prompt and answer together."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 that names what makes the contexts, and is noted in them."""
        ...

    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rate: int | None = None,
        context: CompressedContext | None = None,
        *,
        batch_tokens: int | None = None,
        progress: ReadProgress | None = None,
    ) -> CompressedContext:
        """Return a context of texts [B, tokens], after those of `context`; see `RCCForCausalLM.compress`."""
        ...

    def fitting_rate(
        self,
        tokens: list[int],
        context: CompressedContext | None = None,
        reserve: int = SPARE,
        budget: int | None = None,
    ) -> int:
        """Return the lowest rate at which texts of these lengths fit; see `RCCForCausalLM.fitting_rate`."""
        ...

    def check_rate(self, rate: int | None) -> int:
        """Return the rate to use, the default one for None.

        Raises:
            InputError: it cannot be used.
        """
        ...

    def positions(self, tokens: int, rate: int) -> int:
        """Return how many positions a text takes."""
        ...

    def split(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the segments of a text of token ids [T]."""
        ...

    def piece(self, ids: Tensor, rate: int) -> Piece:
        """Return the record of a text of token ids [T]."""
        ...

    def prompt(self, question: str, mode: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """Return the prompt for a question about a context, in one of :data:`rcc.text.prompting.MODES`.

        Raises:
            InputError: an empty question, or a mode that there is not.
        """
        ...

    def joins(self, prompt: Prompt) -> bool:
        """Return whether a text at hand and a prompt are read as one; see :func:`rcc.text.prompting.joins`."""
        ...

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: CompressedContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts [B, Q] after a context; see `RCCForCausalLM.generate`."""
        ...
