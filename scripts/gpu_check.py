"""The parts of `scripts/gpu_check.sh`, which says what they are: python scripts/gpu_check.py DEVICE SECONDS."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig

from rcc import CompressedContext, RCCConfig, RCCForCausalLM
from rcc.config import SideConfig
from rcc.model.encoder import batch_tokens_on
from rcc.planning import shapes
from rcc.planning.blueprint import Blueprint

PREFIXES = ("residual", "direct")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the norm of the logits' difference from the CPU's in float64, beside the logits' norm."""
SHAPES = {"cuda": ("pythia-1.4b", torch.bfloat16), "cpu": ("smollm2-135m", torch.float32)}
SPEED_TOKENS = {"cuda": 131_072, "cpu": 2_048}
LENGTHS = {"cuda": ("1M", "2M"), "cpu": ("2k", "4k")}
NEEDS = {"equality": 10, "speed": 30, "memory": 45}
"""Seconds that a part should have left to begin."""


def settings(prefix: str, segment: int, rate: int) -> RCCConfig:
    """Return the settings of a model whose sides have all their weights."""
    side = SideConfig(lora_rank=0)
    return RCCConfig(
        segment_length=segment, rates=[rate], share_base=False, encoder=side, decoder=side, prefix=prefix, name="random"
    )


# ---------------------------------------------------------------- 1. equality
def tiny(prefix: str) -> RCCForCausalLM:
    """Return a random model on the CPU, in float64."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = Blueprint(settings(prefix, 32, 4), shape, shape, torch.float64).build("cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model


def equality(device: str) -> bool:
    """Compare a tiny model on the device with the same one on the CPU in float64; return whether all is well."""
    well = True
    for prefix in PREFIXES:
        exact = tiny(prefix)
        text, more, prompt = (torch.randint(211, (1, n)) for n in (150, 40, 9))
        context = exact.compress(more, context=exact.compress(text))
        want = exact(prompt, context=context).logits
        for dtype, tolerance in TOLERANCE.items():
            model = tiny(prefix).to(device, dtype)
            got = model.compress(more, context=model.compress(text))
            logits = model(prompt, context=got).logits.double().cpu()
            error = float((logits - want).norm() / want.norm())
            eight = got.to(dtype="int8")
            small = float((model(prompt, context=eight).logits.double().cpu() - want).norm() / want.norm())
            with tempfile.TemporaryDirectory() as folder:
                got.save(Path(folder) / "context.rcc")
                model.record_fingerprint(got.fingerprint)
                again = CompressedContext.load(Path(folder) / "context.rcc", model=model)
            stored = model(prompt, context=again).logits.double().cpu()
            one = model.generate(prompt, context=got, max_new_tokens=8, do_sample=False, pad_token_id=0)
            both = model.generate(
                prompt.expand(2, -1), context=got.expand(2), max_new_tokens=8, do_sample=False, pad_token_id=0
            )
            checks = {
                "appended": error < tolerance,
                "8 bits": small < tolerance + 0.05,
                "stored": float((stored - logits).norm() / want.norm()) < tolerance,
                "a batch": dtype != torch.float32 or bool((both == one).all()),
            }
            well &= all(checks.values())
            word = ", ".join(name if right else f"{name} WRONG" for name, right in checks.items())
            print(f"equality, {prefix}, {dtype}: error {error:.1e}, in 8 bits {small:.1e}: {word}")
    return well


# ---------------------------------------------------------------- 2. speed
def timed(device: str, run: Callable[[], object]) -> float:
    """Return the seconds of the faster of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@torch.no_grad()
def speed(device: str, prefix: str) -> bool:
    """Time `compress` beside the encoder alone, and the first token from a stored context."""
    name, dtype = SHAPES[device]
    tokens, rate, segment = SPEED_TOKENS[device], 32, 1024
    shape = shapes.find(name)
    shape.max_position_embeddings = max(shape.max_position_embeddings, 4 * tokens // rate)
    model = Blueprint(settings(prefix, segment, rate), shape, shape, dtype).build(device)
    model.record_fingerprint("random")
    ids = torch.randint(1000, (1, tokens), device=device)
    batches = ids.view(-1, segment).split(max(1, batch_tokens_on(model.device) // segment))

    def encoder() -> None:
        for batch in batches:
            model.encoder(input_ids=batch, use_cache=False)

    alone, whole = timed(device, encoder), timed(device, lambda: model.compress(ids))
    context, question = model.compress(ids), ids[:, :32]
    with tempfile.TemporaryDirectory() as folder:
        context.save(Path(folder) / "context.rcc")

        def first() -> None:
            stored = CompressedContext.load(Path(folder) / "context.rcc", model=model, verify="header")
            model.generate(question, context=stored, max_new_tokens=1, do_sample=False, pad_token_id=0)

        token = timed(device, first)
    print(
        f"speed, {prefix}, {name}, {tokens:,} tokens at {rate}×: encoder {tokens / alone:,.0f} tokens/s, compress"
        f" {tokens / whole:,.0f}, ratio {alone / whole:.2f}; first token from the file {token:.3f} s"
    )
    return True


# ---------------------------------------------------------------- 3. memory
def memory(device: str, prefix: str, length: str, seconds: float) -> bool:
    """Run `rcc eval resources` of the shape with random weights; return whether it ended well in time."""
    name, dtype = SHAPES[device]
    command = [sys.executable, "-m", "rcc", "eval", "resources", "--shape", name, "--random", "--device", device]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--prefix", prefix, "--segment-length", "1024"]
    command += ["--rates", "32", "--lengths", length, "--no-plain"]
    print(f"memory, {prefix}, {length}:", flush=True)
    try:
        return subprocess.run(command, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"memory, {prefix}, {length}: not done within {seconds:.0f} s")
        return True


def main() -> None:
    """Run the parts that the time allows, and end with 1 where one went wrong."""
    device, end = sys.argv[1], time.monotonic() + float(sys.argv[2])
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here: scripts/gpu_check.sh cpu lets the CPU stand in for it.")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU stands in'}")

    def left() -> float:
        return end - time.monotonic()

    def measured(prefix: str, length: str) -> bool:
        return memory(device, prefix, length, left())

    parts: list[tuple[str, Callable[[], bool]]] = [("equality", lambda: equality(device))]
    parts += [("speed", partial(speed, device, prefix)) for prefix in PREFIXES]
    parts += [("memory", partial(measured, prefix, length)) for length in LENGTHS[device] for prefix in PREFIXES]
    wrong = 0
    for name, part in parts:
        if left() < NEEDS[name]:
            print(f"{name}: left out, {left():.0f} s are left")
            continue
        start = time.monotonic()
        try:
            well = part()
        except Exception as error:  # the other parts are worth having
            print(f"{name}: {type(error).__name__}: {error}")
            well = False
        wrong += not well
        if device == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {'well' if well else 'WRONG'}, {time.monotonic() - start:.0f} s\n", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
