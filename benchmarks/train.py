"""Speed and memory of `rcc train`, beside a bare PyTorch loop over the same modules and samples.

    python benchmarks/train.py [--recipe recipes/smollm2-135m-cpu.yaml] [--steps 16] [--threads 2] [--processes 2,4]
        [--set KEY=VALUE …] [--warmstart ../shared/warmstart/warmstart.py --warmstart-data FOLDER] [--markdown OUT.md]

Each figure comes from a process of its own, one after the other: context tokens a second over the steps after the
first four, and the process's peak memory.

- loop: forward, backward, clipping and AdamW in a `for`, and nothing else.
- train: `rcc train`, with its log, progress, budget and checkpoint at the end.
- processes: `rcc train` under torchrun (DDP) with as many processes, threads and a step's tokens divided between them.
- warmstart: the model and samples of that script in a bare loop, with the same sizes (where it is at hand; FOLDER as
  its `tokens` command makes it).

    python benchmarks/train.py --parts [--blocks 6] [--steps 12] [--threads 1]

takes the step of a direct model apart instead: random weights of Qwen2.5-0.5B's shape, with so many of its 24 blocks,
which read 1,024 context tokens at 4x and learn 511 targets. The head is the whole model's, so its part of a step is
larger than there.

- all logits: the decoder's own head and torch's cross_entropy, as where the head learns.
- in chunks: the head for losses, as `rcc train` computes them where the head is frozen.
- in chunks, cut: with 48,000 of the 151,936 tokens (`run.vocabulary: data`).
- the same without LoRA: projections, sink and rate embeddings alone learn; the difference is LoRA's.

Text: `--text FILE` (default: examples/simple-susan.txt), reconstruction only, so that all do the same work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM = 4
"""Steps before the clock starts."""


def overrides(arguments: argparse.Namespace) -> list[str]:
    return [
        "stages.0.tasks={reconstruction: 1}",
        f"stages.0.max_steps={arguments.steps}",
        f"data.text=[{{path: {arguments.text}}}]",
        "data.questions=[]",
        "data.evaluation_text=[]",
        "data.evaluation_questions=[]",
        "data.held_out=0",
        "run.evaluation_samples=0",
        "run.save_minutes=0",
        "run.evaluate_minutes=0",
        *arguments.set,
    ]


def loop(arguments: argparse.Namespace) -> None:
    """The bare loop, in this process; prints JSON."""
    from rcc.runtime import allocator

    allocator.configure()
    import torch

    from rcc.training.batches import Corpora, Samples
    from rcc.training.distributed import Process
    from rcc.training.objective import Objective
    from rcc.training.recipe import Recipe
    from rcc.training.setup import load_tokenizer, make_model, precision, prepare

    recipe = Recipe.load(arguments.recipe, [*overrides(arguments), f"run.threads={arguments.threads}"])
    process = Process.join(recipe.run.device, recipe.run.threads)
    tokenizer = load_tokenizer(recipe, arguments.init)
    samples = Samples(recipe, 0, Corpora(recipe, tokenizer), tokenizer)
    model = make_model(recipe, arguments.init, process.device)
    loss = prepare(model, recipe.stages[0], recipe, process.device)
    objective = Objective(model, precision(recipe, process.device), loss=loss).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tokens = start = 0.0
    for step in range(arguments.steps):
        if step == WARM:
            start, tokens = time.perf_counter(), 0
        batch = samples.batch(step)
        batch = {k: v.to(process.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        objective(**batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch["context_ids"].numel()
    if process.device.type == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"speed": tokens / (time.perf_counter() - start)}))


def warmstart(arguments: argparse.Namespace) -> None:
    """warmstart.py's model, samples and step in a loop of the same sizes; prints JSON."""
    from rcc import checkpoints
    from rcc.runtime import allocator

    allocator.configure()
    sys.path.insert(0, str(Path(arguments.warmstart).resolve().parent))
    import numpy as np
    import torch
    import warmstart as theirs  # type: ignore[import-not-found]  # a file that the user names

    from rcc.training.recipe import Recipe

    torch.set_num_threads(arguments.threads)
    recipe = Recipe.load(arguments.recipe, overrides(arguments))
    stage, base = recipe.stages[0], str(checkpoints.resolve_base(recipe.model.encoder))
    model = theirs.RCC(base, 16).to(theirs.DEV)
    samples = theirs.Samples(base, arguments.warmstart_data)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    generator, length = np.random.default_rng(0), stage.lengths[0]
    tokens = start = 0.0
    for step in range(arguments.steps):
        if step == WARM:
            start, tokens = time.perf_counter(), 0
        rows = stage.rows(length)
        batch = theirs.to_dev(samples.batch("rec", rows, generator, length, recipe.model.config.segment_length))
        model(batch[0], stage.rates[step % len(stage.rates)], batch[1], batch[2])[0].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch[0].numel()
    print(json.dumps({"speed": tokens / (time.perf_counter() - start)}))


