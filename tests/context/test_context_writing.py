"""Writing a context's file fails with a message and leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from conftest import MakeTokens
from equality import same_bits
from rcc import CompressedContext, FileError, RCCForCausalLM


def test_places_that_cannot_be_written(appended: CompressedContext, tmp_path: Path) -> None:
    """A folder that is missing, a path below a file, a folder in the file's place, a name that is too long, and no
    name at all: a FileError that names the path, and no leftovers."""
    folder, plain = tmp_path / "folder", tmp_path / "plain"
    folder.mkdir()
    plain.write_text("x")
    for path in (tmp_path / "no" / "c", plain / "c", folder, tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot be written"):
            appended.save(path)
    for name in ("", ".", "/"):
        with pytest.raises(FileError, match="cannot be written"):
            appended.save(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain"]
    assert not list(folder.iterdir())
    assert plain.read_text() == "x"


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_full_disk(
    appended: CompressedContext,
    appended_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    older: bool,
) -> None:
    """No space left while writing, flushing or renaming: a FileError that says so, no half-written file, no temporary
    one, and an older file unchanged."""
    path = tmp_path / "book.rcc"
    if older:
        path.write_bytes(appended_file.read_bytes())
    if step == "write":
        import builtins

        real = builtins.open

        def full(name: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            opened = real(name, mode, *args, **kwargs)
            if "x" in mode or "w" in mode:

                class Full:
                    def __enter__(self) -> Self:
                        opened.__enter__()
                        return self

                    def __exit__(self, *error: Any) -> None:
                        opened.__exit__(*error)

                    def __getattr__(self, attribute: str) -> Any:
                        return getattr(opened, attribute)

                    def write(self, data: bytes) -> int:
                        if len(data) > 1000:
                            opened.write(bytes(data[:100]))
                            no_space()
                        return opened.write(data)

                return Full()
            return opened

        monkeypatch.setattr(builtins, "open", full)
    else:
        monkeypatch.setattr(os, step, no_space)
    with pytest.raises(FileError, match=f"{path} cannot be written.*No space left"):
        appended.save(path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["book.rcc"] if older else [])
    if older:
        assert path.read_bytes() == appended_file.read_bytes()
    appended.save(path)
    assert same_bits(CompressedContext.load(path), appended)


def test_a_file_system_that_is_full(appended: CompressedContext, tmp_path: Path) -> None:
    """A real limit: the process may write files of 2,000 bytes only; there are no leftovers."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        with pytest.raises(FileError, match="cannot be written"):
            appended.save(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_writing(
    appended: CompressedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle leaves nothing, and an older file as it was."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "c"
    path.write_text("older")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        appended.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert path.read_text() == "older"


def test_two_writers(
    appended: CompressedContext, tiny_llama: RCCForCausalLM, tokens: MakeTokens, tmp_path: Path
) -> None:
    """Threads that save to one path, and read it, at once: every reader gets one whole file, description and contents
    of the same context, and one whole file is left."""
    path = tmp_path / "c"
    other = tiny_llama.compress(torch.tensor([tokens(20, 5)]))
    twin = tiny_llama.compress(torch.tensor([tokens(57, 6)]))  # as many positions as `context`
    assert len(twin) == len(appended)
    errors: list[BaseException] = []

    def save(what: CompressedContext) -> None:
        try:
            for _ in range(10):
                what.save(path)
                loaded = CompressedContext.load(path, tiny_llama)
                source = next(c for c in (appended, twin, other) if c.source_sha256 == loaded.source_sha256)
                assert same_bits(loaded, source)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(what,)) for what in (appended, other, twin)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
