"""Check that the rule `repeat` scores KV pairs as NVIDIA's kvpress does by its KVzipPress, and keeps the same ones.

    python scripts/kvpress_pairs.py TEXT [--model FOLDER] [--tokens N] [--rates 2,4,8] [--env ENV]

kvpress needs an older transformers than rcc: it runs in an environment of its own, which is made at first use (some
minutes, 1.4 GB). Both sides read the same tokens in float32: the header of the model's chat, N tokens of the text, and
rcc's request to repeat them, which takes the place of kvpress's own. A pair's score is on both sides the highest
attention that the repetition pays it; rcc and kvpress compute it in different ways.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KVPRESS, TORCH = "kvpress==0.5.5", "torch==2.13.0"
MADE = f"{KVPRESS}.txt"
"""What the environment holds, written into it when it is complete."""


# ---------------------------------------------------------------- in rcc's environment
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a base's name, or a model's folder")
    parser.add_argument("--tokens", type=int, default=1024, help="of the text; one chunk at most")
    parser.add_argument("--rates", default="2,4,8")
    parser.add_argument("--env", type=Path, help="kvpress's environment (default: in rcc's home)")
    arguments = parser.parse_args()

    from rcc import RCCError, checkpoints
    from rcc.text.counts import parse_counts

    try:
        rates = parse_counts(arguments.rates, "--rates")
        folder = checkpoints.resolve_base(arguments.model)
        env = arguments.env or environment()
        make_environment(env)
        ours, request = own_scores(folder, arguments.text, arguments.tokens)
        theirs = kvpress_scores(folder, env, request)
        print(table(ours, theirs, rates))
    except RCCError as error:
        print(f"kvpress_pairs: {error}", file=sys.stderr)
        sys.exit(2)


def environment() -> Path:
    """Return where kvpress's environment is, or will be made, unless told otherwise."""
    from rcc import checkpoints

    return checkpoints.home() / "kvpress-env"


def is_made(env: Path) -> bool:
    """Return whether an environment is there and complete."""
    return (env / MADE).is_file() and (env / "bin/python").exists()


def make_environment(env: Path) -> None:
    """Make kvpress's environment unless it is there and complete. What pip says goes to standard error.

    Raises:
        FileError: it cannot be made.
    """
    from filelock import FileLock

    from rcc import FileError

    try:
        env.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{env}.lock"):
            if is_made(env):
                return
            pip = [str(env / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
            # torch by itself first: a find-links folder may have a build for this machine
            for command in (
                [sys.executable, "-m", "venv", "--clear", str(env)],
                [*pip, "install", TORCH],
                [*pip, "install", KVPRESS, TORCH],
            ):
                print("$", " ".join(command), file=sys.stderr, flush=True)
                subprocess.run(command, check=True, stdout=sys.stderr)
            held = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
            (env / MADE).write_text(held, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileError(f"the environment {env} for kvpress cannot be made ({error}): see what pip says.") from error


def own_scores(folder: Path, text: Path, tokens: int) -> tuple[Tensor, dict[str, list[int]]]:
    """Return what the rule `repeat` scores the pairs of a text's first tokens, and the tokens that were read.

    Returns:
        Scores [layers, KV heads, tokens] in float32, and {"header", "text", "asking"}.

    Raises:
        FileError: the text cannot be read. InputError: it is not one chunk.
    """
    from rcc import InputError
    from rcc.documents.plain import read_text
    from rcc.model.selection.rules import RULES, Rule, Seen, highest_attention
    from rcc.model.selection.selection import Selection
    from rcc.runtime.quiet import quiet_transformers
    from rcc.text.tokens import token_ids

    quiet_transformers()
    scores: dict[int, Tensor] = {}

    def recorded(seen: Seen) -> Tensor:
        scores[seen.layer] = highest_attention(seen)
        return scores[seen.layer]

    RULES["recorded"] = Rule(recorded, repeats=True)
    model = Selection.from_pretrained(folder, folder.name, "recorded", dtype=torch.float32)
    ids = token_ids(model.tokenizer, read_text(text))[:, :tokens]
    if not 1 < ids.shape[1] <= model.chunk_length:
        raise InputError(f"{text}: give a text, and 2 to {model.chunk_length} of its tokens, one chunk.")
    model.compress(ids, rate=2)
    read = {"header": model.header, "text": ids[0], "asking": model.asking}
    return torch.stack([scores[layer] for layer in sorted(scores)]), {k: v.tolist() for k, v in read.items()}


def kvpress_scores(folder: Path, env: Path, request: dict[str, list[int]]) -> Tensor:
    """Return what kvpress scores the same pairs, [layers, KV heads, tokens].

    Raises:
        FileError: its process ended badly.
    """
    from rcc import FileError

    # rcc must not be found there, nor any other module of this environment
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(env / "bin/python"), __file__, "--worker", str(folder)]
    done = subprocess.run(command, input=json.dumps(request), stdout=subprocess.PIPE, text=True, env=outside)
    if done.returncode:
        raise FileError(f"kvpress's process ended with code {done.returncode}: see what it says above.")
    return torch.tensor(json.loads(done.stdout))


def table(ours: Tensor, theirs: Tensor, rates: list[int]) -> str:
    """Return how much two scorings [layers, KV heads, tokens] have in common, as Markdown."""
    from rcc.evaluation.results import markdown

    rows = []
    for rate in rates:
        keep = -(-ours.shape[-1] // rate)
        kept = [torch.zeros_like(s).scatter(-1, s.topk(keep, -1).indices, 1) for s in (ours, theirs)]
        common = (kept[0] * kept[1]).sum(-1)  # [layers, KV heads]
        equal = int((common == keep).sum())
        rows.append([f"{rate}×", f"{keep:,}", f"{equal} of {common.numel()}", f"{common.mean() / keep:.2%}"])
    difference = ((ours - theirs).abs() / theirs).max()
    header = ["rate", "pairs a head", "heads that keep the very same", "pairs in common"]
    return markdown(header, rows) + f"\nScores differ by {difference:.1e} of their size at most."


# ---------------------------------------------------------------- in kvpress's environment
def worker(folder: str) -> None:
    """Read a request from standard input, and write kvpress's scores to standard output."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    from kvpress import KVzipPress
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    request = {name: torch.tensor([ids]) for name, ids in json.load(sys.stdin).items()}

    class Recorded(KVzipPress):  # type: ignore[misc]
        """Scores with the request's own words, and drops nothing."""

        def prepare(self, model: Any, tokenizer: Any, prev_postfix_size: int = 8) -> list[tuple[Tensor, Tensor]]:
            super().prepare(model, tokenizer)  # makes room for the scores
            self.prefix_length = request["header"].shape[1]
            return [(request["text"], torch.cat([request["asking"], request["text"]], 1))]

        def compress_post(self, model: Any) -> None:
            out.write(json.dumps(self.score_val[:, 0, :, self.prefix_length :].tolist()))
            out.flush()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    press = Recorded(compression_ratio=0.5, n_sink=request["header"].shape[1])
    with torch.no_grad(), press(model):
        context = torch.cat([request["header"], request["text"]], 1)
        model.model(input_ids=context, past_key_values=DynamicCache())


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1:2] == ["--worker"] else main()
