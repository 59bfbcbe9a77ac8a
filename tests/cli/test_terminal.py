"""Terminals, pipes and signals: what a user sees of `rcc` while it runs, and what is left when it is stopped."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import LIMIT, RCC, Terminal, environment, process
from short_text import BOOK

pytestmark = pytest.mark.usefixtures("cli_home")


def test_chat_on_a_terminal(compressed_file: Path) -> None:
    chat = Terminal("chat", compressed_file, "--max-new-tokens", "8000")
    chat.wait_for("> ")
    chat.type("Who is the father?" + " And who is the mother?" * 40 + "\r")
    chat.wait_for("rcc: [^\n]*window of 8,192")
    chat.wait_for(r"window(.|\n)*> ")  # one question too long is not the end
    chat.type("\x04")
    assert chat.end() == 0
    assert "Traceback" not in chat.screen


def test_chat_answers_on_a_terminal(compressed_file: Path) -> None:
    chat = Terminal("chat", compressed_file, "--max-new-tokens", "40")
    chat.wait_for("> ")
    chat.type("Who is the father?\r")
    chat.wait_for(r"\?\r?\n(.|\n)*\n\r?> ")  # whatever it answers
    # Python misses a Ctrl-C that falls between a prompt and the moment at which readline begins to wait after it
    assert chat.end("\x03") == 130
    assert "rcc: interrupted." in chat.screen
    assert "Traceback" not in chat.screen


def test_progress_on_a_terminal(short_text: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(short_text.read_text(encoding="utf-8") * 12, encoding="utf-8")  # more than one batch
    terminal = Terminal("compress", long, "-o", tmp_path / "x.rcc")
    assert terminal.end() == 0
    assert "loading the model" in terminal.text
    assert "compressing" in terminal.text
    assert re.search(r"[1-9][0-9,.]* tokens/s, [0-9]+:[0-9]{2}:[0-9]{2} left", terminal.text)
    assert re.search(r"x\.rcc: [0-9,]+ tokens at 4× in [0-9,]+ positions", terminal.text)


def test_forced_colours_are_no_terminal(short_text: Path, tmp_path: Path) -> None:
    done = process("compress", short_text, "-o", tmp_path / "x.rcc", FORCE_COLOR="1").ok()
    assert "compressing" not in done.err
    assert len(done.err.splitlines()) == 1


def test_interrupt_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal("compress", BOOK, "-o", tmp_path / "x.rcc")
    terminal.wait_for("compressing")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "rcc: interrupted." in terminal.text
    assert "Traceback" not in terminal.screen
    assert terminal.screen.rstrip().endswith("rcc: interrupted.")
    assert "\x1b[?25h" in terminal.screen  # the cursor is back
    assert list(tmp_path.iterdir()) == []


SLOW_DISK = "import os, time; os.fsync = lambda fd: time.sleep(600); from rcc.cli.app import main; main()"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_signal_while_writing(short_text: Path, tmp_path: Path, name: str, code: int) -> None:
    """The moment that matters: all is written but the rename. The old file stays, whole."""
    old = tmp_path / "x.rcc"
    old.write_text("the old one")
    command: list[str | Path] = [sys.executable, "-c", SLOW_DISK, "compress", short_text, "-o", old, "--force"]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + LIMIT
    while not any(p.stat().st_size > 1e6 for p in tmp_path.glob(".*.tmp")):
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    running.send_signal(getattr(signal, name))
    out, err = running.communicate(timeout=LIMIT)
    assert running.returncode == code
    assert (out, b"Traceback" in err) == (b"", False)
    assert old.read_text() == "the old one"
    left = [p.name for p in tmp_path.iterdir() if p != old]
    assert left == [] or name == "SIGKILL"  # nobody can clean up after that one


def test_reader_that_goes_away(compressed_file: Path) -> None:
    ask = f"{' '.join(RCC)} ask {compressed_file} 'Describe the village.' 'Who?' 'Where?'"
    command = f"{ask} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=LIMIT, env=environment(), text=True)
    assert done.stdout == "Describe the village.\n141\n"
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*RCC, "models"], stdout=full, stderr=subprocess.PIPE, env=environment(), text=True)
    assert (done.returncode, done.stderr) == (2, "rcc: No space left on device.\n")


def test_poor_terminals() -> None:
    done = process("models", PYTHONIOENCODING="ascii").ok()
    assert "4?, 8?" in done.out
    closed = subprocess.run(["bash", "-c", f"{' '.join(RCC)} models >&- 2>&- <&-"], env=environment())
    assert closed.returncode == 0
