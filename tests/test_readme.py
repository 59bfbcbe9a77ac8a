"""Every command and program of the README runs, in a fresh copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rcc import checkpoints

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", README, re.M | re.S)
TESTS = "bash scripts/test.sh"
MARK = "---- end of block ----"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git would clone of the working tree."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.timeout(1800)  # an installation, and the model for every command
def test_readme(copy: Path, tmp_path: Path) -> None:
    """One shell runs the blocks from top to bottom, as a reader would; only the bases are there already."""
    home = tmp_path / "home"
    (home / "bases").mkdir(parents=True)
    for name in checkpoints.BASES:
        (home / "bases" / name).symlink_to(checkpoints.ensure_base(name))
    script, programs = ["set -e"], []
    for language, block in BLOCKS:
        if language == "python":
            programs.append(block)
        elif block.strip() != TESTS:  # this very test is part of it; .ci/run runs it
            script += [block, f"echo {MARK}"]
    (copy / "readme.py").write_text("\n".join(programs), encoding="utf-8")
    script.append("python readme.py")
    # this is the longest test: it may take all cores, also where tests run side by side
    outside = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RCC_MODEL")}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=copy,
        env={**outside, "RCC_HOME": str(home), "VIRTUAL_ENV": "", "PIP_NO_COMPILE": "1"},  # half of an installation
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (copy / "susan.rcc").stat().st_size > 1e6
    assert (copy / "mine/model.safetensors").is_file()
    assert (copy / "own/model.safetensors").is_file()
    for printed in done.stdout.split(MARK)[:-1]:
        assert printed.strip(), "a block of the README printed nothing"


def test_readme_names_both_commands() -> None:
    """The second command is the one that CI runs, and the first is the first block."""
    blocks = [block.strip() for language, block in BLOCKS if language == "sh"]
    assert blocks[0].startswith("python3 -m venv")
    assert blocks[1] == TESTS
    assert TESTS in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_links() -> None:
    """Every relative link of a page leads somewhere."""
    pages = "*.md", "docs/*.md", "research/**/*.md", "src/rcc/weights/*/README.md"
    for page in (page for pattern in pages for page in ROOT.glob(pattern)):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} → {target}"


def test_shipped_models_are_in_the_package() -> None:
    assert {"rcc-qwen2.5-0.5b", "rcc-smollm2-135m"} <= set(checkpoints.shipped_models())
