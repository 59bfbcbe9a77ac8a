"""research/scripts/curves.py draws the loss of each kind of batch from steps that mix kinds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "research/scripts/curves.py"
KINDS = {"reconstruction@256/4x": 0.5, "reconstruction@512/8x": 2.0, "cloze@512/4x": 1.0}


def log(folder: Path, steps: int = 150) -> Path:
    """A run whose kinds have losses of their own that nothing changes, two kinds a step."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "log.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            kinds = rng.choice(list(KINDS), 2)
            loss = float(np.mean([KINDS[kind] for kind in kinds]))
            row = {"stage": "all", "step": step, "tokens": 2048 * step, "kind": " ".join(kinds), "loss": loss}
            file.write(json.dumps(row) + "\n" + json.dumps({"stage": "all", "step": step, "held_out": {}}) + "\n")
    return folder


def test_the_losses_of_mixed_kinds_are_told_apart(tmp_path: Path) -> None:
    curves = load_script("research/scripts/curves.py")
    fitted = curves.fitted(curves.steps(log(tmp_path / "run")))
    assert set(fitted) == {"reconstruction/4x", "reconstruction/8x", "cloze/4x"}
    for kind, loss in KINDS.items():
        assert fitted[kind.replace("@256", "").replace("@512", "")] == pytest.approx([loss] * 150)
    few = curves.fitted(curves.steps(log(tmp_path / "short", 5)))
    assert np.isnan([*few.values()]).all()


def test_it_draws_both_kinds_of_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [str(log(tmp_path / name)) for name in ("one", "two", "three")]
    for given in ([*runs], [f"{runs[0]},{runs[1]}", runs[2], "--kinds", "reconstruction/4x,cloze/4x"]):
        drawn = tmp_path / "curves.svg"
        done = subprocess.run([sys.executable, SCRIPT, *given, "-o", drawn], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "| two | 150 | 307,200 | 150 | +0.000 ± 0.000 |" in done.stdout
        assert drawn.read_text().startswith("<?xml")
        drawn.unlink()
