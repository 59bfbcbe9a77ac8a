"""Write the model that a run's newest checkpoint holds, while the run is not finished: an ordinary model folder.

    python research/scripts/export.py RUN OUT [--init MODEL] [--mean N]

MODEL is what the run was started from, if anything. `--mean` takes the mean of the newest N checkpoints' weights, which
is better than the last where the learning rate is still high (`run.keep` says how many there are).
"""

import argparse
from pathlib import Path

import torch

from rcc.model.freezing import learned
from rcc.training import checkpointing
from rcc.training.checkpointing import load_state
from rcc.training.recipe import Recipe
from rcc.training.setup import copy_weights, make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--init")
    parser.add_argument("--mean", type=int, default=1)
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.run / "recipe.yaml")
    stages = [arguments.run / "stages" / f"{i}-{stage.name}" for i, stage in enumerate(recipe.stages, 1)]
    checkpoints = next(
        (c for stage in reversed(stages) if (c := list(checkpointing.whole(stage / "checkpoints")))), None
    )
    if checkpoints is None:
        parser.exit(1, f"{arguments.run} holds no whole checkpoint yet\n")
    if not 1 <= arguments.mean <= len(checkpoints):
        parser.exit(2, f"--mean: its last stage has {len(checkpoints)} checkpoints\n")
    model = make_model(recipe, arguments.init, torch.device("cpu"))
    states = [load_state(checkpoint) for checkpoint in checkpoints[: arguments.mean]]
    weights = {name: sum(s["weights"][name] for s in states) / len(states) for name in states[0]["weights"]}
    copy_weights(learned(model), weights, checkpoints[0])
    model.save_pretrained(arguments.out, dtype=getattr(torch, recipe.run.dtype))
    newest, tokens = checkpoints[0], states[0]["tokens"]
    print(f"{arguments.out}: {newest.parent.parent.name}, {newest.name}, {tokens / 1e6:.2f}M tokens")


if __name__ == "__main__":
    main()
