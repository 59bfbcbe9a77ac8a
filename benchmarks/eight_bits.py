"""What 8 bits cost a context's keys and values, by what shares a step: python benchmarks/eight_bits.py CONTEXT.rcc

Printed: the size of the rounding error beside that of the values, over all layers. The last grouping is rcc's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rcc import CompressedContext
from rcc.context.eight_bits import EightBits


def rounded(values: Tensor, dimension: int) -> Tensor:
    """Round values [1, KV heads, n, head dim] to steps that one dimension shares."""
    steps = (values.abs().amax(dimension, keepdim=True) / 127).clamp(min=1e-30)
    return (values / steps).round() * steps


GROUPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "a position of a head": lambda values: rounded(values, 3),
    "a channel of a head": lambda values: rounded(values, 2),
    "a channel of a head, 64 positions": lambda values: EightBits.of(values).values(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("context", type=Path)
    context = CompressedContext.load(parser.parse_args().context)
    print(f"{context}\n\n| a step for | keys | values |\n|---|---:|---:|")
    for name, grouping in GROUPINGS.items():
        errors, sizes = torch.zeros(2), torch.zeros(2)
        for i in range(len(context.blocks.layers)):
            for k, states in enumerate(context.layer(i)):
                exact = states.float()
                errors[k] += (grouping(exact) - exact).square().sum()
                sizes[k] += exact.square().sum()
        keys, values = (errors / sizes).sqrt().tolist()
        print(f"| {name} | {keys:.2%} | {values:.2%} |")


if __name__ == "__main__":
    main()
