"""Processes, messages and folders of the tests of rcc.checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rcc


def environment(home: Path, **more: str) -> dict[str, str]:
    source = str(Path(rcc.__file__).parents[1])
    return {**os.environ, "RCC_HOME": str(home), "PYTHONPATH": source, **more}


def start(home: Path, code: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)


def one_sentence(message: str) -> bool:
    return "\n" not in message and ". " not in message and message.endswith(".")


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
