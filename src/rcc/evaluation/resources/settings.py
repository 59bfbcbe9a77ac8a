"""Of what texts memory and time are measured or computed, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...model.selection.names import compressor_name
from ..evaluation import check_lengths

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...model.compressor import Compressor

BY = ("reader", "length", "rate")
"""The keys that tell cells apart. The reader is `rcc`, whatever compresses, or `plain`: the same base reading the text
as it is, without a rate."""
PAPER_RATE = 32
PAPER = {
    "rcc": {
        0: 7_664, 2**11: 7_788, 2**13: 7_910, 2**14: 8_182, 2**16: 9_302, 2**18: 13_300, 2**20: 29_944, 2**21: 64_858
    },
    "plain": {0: 4_078, 2**11: 6_322, 2**13: 11_752, 2**14: 19_914, 2**15: 33_240, 2**16: 61_928},
}  # fmt: skip
"""Length → MB of GPU memory that the paper gives for Pythia-1.4B (A800, batch 1); 0: with the weights alone."""


def compressor_label(settings: Mapping[str, Any]) -> str:
    """Return what tables and charts call what compresses, by an evaluation's settings."""
    made = settings.get("compressor")
    return compressor_name(made) if made else "RCC"


@dataclass(frozen=True, eq=False)
class ResourcesSettings:
    """What is read, and how.

    Args:
        lengths: tokens of a text.
        rates: none: of a trained model, for each length the lowest trained one at which the prefix fits; of a shape,
            its own.
        measured: with real weights, or random ones of a shape, whose decoder's window is widened as needed. False:
            computed, without weights.
        question_tokens: of the question after which the first token is written.
        plain: also the same base reading the text as it is, in batches of `batch_tokens`.
        device: where to measure.
        dtype: of a trained model; None: as it is stored.
        batch_tokens: that are read at once. None: :func:`rcc.model.encoder.batch_tokens_on` the device.
        text: token ids [T], repeated if need be. None: random ids.
        limit: lengths at most, the shortest ones.

    Raises:
        InputError: a setting that cannot be used.
    """

    lengths: Sequence[int]
    rates: Sequence[int] = ()
    measured: bool = True
    question_tokens: int = 32
    plain: bool = True
    device: str = "cpu"
    dtype: torch.dtype | None = None
    batch_tokens: int | None = None
    text: np.ndarray | None = None
    limit: int | None = None

    def check(self, model: Compressor) -> None:
        """Check that a model can be measured so.

        Raises:
            InputError: it cannot.
        """
        check_lengths(model, self.sizes)
        for rate in self.rates:
            model.check_rate(rate)
        if self.question_tokens < 1:
            raise InputError(f"question_tokens must be at least 1, not {self.question_tokens}.")

    @property
    def sizes(self) -> list[int]:
        """The lengths that are measured, in rising order."""
        return sorted(self.lengths)[: self.limit]
