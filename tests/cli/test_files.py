"""What the command line does to the files of its user: nothing is lost, nothing is mixed, nothing stays."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import learning
from conftest import Command
from rcc import CompressedContext, Engine, RCCConfig, RCCForCausalLM
from rcc.evaluation.html import page as report

MADE = Path(__file__).parents[1] / "fixtures" / "56825c2"
WORDS = [f"{a}{b}" for a in "abcdefgh" for b in "klmnopqr"][:60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model with segments of 64 tokens."""
    base = learning.make_base(tmp_path_factory.mktemp("base"), WORDS, learning.SPLIT, window=4096)
    out = tmp_path_factory.mktemp("model") / "m"
    RCCForCausalLM.from_base(base, config=RCCConfig(segment_length=64, rates=[4, 8], name="m")).save_pretrained(out)
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 30))
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_text_from_a_pipe_that_is_named_as_a_file_is_read_whole(
    command: Command, folder: Path, text: Path, tmp_path: Path, home: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(text.read_bytes()))
    writer.start()
    code, _, said = command("ask", tmp_path / "pipe", "who?", "--model", folder, "--max-new-tokens", 1)
    writer.join()
    assert (code, "1,800 tokens" in said) == (0, True), said
    assert command("ask", text, "who?", "--model", folder, "--max-new-tokens", 1)[2].startswith("read ")


def test_what_is_kept_is_private(command: Command, folder: Path, text: Path, home: Path) -> None:
    command("ask", text, "who?", "--model", folder, "--max-new-tokens", 1)
    (stored,) = (home / "contexts").iterdir()
    assert [stat.S_IMODE(p.stat().st_mode) for p in (stored, stored.parent)] == [0o600, 0o700]


def test_a_file_that_appears_while_rcc_works_stays(
    command: Command, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, compress = tmp_path / "out.rcc", Engine.compress

    def meanwhile(*args: Any, **options: Any) -> CompressedContext:
        out.write_text("precious")
        return compress(*args, **options)

    monkeypatch.setattr(Engine, "compress", meanwhile)
    code, _, said = command("compress", text, "-o", out, "--model", folder)
    assert (code, said) == (2, f"rcc: {out} exists: use --force to replace it.\n")
    assert out.read_text() == "precious"
    out.chmod(0o600)
    assert command("compress", text, "-o", out, "--model", folder, "--force")[0] == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_a_page_that_appears_while_rcc_works_stays(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "page.html", report.page

    def meanwhile(*args: Any) -> str:
        out.write_text("precious")
        return page(*args)

    monkeypatch.setattr(report, "page", meanwhile)
    code, _, said = command("report", MADE / "qa", "-o", out)
    assert (code, said) == (2, f"rcc: {out} exists: use --force to replace it.\n")
    assert out.read_text() == "precious"


def test_replacing_keeps_the_mode(command: Command, folder: Path, text: Path, tmp_path: Path) -> None:
    for name, verb in {"out.rcc": ["compress", text, "--model", folder], "page.html": ["report", MADE / "qa"]}.items():
        (tmp_path / name).write_text("before")
        (tmp_path / name).chmod(0o600)
        assert command(*verb, "-o", tmp_path / name, "--force")[0] == 0
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_what_killed_processes_left_is_removed_once_it_is_old(
    command: Command, folder: Path, text: Path, tmp_path: Path
) -> None:
    old, young = tmp_path / ".rcc-0a.tmp", tmp_path / ".rcc-0b.tmp"
    for path in (old, young):
        path.write_bytes(b"half a context")
    os.utime(old, (time.time() - 7200,) * 2)
    assert command("compress", text, "-o", tmp_path / "out.rcc", "--model", folder)[0] == 0
    assert (old.exists(), young.exists()) == (False, True)


@pytest.mark.parametrize("name", ["text.txt", "link.txt", "hard.txt"])
def test_an_output_that_is_an_input_is_refused_even_with_force(
    command: Command, folder: Path, text: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "link.txt").symlink_to(text)
    (tmp_path / "hard.txt").hardlink_to(text)
    before = text.read_bytes()
    code, _, said = command("compress", text, "-o", tmp_path / name, "--model", folder, "--force")
    assert (code, "is one of the inputs" in said, text.read_bytes()) == (2, True, before)


@pytest.mark.parametrize("broken", ["a file", "no permission"])
def test_a_cache_that_cannot_be_used_does_not_stop_an_answer(
    command: Command, folder: Path, text: Path, home: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    if broken == "a file":
        (home / "contexts").write_text("")
    else:  # root may enter every folder, so the system's answer is made up
        real = os.stat

        def refuse(path: Any, *args: Any, **options: Any) -> os.stat_result:
            if "contexts/" in str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(os, "stat", refuse)
    code, _, said = command("ask", text, "who?", "--model", folder, "--max-new-tokens", 1)
    assert (code, said.count("not kept for the next time")) == (0, 1), said


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_leaves_nothing(folder: Path, text: Path, tmp_path: Path, number: int) -> None:
    """The signal comes while the file is being written."""
    hold = (
        "import sys, time; from rcc.cli import app; from rcc.context import file\n"
        "def put(*a): print('writing', flush=True); time.sleep(600)\n"
        "file._put = put; app.main()"
    )
    (tmp_path / "o").mkdir()
    arguments: list[str | Path] = ["compress", text, "-o", tmp_path / "o" / "x.rcc", "--model", folder]
    process = subprocess.Popen([sys.executable, "-c", hold, *arguments], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    assert list((tmp_path / "o").glob(".rcc-*.tmp"))
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    process.stdout.close()
    assert list((tmp_path / "o").iterdir()) == []


WORKS = {
    "train": ("from rcc.training.trainer import StageTrainer as At", "go", "train run/recipe.yaml -o run --resume"),
    "eval": (
        "from rcc.evaluation.results import Results as At",
        "collect",
        "eval qa --model model --data questions.jsonl --rates 4,8 --modes human --max-new-tokens 6 -o qa"
        " --hint 'Answer in a few words.'",  # the default when the folder was made
    ),
}


@pytest.mark.parametrize("work", WORKS)
def test_a_second_process_in_a_folder_is_told_who_is_first(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """And a killed one holds nothing."""
    shutil.copytree(MADE, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    target, what, line = WORKS[work]
    hold = (
        f"import sys, time; from rcc.cli import app; {target}\n"
        f"def hold(*a): print('at work', flush=True); time.sleep(600)\nAt.{what} = hold; app.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, *shlex.split(line)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"at work\n"
        code, _, said = command(*shlex.split(line))
        assert (code, f"in use by process {process.pid} on " in said) == (2, True), said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert command(*shlex.split(line))[0] == 0


@pytest.mark.parametrize(("given", "words"), [("wrong,none", "stands alone"), ("wrong,odd", "or all, or none")])
def test_controls_say_that_none_stands_alone(command: Command, given: str, words: str) -> None:
    code, _, said = command("eval", "reconstruction", "--controls", given)
    assert (code, words in said) == (2, True)
