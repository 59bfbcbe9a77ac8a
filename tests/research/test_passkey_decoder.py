"""passkey_decoder.py: what it puts together from stored vectors is what the encoder reads, and it trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import load_script
from learning import SPLIT, make_base, passkey_words
from rcc import RCCConfig, RCCForCausalLM, SideConfig, load_tokenizer
from rcc.data import haystack
from rcc.training.tasks.base import Marks

SCRIPT = Path(__file__).resolve().parents[2] / "research/scripts/passkey_decoder.py"
PART = 64
KEYS = [12345, 90909]


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("research/scripts/passkey_decoder.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of segments of 64 tokens, one vector each."""
    root = tmp_path_factory.mktemp("decoder")
    base = make_base(root / "base", passkey_words(), SPLIT, window=1024)
    config = RCCConfig(
        segment_length=PART, rates=[PART], encoder=SideConfig(0), decoder=SideConfig(4), share_base=False
    )
    torch.manual_seed(0)
    RCCForCausalLM.from_base(base, base, config).save_pretrained(root / "model")
    return root / "model"


def test_texts_from_stored_vectors_are_real_texts(script: Any, folder: Path) -> None:
    """Each is, vector by vector, what the encoder makes of a passkey text with that key at some sentence."""
    model, marks = RCCForCausalLM.from_pretrained(folder), Marks.of(load_tokenizer(folder))
    vectors = script.Vectors(model, marks.encode, KEYS, np.random.default_rng(0))
    opening, filler = marks.encode(haystack.OPENING), [marks.encode(sentence) for sentence in haystack.FILLER]
    assert vectors.period > 1
    assert vectors.first[0][1] == 2  # segments
    made = 0
    for number, key in enumerate(KEYS):
        hidden = marks.encode(haystack.HIDDEN.format(key=key))
        for n in (2, 3, 9, vectors.period + 7):
            size = n * PART + len(hidden)  # what is beyond n segments is left away
            depths = np.linspace(0, 1, size // min(map(len, filler)), endpoint=False)
            texts = [haystack.hide(opening, [(place, hidden)], filler, size)[0][: n * PART] for place in depths]
            real = model.encode(torch.from_numpy(np.stack(texts)), rate=PART).states[:, :, model.projections.states]
            for _ in range(4):
                if (place := vectors.place(number, n)) is not None:
                    made += 1
                    text = vectors.text(place, *vectors.hidden([number]))
                    assert min((text - one).abs().max().item() for one in real) < 1e-4
    assert made > 16


def test_segments_beside_an_edge_are_cut_far_from_it(script: Any, folder: Path) -> None:
    """What is read of them is what the encoder makes of that many tokens before the edge, and after it."""
    model, marks = RCCForCausalLM.from_pretrained(folder), Marks.of(load_tokenizer(folder))
    vectors = script.Vectors(model, marks.encode, KEYS, np.random.default_rng(0), learning=True)
    assert vectors.first[0][1] == 2  # segments
    (states,) = vectors.hidden([0], length=40)
    for vector, ids in zip(states, (vectors.segments[0][-40:], vectors.segments[1][:40]), strict=True):
        real = model.encode(torch.from_numpy(ids)[None], rate=PART).states[0, 0, model.projections.states]
        assert (vector - real).abs().max() < 1e-4
    assert torch.equal(vectors.hidden([0])[0], vectors.hidden([0], PART)[0])


def test_what_was_encoded_is_kept(script: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same keys and model, and no other."""
    model, marks = RCCForCausalLM.from_pretrained(folder), Marks.of(load_tokenizer(folder))
    stored = tmp_path / "out" / "vectors.pt"
    first = script.Vectors(model, marks.encode, KEYS, np.random.default_rng(0), stored)
    script.Vectors(model, marks.encode, KEYS[:1], np.random.default_rng(0), tmp_path / "other.pt")
    with monkeypatch.context() as patch:
        patch.setattr(script.Vectors, "read", None)
        again = script.Vectors(model, marks.encode, KEYS, np.random.default_rng(1), stored)
        with pytest.raises(TypeError):
            script.Vectors(model, marks.encode, KEYS, np.random.default_rng(0), tmp_path / "other.pt")
    assert again.first == first.first
    assert torch.equal(again.keys, first.keys)
    assert torch.equal(again.before, first.before)
    shapes = [one.text(one.place(0, 9), *one.hidden([0])).shape for one in (again, first)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ([], {"decoder", "projections"}),
        (["--encoder"], {"decoder", "encoder", "projections"}),
        (["--encoder", "--shortest", "40"], {"decoder", "encoder", "projections"}),
    ],
)
def test_it_trains_what_it_should(folder: Path, tmp_path: Path, more: list[str], changes: set[str]) -> None:
    command: list[str | Path] = [
        sys.executable,
        SCRIPT,
        folder,
        tmp_path / "out",
        "--keys",
        "4",
        "--minutes",
        "0.15",
        "--threads",
        "1",
    ]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "out" / "decoder-log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert not (tmp_path / "out" / "vectors.pt").exists()
    before, after = (RCCForCausalLM.from_pretrained(one).state_dict() for one in (folder, tmp_path / "out"))
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name].bfloat16())}
    assert changed == changes
