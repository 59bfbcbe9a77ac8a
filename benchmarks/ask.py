"""Asking a stored context, beside the plain base after the very same KV cache.

    python benchmarks/ask.py [--model M] [--positions 4033] [--tokens 32] [--repeats 3] [--threads 2]

Three tables of one run:

- the command line: `rcc ask CONTEXT QUESTION` from the start of the process to the first character of the answer, and
  beside it processes that import torch, and torch and what of transformers the model needs, and end.
- a token and the first token: the model as the command line loads it (adapters merged), with separate adapters, and the
  base by transformers' own `generate` with a `DynamicCache` of the same keys and values. They take turns.
- many questions of one context in one batch: tokens a second.

The context has the shape and precision of a real one; its keys and values are those of 1,024 tokens of random text,
repeated, because their values change no time. The fastest of `--repeats` counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from rcc import CompressedContext, RCCForCausalLM

QUESTION = "Who is the young woman that the story is about?"
BATCHES = (1, 4, 16)
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": 2**31 - 1, "pad_token_id": 0}
"""Of `generate`: every answer is as long as it may be."""
IMPORTS = {
    "import torch": "import torch",
    "import torch, transformers' model": "import torch\nfrom transformers.models.{family} import modeling_{family}",
}


def fastest(repeats: int, **runs: Callable[[], object]) -> dict[str, float]:
    """Return the least seconds of each of some functions, which take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def until_first_byte(command: list[str], environment: dict[str, str]) -> None:
    """Run a command until it writes to standard output, or ends."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.kill()


def show(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, and print it."""
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    table = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
    print(table + "\n", flush=True)
    return table


def make_context(model: RCCForCausalLM, positions: int) -> CompressedContext:
    """Return a context of so many positions, in the precision that contexts are kept in."""
    import torch

    from rcc.context.cache import KVBlocks

    ids = torch.randint(1000, (1, 1024), generator=torch.Generator().manual_seed(0))
    rate = 8 if 8 in model.config.rates else model.config.rates[0]
    short = model.compress(ids, rate=rate)
    index = torch.arange(positions) % len(short)
    pairs = (short.layer(i) for i in range(len(short.blocks.layers)))
    layers = [(keys[:, :, index], values[:, :, index]) for keys, values in pairs]
    piece = replace(short.pieces[0][0], tokens=positions * rate, positions=positions)
    context = replace(short, blocks=KVBlocks(layers, positions, True), length=positions, pieces=((piece,),))
    return context.to(dtype=model.decoder.config.dtype)


def command_line(arguments: argparse.Namespace, context: Path, family: str) -> str:
    """Time `rcc ask` beside what it has to import; return the table."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    ask = [sys.executable, "-m", "rcc", "ask", str(context), QUESTION, "--model", arguments.model]
    commands = {"rcc ask, to the first character": ask}
    commands |= {name: [sys.executable, "-c", code.format(family=family)] for name, code in IMPORTS.items()}
    runs = {name: partial(until_first_byte, command, environment) for name, command in commands.items()}
    seconds = fastest(arguments.repeats, **runs)
    return show("The command line", ["", "seconds"], [[name, f"{s:.2f}"] for name, s in seconds.items()])


def answers(arguments: argparse.Namespace, model: RCCForCausalLM, held: CompressedContext, ids: Tensor) -> str:
    """Time the first and further tokens of answers beside the plain base's; return the table."""
    import torch
    from transformers import DynamicCache

    from rcc import RCCForCausalLM, checkpoints
    from rcc.model import backbones

    device = model.device
    apart = RCCForCausalLM.from_pretrained(arguments.model, device=device, dtype=model.dtype)
    folder = checkpoints.resolve_base(model.config.base["decoder"].source)
    base: Any = checkpoints.load_backbone(folder, True, dtype=model.dtype).eval()
    base.to(device)
    layers = [model.as_cache(held).layer(i) for i in range(len(held.blocks.layers))]
    mask = torch.ones(1, layers[0][0].shape[2] + ids.shape[1], dtype=torch.long, device=device)

    def plain(tokens: int) -> None:
        cache = DynamicCache()
        for i, (keys, values) in enumerate(layers):
            cache.update(keys, values, i)
        options = {backbones.CACHE: cache, "attention_mask": mask, "max_new_tokens": tokens}
        base.generate(ids, **options, **OPTIONS)

    def ours(compressor: RCCForCausalLM, tokens: int) -> None:
        compressor.generate(ids, context=held, max_new_tokens=tokens, **OPTIONS)

    kinds: dict[str, Callable[[int], None]] = {
        "rcc": partial(ours, model),
        "rcc, separate adapters": partial(ours, apart),
        "plain base": plain,
    }
    runs = {f"{kind} {n}": partial(ask, n) for n in (1, 1 + arguments.tokens) for kind, ask in kinds.items()}
    for run in runs.values():
        run()
    seconds = fastest(arguments.repeats, **runs)
    first = {kind: seconds[f"{kind} 1"] for kind in kinds}
    each = {kind: (seconds[f"{kind} {1 + arguments.tokens}"] - first[kind]) / arguments.tokens for kind in kinds}
    rows = []
    for kind in kinds:
        ratios = [f"{times[kind] / times['plain base']:.2f}" for times in (first, each)]
        rows.append([kind, f"{first[kind]:.3f}", ratios[0], f"{1e3 * each[kind]:.1f}", ratios[1]])
    header = ["", "first token, s", "of the base's", "each further token, ms", "of the base's"]
    return show(f"A question of {arguments.positions:,} positions", header, rows)


def batches(arguments: argparse.Namespace, model: RCCForCausalLM, held: CompressedContext, ids: Tensor) -> str:
    """Time many questions of one context in one batch; return the table."""

    def ask(n: int) -> None:
        model.generate(ids.expand(n, -1), context=held.expand(n), max_new_tokens=arguments.tokens, **OPTIONS)

    seconds = fastest(arguments.repeats, **{str(n): partial(ask, n) for n in BATCHES})
    rows = [[n, f"{s:.2f}", f"{int(n) * arguments.tokens / s:.1f}"] for n, s in seconds.items()]
    return show("Many questions in one batch", ["questions", "seconds", "tokens/s, all together"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rcc-smollm2-135m")
    parser.add_argument("--positions", type=int, default=4033)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)

    from rcc.runtime import allocator

    allocator.configure()
    import torch
    from compress import machine

    from rcc import Engine
    from rcc.text.prompting import build
    from rcc.text.tokens import prompt_ids

    torch.set_num_threads(arguments.threads)
    engine = Engine.load(arguments.model, arguments.device)
    model = engine.rcc
    context = make_context(model, arguments.positions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "context.rcc"
        context.save(path)
        tables = [command_line(arguments, path, model.decoder.config.model_type)]
    ids = prompt_ids(engine.tokenizer, build(QUESTION, "human").decoder_parts).to(model.device)
    held = context.to(model.device, model.dtype)
    tables += [answers(arguments, model, held, ids), batches(arguments, model, held, ids)]
    note = f"{arguments.model}, {model.dtype}, {arguments.threads} threads, {arguments.device}. {machine()}."
    print(note)
    if arguments.markdown:
        arguments.markdown.write_text("\n\n".join([*tables, note]) + "\n")


if __name__ == "__main__":
    main()
