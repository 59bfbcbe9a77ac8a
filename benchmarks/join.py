"""Time of joining compressed contexts, beside compressing their texts anew, in one run.

    python benchmarks/join.py [--model M] [--contexts 64] [--tokens 1024] [--rate 8] [--threads 2]

Texts are random tokens. What is joined is loaded from files, mapped; the joined context is compared bit by bit.
"""

import argparse
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rcc-qwen2.5-0.5b")
    parser.add_argument("--contexts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rate", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    from rcc.runtime import allocator

    allocator.configure()
    import torch

    from rcc import CompressedContext, RCCForCausalLM
    from rcc.runtime.precision import computing

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = RCCForCausalLM.from_pretrained(arguments.model)
    model.to(computing(model.dtype, "cpu"))
    texts = torch.randint(1000, (arguments.contexts, arguments.tokens))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.rcc" for i in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            model.compress(text[None], rate=arguments.rate).save(file)
        start = time.perf_counter()
        parts = [CompressedContext.load(file) for file in files]
        loaded = time.perf_counter()
        joined = CompressedContext.join(parts)
        done = time.perf_counter()
    anew = time.perf_counter()
    whole = model.compress(texts.view(1, -1), rate=arguments.rate)
    compressed = time.perf_counter() - anew
    pairs = (zip(joined.layer(i), whole.layer(i), strict=True) for i in range(len(whole.blocks.layers)))
    same = all(torch.equal(a, b) for pair in pairs for a, b in pair)
    print("| contexts | positions | loading, s | joining, s | compressing anew, s | same bits |")
    print("|---:|---:|---:|---:|---:|---|")
    print(
        f"| {len(texts)} | {len(joined):,} | {loaded - start:.3f} | {done - loaded:.3f} | {compressed:.1f} |"
        f" {'yes' if same else 'no'} |"
    )


if __name__ == "__main__":
    main()
