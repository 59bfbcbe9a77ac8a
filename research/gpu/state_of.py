#!/usr/bin/env python3
"""A model folder → the trainer's state, to go on from:  state_of.py MODEL OUT.safetensors"""

import argparse

import torch
from safetensors.torch import save_file

from rcc import RCCForCausalLM

TRAINED = [1, 2, 4, 8, 16, 32]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a shipped name, or a folder")
    parser.add_argument("out")
    args = parser.parse_args()
    model = RCCForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    state = {}
    for name, tensor in model.own_state_dict().items():
        name = name.removesuffix(".weight").replace("decoder.model.layers.", "decoder.layers.")
        if name.startswith("projections."):
            tensor = tensor + torch.eye(len(tensor))
        elif name == "rate_embeddings":  # a rate that the model was not trained at starts as the nearest
            rates = model.config.rates
            rows = [min(range(len(rates)), key=lambda i: abs(rates[i] - rate)) for rate in TRAINED]
            tensor = tensor[rows]
        state[name] = tensor.detach().float().contiguous().clone()
    save_file(state, args.out)
    print(args.out, len(state), "tensors")


if __name__ == "__main__":
    main()
