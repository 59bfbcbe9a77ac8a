"""Peak memory of one training step against context length, with the encoder learning and with it frozen.

    python benchmarks/train_memory.py [--frozen 4096,16384,32768] [--learning 2048,4096,8192] [--rate 32] [--markdown F]
        [--checkpointing]

One context of each length, 256 decoder tokens, the default model, each figure in a process of its own: the process's
peak less what it held once the model was loaded, what torch allocated in a second such step, and what
`rcc plan` and `rcc train --dry-run` estimate: activations, and the gradients beside them. A frozen encoder's
vectors are computed without gradients, in chunks: what grows with the context is the decoder's prefix, one position for
every `rate` tokens.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "rcc-smollm2-135m"


def measure(arguments: argparse.Namespace) -> None:
    """One step of one kind and length, in this process; prints JSON."""
    from rcc.runtime import allocator

    allocator.configure()
    import torch

    from rcc.planning.activations import Batch, activations
    from rcc.runtime import memory
    from rcc.training.batches import Kind
    from rcc.training.collate import collate
    from rcc.training.distributed import Process
    from rcc.training.objective import Objective
    from rcc.training.plan import blueprint
    from rcc.training.recipe import Recipe
    from rcc.training.setup import make_model, prepare
    from rcc.training.tasks.base import Sample

    frozen = arguments.kind == "frozen"
    recipe = Recipe.load(
        ROOT / "recipes/smollm2-135m-cpu.yaml",
        [
            "stages.0.tasks={reconstruction: 1}",
            f"data.text=[{{path: {ROOT / 'examples/simple-susan.txt'}}}]",
            f"model.rates=[{arguments.rate}]",
            f"stages.0.lengths=[{arguments.length}]",
            f"stages.0.frozen=[{'encoder' if frozen else ''}]",
            f"stages.0.gradient_checkpointing={str(arguments.checkpointing).lower()}",
            f"run.threads={arguments.threads}",
            "run.attention=sdpa",
        ],
    )
    device = Process.join(recipe.run.device, recipe.run.threads).device
    model = make_model(recipe, MODEL, device)
    loss = prepare(model, recipe.stages[0], recipe, device)
    objective = Objective(model, torch.bfloat16, loss=loss).train()
    text = torch.randint(1000, 40000, (arguments.length,)).numpy()
    sample = Sample((text,), text[:10], text[10:256], "reconstruction")
    batch = collate([sample], 0)
    for weight in model.parameters():
        weight.sum()  # weights are mapped files: read them in, so that they count as held before
    before = memory.resident()
    kind = str(Kind("reconstruction", arguments.length, arguments.rate))

    def step() -> None:
        objective(**batch, rate=arguments.rate, kind=kind)["loss"].backward()

    step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gradients = {name: p.grad.nbytes for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    allocated = memory.allocated(step)
    shape = Batch(1, arguments.length, arguments.rate, 256)
    computed = activations(blueprint(recipe, MODEL), shape, recipe.stages[0].frozen)
    estimate = (computed.checkpointed if arguments.checkpointing else computed.kept) + sum(gradients.values())
    learning = sum(name.startswith("encoder.") for name in gradients)
    print(json.dumps({"sizes": [peak - before, allocated, estimate], "encoder_gradients": learning}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frozen", default="4096,16384,32768")
    parser.add_argument("--learning", default="2048,4096,8192")
    parser.add_argument("--rate", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--kind", choices=["frozen", "learning"], help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        measure(arguments)
        return
    rows = ["| encoder | context tokens | process, GB | torch, GB | estimated, GB | encoder gradients |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    print(*rows, sep="\n", flush=True)
    for kind in ("learning", "frozen"):
        for length in map(int, getattr(arguments, kind).split(",")):
            command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, "--length", str(length)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            figures = json.loads(done.stdout.splitlines()[-1])
            sizes = " | ".join(f"{size / 1e9:.2f}" for size in figures["sizes"])
            rows.append(f"| {kind} | {length:,} | {sizes} | {figures['encoder_gradients']} |")
            print(rows[-1], flush=True)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
