"""What is prepared for a lent GPU: each call's part is small enough, together they are whole, and nothing is lost."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from rcc.checkpoints import BASES

SCRIPT = Path(__file__).parents[2] / "research/scripts/gpu_prepare.sh"
BOUND = 64 << 20  # of what travels with a call


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Path]:
    """A repository with a shipped model, the wheels at hand, and data beside it."""
    root, data = tmp_path / "project", tmp_path / "data"
    for folder in ("research/scripts", "src/rcc/weights/small", ".gpu/wheels"):
        (root / folder).mkdir(parents=True)
    data.mkdir()
    shutil.copy(SCRIPT, root / "research/scripts")
    (root / ".gitignore").write_text("/.gpu/\n")
    (root / "src/rcc/weights/small/config.json").write_text("{}")
    (root / "src/rcc/weights/small/model.safetensors").write_bytes(os.urandom(1 << 20))
    wheel = root / ".gpu/wheels" / BASES["smollm2-135m-instruct"].parts[0].wheel
    wheel.touch()
    os.truncate(wheel, 100 << 20)
    for name in ("gguf-1.whl", "platformdirs-1.whl"):
        (root / ".gpu/wheels" / name).write_text(name)
    for name in ("text_train_books_00.jsonl.xz", "text_train_docs_00.jsonl.xz", "qa_train_open_00.jsonl.xz"):
        (data / name).write_text(name)
    for name in ("text_eval.jsonl", "qa_eval.jsonl"):
        (data / name).write_text(name)
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "-C", root, "add", "."], check=True)
    return root, data


def prepare(root: Path, *arguments: str | Path) -> str:
    command: list[str | Path] = ["bash", root / "research/scripts/gpu_prepare.sh", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_parts_are_small_whole_and_leave_the_weights_where_they_were(
    project: tuple[Path, Path], tmp_path: Path
) -> None:
    root, data = project
    weights = root / "src/rcc/weights/small/model.safetensors"
    before = weights.read_bytes()
    for _ in range(2):  # a second time, with the weights still moved away
        said = prepare(root, "small", data)
    assert not weights.exists()
    folders = sorted(p for p in (root / ".gpu").iterdir() if p.name.isdigit())
    assert [p.name for p in folders] == ["1", "2"]
    assert "2 calls" in said
    for folder in folders:
        assert f'carry [".gpu/{folder.name}"]' in said
        assert 0 < sum(p.stat().st_size for p in folder.iterdir()) < BOUND

    whole = tmp_path / "payload.tar"
    whole.write_bytes(b"".join((p / f"part.{p.name}").read_bytes() for p in folders))
    listed = (folders[-1] / "payload.sha256").read_text().split()
    assert listed == [hashlib.sha256(whole.read_bytes()).hexdigest(), "payload.tar"]
    with tarfile.open(whole) as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
        member = archive.extractfile("./init/model.safetensors")
        assert member is not None
        assert member.read() == before
    wheel = f"home/downloads/{BASES['smollm2-135m-instruct'].parts[0].wheel}"
    assert {wheel, "wheels/gguf-1.whl", "data/qa_train_open_00.jsonl.xz", "data/text_eval.jsonl"} <= names

    prepare(root, "--restore")
    assert weights.read_bytes() == before
    assert not (root / ".gpu/moved").exists()
