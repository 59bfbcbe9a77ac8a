"""What a passkey test hides, where, and how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...data.haystack import POSITIONS, VARIANTS
from ...errors import InputError
from ..evaluation import check_lengths

if TYPE_CHECKING:
    from ...model.compressor import Compressor

BY = ("variant", "rate", "length", "position", "context")
"""The keys that tell cells apart. The context is the `whole` text, or one in which the key's own segments are
`replaced`."""


@dataclass(frozen=True)
class PasskeySettings:
    """What is hidden, where, and how often.

    Args:
        lengths: tokens of a text.
        rates: none: for each length the lowest of the model's at which the prefix fits.
        keys: samples of a cell: a variant, rate, length and position.
        controls: of those, how many are asked again with the key's own segments replaced.
        positions: any of :data:`rcc.data.haystack.POSITIONS`.
        variants: any of :data:`rcc.data.haystack.VARIANTS`.
        prose: {name: text}, the filler of the variant `prose`.
        seed: of keys and of where they stand.
        batch_tokens: how much is read at once. None: 4,096 tokens of prose; of filler that repeats itself, of whose
            segments few are different, up to 65,536, as long as the decoder takes 1,024 positions at once at most.
        limit: keys and controls of a cell, at most.

    Raises:
        InputError: a setting that cannot be used.
    """

    lengths: Sequence[int]
    rates: Sequence[int] = ()
    keys: int = 5
    controls: int = 1
    positions: Sequence[str] = tuple(POSITIONS)
    variants: Sequence[str] = ("plain",)
    prose: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    batch_tokens: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        for wanted, known, what in ((self.variants, VARIANTS, "variant"), (self.positions, POSITIONS, "position")):
            for name in wanted:
                if name not in known:
                    raise InputError(f"{what} {name!r} is unknown: use some of {', '.join(known)}.")
        for number, least, what in (
            (self.keys, 1, "keys"),
            (self.controls, 0, "controls"),
            (1 if self.limit is None else self.limit, 1, "limit"),
        ):
            if number < least:
                raise InputError(f"{what} must be at least {least}, not {number}.")

    def check(self, model: Compressor) -> None:
        """Check that a model can be asked so.

        Raises:
            InputError: it cannot.
        """
        for rate in self.rates:
            model.check_rate(rate)
        check_lengths(model, self.lengths)

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each cell, by context."""
        return {
            "whole": min(self.keys, self.limit or self.keys),
            "replaced": min(self.controls, self.limit or self.controls),
        }
