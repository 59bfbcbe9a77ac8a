"""A file that says something else of itself than it holds is refused, even where its digest is right."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import MakeModel, MakeTokens
from equality import same_bits
from rcc import CompressedContext, CompressedVectors, ContextError, FileError, RCCError, RCCForCausalLM


def rewrite(
    file: Path,
    target: Path,
    change: Callable[[dict[str, Any]], object] | None,
    manifest_change: Callable[[dict[str, Any]], object] | None = None,
) -> None:
    """A file with another header, with a right digest: what another version of rcc might write."""

    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    if manifest_change is not None:
        manifest = json.loads(header["__metadata__"]["rcc"])
        manifest_change(manifest)
        header["__metadata__"]["rcc"] = json.dumps(manifest)
    if change is not None:
        change(header)
    header["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = struct.pack("<Q", len(text)) + text + data[8 + size :]
    digest = hashlib.sha256(whole).hexdigest().encode()
    at = whole.index(b'"sha256":"' + b"0" * 64) + 10
    target.write_bytes(whole[:at] + digest + whole[at + 64 :])


@pytest.mark.parametrize("verify", ["full", "header"])
def test_versions_and_kinds(
    appended: CompressedContext,
    appended_file: Path,
    tiny_llama: RCCForCausalLM,
    tokens: MakeTokens,
    tmp_path: Path,
    verify: str,
) -> None:
    """A newer format is refused with what to do; vectors are not a context and a context is not vectors; with an
    unchanged header the rewritten file is accepted, so it is the version that is refused."""
    path = tmp_path / "other"
    rewrite(appended_file, path, None)
    assert same_bits(CompressedContext.load(path, tiny_llama, verify), appended)
    rewrite(appended_file, path, lambda header: header["__metadata__"].update(version="3"))
    with pytest.raises(ContextError, match=r"version 3.*update rcc"):
        CompressedContext.load(path, verify=verify)
    rewrite(appended_file, path, lambda header: header["__metadata__"].update(format="rcc-other"))
    with pytest.raises(ContextError, match=r"rcc-other.*not an rcc context"):
        CompressedContext.load(path, verify=verify)
    tiny_llama.encode(torch.tensor([tokens(20)])).save(path)
    with pytest.raises(ContextError, match=r"rcc-vectors.*not an rcc context"):
        CompressedContext.load(path, verify=verify)
    with pytest.raises(ContextError, match=r"rcc-context.*not an rcc vectors"):
        CompressedVectors.load(appended_file)


MANIFESTS = {
    "no layers": lambda m: m.update(layers=0),
    "negative layers": lambda m: m.update(layers=-1),
    "fewer layers": lambda m: m.update(layers=2),
    "more layers": lambda m: m.update(layers=4),
    "layers no number": lambda m: m.update(layers="3"),
    "layers a fraction": lambda m: m.update(layers=3.0),
    "without layers": lambda m: m.pop("layers"),
    "no pieces": lambda m: m.update(pieces=[]),
    "pieces no list": lambda m: m.update(pieces=3),
    "pieces null": lambda m: m.update(pieces=None),
    "a piece no object": lambda m: m.update(pieces=["x"]),
    "an empty piece": lambda m: m.update(pieces=[{}]),
    "an unknown field": lambda m: m["pieces"][0].update(taste=1),
    "fewer positions": lambda m: m["pieces"][0].update(positions=9),
    "positions no number": lambda m: m["pieces"][0].update(positions="10"),
    "positions a fraction": lambda m: m["pieces"][0].update(positions=10.0),
    "negative positions": lambda m: (
        m["pieces"][0].update(positions=-5),
        m["pieces"][1].update(positions=20),
    ),
    "opening no list": lambda m: m["pieces"][0].update(opening=3),
    "without a fingerprint": lambda m: m.pop("fingerprint"),
    "fingerprint no text": lambda m: m.update(fingerprint=3),
    "without a model": lambda m: m.pop("model"),
    "without versions": lambda m: m.pop("versions"),
    "rate no number": lambda m: m["pieces"][0].update(rate="x"),
    "tokens no number": lambda m: m["pieces"][0].update(tokens=None),
}


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("verify", ["full", "header"])
def test_manifests_that_make_no_sense(
    appended_file: Path, tiny_llama: RCCForCausalLM, tmp_path: Path, verify: str, with_model: bool
) -> None:
    """A manifest with a missing, wrong or contradicting entry is refused even where the digest is right."""
    wrong = []
    for name, change in MANIFESTS.items():
        path = tmp_path / "odd"
        rewrite(appended_file, path, None, change)
        try:
            CompressedContext.load(path, tiny_llama if with_model else None, verify)
            wrong.append(f"{name}: accepted")
        except Exception as error:
            if not isinstance(error, ContextError) or "\n" in str(error):
                wrong.append(f"{name}: {error!r}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_tensors_of_the_wrong_kind(appended_file: Path, tiny_llama: RCCForCausalLM, tmp_path: Path) -> None:
    """Keys that are whole numbers of the right size, layers of different shapes, and a tensor with another name are
    refused."""
    wrong = []
    changes = {
        "whole numbers": lambda h: h["keys.1"].update(dtype="I32"),
        "other shape": lambda h: h["keys.1"].update(shape=[2, 1, 15, 12]),
        "other heads": lambda h: [h[f"{k}.{i}"].update(shape=[1, 4, 15, 6]) for k in ("keys", "values") for i in (1,)],
        "three dimensions": lambda h: h["values.0"].update(shape=[2, 15, 12]),
        "other name": lambda h: h.update({"key.0": h.pop("keys.0")}),
    }
    for name, change in changes.items():
        for verify in ("full", "header"):
            path = tmp_path / "odd"
            rewrite(appended_file, path, change)
            try:
                CompressedContext.load(path, tiny_llama, verify)
                wrong.append(f"{name}, {verify}: accepted")
            except ContextError:
                pass
            except Exception as error:
                wrong.append(f"{name}, {verify}: {error!r}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_another_model(appended: CompressedContext, appended_file: Path, tiny: MakeModel) -> None:
    """A context is refused by any other model, before anything of it is used, in both ways of checking."""
    for verify in ("full", "header"):
        for other in (tiny("llama", seed=7), tiny("gpt_neox"), tiny("llama", segment_length=32)):
            with pytest.raises(ContextError, match=r"made by another model.*tiny-llama"):
                CompressedContext.load(appended_file, other, verify)


@pytest.mark.parametrize("verify", ["full", "header"])
def test_what_is_not_a_context(appended: CompressedContext, tmp_path: Path, verify: str) -> None:
    """A missing file, a folder, an empty file, a text, zeros, random bytes, JSON, another safetensors file: each is
    refused with its path; what cannot be opened is a FileError."""

    missing, folder = tmp_path / "missing", tmp_path / "folder"
    folder.mkdir()
    for path in (missing, folder, tmp_path / "missing" / "x", context_file(tmp_path) / "x"):
        with pytest.raises(FileError, match=f"{path}.*cannot be read"):
            CompressedContext.load(path, verify=verify)
    path = tmp_path / "thing"
    random_bytes = random.Random(0).randbytes(5000)
    for content in (
        b"",
        b"x",
        b"12345678",
        b"A long text.\n" * 100,
        b"\0" * 4096,
        b"\xff" * 4096,
        random_bytes,
        b'{"__metadata__": {}}',
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 5000) + b"[" * 5000,
    ):
        path.write_bytes(content)
        with pytest.raises(ContextError, match=str(path)):
            CompressedContext.load(path, verify=verify)
    save_file({"keys.0": torch.zeros(3)}, path)
    with pytest.raises(ContextError, match=str(path)):
        CompressedContext.load(path, verify=verify)
    with pytest.raises(RCCError, match="verify="):
        CompressedContext.load(path, verify="some")


def context_file(folder: Path) -> Path:
    path = folder / "a-file"
    path.write_text("x")
    return path
