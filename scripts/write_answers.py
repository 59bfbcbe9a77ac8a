"""Have a base answer questions from the plain passages, as targets to train on instead of the data's own answers.

    python scripts/write_answers.py QUESTIONS.jsonl OUT.jsonl [--base smollm2-135m-instruct] [--keep-f1 0.5]

Rows are as for `rcc train` (context, question, answers; .xz too). OUT gets them with the base's answer as `answers` and
the data's as `reference`; with --keep-f1, only rows where the two agree at least that far. Run again, it continues.
"""

import argparse
import json
import lzma
import sys
from pathlib import Path
from typing import Any

from rcc.runtime import allocator
from rcc.text.tokens import token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--keep-f1", type=float, default=0.0)
    parser.add_argument("--max-context", type=int, default=2000, help="leave out longer passages (characters)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    allocator.configure()

    import torch
    from transformers import AutoModelForCausalLM

    from rcc import checkpoints
    from rcc.evaluation.metrics import f1
    from rcc.text import prompting

    folder = checkpoints.resolve_base(arguments.base)
    tokenizer = checkpoints.load_tokenizer(folder)
    tokenizer.padding_side = "left"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(device).eval()
    end = token_ids(tokenizer, prompting.END, allow_special=True)[0, -1].item()

    progress = arguments.out.with_suffix(".done")  # rows read so far: a row may be read and not kept
    done = int(progress.read_text()) if progress.exists() else 0
    opened = lzma.open if arguments.questions.suffix == ".xz" else open
    with opened(arguments.questions, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: arguments.limit]
    with arguments.out.open("a", encoding="utf-8") as out:
        for start in range(done, len(rows), arguments.batch):
            batch = [r for r in rows[start : start + arguments.batch] if len(r["context"]) <= arguments.max_context]
            if batch:
                asked = [prompting.HEADER + r["context"] + "\n\n" + r["question"] + prompting.TURN for r in batch]
                ids = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
                with torch.no_grad():
                    wrote = model.generate(**ids, max_new_tokens=64, do_sample=False, eos_token_id=end, pad_token_id=0)
                for row, ids_of in zip(batch, wrote[:, ids.input_ids.shape[1] :], strict=True):
                    answer = str(tokenizer.decode(ids_of)).split(prompting.END)[0].strip()
                    if answer and f1(answer, row["answers"]) >= arguments.keep_f1:
                        out.write(json.dumps({**row, "answers": [answer], "reference": row["answers"]}) + "\n")
            out.flush()
            progress.write_text(str(start + arguments.batch))
            print(f"\r{min(start + arguments.batch, len(rows)):,} of {len(rows):,} rows", end="", file=sys.stderr)
    print(file=sys.stderr)


if __name__ == "__main__":
    main()