PARTS = ("all logits", "in chunks", "in chunks, cut", "in chunks, cut, no LoRA")


def part(arguments: argparse.Namespace) -> None:
    """Steps of a direct model in this process, as `arguments.part` says; prints JSON."""
    from rcc.runtime import allocator

    allocator.configure()
    import torch

    from rcc import RCCConfig, SideConfig
    from rcc.model.freezing import freeze
    from rcc.model.losses import TrainingLoss
    from rcc.planning import shapes
    from rcc.planning.blueprint import Blueprint
    from rcc.runtime.precision import computing
    from rcc.training.head import FrozenHead
    from rcc.training.objective import Objective

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape, dtype = shapes.find("qwen2.5-coder-0.5b"), computing(torch.bfloat16, torch.device("cpu"))
    shape.num_hidden_layers = arguments.blocks
    shape.layer_types = shape.layer_types[: arguments.blocks]
    rank = 0 if "no LoRA" in arguments.part else 16
    config = RCCConfig(1024, [4], "direct", rate_embeddings=True)
    config.share_base, config.encoder, config.decoder = True, SideConfig(rank), SideConfig(rank)
    model = Blueprint(config, shape, None, dtype).build("cpu")
    freeze(model, (), dtype)
    used = torch.arange(0, 144_000, 3)
    loss = TrainingLoss()
    if "chunks" in arguments.part:
        head = model.decoder.get_output_embeddings().weight
        loss = TrainingLoss(head=FrozenHead(head, used if "cut" in arguments.part else None))
    objective = Objective(model, dtype, loss=loss).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    start = 0.0
    for step in range(arguments.steps):
        if step == WARM:
            start = time.perf_counter()
        context, prompt = (used[torch.randint(len(used), (1, n))] for n in (1024, 512))
        objective(prompt, prompt, torch.arange(511), context, 4)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"speed": 1024 * (arguments.steps - WARM) / (time.perf_counter() - start)}))


def train(arguments: argparse.Namespace, processes: int) -> dict[str, float]:
    """`rcc train` in a process, or several, of its own."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
        sets = [*overrides(arguments), f"run.threads={max(1, arguments.threads // processes)}", "run.log_steps=4"]
        if processes > 1:
            from rcc.training.recipe import Recipe

            whole = Recipe.load(arguments.recipe, sets).stages[0].batch_tokens
            sets.append(f"stages.0.batch_tokens={whole // processes}")
        command = [sys.executable, *launcher, "-m", "rcc", "train", arguments.recipe, "--output", f"{folder}/run"]
        command += ["--init", arguments.init, *(word for value in sets for word in ("--set", value))]
        memory = child(command)[1]
        rows = [json.loads(line) for line in Path(folder, "run/log.jsonl").read_text().splitlines()]
    first, last = rows[WARM - 1], rows[-1]
    return {"speed": (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]), "bytes": memory}


def child(command: list[str]) -> tuple[str, int]:
    """Run a command → its output, and the peak memory of the largest of its processes in bytes."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout, int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=str(ROOT / "recipes/smollm2-135m-cpu.yaml"))
    parser.add_argument("--init", default="rcc-smollm2-135m")
    parser.add_argument("--text", default=str(ROOT / "examples/simple-susan.txt"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", default="2", help="of torchrun, comma-separated; - for none")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--warmstart")
    parser.add_argument("--warmstart-data")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--parts", action="store_true", help="take the step of a direct model apart")
    parser.add_argument("--blocks", type=int, default=6, help="with --parts: of the base")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["loop", "warmstart", "part"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        {"loop": loop, "warmstart": warmstart, "part": part}[arguments.kind](arguments)
        return

    def own(kind: str, *more: str) -> dict[str, float]:
        output, memory = child([sys.executable, __file__, *sys.argv[1:], "--kind", kind, *more])
        return {**json.loads(output.splitlines()[-2]), "bytes": memory}

    rows = [
        f"| | context tokens/s | of {PARTS[0] if arguments.parts else 'the loop'} | peak memory, GB |",
        "|---|---:|---:|---:|",
    ]
    print(*rows, sep="\n", flush=True)
    kinds: dict[str, Callable[[], dict[str, float]]] = {
        "loop": lambda: own("loop"),
        "train": lambda: train(arguments, 1),
    }
    if arguments.parts:
        kinds = {name: partial(own, "part", "--part", name) for name in PARTS}
    for processes in map(int, filter(str.isdigit, "" if arguments.parts else arguments.processes.split(","))):
        kinds[f"train, {processes} processes (memory of one)"] = partial(train, arguments, processes)
    if arguments.warmstart:
        kinds["warmstart"] = lambda: own("warmstart")
    base = 0.0
    for name, measure in kinds.items():
        measured = measure()
        base = base or measured["speed"]
        rows.append(
            f"| {name} | {measured['speed']:,.0f} | {measured['speed'] / base:.2f} | {measured['bytes'] / 1e9:.1f} |"
        )
        print(rows[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
