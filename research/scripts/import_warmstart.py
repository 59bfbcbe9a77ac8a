"""Turn a state of `warmstart.py` (a safetensors file of adapters) into an RCC model folder.

    python research/scripts/import_warmstart.py STATE.safetensors OUT [--name NAME] [--rates 4,8] [--segment 128]

The state's tensors: `projections.i` [H, H], `encoder.…lora_A` / `lora_B` and `decoder.…` of the base's linear layers,
with LoRA at scale 1. They go over the base `smollm2-135m-instruct` unchanged, in bfloat16.
"""

import argparse
import re
from pathlib import Path

from safetensors.torch import load_file

from rcc import RCCConfig, RCCForCausalLM, SideConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", default="rcc-smollm2-135m")
    parser.add_argument("--rates", default="4,8")
    parser.add_argument("--segment", type=int, default=128)
    arguments = parser.parse_args()

    def rename(name: str) -> str:
        name = re.sub(r"^projections\.(\d+)$", r"projections.\1.weight", name)
        name = re.sub(r"^decoder\.", "decoder.model.", name)
        return re.sub(r"lora_([AB])$", r"lora_\1.weight", name)

    state = {rename(name): tensor for name, tensor in load_file(arguments.state).items()}
    rank = next(tensor.shape[0] for name, tensor in state.items() if "lora_A" in name)
    config = RCCConfig(
        segment_length=arguments.segment,
        rates=[int(rate) for rate in arguments.rates.split(",")],
        encoder=SideConfig(rank),
        decoder=SideConfig(rank),
        name=arguments.name,
    )
    model = RCCForCausalLM.from_base("smollm2-135m-instruct", config=config)
    model.load_own_state_dict(state)
    model.save_pretrained(arguments.out)
    print(f"{arguments.out}: {len(state)} tensors, fingerprint {model.fingerprint[:12]}")


if __name__ == "__main__":
    main()
