"""Speed and memory of `compress`, beside the encoder's own forward pass and plain prefill of the same base.

    python benchmarks/compress.py [--model M] [--rate 8] [--lengths 2048,8192,65536] [--threads 2] [--markdown OUT.md]
    python benchmarks/compress.py --compressor selection-expected [--model FOLDER] …

Each figure comes from a process of its own, which loads the model as the command line does (adapters merged), runs
once to warm up on 2,048 tokens, and then `--repeats` times: the fastest counts. Processes of the three kinds take
turns. Memory is the process's peak less what it held once the model was loaded: weights and libraries are not in it,
the KV prefix or cache that results is.

- compress: `model.compress`, that is the encoder over all segments and the decoder over the prefix.
- encoder: the encoder alone over the same segments in the same batches, all layers, nothing kept.
- prefill: the base reads the text as it is, in one pass with a KV cache, up to its window.

The prefix pass of a residual prefix reads one position for every `rate` tokens, so its goal is compress ≥ 0.95 /
(1 + 1 / rate) of encoder. A direct prefix has no such pass: there the goal is 0.95. A selection has no encoder: its
goal is 0.9 of prefill, and 0.45 where the text is read twice.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("encoder", "compress", "prefill")


def measure(arguments: argparse.Namespace) -> dict[str, float | None]:
    """One kind at one length, in this process."""
    from rcc.runtime import allocator

    allocator.configure()
    import torch
    from transformers import AutoModelForCausalLM

    from rcc import Engine, RCCForCausalLM
    from rcc.model import backbones
    from rcc.model.encoder import batch_tokens_on
    from rcc.model.opening import language_model

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = Engine.load(arguments.model, arguments.device, compressor=arguments.compressor).compressor
    base: Any = None
    if arguments.kind == "prefill":
        found = language_model(arguments.model, "selection")
        assert found is not None
        base = AutoModelForCausalLM.from_pretrained(found[1], dtype=model.dtype)
        base.to(model.device)
        if arguments.length > base.config.max_position_embeddings:
            return {"seconds": None, "bytes": None}
    vocabulary = model.decoder.config.vocab_size
    segment = model.segment_length

    @torch.no_grad()
    def run(ids: torch.Tensor) -> object:
        if base is not None:
            return base(ids, use_cache=True, logits_to_keep=1)[backbones.CACHE]
        if arguments.kind == "compress":
            return model.compress(ids, rate=arguments.rate)
        assert isinstance(model, RCCForCausalLM)
        for batch in ids.view(-1, segment).split(max(1, batch_tokens_on(model.device) // segment)):
            model.encoder(input_ids=batch, use_cache=False)
        return None

    ids = torch.randint(vocabulary, (1, arguments.length), device=model.device)
    cuda = model.device.type == "cuda"
    modules: list[torch.nn.Module] = [model.decoder] if base is None else [model.decoder, base]
    if isinstance(model, RCCForCausalLM) and model.encoder is not None:  # which is read when it is first asked for
        modules.append(model)
    for weight in itertools.chain.from_iterable(module.parameters() for module in modules):
        weight.sum()  # weights are mapped files: read them in, so that they count as held before and not as used
    before = torch.cuda.memory_allocated() if cuda else resident()
    run(ids[:, :2048])
    best = float("inf")
    if cuda:
        torch.cuda.synchronize()
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        context = run(ids)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        del context
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": best, "bytes": max(0, peak - before)}


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine() -> str:
    import torch
    import transformers

    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{names[0] if names else platform.processor()}, {len(names)} cores; Python {platform.python_version()},"
        f" torch {torch.__version__}, transformers {transformers.__version__}"
    )


def what_to_measure(arguments: argparse.Namespace) -> tuple[Sequence[str], str, str]:
    """Return the kinds, and what the table says of the goals beside the encoder and beside prefill."""
    from rcc import RCCConfig, checkpoints
    from rcc.model.opening import language_model
    from rcc.model.selection.names import rule_of
    from rcc.model.selection.rules import RULES

    if language_model(arguments.model, arguments.compressor) is None:
        direct = RCCConfig.load(checkpoints.resolve_model(arguments.model)).direct
        return KINDS, f" (goal {0.95 if direct else 0.95 / (1 + 1 / arguments.rate):.2f})", ""
    repeats = RULES[rule_of(arguments.compressor or "selection")].repeats
    return ("compress", "prefill"), "", f" (goal {0.45 if repeats else 0.9})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rcc-qwen2.5-0.5b")
    parser.add_argument("--compressor", help="as of `rcc compress`")
    parser.add_argument("--rate", type=int, default=8)
    parser.add_argument("--lengths", default="2048,4096,8192,16384,32768,65536")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments)))
        return

    kinds, encoder_goal, prefill_goal = what_to_measure(arguments)
    rows = [
        "| tokens | encoder, tokens/s | compress, tokens/s | prefill, tokens/s | compress / encoder"
        f"{encoder_goal} | compress / prefill{prefill_goal} | compress, peak MB | prefill, peak MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print(*rows, sep="\n", flush=True)
    for length in map(int, arguments.lengths.split(",")):
        measured: dict[str, dict[str, float | None]] = {kind: {"seconds": None, "bytes": None} for kind in KINDS}
        for kind in kinds:
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, "--length", str(length)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            measured[kind] = json.loads(done.stdout.splitlines()[-1])
        speed = {k: length / v["seconds"] if v["seconds"] else None for k, v in measured.items()}
        memory = {k: f"{v['bytes'] / 1e6:,.0f}" if v["bytes"] is not None else "–" for k, v in measured.items()}
        cells = [f"{length:,}"]
        cells += [f"{speed[k]:,.0f}" if speed[k] else "beyond its window" if k in kinds else "–" for k in KINDS]
        compress, encoder, prefill = (speed[kind] for kind in ("compress", "encoder", "prefill"))
        cells += [f"{compress / other:.2f}" if compress and other else "–" for other in (encoder, prefill)]
        cells += [memory["compress"], memory["prefill"]]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    how = f"{arguments.compressor}, " if arguments.compressor else ""
    note = f"\n{how}rate {arguments.rate}, {arguments.threads} threads, device {arguments.device}. {machine()}."
    print(note)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join([*rows, note]) + "\n")


if __name__ == "__main__":
    main()
