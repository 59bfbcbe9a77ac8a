"""Add rows to the folder of an `rcc eval qa`: the same questions, answered by the same base with kvpress's presses.

    python scripts/kvpress_rows.py DIR [--press snapkv --press knorm …] [--rates 4,8] [--limit N] [--env ENV]

kvpress needs an older transformers than rcc: its environment is made at first use (1.4 GB, some minutes). A press keeps
as many positions as a context compressed at that rate has, and the chat's header besides. The questions are those of
DIR; `--limit` means the same as there. Interrupted, the same command continues.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvpress_answers import PRESSES, answers

from rcc import RCCConfig, RCCError, checkpoints, load_tokenizer
from rcc.cli.console import progress
from rcc.evaluation.qa import run as qa
from rcc.evaluation.qa.questions import Question, choose
from rcc.evaluation.qa.reading import reopen
from rcc.evaluation.qa.settings import BY
from rcc.evaluation.qa.table import QAReport
from rcc.evaluation.qa.texts import Texts
from rcc.evaluation.results import Case, Results, Skipped
from rcc.evaluation.results import load as load_results
from rcc.runtime.precision import has_bfloat16
from rcc.text import prompting
from rcc.text.chat import chat_form
from rcc.text.counts import parse_counts
from rcc.text.prompting import with_hint
from rcc.text.tokens import prompt_ids, token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--press", action="append", help=f"{', '.join(PRESSES)}; may be repeated (default: snapkv)")
    parser.add_argument("--model", default="rcc-smollm2-135m", help="the model of the evaluation, for its base")
    parser.add_argument("--rates", help="such as 4,8 (default: those that the model learnt)")
    parser.add_argument("--limit", type=int, default=100, help="questions of each set")
    parser.add_argument("--env", type=Path, help="kvpress's environment (default: in rcc's home)")
    arguments = parser.parse_args()
    try:
        add(arguments)
    except RCCError as error:
        print(f"kvpress_rows: {error}", file=sys.stderr)
        sys.exit(2)


def add(arguments: argparse.Namespace) -> None:
    """Ask what is missing, and write the folder's table anew."""
    data, _ = load_results(arguments.folder)
    settings = data["settings"]
    results = Results("qa", settings, arguments.folder, cluster="text")
    asked, notes = reopen(settings)
    folder = checkpoints.resolve_model(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    base = checkpoints.resolve_base(RCCConfig.load(folder).base["decoder"].source, relative_to=folder)
    rates = parse_counts(arguments.rates, "--rates") if arguments.rates else settings["trained_rates"]
    text = Texts(asked, tokenizer, settings["pad_to"], settings["seed"])
    chat = chat_form(tokenizer)
    header = token_ids(tokenizer, chat.header, allow_special=True)[0]
    end = token_ids(tokenizer, prompting.END, allow_special=True)[0].tolist()

    def request(question: Question, ids: torch.Tensor, press: str, rate: int) -> dict[str, Any]:
        prompt = chat.prompt(with_hint(question.question, settings["hint"]))
        return {
            "id": f"{question.id} at {rate}",
            "press": press,
            "context": torch.cat([header, ids]).tolist(),
            "question": prompt_ids(tokenizer, prompt.decoder_parts)[0].tolist(),
            "keep": -(-len(ids) // rate) + len(header),
            "max_new_tokens": question.tokens or settings["max_new_tokens"],
        }

    def measure(question: Question, tokens: int) -> dict[str, Any]:
        answer = next(answered)
        if "error" in answer:
            raise Skipped(answer["error"])
        positions = answer["positions"] - len(header)
        return {
            **qa.score(question, str(tokenizer.decode(answer["tokens"])).strip()),
            "context_tokens": tokens,
            "positions": positions,
            "bytes": answer["bytes"] // answer["positions"] * positions,
            "cut": 0.0,
            "compress_seconds": answer["compress_seconds"],
            "first_token_seconds": answer["first_token_seconds"],
        }

    done = [row["key"] for row in results.rows]
    cases, requests = [], []
    for question in choose(asked, arguments.limit, settings["seed"]):
        ids = text(question)
        for press in arguments.press or ["snapkv"]:
            for rate in rates:
                key = qa.key_of(question, f"kvpress {press}", "", rate, len(ids))
                if key not in done:
                    requests.append(request(question, ids, press, rate))
                    cases.append(Case(key, partial(measure, question, len(ids))))
    dtype = "auto" if has_bfloat16() else "float32"  # as `rcc eval qa` computes here
    answered = answers(requests, base, arguments.env, dtype=dtype, stop=end)
    with progress("asking", len(cases), "answers") as advance:
        results.collect(cases, advance)
    report = QAReport(results)
    table = report.table()
    results.notes = [*report.notes(), *notes]
    results.finish(BY, table, report.plots(), report.more())
    print(table)


if __name__ == "__main__":
    main()
