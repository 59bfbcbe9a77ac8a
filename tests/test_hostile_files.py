"""Every JSON and YAML that rcc reads, damaged at random: an RCCError in one sentence, or it is read; nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import MakeBatch, MakeModel, MakeTokens
from damage import DEEP, attempt, damaged
from rcc import CompressedContext, CompressedVectors, ContextError, RCCConfig, RCCError
from rcc.errors import InputError, ModelError
from rcc.evaluation import compare, results
from rcc.evaluation.html import page as report
from rcc.training import checkpointing
from rcc.training.recipe import Recipe


def test_recipes(tmp_path: Path) -> None:
    good = yaml.safe_load(sorted(Path("recipes").glob("*.yaml"))[0].read_text())
    for data in damaged(good, 300):
        attempt(partial(Recipe.load, write(tmp_path / "r.yaml", json.dumps(data))))  # JSON is YAML
    for text in (DEEP, "a: " + "[" * 5000, "a: &x [*x]", "? [a]\n: 1", "a: 2020-99-99", "<<: 5", "\x00", "a: !!int x"):
        attempt(partial(Recipe.load, write(tmp_path / "r.yaml", text)))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "- {a: 1,\n   b: 2,\n   a: 3}\n"])
def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="'a' stands twice in one table, in lines 1 and 3"):
        Recipe.load(write(tmp_path / "r.yaml", text))


def test_model_configurations(tmp_path: Path, fresh: MakeModel) -> None:
    fresh().save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    good = json.loads(file.read_text())
    for data in damaged(good, 300):
        file.write_text(json.dumps(data))
        attempt(lambda: RCCConfig.load(tmp_path / "m"))
    for changed in ({"lora_alpha": "x"}, {"lora_alpha": float("inf")}, {"segment_length": 2**70}, {"name": 5}):
        file.write_text(json.dumps({**good, **changed}))
        with pytest.raises(ModelError, match=next(iter(changed))):
            RCCConfig.load(tmp_path / "m")
    file.write_text(DEEP)
    with pytest.raises(ModelError, match="JSON"):
        RCCConfig.load(tmp_path / "m")


def forged(raw: bytes, header: dict[str, Any]) -> bytes:
    """A context file with another header and the right digest."""
    size = int.from_bytes(raw[:8], "little")
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    data = struct.pack("<Q", len(text)) + text + raw[8 + size :]
    at = data.find(b'"sha256":"' + b"0" * 64) + 10
    return data[:at] + hashlib.sha256(data).hexdigest().encode() + data[at + 64 :]


def test_context_files(tmp_path: Path, tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch) -> None:
    path = tmp_path / "c.rcc"
    tiny().compress(batch([tokens(40)])[0]).save(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    manifest = json.loads(header["__metadata__"]["rcc"])

    def load() -> None:
        CompressedContext.load(path).info()

    for changed in damaged(manifest, 200):
        metadata = {**header["__metadata__"], "rcc": json.dumps(changed)}
        path.write_bytes(forged(raw, {**header, "__metadata__": metadata}))
        attempt(load)
    for changed in damaged({k: v for k, v in header.items() if k != "__metadata__"}, 200):
        path.write_bytes(forged(raw, {"__metadata__": dict(header["__metadata__"]), **changed}))
        attempt(load)
    for version in (float("inf"), 2**70, "9" * 5000):
        metadata = {**header["__metadata__"], "version": version}
        path.write_bytes(forged(raw, {**header, "__metadata__": metadata}))
        with pytest.raises(ContextError):
            load()
    manifest["pieces"][0]["opening"] = [2**70]
    header["__metadata__"]["rcc"] = json.dumps(manifest)
    path.write_bytes(forged(raw, header))
    with pytest.raises(ContextError, match="damaged"):
        load()


def test_files_of_vectors(tmp_path: Path, tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch) -> None:
    path = tmp_path / "v"
    tiny().encode(batch([tokens(40)])[0], rate=4).save(path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header.pop("__metadata__")

    def use() -> None:
        tiny().prefix(CompressedVectors.load(path))

    for changed in damaged(json.loads(metadata["rcc"]), 150):
        path.write_bytes(forged(raw, {"__metadata__": {**metadata, "rcc": json.dumps(changed)}, **header}))
        attempt(use)
    for changed in damaged(header, 100):
        path.write_bytes(forged(raw, {"__metadata__": dict(metadata), **changed}))
        attempt(use)


def test_evaluations(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    run = results.Results("qa", {"model": "m"}, folder, cluster="text")
    cases = [results.Case({"method": "rcc", "text": i}, lambda: {"f1": 0.5, "answer": "a"}) for i in range(3)]
    run.collect(cases)
    run.finish(["method"], "table\n")
    good = json.loads((folder / "results.json").read_text())
    for data in damaged(good, 150):
        (folder / "results.json").write_text(json.dumps(data))
        attempt(lambda: compare.compare(folder, folder))
        attempt(lambda: report.page([folder]))
    for text in (DEEP, "5", '{"format_version": "1"}', '{"format_version": 1}'):
        (folder / "results.json").write_text(text)
        for read in (lambda: compare.compare(folder, folder), lambda: report.page([folder])):
            with pytest.raises(InputError, match="make it again"):
                read()


def test_checkpoint_listings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint whose listing or content is damaged is named and passed over; the one before it is used."""
    for step in (1, 2):
        checkpointing.write(tmp_path, step, {"state.pt": lambda path: path.write_bytes(b"x" * 100)}, keep=2)
    assert checkpointing.newest(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "state.pt").write_bytes(b"y" * 100)
    assert checkpointing.newest(tmp_path) == tmp_path / "checkpoint-1"
    assert "digest" in caplog.text
    for text in (DEEP, "5", "{}"[:1], '{"state.pt": {}}', '{"state.pt": {"bytes": "x"}}', '{"state.pt": []}'):
        (tmp_path / "checkpoint-2" / checkpointing.LISTING).write_text(text)
        assert checkpointing.newest(tmp_path) == tmp_path / "checkpoint-1"


def test_a_checkpoint_of_before_there_were_digests_is_whole(tmp_path: Path) -> None:
    checkpointing.write(tmp_path, 1, {"a": lambda path: path.write_bytes(b"x")}, keep=2)
    (tmp_path / "checkpoint-1" / checkpointing.LISTING).write_text('{"a": 1}')
    assert checkpointing.newest(tmp_path) == tmp_path / "checkpoint-1"


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 134848 vs 134740")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RCCError, match="No space left on device"):
        checkpointing.write(tmp_path, 1, {"a": fail}, keep=2)
