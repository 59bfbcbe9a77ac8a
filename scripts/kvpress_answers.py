"""Answer with a base whose KV cache NVIDIA's kvpress prunes (SnapKV and others): baselines for compression.

    python scripts/kvpress_answers.py REQUESTS.jsonl OUT.jsonl --press snapkv --press knorm [--base FOLDER]

kvpress 0.5.5 needs an older transformers than rcc does. So it runs in an environment of its own, which is made at
first use (minutes, 1.4 GB with torch for a CPU), and exchanges JSON lines with this script. Each request is one line:

    {"id": …, "context": [token ids to compress], "question": [token ids of the rest of the prompt], "keep": 128}

A request may also have `press` and `max_new_tokens`. `keep` is how many positions of the context each layer keeps. Each
answer is one line, written as soon as it is ready:

    {"id", "press", "tokens", "positions", "bytes", "compress_seconds", "first_token_seconds", "total_seconds"}

`tokens` are written greedily, without the stop token. `positions` and `bytes` are those of the context's remaining keys
and values. `compress_seconds` is the time until the context is pruned, `first_token_seconds` from then until the first
token of the answer, `total_seconds` all of it. A request that cannot be answered has `error` instead. Run again, the
script continues.

The press "none" prunes nothing. Nothing here sees the question before the context is pruned: with SnapKV, whose window
is the prompt's end in its paper, the window is the context's end, as in kvpress's own pipeline. Where fewer than 128
positions are kept, that window is half of them instead of kvpress's 64 tokens: otherwise it would be all that is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

KVPRESS, TORCH = "kvpress==0.5.5", "torch==2.13.0"
MADE = f"{KVPRESS}.txt"
"""What the environment holds, written into it when it is complete."""
PRESSES = {
    "snapkv": "SnapKVPress",
    "knorm": "KnormPress",
    "expected_attention": "ExpectedAttentionPress",
    "streaming_llm": "StreamingLLMPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
    "random": "RandomPress",
    "none": None,
}
"""Those that keep the same number of positions in every layer and head; their settings are kvpress's defaults."""
WINDOW = 64
"""SnapKV's, by default."""
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "1000000000"}
"""For glibc, as rcc.allocator sets it: times are to be compared with rcc's."""


# ---------------------------------------------------------------- in rcc's environment
def environment() -> Path:
    """Where kvpress's environment is, or will be made, unless told otherwise."""
    from rcc import checkpoints

    return checkpoints.home() / "kvpress-env"


def is_made(env: Path) -> bool:
    """Whether an environment is there and complete."""
    return (env / MADE).is_file() and (env / "bin/python").exists()


def make_environment(env: Path) -> None:
    """Make kvpress's environment unless it is there. What pip says goes to standard error.

    Raises:
        FileError: it cannot be made.
    """
    from filelock import FileLock

    from rcc import FileError

    if is_made(env):
        return
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


def answers(
    requests: Iterable[dict[str, Any]],
    base: str | Path,
    env: Path | None = None,
    presses: Sequence[str] = ("snapkv",),
    *,
    max_new_tokens: int = 32,
    stop: Collection[int] = (),
    device: str = "cpu",
    dtype: str = "auto",
    done: Collection[tuple[Any, str]] = (),
) -> Iterator[dict[str, Any]]:
    """Ask every request with every press, one after the other, in one process that holds the base.

    Args:
        requests: as in this file's head. One that names its own `press` is asked with that alone.
        base: the folder of a transformers model.
        env: kvpress's environment, made if it is not there. None: :func:`environment`.
        stop: tokens that end an answer; none: those of the base's own settings.
        done: (id, press) that need no answer.

    Raises:
        InputError: a request or press that cannot be used. FileError: no environment, or its process ended.
    """
    from rcc import FileError, InputError

    asked = []
    for number, request in enumerate(requests, 1):
        check(request, f"request {number}")
        for press in [request["press"]] if "press" in request else presses:
            if press not in PRESSES:
                raise InputError(f"press {press!r} is unknown: use some of {', '.join(PRESSES)}.")
            if (request["id"], press) not in done:
                asked.append({**request, "press": press})
    if not asked:
        return
    env = environment() if env is None else env
    make_environment(env)
    command = [str(env / "bin/python"), str(Path(__file__).resolve()), "--worker", "--base", str(base)]
    command += ["--max-new-tokens", str(max_new_tokens), "--device", device, "--dtype", dtype]
    command += [word for token in stop for word in ("--stop", str(token))]
    # rcc must not be found there, nor any other module of this environment
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env={**MEMORY, **outside}
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        for request in asked:
            with contextlib.suppress(BrokenPipeError):  # what it then does not say
                worker.stdin.write(json.dumps(request) + "\n")
                worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise FileError(f"kvpress's process ended with code {worker.wait()}: see what it says above.")
            yield json.loads(line)
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def check(request: Any, name: str) -> None:
    """Raise InputError unless this is a request."""
    from rcc import InputError

    if not isinstance(request, dict) or not isinstance(request.get("id"), (str, int)):
        raise InputError(f"{name} has no id: give it a word or a number.")
    for field in ("context", "question"):
        ids = request.get(field)
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
            raise InputError(f"{name}: {field} must be a list of token ids, at least one.")
    if not isinstance(request.get("keep"), int) or request["keep"] < 1:
        raise InputError(f"{name}: keep must be a whole number above 0.")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; what a killed process left of a last line is not one.

    Raises:
        InputError: a line is no JSON. FileError: the file cannot be read.
    """
    from rcc import FileError, InputError

    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise InputError(f"{path}, line {number} is no JSON.") from None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requests", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--press", action="append", help=f"{', '.join(PRESSES)}; may be repeated (default: snapkv)")
    parser.add_argument("--env", type=Path, help="kvpress's environment (default: in rcc's home)")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="a name, or the folder of a transformers model")
    _common(parser)
    arguments = parser.parse_args()

    from rcc import RCCError, checkpoints

    try:
        requests = read(arguments.requests)
        kept = read(arguments.out) if arguments.out.exists() else []
        made = answers(
            requests,
            checkpoints.resolve_base(arguments.base),
            arguments.env,
            arguments.press or ["snapkv"],
            max_new_tokens=arguments.max_new_tokens,
            stop=arguments.stop,
            device=arguments.device,
            dtype=arguments.dtype,
            done={(row["id"], row["press"]) for row in kept},
        )
        with arguments.out.open("w" if not kept else "r+", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in kept)
            out.truncate()  # a last line that was not finished
            for count, row in enumerate(made, len(kept) + 1):
                out.write(json.dumps(row) + "\n")
                out.flush()
                print(f"\r{count:,} answers", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    except RCCError as error:
        print(f"kvpress_answers: {error}", file=sys.stderr)
        sys.exit(2)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--stop", type=int, action="append", default=[], help="a token id; may be repeated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16, float32 (default: as stored)")


# ---------------------------------------------------------------- in kvpress's environment
def worker() -> None:
    """Answer each line of standard input by one of standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--base", required=True)
    _common(parser)
    arguments = parser.parse_args()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=arguments.dtype).to(arguments.device).eval()
    own = model.generation_config.eos_token_id
    stop = arguments.stop or [token for token in (own if isinstance(own, list) else [own]) if token is not None]
    for line in sys.stdin:
        request = json.loads(line)
        row: dict[str, Any] = {"id": request["id"], "press": request["press"]}
        try:
            with torch.no_grad():
                row |= answer(model, request, request.get("max_new_tokens", arguments.max_new_tokens), stop)
        except (AssertionError, ValueError) as error:  # how presses refuse a context
            row["error"] = str(error) or type(error).__name__
        out.write(json.dumps(row) + "\n")
        out.flush()


