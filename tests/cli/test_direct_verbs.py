"""`rcc join`, `--budget` and asking, with a model that has a direct prefix; its file in 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import learning
from conftest import Command
from rcc import CompressedContext, InputError, ModelError, RCCConfig, RCCForCausalLM
from rcc.model import packing

WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"][:60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model with a direct prefix and segments of 16 tokens."""
    base = learning.make_base(tmp_path_factory.mktemp("base"), WORDS, learning.SPLIT, window=512)
    config = RCCConfig(segment_length=16, rates=[4, 1, 8], prefix="direct", rate_embeddings=True, name="sums")
    model = RCCForCausalLM.from_base(base, config=config)
    out = tmp_path_factory.mktemp("model") / "sums"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if name.startswith("projections."):
                parameter.normal_(0, 0.01)
    model.save_pretrained(out, eight_bits=["projections", "lora"])
    return out


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two texts, the first of whole segments."""
    paths = []
    for k, count in enumerate((32, 21)):
        path = tmp_path / f"{k}.txt"
        path.write_text(" ".join(WORDS[(7 * i + k) % 60] for i in range(count)))
        paths.append(path)
    return paths


def info(command: Command, path: Path) -> dict[str, Any]:
    return json.loads(command("inspect", path, "--json")[1])


def test_join(command: Command, folder: Path, texts: list[Path], tmp_path: Path) -> None:
    """Joined files are what compressing the texts one after another makes, and can be asked."""
    parts = [tmp_path / "0.rcc", tmp_path / "1.rcc"]
    for text, part in zip(texts, parts, strict=True):
        assert command("compress", text, "-o", part, "--model", folder, "--rate", 4)[0] == 0
    assert command("compress", *texts, "-o", tmp_path / "both.rcc", "--model", folder, "--rate", 4)[0] == 0
    code, _, said = command("join", *parts, "-o", tmp_path / "joined.rcc")
    assert (code, "53 tokens at 4× in 14 positions" in said) == (0, True)
    joined, both = (CompressedContext.load(tmp_path / name) for name in ("joined.rcc", "both.rcc"))
    assert joined.pieces == both.pieces
    for i in range(len(both.blocks.layers)):
        assert all(torch.equal(a, b) for a, b in zip(joined.layer(i), both.layer(i), strict=True))
    code, printed, _ = command("ask", tmp_path / "joined.rcc", "ak", "--model", folder, "--max-new-tokens", 3, "--json")
    assert (code, len(json.loads(printed)["answers"])) == (0, 1)


def test_join_refuses(command: Command, folder: Path, texts: list[Path], tmp_path: Path) -> None:
    """An output that is an input, even with --force, or that exists; nothing is written."""
    part = tmp_path / "0.rcc"
    command("compress", texts[0], "-o", part, "--model", folder, "--rate", 4)
    before = part.read_bytes()
    code, _, said = command("join", part, part, "-o", part, "--force")
    assert (code, "one of the contexts to join" in said) == (2, True)
    code, _, said = command("join", part, texts[0], "-o", tmp_path / "new.rcc")
    assert (code, "not an rcc context" in said) == (2, True)
    assert part.read_bytes() == before
    assert not (tmp_path / "new.rcc").exists()


@pytest.mark.parametrize(("budget", "rate"), [(100, 1), (53, 1), (52, 4), (14, 4), (13, 8), (1, 1)])
def test_budget(command: Command, folder: Path, texts: list[Path], tmp_path: Path, budget: int, rate: int) -> None:
    """auto takes the lowest rate within the budget of positions; where there is none, the lowest that fits."""
    text = tmp_path / "long.txt"
    text.write_text(" ".join(path.read_text() for path in texts))
    out = tmp_path / "long.rcc"
    assert command("compress", text, "-o", out, "--model", folder, "--budget", budget)[0] == 0
    assert info(command, out)["rate"] == rate


def test_eight_bits_are_the_model(folder: Path) -> None:
    """The folder's file is smaller, and what is loaded is what was saved, fingerprint included."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    assert stored["projections.0.weight.int8"].dtype == torch.int8
    assert not any(name.endswith(".lora_A.weight") for name in stored)
    model = RCCForCausalLM.from_pretrained(folder)
    assert model.compute_fingerprint() == model.config.fingerprint


def test_packing() -> None:
    """A matrix comes back within a step of each row, or column where there are fewer; the rest is refused."""
    tall = "encoder.layers.0.q.lora_B.weight"
    state = {"projections.0.weight": torch.randn(5, 9), tall: torch.randn(9, 2), "sink": torch.randn(2, 3)}
    packed = packing.pack(state, ["projections", "lora"])
    again = packing.unpack(packed)
    assert torch.equal(again["sink"], state["sink"])
    for name, across, steps in (("projections.0.weight", 1, 5), (tall, 0, 2)):
        step = state[name].abs().amax(across, keepdim=True) / 127
        assert packed[name + ".int8"].dtype == torch.int8
        assert step.numel() == steps
        assert bool(((again[name] - state[name]).abs() <= 1.01 * step).all())
    with pytest.raises(InputError, match="eight_bits"):
        packing.pack(state, ["sink"])
    assert packed["int8_steps"].numel() == 5 + 2
    del packed["int8_steps"]
    with pytest.raises(ModelError, match="lack their steps"):
        packing.unpack(packed)


def test_kept_in_8_bits(command: Command, folder: Path, texts: list[Path], tmp_path: Path) -> None:
    """`--kv int8` makes a file of about half the keys' and values' bytes, which is asked and appended to as any other;
    an unknown precision is refused before anything is read."""
    small, large = tmp_path / "small.rcc", tmp_path / "large.rcc"
    model = ("--model", folder, "--rate", 1)
    assert command("compress", *texts, "-o", large, *model, "--kv", "bfloat16")[0] == 0
    assert command("compress", *texts, "-o", small, *model, "--kv", "int8")[0] == 0
    sizes = {path: info(command, path) for path in (small, large)}
    assert (sizes[small]["dtype"], sizes[large]["dtype"]) == ("int8", "bfloat16")
    assert sizes[small]["bytes"] < 0.55 * sizes[large]["bytes"]
    code, answer, _ = command("ask", small, WORDS[0], "--model", folder, "--max-new-tokens", 4)
    assert (code, bool(answer.strip())) == (0, True)
    more = tmp_path / "more.rcc"
    assert command("compress", texts[0], "--context", small, "-o", more, *model)[0] == 0
    assert info(command, more)["source_tokens"] == 85
    code, _, said = command("compress", *texts, "-o", tmp_path / "no.rcc", *model, "--kv", "int4")
    assert (code, said) == (2, "rcc: --kv int4 is unknown: use one of bfloat16, float16, float32, int8.\n")
