"""Bad input is one sentence, exit code 2, and nothing written.

It runs inside this process, through `main` as the shell would call it, because starting Python and torch anew costs
seconds each time; nothing of the model is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import process
from conftest import Call
from rcc import Engine, RCCForCausalLM, checkpoints
from short_text import MODEL

pytestmark = pytest.mark.usefixtures("cli_home")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["does not exist"]),
        (b"", ["is empty"]),
        (b" \n\t \r\n", ["is empty"]),
        (b"\x7fELF\x02\0\0\0abc", ["binary"]),
        ("Grüße aus Köln".encode("latin-1"), ["not UTF-8", "0xfc at position 2"]),
        ("hello".encode("utf-16"), ["binary"]),
    ],
    ids=["missing", "empty", "blank", "binary", "latin-1", "utf-16"],
)
def test_bad_text(
    call: Call, tmp_path: Path, folder: Path, cli_home: Path, content: bytes | None, words: list[str]
) -> None:
    source = tmp_path / "source.txt"
    if content is not None:
        source.write_bytes(content)
        call("compress", "-", "-o", folder / "x.rcc", stdin=content).refused("standard input", *words)
    call("compress", source, "-o", folder / "x.rcc").refused("source.txt", *words)
    call("ask", source, "Who?").refused("source.txt", *words)
    call("reconstruct", "none.rcc", "--against", source).refused("source.txt", *words)


def test_a_folder_is_no_text(call: Call, tmp_path: Path, folder: Path) -> None:
    call("compress", tmp_path, "-o", folder / "x.rcc").refused("is a folder")
    call("ask", tmp_path, "Who?").refused("is a folder")


def test_bad_output(call: Call, short_text: Path, tmp_path: Path, folder: Path) -> None:
    """Refused before any work."""
    old = tmp_path / "old.rcc"
    old.write_text("old")
    call("compress", short_text, "-o", old).refused("exists", "--force")
    assert old.read_text() == "old"
    call("compress", short_text, "-o", folder).refused("is a folder")
    call("compress", short_text, "-o", folder / "none" / "x.rcc").refused("does not exist")
    call("compress", short_text, "-o", old / "x.rcc").refused("is not a folder")
    call("compress", short_text, "-o", tmp_path / ("x" * 250)).ok()
    call("compress", short_text, "-o", folder / ("x" * 300)).refused("cannot be written")
    call("compress", short_text, "-o", "/dev/null").refused("not a regular file")
    call("compress", short_text, "-o", "/proc/x.rcc").refused("cannot be written")
    if os.geteuid():  # root may write anywhere
        folder.chmod(0o500)
        call("compress", short_text, "-o", folder / "x.rcc").refused("cannot be written", "ermission")


def test_file_size_limit(call: Call, short_text: Path, folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        result = call("compress", short_text, "-o", folder / "x.rcc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    result.refused("cannot be written", "File too large")


def test_full_disk(call: Call, short_text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted; the limit on file size is tested above")
    try:
        call("compress", short_text, "-o", small / "x.rcc").refused("cannot be written", "No space left")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("rate", ["0", "-4", "1.5", "abc", "²", "9" * 5000, ""])
def test_bad_rate(call: Call, short_text: Path, folder: Path, rate: str) -> None:
    call("compress", short_text, "-o", folder / "x.rcc", "--rate", rate).refused("is not a rate")


def test_rate_that_does_not_divide(call: Call, short_text: Path, compressed_file: Path, folder: Path) -> None:
    call("compress", short_text, "-o", folder / "x.rcc", "--rate", "3").refused(
        "256", "1, 2, 4, 8, 16, 32, 64, 128, 256"
    )
    call("ask", compressed_file, "Who?", "--rate", "8").refused("compressed already")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--device", "abacus", ["device abacus is unknown", "cpu"]),
        ("--device", "meta", ["device meta cannot be used here"]),
        ("--device", "cuda:99", ["device cuda:99 cannot be used here"]),
        ("--dtype", "int8", ["dtype int8 is unknown", "bfloat16"]),
        ("--dtype", "nn", ["dtype nn is unknown"]),
        ("--model", "", ["neither a shipped model"]),
        ("--model", "./nothing-here", ["neither a shipped model", "nor a folder"]),
        ("--model", "nobody/nothing", ["nor could it be fetched"]),
    ],
)
def test_bad_option(call: Call, short_text: Path, folder: Path, option: str, value: str, words: list[str]) -> None:
    call("compress", short_text, "-o", folder / "x.rcc", option, value).refused(*words)


def test_bad_usage(call: Call, short_text: Path, compressed_file: Path, folder: Path) -> None:
    call("compress", short_text).refused("--output", "rcc compress --help")
    call("compress", "-o", folder / "x.rcc").refused("sources")
    call("compres").refused("compres")
    call("ask", compressed_file).refused("questions")
    call("ask", compressed_file, "Who?", "--colour").refused("--colour")
    call("ask", compressed_file, "Who?", "--max-new-tokens", "0").refused("--max-new-tokens")
    call("ask", compressed_file, "Who?", "--mode", "shout").refused(
        "'shout' is unknown", "human, reconstruct, compress"
    )
    call("ask", compressed_file, " ").refused("the question is empty")
    nothing = call()
    assert (nothing.code, "Traceback" in nothing.err) == (2, False)
    assert "compress" in nothing.err  # the help


def test_bad_question(call: Call, compressed_file: Path) -> None:
    call("ask", compressed_file, "word " * 9000).refused("window of 8,192")
    call("ask", compressed_file, "Who?", "--max-new-tokens", "9000").refused("window of 8,192")
    call("ask", compressed_file, "Gr\udcfc\udcdfe?").refused("UTF-8")  # how Python passes on an argument in Latin-1
    call("reconstruct", compressed_file, "--prompt", "").refused("prompt is empty")


def test_bad_model_folder(call: Call, short_text: Path, folder: Path, tmp_path: Path) -> None:
    mine, shipped = tmp_path / "mine", checkpoints.shipped_models()[MODEL]
    mine.mkdir()
    call("compress", short_text, "-o", folder / "x.rcc", "--model", mine).refused("no config.json")
    shutil.copy(shipped / "config.json", mine)
    call("compress", short_text, "-o", folder / "x.rcc", "--model", mine).refused("no *.safetensors")
    weights = bytearray((shipped / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (mine / "model.safetensors").write_bytes(weights)
    call("compress", short_text, "-o", folder / "x.rcc", "--model", mine).refused("SHA-256")
    (mine / "config.json").write_text('{"model_type": "gpt2"}')
    call("compress", short_text, "-o", folder / "x.rcc", "--model", mine).refused("has no rotary positions")
    call("compress", short_text, "-o", folder / "x.rcc", "--model", mine / "config.json").refused("is a file")


def test_context_of_another_model(call: Call, short_text: Path, compressed_file: Path, tmp_path: Path) -> None:
    model = RCCForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        next(iter(model.projections.parameters())).mul_(1.01)
    model.save_pretrained(tmp_path / "mine")
    other = tmp_path / "other.rcc"
    model.compress(torch.arange(1, 200)[None]).save(other)
    call("ask", other, "Who?").refused("made by another model")
    call("reconstruct", other).refused("made by another model")
    call("compress", short_text, "-o", tmp_path / "x.rcc", "--context", other).refused("made by another model")
    call("ask", compressed_file, "Who?", "--model", tmp_path / "mine").refused("made by another model")
    assert call("ask", other, "Who?", "--model", tmp_path / "mine").ok().err == ""
    assert not (tmp_path / "x.rcc").exists()
    # one that does not come with rcc has to be named
    model.config.name = "mine"
    model.compress(torch.arange(1, 200)[None]).save(other)
    call("ask", other, "Who?").refused("made by mine", "as the model")


def test_bad_context(call: Call, short_text: Path, compressed_file: Path, tmp_path: Path, folder: Path) -> None:
    bad = tmp_path / "bad.rcc"
    for verb in (["ask", bad, "Who?"], ["inspect", bad], ["reconstruct", bad]):
        bad.unlink(missing_ok=True)
        call(*verb).refused("bad.rcc", "No such file")
        bad.touch()
        call(*verb).refused("bad.rcc", "is empty")
        for size in (5, 3000, compressed_file.stat().st_size // 2, compressed_file.stat().st_size - 1):
            bad.write_bytes(compressed_file.read_bytes()[:size])
            call(*verb).refused("bad.rcc", "damaged")
    call("inspect", short_text).refused("damaged or not an rcc context")
    call("compress", short_text, "-o", folder / "x.rcc", "--context", bad).refused("damaged")
    # without the name's help too
    cut = tmp_path / "cut"
    cut.write_bytes(compressed_file.read_bytes()[:3000])
    call("ask", cut, "Who?").refused("damaged")


def test_context_of_a_newer_format(call: Call, compressed_file: Path, tmp_path: Path) -> None:
    newer, data = tmp_path / "newer.rcc", compressed_file.read_bytes()
    data = data.replace(b'"version":"1"', b'"version":"3"', 1)
    (old,) = re.findall(rb'"sha256":"([0-9a-f]{64})"', data[:3000])
    blank = data.replace(old, b"0" * 64, 1)
    newer.write_bytes(blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1))
    for verb in (["ask", newer, "Who?"], ["inspect", newer]):
        call(*verb).refused("format version 3", "update rcc")


def flips(data: bytes) -> Sequence[int]:
    """Places in the length, the header (format, digest, manifest, shapes) and all over the tensors."""
    size = 8 + int.from_bytes(data[:8], "little")
    named = [
        data.index(word) + len(word) + 2 for word in (b'"format"', b'"sha256"', b"fingerprint", b"keys.0", b"shape")
    ]
    spread = [size + i * (len(data) - size - 1) // 7 for i in range(8)]
    return [0, 3, 7, 8, *named, size // 2, size - 1, *spread, len(data) - 2]


def test_one_byte_changed(call: Call, compressed_file: Path, tmp_path: Path) -> None:
    whole, changed = compressed_file.read_bytes(), tmp_path / "changed.rcc"
    offsets = flips(whole)
    assert len(offsets) >= 20
    for i, offset in enumerate(offsets):
        changed.write_bytes(whole[:offset] + bytes([whole[offset] ^ (1 << i % 8)]) + whole[offset + 1 :])
        call("ask", changed, "Who?").refused("changed.rcc" if offset > 8 else "")
    done = process("ask", changed, "Who?")
    done.refused("changed.rcc", "damaged")


def test_out_of_memory(call: Call, short_text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error of an allocation that no machine can serve."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1 << 60, dtype=torch.uint8)

    def huge(*args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Engine, "compress", huge)
    call("compress", short_text, "-o", folder / "x.rcc").refused("out of memory", "--rate")