def answer(model: Any, request: dict[str, Any], max_new_tokens: int, stop: Collection[int]) -> dict[str, Any]:
    """Read the context, prune it, and write an answer after the question: kvpress's own pipeline, on token ids.

    Raises:
        ValueError, AssertionError: more tokens than the base's window, or a context too short for the press.
    """
    import torch
    from transformers import DynamicCache

    context, question = (torch.tensor([request[name]], device=model.device) for name in ("context", "question"))
    length, keep = context.shape[1], min(request["keep"], context.shape[1])
    window = model.config.max_position_embeddings
    if length + question.shape[1] + max_new_tokens > window:
        raise ValueError(f"context, question and answer are more than the base's {window} positions")
    press, settings = make_press(request["press"], keep, length)
    cache = DynamicCache()
    start = _now(model)
    with contextlib.nullcontext() if press is None else press(model):
        model.model(input_ids=context, past_key_values=cache)
    pruned = _now(model)
    layers: list[Any] = cache.layers
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    positions = {tensor.shape[2] for tensor in held}
    if press is not None and positions != {keep}:
        raise ValueError(f"{request['press']} kept {sorted(positions)} positions instead of {keep}")
    size = sum(tensor.nbytes for tensor in held)

    # a position is where a token stands in the text, also after a pruned one
    next_positions = torch.arange(length, length + question.shape[1], device=model.device)[None]
    tokens: list[int] = []
    ids, first = question, None
    while len(tokens) < max_new_tokens:
        logits = model(input_ids=ids, past_key_values=cache, position_ids=next_positions, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        next_positions = next_positions[:, -1:] + 1
        token = int(ids)
        first = first or _now(model)
        if token in stop:
            break
        tokens.append(token)
    end = _now(model)
    return {
        "tokens": tokens,
        "positions": max(positions),
        "bytes": size,
        "compress_seconds": pruned - start,
        "first_token_seconds": None if first is None else first - pruned,
        "total_seconds": end - start,
        **({"settings": settings} if settings else {}),
    }


def make_press(name: str, keep: int, length: int) -> tuple[Any, dict[str, Any]]:
    """A press that keeps exactly `keep` of `length` positions, and its settings that are not kvpress's defaults."""
    kind = PRESSES[name]
    if kind is None:
        return None, {}
    import kvpress

    settings: dict[str, Any] = {}
    if name == "snapkv" and keep < 2 * WINDOW:
        settings["window_size"] = max(1, keep // 2)  # a window is always kept: of fewer positions all would be window
    if name == "random":  # the same ones every time, others in every layer
        import torch

        torch.manual_seed(0)
    # kvpress rounds length · (1 - ratio) down: half a position more keeps that from going wrong
    ratio = 0.0 if keep == length else 1 - (keep + 0.5) / length
    return getattr(kvpress, kind)(compression_ratio=ratio, **settings), settings


def _now(model: Any) -> float:
    """Seconds, with everything done that a GPU was given to do."""
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
