"""Files that appear whole: nothing is lost, nothing gets readable for others, nothing is left lying about."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from rcc.errors import ExistsError, FileError
from rcc.runtime import atomic


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ExistsError, match="exists"), atomic.writing(target, replace=False) as file:  # noqa: PT012
        file.write(b"ours")
        target.write_bytes(b"precious")
    assert target.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["out"]


def test_the_same_on_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    target = tmp_path / "out"
    with atomic.writing(target, replace=False) as file:
        file.write(b"first")
    with pytest.raises(ExistsError), atomic.writing(tmp_path / "other", replace=False) as file:
        (tmp_path / "other").write_bytes(b"precious")
    assert target.read_bytes() == b"first"
    assert (tmp_path / "other").read_bytes() == b"precious"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_replacing_keeps_the_mode_and_the_target_of_a_link(tmp_path: Path, mode: int) -> None:
    target, link = tmp_path / "out", tmp_path / "link"
    target.write_bytes(b"before")
    target.chmod(mode)
    link.symlink_to(target)
    with atomic.writing(link) as file:
        (temporary,) = tmp_path.glob(".rcc-*.tmp")
        assert mode_of(temporary) == 0o600
        file.write(b"after")
    assert (link.is_symlink(), target.read_bytes(), mode_of(target)) == (True, b"after", mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_replacing_keeps_the_owner(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"before")
    os.chown(target, 1234, 2345)
    atomic.write_text(target, "after")
    assert (target.stat().st_uid, target.stat().st_gid) == (1234, 2345)


def test_private_files_and_folders_are_for_their_owner(tmp_path: Path) -> None:
    atomic.private_folder(tmp_path / "home" / "contexts")
    atomic.write_text(tmp_path / "home" / "contexts" / "file", "text", private=True)
    assert mode_of(tmp_path / "home" / "contexts") == 0o700
    assert mode_of(tmp_path / "home" / "contexts" / "file") == 0o600


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="regular"):
        atomic.write_text(tmp_path / "pipe", "text")


def left_over(folder: Path, name: str, hours: float) -> Path:
    path = folder / name
    path.write_bytes(b"half a context")
    os.utime(path, (time.time() - 3600 * hours,) * 2)
    return path


def test_old_left_overs_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    old, young = left_over(tmp_path, ".rcc-0a.tmp", 2), left_over(tmp_path, ".rcc-0b.tmp", 0.1)
    held, other = left_over(tmp_path, ".rcc-0c.tmp", 2), left_over(tmp_path, "mine.tmp", 2)
    folder = tmp_path / ".rcc-0d.tmp"
    folder.mkdir()
    left_over(folder, "x", 2)
    os.utime(folder, (0, 0))
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        atomic.write_text(tmp_path / "out", "text")
    assert [p.exists() for p in (old, folder, young, held, other)] == [False, False, True, True, True]


def _create(path: Path, number: int, start: float, results: multiprocessing.Queue[int | None]) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        atomic.write_text(path, str(number), replace=False)
        results.put(number)
    except ExistsError:
        results.put(None)


def test_of_several_writers_one_succeeds(tmp_path: Path) -> None:
    results: multiprocessing.Queue[int | None] = multiprocessing.Queue()
    start = time.time() + 0.5
    processes = [multiprocessing.Process(target=_create, args=(tmp_path / "out", n, start, results)) for n in range(4)]
    for process in processes:
        process.start()
    winners = [n for n in (results.get(timeout=60) for _ in processes) if n is not None]
    for process in processes:
        process.join()
    assert [str(n) for n in winners] == [(tmp_path / "out").read_text()]
