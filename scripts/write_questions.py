"""Have a small model write questions about texts, with answers that occur in them, to train on.

    python scripts/write_questions.py learn QUESTIONS.jsonl WRITER.jsonl [--include clara_wiki,fairytaleqa]
    rcc train recipes/smollm2-135m-plain.yaml --output runs/writer --set "data.questions=[{path: WRITER.jsonl}]" \\
        --set "stages.0.tasks={instruction: {modes: {human: 1}, distractors: 0}}" \\
        --set "stages.0.lengths=[128]" --set stages.0.target_tokens=80
    python scripts/write_questions.py write TEXTS.jsonl OUT.jsonl --writer runs/writer [--field context] [--each 8]

`learn` turns rows as for `rcc train` (context, question, answers; .xz too) into training data from which a base learns
to write and to answer questions about a sentence and what precedes it. `write` cuts texts into contexts, picks names,
numbers and phrases in them by rule, has the writer ask for each, and keeps a question if the writer, reading the
passage, gives exactly that answer. Run again, it continues.
"""

import argparse
import json
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rcc.runtime import allocator
from rcc.text.tokens import token_ids
from rcc.training.tasks.cloze import askable

ASK = "Write a question about this, to which the answer is “{answer}”."
SENTENCE_END = re.compile(r"[.!?][\"”’)]*\s+|\n")
BEFORE, AFTER = 300, 200
"""Characters that a passage has before its answer at least, and after it at most."""


def rows_of(path: Path, include: str | None) -> Iterator[dict[str, Any]]:
    wanted = tuple(include.split(",")) if include else ("",)
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if str(row["id"]).startswith(wanted):
                yield row


def passage_of(text: str, start: int, end: int) -> str:
    """The sentence that holds text[start:end], and those before it."""
    begins = [m.end() for m in SENTENCE_END.finditer(text, 0, start)]
    first = max((b for b in begins if b <= start - BEFORE), default=0)
    stop = SENTENCE_END.search(text, end - 1)
    return text[first : min(stop.end() if stop else len(text), end + AFTER)].strip()


def contexts_of(text: str, size: int) -> Iterator[str]:
    """Whole sentences, up to `size` characters of them at once."""
    begin = 0
    while begin < len(text):
        ends = [m.end() for m in SENTENCE_END.finditer(text, begin, begin + size)] if begin + size < len(text) else []
        end = ends[-1] if ends else begin + size
        if len(piece := text[begin:end].strip()) > size // 4:
            yield piece
        begin = end


def learn(arguments: argparse.Namespace) -> None:
    kept = 0
    with arguments.out.open("w", encoding="utf-8") as out:
        for row in rows_of(arguments.source, arguments.include):
            text, question = row["context"], row["question"]
            answer = (row["answers"] if isinstance(row["answers"], str) else row["answers"][0]).removesuffix(".")
            if len(answer.split()) > 8 or text.count(answer) != 1:
                continue
            start = text.index(answer)
            passage = passage_of(text, start, start + len(answer))
            if len(passage) > 3 * BEFORE:
                continue
            kept += 1
            for kind, asked, said in (("write", ASK.format(answer=answer), question), ("read", question, answer)):
                new = {"id": f"{kind}/{row['id']}", "context": passage, "question": asked, "answers": [said]}
                out.write(json.dumps(new, ensure_ascii=False) + "\n")
    print(f"{arguments.out}: {kept:,} questions to write and to answer")


