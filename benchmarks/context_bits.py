"""What a context's keys and values lose in fewer bits: python benchmarks/context_bits.py TEXT [--model M] [--rate 4]

For every way to round them: the size of the error beside that of the values, over all layers, and how well the decoder
then recovers the text, teacher forced. A group of positions shares a step in a channel of a head; the line `8 bits, a
channel, 64 positions` is what `--kv int8` keeps. In 4 bits a value has a smallest one besides, as nothing is to spare.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rcc import CompressedContext, Engine
from rcc.context.eight_bits import EightBits, to_steps
from rcc.defaults import DEFAULT_MODEL
from rcc.evaluation.reconstruction.teacher_forcing import teacher_forced
from rcc.text.tokens import token_ids

GROUP = 32
"""Positions, or channels, that share a step in 4 bits: 4.5 to 5 bits a value with its 16-bit steps and minima."""


def rounded(values: Tensor, dimension: int) -> Tensor:
    """Round values [1, KV heads, n, head dim] to 8 bits, with steps that one dimension shares."""
    numbers, steps = to_steps(values, dimension, 1e-30, values.dtype)
    return numbers * steps


def four_bits(values: Tensor, dimension: int) -> Tensor:
    """Round values to 16 levels between the smallest and the largest of each group along a dimension."""
    parts = []
    for part in values.split(GROUP, dimension):
        low, high = part.amin(dimension, keepdim=True), part.amax(dimension, keepdim=True)
        steps = ((high - low) / 15).clamp(min=1e-30)
        parts.append(((part - low) / steps).round() * steps + low)
    return torch.cat(parts, dimension)


KEPT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "as computed": (lambda keys: keys, lambda values: values),
    "8 bits, a position": (lambda keys: rounded(keys, 3), lambda values: rounded(values, 3)),
    "8 bits, a channel": (lambda keys: rounded(keys, 2), lambda values: rounded(values, 2)),
    "8 bits, a channel, 64 positions": (lambda keys: EightBits.of(keys).values(), lambda x: EightBits.of(x).values()),
    "4 bits, a channel, 32 positions": (lambda keys: four_bits(keys, 2), lambda values: four_bits(values, 2)),
    "4 bits, keys a channel, values a position": (lambda keys: four_bits(keys, 2), lambda x: four_bits(x, 3)),
}
"""How keys and values are rounded, by what shares a step."""


def round_in_place(context: CompressedContext, *ways: Callable[[Tensor], Tensor]) -> Tensor:
    """Round a context's keys and values in place; return the relative errors of both, [2]."""
    errors, sizes = torch.zeros(2), torch.zeros(2)
    for i in range(len(context.blocks.layers)):
        for k, (states, way) in enumerate(zip(context.layer(i), ways, strict=True)):
            exact = states.float()
            near = way(exact)
            errors[k] += (near - exact).square().sum()
            sizes[k] += exact.square().sum()
            states.copy_(near)
    return (errors / sizes).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rate", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, from its beginning")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16; default: what the CPU computes fastest")
    arguments = parser.parse_args()
    engine = Engine.load(arguments.model, dtype=arguments.dtype)
    model = engine.rcc
    ids = token_ids(engine.tokenizer, arguments.text.read_text(encoding="utf-8"))[:, : arguments.tokens]
    print(f"{engine.name}, {ids.shape[1]:,} tokens at {arguments.rate}x, {model.dtype}\n")
    print("| kept | error of keys | of values | accuracy | loss |\n|---|---:|---:|---:|---:|")
    computed = model.compress(ids, rate=arguments.rate)
    for name, ways in KEPT.items():
        context = copy.deepcopy(computed)
        keys, values = round_in_place(context, *ways).tolist()
        found = teacher_forced(model, context, ids[0])
        print(f"| {name} | {keys:.2%} | {values:.2%} | {found.accuracy:.4f} | {found.loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
