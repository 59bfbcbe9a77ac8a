"""Ten questions about the example book, asked of the part around each answer, of its chapter, and of the whole book.

    python benchmarks/example_questions.py [--model M] [--scopes 1900,chapter,book] [--rates 1,2,4,8] [--controls]
                                           [--markdown OUT.md]

Prints how many of ten answers (greedy, mode `human`) are right, that is reach F1 0.5, their mean F1, and every answer.
A scope is a number of tokens around the answer, `chapter` or `book`. A rate at which a scope does not fit the window
is left out. `--controls` asks the wrong text (this repository's LICENSE) and no text too.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rcc import CompressedContext, RCCForCausalLM, WindowError, load_tokenizer
from rcc.evaluation.metrics import f1
from rcc.model import answering
from rcc.runtime import allocator
from rcc.runtime.precision import computing
from rcc.text import prompting
from rcc.text.tokens import decode, token_ids

ROOT = Path(__file__).resolve().parent.parent
RIGHT = 0.5


def part(text: str, row: dict[str, Any], scope: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the part of the book that a question is asked of."""
    at = text.index(row["where"])
    if scope == "book":
        return text
    if scope == "chapter":
        second = text.index("CHAPTER II")
        return text[:second] if at < second else text[second:]
    before = token_ids(tokenizer, text[:at])[0]
    after = token_ids(tokenizer, text[at:])[0]
    half = int(scope) // 2
    after = after[: int(scope) - min(half, len(before))]
    return decode(tokenizer, before[-half:]) + decode(tokenizer, after)


def answers(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    texts: list[str | None],
    rate: int,
) -> Iterator[str]:
    """Yield the answer to each question, asked of its own text."""
    contexts: dict[str, CompressedContext] = {}
    for row, text in zip(rows, texts, strict=True):
        if text is not None and text not in contexts:
            contexts = {text: model.compress(token_ids(tokenizer, text), rate=rate)}
        context = None if text is None else contexts[text]
        yield answering.ask(model, tokenizer, context, prompting.build(row["question"], "human"), max_new_tokens=48)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="rcc-qwen2.5-0.5b")
    parser.add_argument("--scopes", default="1900,chapter,book")
    parser.add_argument("--rates", default="1,2,4,8")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    arguments = parser.parse_args()
    allocator.configure()
    model = RCCForCausalLM.from_pretrained(arguments.model)
    model.to(computing(model.dtype, "cpu"))
    tokenizer = load_tokenizer(arguments.model)
    text = (ROOT / "examples/simple-susan.txt").read_text(encoding="utf-8")
    lines = (ROOT / "examples/simple-susan.questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    table = ["| asked of | rate | right | mean F1 |", "|---|---:|---:|---:|"]
    details = ["| question | accepted | asked of | answer |", "|---|---|---|---|"]

    def measure(scope: str, rate: int, texts: list[str | None]) -> None:
        try:
            given = list(answers(model, tokenizer, rows, texts, rate))
        except WindowError:
            return
        scores = [f1(answer, row["answers"]) for answer, row in zip(given, rows, strict=True)]
        right = sum(score >= RIGHT for score in scores)
        table.append(f"| {scope} | {rate if texts[0] else '–'} | {right} | {sum(scores) / len(rows):.3f} |")
        print(table[-1], flush=True)
        for row, answer in zip(rows, given, strict=True):
            cells = [row["question"], row["answers"][0], f"{scope}, {rate}×", answer]
            details.append("| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in cells) + " |")

    for scope in arguments.scopes.split(","):
        name = f"{scope} tokens around the answer" if scope.isdigit() else f"its {scope}"
        for rate in map(int, arguments.rates.split(",")):
            measure(name, rate, [part(text, row, scope, tokenizer) for row in rows])
    if arguments.controls:
        measure("another text", 4, [(ROOT / "LICENSE").read_text()] * len(rows))
        measure("no text", 4, [None] * len(rows))
    result = "\n".join([*table, "", *details[:2], *sorted(details[2:])]) + "\n"
    print(f"\n{result}")
    if arguments.markdown:
        arguments.markdown.write_text(result, encoding="utf-8")


if __name__ == "__main__":
    main()