def write(arguments: argparse.Namespace) -> None:
    allocator.configure()

    import torch

    from rcc import RCCForCausalLM, load_tokenizer
    from rcc.text import prompting

    device = "cuda" if torch.cuda.is_available() else "cpu"
    writer = RCCForCausalLM.from_pretrained(arguments.writer, dtype=torch.bfloat16).to(device).eval()
    tokenizer = load_tokenizer(arguments.writer)
    end = token_ids(tokenizer, prompting.END, allow_special=True)[0, -1].item()

    def padded(texts: list[str], side: str) -> Any:
        return tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False).to(
            device
        )

    def encode(pairs: list[tuple[str, str]]) -> Any:
        asked = [prompting.HEADER + text + prompting.SEPARATOR + question + prompting.TURN for text, question in pairs]
        return padded(asked, "left")

    @torch.no_grad()
    def ask(picked: list[tuple[str, str]]) -> list[str]:
        ids = encode([(passage, ASK.format(answer=answer)) for passage, answer in picked])
        decoder: Any = writer.decoder
        wrote = decoder.generate(
            **ids, max_new_tokens=40, do_sample=False, eos_token_id=end, pad_token_id=end, use_cache=True
        )
        return [
            text.split(prompting.END)[0].strip() for text in tokenizer.batch_decode(wrote[:, ids.input_ids.shape[1] :])
        ]

    @torch.no_grad()
    def answered(picked: list[tuple[str, str]], questions: list[str]) -> list[bool]:
        """Whether greedy writing gives just the answer: its tokens are each the likeliest."""
        prompts = encode([(passage, question) for (passage, _), question in zip(picked, questions, strict=True)])
        targets = padded([answer + prompting.END for _, answer in picked], "right")
        ids = torch.cat([prompts.input_ids, targets.input_ids], 1)
        mask = torch.cat([prompts.attention_mask, targets.attention_mask], 1)
        order = (mask.cumsum(1) - 1).clamp(min=0)
        n = targets.input_ids.shape[1]
        logits = writer.decoder(input_ids=ids, attention_mask=mask, position_ids=order, logits_to_keep=n + 1).logits
        right = (logits[:, :-1].argmax(-1) == targets.input_ids) | (targets.attention_mask == 0)
        return [bool(row) for row in right.all(1)]

    progress = arguments.out.with_suffix(".done")  # contexts read so far
    done = int(progress.read_text()) if progress.exists() else 0
    texts = {row[arguments.field]: str(row["id"]) for row in rows_of(arguments.source, arguments.include)}
    contexts = [(name, piece) for text, name in texts.items() for piece in contexts_of(text, arguments.size)]
    order = np.random.default_rng(arguments.seed).permutation(len(contexts))[: arguments.limit]
    asked = kept = 0
    with arguments.out.open("a", encoding="utf-8") as out:
        for at in range(done, len(order), arguments.batch):
            picked: list[tuple[str, str]] = []
            of: list[int] = []
            for number in order[at : at + arguments.batch]:
                rng, text = np.random.default_rng([arguments.seed, number]), contexts[number][1]
                answers = set()
                for _ in range(arguments.each):
                    _, start, stop, _ = askable(text, rng, phrases=True)
                    if text[start:stop] not in answers:
                        answers.add(text[start:stop])
                        picked.append((passage_of(text, start, stop), text[start:stop]))
                        of.append(number)
            # of like length together: padding costs as much as text
            ranked = sorted(range(len(picked)), key=lambda i: len(picked[i][0]))
            for start in range(0, len(ranked), 32):
                chosen = ranked[start : start + 32]
                batch = [picked[i] for i in chosen]
                questions = ask(batch)
                for i, question, good in zip(chosen, questions, answered(batch, questions), strict=True):
                    (name, text), answer = contexts[of[i]], picked[i][1]
                    asked += 1
                    if good and question.endswith("?") and answer.lower() not in question.lower():
                        kept += 1
                        row = {"id": f"written/{name}", "context": text, "question": question, "answers": [answer]}
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            progress.write_text(str(at + arguments.batch))
            read = min(at + arguments.batch, len(order))
            said = f"{read:,} of {len(order):,} contexts, {kept:,} of {asked:,} questions kept"
            print(f"\r{said}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("learn", learn), ("write", write)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("source", type=Path)
        command.add_argument("out", type=Path)
        command.add_argument("--include", help="only rows whose id begins with one of these: a/,b/")
    command.add_argument("--writer", required=True)
    command.add_argument("--field", default="text", help="of TEXTS")
    command.add_argument("--size", type=int, default=2000, help="characters of a context at most")
    command.add_argument("--each", type=int, default=8, help="questions to try for a context")
    command.add_argument("--batch", type=int, default=16, help="contexts between two notes of what is done")
    command.add_argument("--limit", type=int, help="contexts")
    command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
