"""Compressor: what makes compressed contexts. `RCCForCausalLM` is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..context.cache import SPARE
from ..context.context import CompressedContext

ReadProgress = Callable[[int, int], None]
"""Called with tokens read so far and tokens in all."""


class Compressor(Protocol):
    """Token ids, a rate and an earlier context in; a context out."""

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
