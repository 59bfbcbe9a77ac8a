#!/usr/bin/env python3
"""The trainer's state → a model folder.

export.py STATE BASE OUT [--rates 4,1,2,8,16] [--segment 1024] [--name rcc-qwen2.5-0.5b] [--eight-bits projections,lora]
"""

import argparse

import torch
from safetensors.torch import load_file

from rcc import RCCConfig, RCCForCausalLM, SideConfig

TRAINED = [1, 2, 4, 8, 16, 32]
"""The trainer's rates, in the order of the rows of its rate embeddings."""


def renamed(state, rates):
    """The state by the names of the project's model."""
    mine = {}
    for name, tensor in state.items():
        if name.startswith("projections."):
            name, tensor = f"{name}.weight", tensor.float() - torch.eye(len(tensor))
        elif name.startswith("decoder.layers."):
            name = name.replace("decoder.layers.", "decoder.model.layers.") + ".weight"
        elif name.startswith("encoder.layers."):
            name += ".weight"
        elif name == "rate_embeddings":
            tensor = tensor[[TRAINED.index(rate) for rate in rates]]
        mine[name] = tensor
    return mine


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state")
    parser.add_argument("base", help="a folder, or the name of a base")
    parser.add_argument("out")
    parser.add_argument("--rates", default="4,1,2,8,16")
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--name", default="rcc-qwen2.5-0.5b")
    parser.add_argument("--eight-bits", default="projections,lora")
    args = parser.parse_args()
    rates = [int(rate) for rate in args.rates.split(",")]
    config = RCCConfig(
        name=args.name,
        prefix="direct",
        segment_length=args.segment,
        rates=rates,
        rate_embeddings=True,
        encoder=SideConfig(args.rank),
        decoder=SideConfig(args.rank),
        lora_alpha=args.rank,
    )
    model = RCCForCausalLM.from_base(args.base, config=config, dtype=torch.bfloat16)
    model.load_own_state_dict(renamed(load_file(args.state), rates))
    model.save_pretrained(args.out, eight_bits=[part for part in args.eight_bits.split(",") if part])
    print(args.out)


if __name__ == "__main__":
    main()
