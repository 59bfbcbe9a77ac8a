"""What docs/architecture.md says is there is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import rcc

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`(rcc(?:\.\w+)+)`", PAGE)))


@pytest.mark.parametrize("name", NAMES)
def test_names_can_be_imported(name: str) -> None:
    parts, owner = name.split("."), None
    for end in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            owner = getattr(owner, attribute)
        break
    assert owner is not None


def test_the_tree_is_the_packages() -> None:
    tree = PAGE.split("src/rcc/\n")[1].split("\n\n")[0]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    package = Path(rcc.__file__).parent
    there = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert there <= named
    assert all((package / name).exists() for name in named)


def test_names_of_classes_mean_one_thing() -> None:
    """No two classes of the package have one name."""
    classes: dict[str, set[str]] = {}
    for file in Path(rcc.__file__).parent.rglob("*.py"):
        for name in re.findall(r"^class ([A-Z]\w*)", file.read_text(encoding="utf-8"), re.M):
            classes.setdefault(name, set()).add(str(file))
    assert {name: files for name, files in classes.items() if len(files) > 1} == {}
