"""Damaged files of contexts and vectors are refused, or by the header alone loaded in a usable form."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from conftest import MakeTokens
from rcc import CompressedContext, CompressedVectors, ContextError, RCCError, RCCForCausalLM


@pytest.mark.parametrize("verify", ["full", "header"])
def test_truncation(appended_file: Path, tmp_path: Path, verify: str) -> None:
    """A file cut anywhere is refused in both ways of checking: at every byte of the header, then in steps; so is one
    with more after it."""
    data = appended_file.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "cut"
    for length in [*range(0, size + 40, 3), *range(size, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ContextError, match="cut"):
            CompressedContext.load(path, verify=verify)
    for more in (b"\0", b"x" * 100, data):
        path.write_bytes(data + more)
        with pytest.raises(ContextError, match="damaged"):
            CompressedContext.load(path, verify=verify)


@pytest.mark.parametrize("verify", ["full", "header"])
def test_a_header_of_many_brackets(appended_file: Path, tmp_path: Path, verify: str) -> None:
    """JSON nested too deeply for the parser, with whatever digest, is damaged too: no RecursionError."""
    text = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"},"x":' + b"[" * 200_000
    path = tmp_path / "deep"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ContextError):
        CompressedContext.load(path, verify=verify)
    if verify == "full":
        whole = path.read_bytes()
        at = whole.index(b"0" * 64)
        path.write_bytes(whole[:at] + hashlib.sha256(whole).hexdigest().encode() + whole[at + 64 :])
        with pytest.raises(ContextError):
            CompressedContext.load(path, verify=verify)


def use(context: CompressedContext) -> None:
    """What a caller does first with a context it was given."""
    repr(context)
    json.dumps(context.info())
    context.layer(0)
    assert context.nbytes > 0
    with context.borrow(1):
        pass


def load_damaged(path: Path, verify: str, model: RCCForCausalLM = None) -> str | None:
    """Load a damaged file: None where it is refused or, by its header alone, loaded in a usable form; else what is
    wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = CompressedContext.load(path, model, verify)
            if verify == "header":
                use(loaded)
    except RCCError:
        return None
    except Exception as error:
        return repr(error)
    return "accepted" if verify == "full" else None


def mutations(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged copies of `data`: bits flipped, bytes replaced, inserted, deleted, doubled, swapped, zeroed, cut;
    half of them in the header."""
    generator = random.Random(seed)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    while count:
        end = header if generator.random() < 0.5 else len(data)
        at = generator.randrange(end)
        size = generator.choice([1, 1, 2, 8, 64, 500])
        kind = generator.choice(["flip", "replace", "insert", "delete", "double", "swap", "zero", "cut", "move"])
        part = data[at : at + size]
        if kind == "flip":
            new = data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :]
        elif kind == "replace":
            new = data[:at] + generator.randbytes(len(part)) + data[at + size :]
        elif kind == "insert":
            new = data[:at] + generator.randbytes(size) + data[at:]
        elif kind == "delete":
            new = data[:at] + data[at + size :]
        elif kind == "double":
            new = data[:at] + part + data[at:]
        elif kind == "swap":
            other = generator.randrange(end)
            copy = bytearray(data)
            copy[at], copy[other] = copy[other], copy[at]
            new = bytes(copy)
        elif kind == "zero":
            new = data[:at] + bytes(len(part)) + data[at + size :]
        elif kind == "cut":
            new = data[:at]
        else:
            rest = data[:at] + data[at + size :]
            to = generator.randrange(len(rest) + 1)
            new = rest[:to] + part + rest[to:]
        if new != data:
            count -= 1
            yield f"{kind} {size} at {at}", new


@pytest.mark.parametrize("verify", ["full", "header"])
def test_a_thousand_mutations(appended_file: Path, tmp_path: Path, verify: str) -> None:
    """1,000 damaged files: verify="full" refuses each with an RCCError; verify="header" refuses it or loads something
    that can be looked at and borrowed; never another exception."""
    path = tmp_path / "damaged"
    data = appended_file.read_bytes()
    wrong = []
    for name, damaged in mutations(data, 1000, seed=20240610):
        path.write_bytes(damaged)
        problem = load_damaged(path, verify)
        if problem:
            wrong.append(f"{name}: {problem}")
    assert not wrong, f"{len(wrong)} of 1000:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize(
    ("kind", "verify"),
    [
        ("lowest bit", "full"),
        ("case bit", "full"),
        *((kind, "header") for kind in ("lowest bit", "case bit", "highest bit", "zero", "quote")),
    ],
)
def test_every_byte_of_the_header(
    appended_file: Path, tiny_llama: RCCForCausalLM, tmp_path: Path, verify: str, kind: str
) -> None:
    """Every single byte of the header damaged in several ways: as above, with the model at hand."""
    damages: dict[str, Callable[[int], int]] = {
        "lowest bit": lambda byte: byte ^ 1,
        "case bit": lambda byte: byte ^ 0x20,
        "highest bit": lambda byte: byte ^ 0x80,
        "zero": lambda byte: ord("0"),
        "quote": lambda byte: ord('"'),
    }
    path = tmp_path / "damaged"
    data = bytearray(appended_file.read_bytes())
    wrong = []
    for at in range(8 + struct.unpack("<Q", data[:8])[0]):
        byte = data[at]
        data[at] = damages[kind](byte)
        if data[at] != byte:
            path.write_bytes(data)
            problem = load_damaged(path, verify, tiny_llama)
            if problem:
                wrong.append(f"byte {at} {bytes([byte])!r} → {bytes([data[at]])!r}: {problem}")
        data[at] = byte
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:20])


def test_every_byte_after_the_header(appended_file: Path, tmp_path: Path) -> None:
    """One byte of the keys and values changed, wherever it is: refused under verify="full"."""
    path = tmp_path / "damaged"
    data = bytearray(appended_file.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for at in range(start, len(data), 23):
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        assert load_damaged(path, "full") is None
        data[at] ^= 1 << at % 8


def test_vectors_are_checked_the_same_way(tiny_llama: RCCForCausalLM, tokens: MakeTokens, tmp_path: Path) -> None:
    """300 damaged files of vectors: each refused."""
    path = tmp_path / "v"
    tiny_llama.encode(torch.tensor([tokens(20)])).save(path)
    data = path.read_bytes()
    for _, damaged in mutations(data, 300, seed=1):
        path.write_bytes(damaged)
        with pytest.raises(RCCError):
            CompressedVectors.load(path)
