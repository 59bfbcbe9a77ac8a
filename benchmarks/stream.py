"""Memory of `rcc compress` over the time of reading texts of different lengths, and what becomes of the contexts.

    python benchmarks/stream.py --model rcc-smollm2-135m-passkey --rate 512 --lengths 256k,2M TEXT… [--threads 2]

TEXT: files of running text, also .jsonl(.xz) with a field `text`; they need as many tokens as the longest length.
Each length is compressed by a process of its own, the command line as users have it, whose resident memory is sampled
every half second. Then another process loads the file (mapped) and writes the first token of an answer. Linux only.

Printed: peak memory; the same at quarters of the time between the first batch and the last. Less the context's keys and
values (which grow with the text) what is left should be the same at every quarter and length. `--markdown OUT.md`
keeps the table, `--curve OUT.csv` the samples.
"""

import argparse
import contextlib
import json
import os
import pty
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rcc import load_tokenizer
from rcc.data.corpus import open_text
from rcc.data.sources import Source
from rcc.runtime.memory import resident
from rcc.text.counts import parse_counts, show_count
from rcc.text.tokens import decode

LOAD = """
import sys, time
from rcc.runtime import allocator
allocator.configure()
from rcc import CompressedContext, RCCForCausalLM, load_tokenizer
from rcc.text.tokens import token_ids
model = RCCForCausalLM.from_pretrained(sys.argv[1])
for weight in model.parameters():
    weight.sum()
question = token_ids(load_tokenizer(sys.argv[1]), "What is the text about?")
start = time.perf_counter()
context = CompressedContext.load(sys.argv[2], model, verify="header")
loaded = time.perf_counter()
model.generate(question, context=context, max_new_tokens=1, do_sample=False, pad_token_id=0)
print(len(context), context.nbytes, loaded - start, time.perf_counter() - start)
"""


def compress(command: list[str], environment: dict[str, str]) -> list[tuple[float, int, bool]]:
    """Run → samples: seconds, bytes, whether it is reading the text."""
    start = time.perf_counter()
    ours, theirs = pty.openpty()  # on a terminal it shows how far it is
    process = subprocess.Popen(command, env=environment, stderr=theirs, stdout=subprocess.DEVNULL)
    os.set_blocking(ours, False)
    samples, told = [], b""
    while process.poll() is None:
        with contextlib.suppress(BlockingIOError):
            told += os.read(ours, 1 << 20)
        samples.append((time.perf_counter() - start, resident(process.pid), b"tokens/s" in told))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(told.decode())
    return [sample for sample in samples if sample[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--model", default="rcc-smollm2-135m")
    parser.add_argument("--rate", default="auto")
    parser.add_argument("--lengths", default="8k,32k")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--curve", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    corpora = [open_text(Source(path), tokenizer) for path in arguments.texts]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    quarters = ["first batch", "a quarter", "half", "three quarters", "end"]
    header = ["tokens", "positions", "keys and values, MB", "peak, MB", *(f"{q}, MB" for q in quarters)]
    header += ["end less keys and values", "tokens/s", "load (mapped), ms", "first token, s"]
    rows, curve = [], ["length,seconds,bytes"]
    with tempfile.TemporaryDirectory() as folder:
        for length in sorted(parse_counts(arguments.lengths, "--lengths")):
            text, out = Path(folder) / f"{length}.txt", Path(folder) / "context.rcc"
            tokens = 0
            with text.open("w", encoding="utf-8") as stream:
                for corpus in corpora:
                    for number in range(len(corpus)):
                        if tokens < length:
                            ids = corpus.document(number)[: length - tokens]
                            stream.write(decode(tokenizer, ids.tolist()))
                            tokens += len(ids)
            if tokens < length:
                sys.exit(f"the texts have {tokens:,} tokens, {length:,} are asked for: name more of them")
            command = [sys.executable, "-m", "rcc", "compress", str(text), "-o", str(out), "--force"]
            command += ["--model", arguments.model, "--rate", arguments.rate]
            samples = compress(command, environment)
            loading = [sys.executable, "-c", LOAD, arguments.model, str(out)]
            done = subprocess.run(loading, env=environment, capture_output=True, text=True, check=True)
            positions, size, load, first = map(float, done.stdout.split())
            reading = [sample for sample in samples if sample[2]] or samples
            held_mb = [reading[round(i / 4 * (len(reading) - 1))][1] / 1e6 for i in range(5)]
            row = [show_count(length), f"{positions:,.0f}", f"{size / 1e6:,.0f}"]
            row += [f"{max(s[1] for s in samples) / 1e6:,.0f}", *(f"{mb:,.0f}" for mb in held_mb)]
            spent = (reading[-1][0] - reading[0][0]) or 1
            row += [f"{held_mb[-1] - size / 1e6:,.0f}", f"{tokens / spent:,.0f}", f"{load * 1e3:.1f}", f"{first:.2f}"]
            rows.append(row)
            curve += [f"{length},{s:.1f},{b}" for s, b, _ in samples]
            print(json.dumps(dict(zip(header, row, strict=True))), flush=True)
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    table = "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
    print(f"\n{table}")
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")
    if arguments.curve:
        arguments.curve.write_text("\n".join(curve) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
