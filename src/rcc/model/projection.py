"""The linear maps from encoder states to the decoder's residual stream, and which state each one reads."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from ..config import RCCConfig


def layer_map(encoder_layers: int, decoder_layers: int, config: RCCConfig) -> list[list[int]]:
    """List which encoder states feed decoder state i, for i = 0 (the prefix's input), 1 … decoder_layers - 1.

    State 0 is the embedding output, state k the output of encoder block k, the last one after the final norm.
    Entry i is added after decoder block i, that is before block i + 1 counted from 1. The paper's last term,
    after the last block, reaches no KV entry and so has no place here.

    `"duplicate"`: state ceil(i · Lₑ / L_d). `"average"`: the mean of states ⌊(i - 1) · Lₑ / L_d⌋ + 1 … that one.
    Equal depths give [[0], [1], …]. With `states="last"` only the prefix's input is fed.
    """
    if config.states == "last":
        return [[encoder_layers]]
    last = [ceil(i * encoder_layers / decoder_layers) for i in range(decoder_layers)]
    if config.layer_map == "duplicate":
        return [[k] for k in last]
    first = [0] + [(i - 1) * encoder_layers // decoder_layers + 1 for i in range(1, decoder_layers)]
    return [list(range(a, b + 1)) for a, b in zip(first, last, strict=True)]


class Projections(nn.ModuleList):
    """P_0, P_1, …: one bias-free linear map per fed decoder state.

    Of a residual prefix P_0 starts as the identity (padded with zeros where widths differ), the others at zero: better
    everywhere than starting them all at the identity in the runs that made the default model's first weights. Of a
    direct prefix all start as the identity; there, where widths are equal, the weights are the *differences* from it,
    which 8 bits or bfloat16 hold far better than a matrix with ones in it.
    """

    def __init__(self, sources: list[list[int]], encoder_size: int, decoder_size: int, direct: bool = False):
        super().__init__(nn.Linear(encoder_size, decoder_size, bias=False) for _ in sources)
        self.sources = sources
        self.from_identity = direct and encoder_size == decoder_size
        with torch.no_grad():
            for i in range(len(sources)):
                identity = (direct or i == 0) and not self.from_identity
                nn.init.eye_(self.weight(i)) if identity else nn.init.zeros_(self.weight(i))

    def weight(self, i: int) -> Tensor:
        """Return P_i, [H_decoder, H_encoder], or its difference from the identity."""
        return self.get_parameter(f"{i}.weight")

    @property
    def states(self) -> list[int]:
        """Encoder states that are read at all, in order."""
        return sorted({k for source in self.sources for k in source})

    def project(self, i: int, states: dict[int, Tensor]) -> Tensor:
        """Return what decoder state i receives: {state number: [B, n, H_encoder]} → [B, n, H_decoder]."""
        source = self.sources[i]
        vectors = states[source[0]] if len(source) == 1 else torch.stack([states[k] for k in source]).mean(0)
        vectors = vectors.to(self.weight(i).dtype)
        projected: Tensor = self[i](vectors)
        return vectors + projected if self.from_identity else projected
