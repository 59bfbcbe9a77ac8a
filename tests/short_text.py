"""What the tests of the command line work on: a home of its own, a short text, and its compressed context."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import Result, process
from conftest import Call
from rcc import checkpoints, load_tokenizer

BOOK = Path(__file__).resolve().parents[1] / "examples" / "simple-susan.txt"
MODEL = "rcc-smollm2-135m"


def make_home(folder: Path) -> Path:
    """A home of rcc's own in a folder: the small model's base is there already, contexts are not."""
    base = checkpoints.ensure_base("smollm2-135m-instruct")
    (folder / "bases").mkdir(parents=True)
    (folder / "bases" / base.name).symlink_to(base)
    return folder


@pytest.fixture(scope="module")
def cli_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of a file of tests, and no network."""
    folder = make_home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="session")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 600 words of the example."""
    words = re.findall(r"\S+\s+", BOOK.read_text(encoding="utf-8"))[:600]
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def compressed_text(short_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The file of its context, and what `rcc compress` said; not to be changed."""
    path = tmp_path_factory.mktemp("context") / "short.rcc"
    return path, process("compress", short_text, "-o", path)


@pytest.fixture(scope="session")
def compressed_file(compressed_text: tuple[Path, Result]) -> Path:
    return compressed_text[0]


@pytest.fixture(scope="session")
def text_length(short_text: Path) -> int:
    """Tokens of the text."""
    return len(load_tokenizer(MODEL)(short_text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])


def info(call: Call, path: Path) -> dict[str, Any]:
    return json.loads(call("inspect", path, "--json").ok().out)
