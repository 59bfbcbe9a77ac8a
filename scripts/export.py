"""Write the model that a run's newest checkpoint holds, while the run is not finished: an ordinary model folder.

python scripts/export.py RUN OUT [--init MODEL]        MODEL: what the run was started from, if anything
"""

import argparse
from pathlib import Path

import torch

from rcc.training import checkpointing
from rcc.training.recipe import Recipe
from rcc.training.trainer import Place, learned, load_state, make_model, put


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--init")
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.run / "recipe.yaml")
    stages = [arguments.run / "stages" / f"{i}-{stage.name}" for i, stage in enumerate(recipe.stages, 1)]
    found = [c for stage in reversed(stages) if (c := checkpointing.newest(stage / "checkpoints"))]
    if not found:
        parser.exit(1, f"{arguments.run} holds no whole checkpoint yet\n")
    model = make_model(recipe, arguments.init, Place(torch.device("cpu"), 0, 1))
    state = load_state(found[0])
    put(learned(model), state["weights"], found[0])
    model.save_pretrained(arguments.out, dtype=getattr(torch, recipe.run.dtype))
    print(f"{arguments.out}: {found[0].parent.parent.name}, {found[0].name}, {state['tokens'] / 1e6:.2f}M tokens")


if __name__ == "__main__":
    main()
