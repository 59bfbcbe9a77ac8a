"""A folder for one process: the others are told whose it is, and nothing stays when that one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rcc.errors import FileError
from rcc.evaluation.results import Results
from rcc.runtime.locks import NAME, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from rcc.runtime.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that works in the folder `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_is_told_who_is_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(FileError, match=rf"in use by process {holder.pid} on "):
        FolderLock(tmp_path / "run")
    with pytest.raises(FileError, match=rf"in use by process {holder.pid} on "):
        Results("qa", {}, tmp_path / "run")


def test_a_killed_process_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path / "run"):
        assert (tmp_path / "run" / NAME).exists()
    assert not (tmp_path / "run" / NAME).exists()


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_what_the_lock_says_is_not_believed(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    for text in ("[" * 5000, '{"process": "\\u001b[2J"}', "", '{"process": 1, "machine": "\\u001b", "since": 5}'):
        (tmp_path / "run" / NAME).write_text(text)
        with pytest.raises(FileError) as caught:
            FolderLock(tmp_path / "run")
        assert "\x1b" not in str(caught.value)
