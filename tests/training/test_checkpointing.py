"""Checkpoints are whole or not there; as many are kept as wanted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rcc.training import checkpointing


def checkpoint(folder: Path, step: int, keep: int = 9, size: int = 50) -> Path:
    files = {name: lambda path: path.write_bytes(b"x" * size) for name in ("a", "b")}
    return checkpointing.write(folder, step, files, keep)


@pytest.mark.parametrize(
    "damage", ["truncated", "longer", "emptied", "a file", "all files", "listing", "half a listing"]
)
def test_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    old, new = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)  # by number, not by name
    assert checkpointing.newest(tmp_path) == new
    assert not caplog.records
    match damage:
        case "truncated" | "longer" | "emptied":
            (new / "b").write_bytes(b"x" * {"truncated": 49, "longer": 51, "emptied": 0}[damage])
        case "a file":
            (new / "b").unlink()
        case "all files":
            shutil.rmtree(new)
            new.mkdir()
        case "listing":
            (new / checkpointing.LISTING).unlink()
        case "half a listing":
            (new / checkpointing.LISTING).write_text('{"a": 5')
    assert checkpointing.newest(tmp_path) == old
    [warning] = caplog.messages
    assert warning.startswith(f"{new} is passed over: ")
    assert warning.endswith(".")


def test_as_many_checkpoints_as_wanted(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-7.tmp").mkdir()
    (tmp_path / "checkpoint-old").mkdir()  # somebody else's
    for step in (8, 9, 10, 11):
        checkpoint(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11", "checkpoint-old"]


def test_a_new_checkpoint_is_kept_beside_a_damaged_one_of_a_later_step(tmp_path: Path) -> None:
    (checkpoint(tmp_path, 9) / "b").unlink()
    new = checkpoint(tmp_path, 4, keep=1)
    assert checkpointing.newest(tmp_path) == new
