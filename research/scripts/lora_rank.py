"""Give a model's LoRA other ranks (one shared base).

    python research/scripts/lora_rank.py MODEL OUT --encoder 4 --decoder 2 [--segment 512] [--rates 512,128]

A smaller rank keeps the largest singular values of each pair of matrices; how much of the products' energy (sum of
squared singular values) is lost is printed. A larger one adds directions that change nothing yet, as new LoRA does:
random in A, zero in B. `--segment` and `--rates` are written into the configuration where a run goes on with others.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from rcc import RCCConfig, RCCForCausalLM, SideConfig
from rcc.text.counts import parse_counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--encoder", type=int, required=True, help="rank of the encoder's LoRA")
    parser.add_argument("--decoder", type=int, required=True, help="rank of the decoder's LoRA")
    parser.add_argument("--segment", type=int, help="tokens of a segment (default: the model's)")
    parser.add_argument("--rates", help="such as 512,128 (default: the model's)")
    arguments = parser.parse_args()
    model = RCCForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    old = model.config
    if not old.share_base:
        parser.error(f"{arguments.model} has a base for each side: only models with one base can be given other ranks")
    config = replace(
        old,
        encoder=SideConfig(arguments.encoder),
        decoder=SideConfig(arguments.decoder),
        segment_length=arguments.segment or old.segment_length,
        rates=parse_counts(arguments.rates, "--rates") if arguments.rates else old.rates,
    )
    ranks = {"encoder": arguments.encoder, "decoder": arguments.decoder}
    torch.manual_seed(0)
    state, resized = model.own_state_dict(), {}
    retained = whole = 0.0
    for name, a in state.items():
        if ".lora_B." in name:
            continue  # with its lora_A
        if ".lora_A." not in name:
            resized[name] = a
            continue
        side, other = name.split(".")[0], name.replace(".lora_A.", ".lora_B.")
        rank = ranks[side]
        # LoRA adds alpha / rank · B A, of which the factor may change with the rank
        b = _factor(old, side) / _factor(config, side) * state[other]
        if rank >= len(a):
            new = torch.empty(rank - len(a), a.shape[1])
            if len(new):
                torch.nn.init.kaiming_uniform_(new, a=5**0.5)
            resized[name], resized[other] = torch.cat([a, new]), torch.nn.functional.pad(b, (0, len(new)))
            continue
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        root = s[:rank].sqrt()
        resized[name], resized[other] = root[:, None] * v[:rank], u[:, :rank] * root
        retained, whole = retained + float(s[:rank].square().sum()), whole + float(s.square().sum())
    base = config.base["decoder"].source
    target = RCCForCausalLM.from_base(base, config=replace(config, base={}), dtype=torch.float32)
    target.load_own_state_dict(resized)
    target.save_pretrained(arguments.out, dtype=torch.bfloat16)
    print(f"{arguments.out}: {1 - retained / whole if whole else 0:.1%} of the energy of what was cut is lost")


def _factor(config: RCCConfig, side: str) -> float:
    rank = config.sides[side].lora_rank
    assert rank is not None  # a model with weights has decided it
    return (config.lora_alpha or rank) / rank


if __name__ == "__main__":
    main()
