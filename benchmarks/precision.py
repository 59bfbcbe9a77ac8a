"""Speed of a model's reading in bfloat16, in float32 and with an int8 encoder on this CPU, in one run.

    python benchmarks/precision.py [--model M] [--kinds float32,int8] [--tokens 2048] [--threads 2]

Tokens of the example text that `compress` reads a second, at 8x, the faster of two passes; and how many of the text's
tokens are predicted right from the context. The command line computes in float32 where the CPU has no bfloat16
(`rcc.runtime.precision`), unless it is told otherwise by --dtype. int8 is no choice of rcc: it is measured here
to see whether it should be (the encoder's linear layers, dynamic activations, torch's own kernels).
"""

import argparse
import time
import warnings
from pathlib import Path

from rcc.runtime import allocator

KINDS = ("bfloat16", "float32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rcc-smollm2-135m")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    allocator.configure()

    import torch
    from transformers.utils import logging

    from rcc import RCCForCausalLM, load_tokenizer
    from rcc.evaluation.reconstruction.teacher_forcing import teacher_forced
    from rcc.runtime.precision import has_bfloat16
    from rcc.text.tokens import token_ids

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    text = (Path(__file__).resolve().parent.parent / "examples/simple-susan.txt").read_text(encoding="utf-8")
    name = arguments.model
    ids = token_ids(load_tokenizer(name), text)[:, : arguments.tokens]
    print(f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 in hardware: {'yes' if has_bfloat16() else 'no'}\n")
    print("| precision | tokens/s | tokens recovered |\n|---|---:|---:|")
    for kind in arguments.kinds.split(","):
        dtype = torch.float32 if kind == "int8" else getattr(torch, kind)
        model = RCCForCausalLM.from_pretrained(name, dtype=dtype, adapters="merged")
        if kind == "int8":
            made_by = model.fingerprint
            torch.ao.quantization.quantize_dynamic(model.encoder, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
            model.record_fingerprint(made_by)
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            context = model.compress(ids, rate=8)
            best = min(best, time.perf_counter() - start)
        measured = teacher_forced(model, context, ids[0])
        print(f"| {kind} | {ids.shape[1] / best:,.0f} | {measured.accuracy:.1%} |", flush=True)


if __name__ == "__main__":
    main()
