"""Ten questions about the example text, asked with its context, with another text's, and with none.

    python benchmarks/example_questions.py [--model M] [--rate R] [--modes human,compress] [--markdown OUT.md]

Prints the mean F1 of each (greedy answers) and every answer. The wrong context is this repository's LICENSE; "none" is
the same decoder, LoRA included, that reads the question alone.
"""

import argparse
import json
from pathlib import Path

from rcc import RCCForCausalLM, allocator, load_tokenizer, prompting
from rcc.evaluation.metrics import f1

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rcc-smollm2-135m")
    parser.add_argument("--rate", type=int, help="default: the lowest trained one that fits")
    parser.add_argument("--modes", default="human,reconstruct,compress")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    allocator.configure()
    model = RCCForCausalLM.from_pretrained(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    text = (ROOT / "examples/simple-susan.txt").read_text(encoding="utf-8")
    lines = (ROOT / "examples/simple-susan.questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ids = prompting.token_ids(tokenizer, text)
    rate = arguments.rate or model.fitting_rate([ids.shape[1]])
    contexts = {
        "right": model.compress(ids, rate=rate),
        "wrong": model.compress(prompting.token_ids(tokenizer, (ROOT / "LICENSE").read_text()), rate=rate),
        "none": None,
    }
    modes = arguments.modes.split(",")
    table = [
        f"| context (rate {rate}) | {' | '.join(f'F1, {mode}' for mode in modes)} |",
        "|---|" + "---:|" * len(modes),
    ]
    answers = ["| question | accepted | " + " | ".join(f"{mode}, right context" for mode in modes) + " |"]
    answers.append("|---|---|" + "---|" * len(modes))
    given: dict[str, list[str]] = {}
    for name, context in contexts.items():
        cells = []
        for mode in modes:
            if context is None and mode != "human":  # without a context only the decoder can be asked
                cells.append("–")
                continue
            score = 0.0
            for row in rows:
                prompt = prompting.build(row["question"], mode)
                answer = prompting.ask(model, tokenizer, context, prompt, max_new_tokens=64)[1]
                score += f1(answer, row["answers"]) / len(rows)
                if name == "right":
                    given.setdefault(row["question"], []).append(answer)
            cells.append(f"{score:.3f}")
        table.append(f"| {name} | {' | '.join(cells)} |")
        print(table[-1], flush=True)
    for row in rows:
        cells = [row["question"], row["answers"][0], *given[row["question"]]]
        answers.append("| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |")
    result = "\n".join([*table, "", *answers]) + "\n"
    print(f"\n{result}")
    if arguments.markdown:
        arguments.markdown.write_text(result, encoding="utf-8")


if __name__ == "__main__":
    main()
