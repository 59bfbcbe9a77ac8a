"""Measure models on the same held-out samples: loss and token accuracy of every task and rate of a recipe's stage.

    python research/scripts/measure.py MODEL … --recipe recipes/smollm2-135m-cpu.yaml \\
        [--stage 0] [--samples 24] [--set K=V …]

Models are shipped names or folders. The samples depend on the recipe alone, so the columns can be compared.
"""

import argparse

from rcc.runtime import allocator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    allocator.configure()

    from transformers.utils import logging

    from rcc import RCCForCausalLM
    from rcc.training.batches import Corpora, Samples
    from rcc.training.distributed import Process
    from rcc.training.held_out import measure
    from rcc.training.objective import Objective
    from rcc.training.recipe import Recipe
    from rcc.training.setup import attention, load_tokenizer, precision

    logging.disable_progress_bar()
    recipe = Recipe.load(arguments.recipe, arguments.set)
    process = Process.join(recipe.run.device, recipe.run.threads)
    tokenizer = load_tokenizer(recipe, arguments.models[0])
    samples = Samples(recipe, arguments.stage, Corpora(recipe, tokenizer), tokenizer, "held_out")
    columns = {}
    for name in arguments.models:
        dtype, attend = precision(recipe, process.device), attention(recipe, process.device)
        model = RCCForCausalLM.from_pretrained(name, device=process.device, dtype=dtype, attn_implementation=attend)
        # some were not trained; that is to be seen, not warned of
        model.set_rates(recipe.model.config.rates, model.config.rate_embeddings)
        objective = Objective(model, dtype)
        columns[name] = dict(measure(objective, samples, arguments.samples, process.device))
    print("| task@length/rate |", " | ".join(str(name).rstrip("/").rpartition("/")[2] for name in columns), "|")
    print("|---|" + "---:|" * len(columns))
    for kind in next(iter(columns.values())):
        cells = (f"{f[kind]['loss']:.3f} ({f[kind]['accuracy']:.3f})" for f in columns.values())
        print(f"| {kind} |", " | ".join(cells), "|")
    print(f"\nloss, nats a token (token accuracy); {arguments.samples} held-out samples a row")


if __name__ == "__main__":
    main()
