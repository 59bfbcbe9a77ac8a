"""What a person reads cannot move the cursor, and what a program reads is never altered."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from conftest import Command
from rcc.cli import console
from rcc.evaluation.results import markdown
from rcc.runtime.terminal import Console, shown

HOSTILE = "a\x1b[2J\x07\r\x9b31m\x7f\u202eb\u2028\ud800"


def harmless(text: str) -> bool:
    return not any(c in text for c in "\x1b\x07\r\x9b\x7f\u202e\u2028\ud800")


def test_control_characters_are_shown() -> None:
    assert shown("a\x1b[2J\nb\t\x9b\u202e") == r"a\x1b[2J\nb\t\x9b\u202e"
    assert shown("a\nb\t", lines=True) == "a\nb\t"
    assert shown("Größe – ×8 日本") == "Größe – ×8 日本"
    assert harmless(shown(HOSTILE))
    assert shown(shown(HOSTILE)) == shown(HOSTILE)


def test_consoles_and_tables_escape_what_they_are_given() -> None:
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, highlight=False).print(HOSTILE, markup=False)
    assert harmless(stream.getvalue().replace("\x1b[0m", ""))
    table = markdown(["x"], [[HOSTILE + "\n| forged |"]])
    assert harmless(table)
    assert table.count("\n") == 3


@pytest.mark.parametrize("name", ["a\x1b[2Jb.rcc", "a\nrcc: all is well.rcc"])
def test_messages_show_a_hostile_name_on_one_line(command: Command, name: str, tmp_path: Path) -> None:
    code, out, err = command("inspect", tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert harmless(err)


def test_the_log_shows_a_hostile_name(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler(stream := io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    command("inspect", tmp_path / "gone.rcc")
    logging.getLogger("rcc").warning("%s is passed over", HOSTILE)
    assert harmless(stream.getvalue())
    assert "passed over" in stream.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_json_is_the_same_on_every_stream(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"answer": "Größe – ×8 日本 \U0001f600" + HOSTILE}
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors="replace"))
    console.print_json(value)
    sys.stdout.flush()
    written = raw.getvalue().decode(encoding)
    assert json.loads(written) == value
    assert harmless(written)
