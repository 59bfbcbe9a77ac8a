"""Speed of the default model in bfloat16 and in float32 on this CPU, in one run.

    python benchmarks/precision.py [--tokens 2048] [--threads 2]

Tokens of the example text that `compress` reads a second, at 8x; the second of two passes. The command line computes in
float32 where the CPU has no bfloat16 (`rcc.precision`), unless it is told otherwise by --dtype.
"""

import argparse
import time
from pathlib import Path

from rcc.runtime import allocator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    allocator.configure()

    import torch
    from transformers.utils import logging

    from rcc import RCCForCausalLM, load_tokenizer
    from rcc.runtime.precision import has_bfloat16
    from rcc.text.tokens import token_ids

    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    text = (Path(__file__).resolve().parent.parent / "examples/simple-susan.txt").read_text(encoding="utf-8")
    name = "rcc-smollm2-135m"
    ids = token_ids(load_tokenizer(name), text)[:, : arguments.tokens]
    print(f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 in hardware: {'yes' if has_bfloat16() else 'no'}\n")
    print("| precision | tokens/s |\n|---|---:|")
    for dtype in (torch.bfloat16, torch.float32):
        model = RCCForCausalLM.from_pretrained(name, dtype=dtype)
        for _ in range(2):
            start = time.perf_counter()
            model.compress(ids, rate=8)
            seconds = time.perf_counter() - start
        print(f"| {str(dtype).removeprefix('torch.')} | {ids.shape[1] / seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
