"""Which KV pairs of a chunk stay: a rule is a function of queries and keys that gives each pair a score.

To add a rule, write a function of a :class:`Seen` and put it into :data:`RULES`; it then has a name for
:class:`rcc.model.selection.selection.Selection`, for `--compressor selection-NAME` and for `rcc eval qa`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prefix import rotate

BLOCK_ELEMENTS = 1 << 22
"""Attention weights that are in memory at once, all heads together."""
FUTURE = 512
"""Positions after a chunk over which `expected` takes the mean of the rotation: where questions will stand."""
PARTS = 3
"""Numbers in bfloat16 that hold one in float32."""
SEED = 0


@dataclass(frozen=True)
class Seen:
    """What a rule sees of one layer in one pass; queries and keys are those before rotation.

    Attributes:
        layer: its number, from 0.
        chunk: the chunk's number within its text, from 0.
        queries: [heads, T, head dim] of the tokens of the pass, which are the last T of `keys`.
        keys: [KV heads, n, head dim] of all that the pass attends to.
        values: likewise.
        start: the first of the chunk's pairs among them.
        stop: the end of those.
        keep: pairs to keep for each head.
        cos: [m, rotary dimensions] of positions 0 to m - 1; m is n + :data:`FUTURE`, or the window.
        sin: likewise.
        scaling: of the products of queries and keys.
        sums: [heads, T], for each query the logarithm of the sum of exponentials of its scaled products; None where the
            attention does not say it.
    """

    layer: int
    chunk: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    start: int
    stop: int
    keep: int
    cos: Tensor
    sin: Tensor
    scaling: float
    sums: Tensor | None

    @property
    def size(self) -> int:
        """Pairs of the chunk."""
        return self.stop - self.start

    def rotated(self, states: Tensor, first: int) -> Tensor:
        """Rotate states [heads, t, head dim] to the positions from `first` on."""
        span = slice(first, first + states.shape[1])
        return rotate(states[None], self.cos[None, span], self.sin[None, span])[0]


def highest_attention(seen: Seen) -> Tensor:
    """Score a pair by the highest attention that any token of a pass after the chunk pays it (KVzip, arXiv 2505.23416).

    The attention is the model's own in the pass: a softmax over the header, the chunk and the repetition so far, no
    earlier chunk. Of the query heads that share a pair, and of all tokens of the pass (those that ask for the
    repetition too), the highest counts. A block of queries at a time is in memory.

    Returns:
        [KV heads, chunk] in float32.
    """
    past = seen.keys.shape[1] - seen.queries.shape[1]
    queries = seen.rotated(seen.queries, past) * seen.scaling
    sums = _sums(seen, queries) if seen.sums is None else seen.sums
    # the product itself subtracts a query's sum, in as many parts as make up float32, and gives logarithms of weights:
    # so it is the small differences that are rounded, not the products
    queries = torch.cat([queries, *(-part[..., None] for part in _parts(sums, queries.dtype))], -1)
    keys = seen.rotated(seen.keys[:, seen.start : seen.stop], seen.start)
    keys = torch.cat([keys, keys.new_ones(*keys.shape[:2], PARTS)], -1)
    queries = queries.view(keys.shape[0], -1, queries.shape[-1])  # of the heads that share a pair, one after the other
    highest = torch.full((keys.shape[0], seen.size), -torch.inf, device=keys.device)
    step = max(1, BLOCK_ELEMENTS // highest.numel())
    for block in queries.split(step, 1):
        highest = torch.maximum(highest, torch.bmm(keys, block.transpose(1, 2)).amax(2).float())
    return highest.exp()


def _sums(seen: Seen, queries: Tensor) -> Tensor:
    """Return the logarithms of the sums of exponentials of rotated, scaled queries' products, [heads, T]."""
    heads, tokens, _ = queries.shape
    n = seen.keys.shape[1]
    past, group = n - tokens, heads // seen.keys.shape[0]
    exact = torch.promote_types(queries.dtype, torch.float32)
    keys = seen.rotated(seen.keys, 0).to(exact).transpose(1, 2).repeat_interleave(group, 0)
    order, sums = torch.arange(n, device=keys.device), []
    step = max(1, BLOCK_ELEMENTS // (heads * n))
    for first in range(0, tokens, step):
        end = past + min(tokens, first + step)
        products = torch.matmul(queries[:, first : end - past].to(exact), keys[..., :end])
        later = order[:end] > order[past + first : end, None]
        sums.append(products.masked_fill_(later, -torch.inf).logsumexp(-1))
    return torch.cat(sums, 1)


def _parts(sums: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return numbers in a precision that add up to others in float32."""
    parts = []
    for _ in range(PARTS):
        parts.append(sums.to(dtype))
        sums = sums - parts[-1]
    return parts


def expected_attention(seen: Seen) -> Tensor:
    """Score a pair by the attention that a later token is expected to pay it, times the length of its value.

    Later queries are taken to be normally distributed, with the mean and covariance of the chunk's own, and to stand
    somewhere in the next :data:`FUTURE` positions: the mean of exp(q·k) is then exp(k·μ + k·Σk / 2). After kvpress's
    ExpectedAttentionPress (arXiv 2510.00636). It needs no second pass.

    Returns:
        [KV heads, chunk] in float32.
    """
    queries = seen.queries.float()
    mean = queries.mean(1, keepdim=True)  # [heads, 1, head dim]
    spread = queries - mean
    covariance = spread.transpose(1, 2) @ spread / spread.shape[1]
    ahead = slice(min(seen.stop, len(seen.cos) - 1), seen.stop + FUTURE)
    cos, sin = (table[ahead].float().mean(0)[None, None] for table in (seen.cos, seen.sin))
    axes = torch.eye(queries.shape[2], device=queries.device)
    turn = rotate(axes[None, None], cos, sin)[0]  # [1, head dim, head dim]: the mean rotation, of row vectors
    mean, covariance = mean @ turn, turn.transpose(1, 2) @ covariance @ turn
    kv_heads = seen.keys.shape[0]
    keys = seen.rotated(seen.keys[:, : seen.stop], 0)[:, seen.start :].float() * seen.scaling
    mean, covariance = (moment.view(kv_heads, -1, *moment.shape[1:]) for moment in (mean, covariance))
    expected = (keys[:, None] * mean).sum(-1) + ((keys[:, None] @ covariance) * keys[:, None]).sum(-1) / 2
    weights = expected.softmax(-1).mean(1)
    lengths: Tensor = seen.values[:, seen.start : seen.stop].float().norm(dim=-1)
    return weights * lengths


def every_nth(seen: Seen) -> Tensor:
    """Score as many pairs 1 as are to stay, at even distances, the last one among them: a control.

    Returns:
        [KV heads, chunk].
    """
    numbers = torch.arange(1, seen.keep + 1, device=seen.keys.device) * seen.size // seen.keep - 1
    scores = torch.zeros(seen.keys.shape[0], seen.size, device=seen.keys.device)
    scores[:, numbers] = 1
    return scores


def by_chance(seen: Seen) -> Tensor:
    """Score pairs at random, the same whenever a text is read: a control.

    Returns:
        [KV heads, chunk].
    """
    generator = torch.Generator().manual_seed((SEED << 40) + (seen.chunk << 16) + seen.layer)
    return torch.rand(seen.keys.shape[0], seen.size, generator=generator).to(seen.keys.device)


@dataclass(frozen=True)
class Rule:
    """A way to choose pairs.

    Attributes:
        score: the higher, the sooner a pair stays.
        repeats: whether `score` is of a pass in which the model repeats the chunk, instead of that which reads it.
        shared: whether the KV heads of a layer share their budget: the best pairs stay, whichever heads they are of.
    """

    score: Callable[[Seen], Tensor]
    repeats: bool = False
    shared: bool = False


RULES = {
    "repeat": Rule(highest_attention, repeats=True),
    "shared": Rule(highest_attention, repeats=True, shared=True),
    "expected": Rule(expected_attention),
    "expected-shared": Rule(expected_attention, shared=True),
    "stride": Rule(every_nth),
    "random": Rule(by_chance),
}
