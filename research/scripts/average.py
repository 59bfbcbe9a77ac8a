"""Average the own weights (LoRA, projections) of models that were trained from the same start into one model.

    python research/scripts/average.py OUT MODEL MODEL … [--weights 1,1,2] [--rates 4,8] [--name NAME]

Runs that begin at the same weights and differ in samples or settings end near each other; their mean is often better
than each (Wortsman et al. 2022, arXiv 2203.05482). Configuration and base are the first model's, and so are the rates
unless `--rates` names others.
"""

import argparse
from pathlib import Path
from typing import Any

from rcc import RCCForCausalLM
from rcc.text.counts import parse_counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--weights", help="one a model (default: all the same)")
    parser.add_argument("--rates", help="such as 4,8 (default: the first model's)")
    parser.add_argument("--name")
    arguments = parser.parse_args()
    weights = [float(w) for w in arguments.weights.split(",")] if arguments.weights else [1.0] * len(arguments.models)
    if len(weights) != len(arguments.models):
        parser.error(f"{len(weights)} weights for {len(arguments.models)} models")
    mean: dict[str, Any] = {}
    model = None
    for name, weight in zip(arguments.models, weights, strict=True):
        loaded = RCCForCausalLM.from_pretrained(name)
        first = (model or loaded).config
        rates = parse_counts(arguments.rates, "--rates") if arguments.rates else first.rates
        loaded.set_rates(rates, first.rate_embeddings)
        for key, tensor in loaded.own_state_dict().items():
            mean[key] = mean.get(key, 0) + tensor.float() * (weight / sum(weights))
        model = model or loaded
    assert model is not None
    model.load_own_state_dict(mean)
    model.config.name = arguments.name or model.config.name
    model.save_pretrained(arguments.out)
    print(f"{arguments.out}: the mean of {len(weights)} models, fingerprint {model.fingerprint[:12]}")


if __name__ == "__main__":
    main()
