"""How a table compares two scorings, and, where kvpress's environment has been made, that it keeps the same pairs.

Making it takes minutes and 1.4 GB: `python scripts/kvpress_pairs.py` does, these tests do not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import load_script
from rcc import FileError

pairs = load_script("scripts/kvpress_pairs.py")
OPENING = Path(__file__).resolve().parents[2] / "examples/simple-susan-opening.txt"


def test_the_table_says_how_many_pairs_are_the_same() -> None:
    """Of two heads one keeps the very same, the other half; a larger rate keeps fewer."""
    ours = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]])
    theirs = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [4.0, 1.0, 2.0, 1.0]]])
    assert pairs.table(ours, ours, [2]).splitlines()[2] == "| 2× | 2 | 2 of 2 | 100.00% |"
    rows = pairs.table(ours, theirs, [2, 4]).splitlines()
    assert rows[2:4] == ["| 2× | 2 | 1 of 2 | 75.00% |", "| 4× | 1 | 2 of 2 | 100.00% |"]
    assert rows[-1] == "Scores differ by 2.0e+00 of their size at most."


def test_the_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch first; one that is not complete is made anew; what cannot be made is an error."""
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        ran.append(command)
        if "venv" in command:
            (tmp_path / "env/bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / "env/bin/python").touch()
        if "broken" in str(command):
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, "kvpress==0.5.5\n")

    monkeypatch.setattr(pairs.subprocess, "run", run)
    for _ in range(2):
        pairs.make_environment(tmp_path / "env")
    assert [command[-1] for command in ran] == [str(tmp_path / "env"), "torch==2.13.0", "torch==2.13.0", "freeze"]
    assert ran[0][1:4] == ["-m", "venv", "--clear"]
    assert "kvpress==0.5.5" in ran[2]
    assert (tmp_path / "env" / pairs.MADE).read_text() == "kvpress==0.5.5\n"
    with pytest.raises(FileError, match="for kvpress cannot be made"):
        pairs.make_environment(tmp_path / "broken")
    assert not pairs.is_made(tmp_path / "broken")


def test_a_text_of_one_token_is_refused(
    default_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one sentence, and exit code 2."""
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/python").touch()
    (tmp_path / "env" / pairs.MADE).touch()
    (tmp_path / "text.txt").write_text("a")
    argv = ["kvpress_pairs", str(tmp_path / "text.txt"), "--model", str(default_base), "--env", str(tmp_path / "env")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        pairs.main()
    assert ended.value.code == 2
    assert "one chunk" in capsys.readouterr().err


def test_kvpress_keeps_the_same_pairs(default_base: Path) -> None:
    """All of every head, at each rate."""
    env: Path = pairs.environment()
    if not pairs.is_made(env):
        pytest.skip(f"kvpress's environment is not in {env}: scripts/kvpress_pairs.py makes it")
    ours, request = pairs.own_scores(default_base, OPENING, 300)
    theirs = pairs.kvpress_scores(default_base, env, request)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    rows = pairs.table(ours, theirs, [2, 4, 8]).splitlines()
    assert all("| 90 of 90 | 100.00% |" in row for row in rows[2:5])
