"""A compressed context as a value and as a file: the same bits back, or a refusal; never something else."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import pickle
import random
import struct
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import GenerationConfig

from rcc import CompressedContext, CompressedVectors, ContextError, FileError, InputError, RCCError
from rcc.context.cache import KVBlocks
from rcc.runtime import allocator
from rcc.runtime.memory import peak_mb, reset_peak, resident


@pytest.fixture(scope="module")
def model(tiny):
    return tiny("llama", name="tiny-llama")


@pytest.fixture(scope="module")
def context(model, tokens) -> CompressedContext:
    """An appended text: two pieces at two rates."""
    first = model.compress(torch.tensor([tokens(37)]))
    return model.compress(torch.tensor([tokens(9, 2)]), rate=2, context=first)


@pytest.fixture(scope="module")
def file(context, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("context") / "book.rcc"
    context.save(path)
    return path


def same_bits(a: CompressedContext, b: CompressedContext) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for i in range(3) for x, y in zip(a.layer(i), b.layer(i), strict=True)
    )


def answer(model, context, tokens) -> list[int]:
    return model.generate(torch.tensor([tokens(6, 1)]), context=context, max_new_tokens=6)[0].tolist()


def mapped(context: CompressedContext, file: Path) -> bool:
    """Whether a context's keys and values lie in this process's mapping of a file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            low, high = line.split()[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    pointers = [t.data_ptr() for layer in context.blocks.layers for t in layer]
    inside = [any(low <= p < high for low, high in ranges) for p in pointers]
    assert all(inside) or not any(inside)
    return all(inside)


# ---------------------------------------------------------------- what it says of itself
def test_value(context, model, tokens):
    """Length, bytes, rate, tokens, digests and batch size are what they should be, by hand."""
    import hashlib

    import numpy as np

    assert len(context) == 10 + 5
    assert context.lengths == [15]
    assert context.batch_size == 1
    # 3 layers × keys and values × 2 KV heads × 15 positions × 12 × 4 bytes
    assert context.nbytes == 3 * 2 * 2 * 15 * 12 * 4
    assert context.rate == [2, 4]
    assert context.source_tokens == 46
    assert (context.dtype, context.device.type) == (torch.float32, "cpu")
    assert context.fingerprint == model.fingerprint
    single = model.compress(torch.tensor([tokens(37)]))
    assert single.rate == 4
    digest = hashlib.sha256(np.array(tokens(37), dtype="<i8").tobytes()).hexdigest()
    assert single.source_sha256 == [digest]
    assert context.pieces[0][0].sha256 == digest
    assert context.source_sha256 != [digest]
    assert context.pieces[0][0].opening == tuple(tokens(37)[:10])
    for i in range(3):
        for tensor in context.layer(i):
            assert tensor.shape == (1, 2, 15, 12)
    assert {"rcc", "torch", "transformers"} <= context.versions.keys()
    batch = CompressedContext.stack([context, single])
    assert batch.nbytes == 2 * context.nbytes
    assert batch.source_tokens == 46 + 37


def test_repr_tells_a_person_something(context, model, tokens):
    """Tokens, rates, positions, size, precision, place and model, in one line."""
    text = repr(context)
    for part in ("46 tokens", "2×/4×", "15 positions", "MB", "float32", "cpu", "tiny-llama", context.fingerprint[:12]):
        assert part in text
    assert "\n" not in text
    assert "2 texts" in repr(context.expand(2))
    assert "2,000 tokens" in repr(model.compress(torch.tensor([tokens(2000)]), rate=16))


def test_info(context):
    """What `rcc inspect --json` prints is plain JSON with the promised names."""
    info = json.loads(json.dumps(context.info()))
    assert info["source_tokens"] == 46
    assert info["rate"] == [2, 4]
    assert info["positions"] == 15
    assert info["bytes"] == context.nbytes
    assert info["bytes_per_position"] * 15 == context.nbytes
    assert info["model"] == "tiny-llama"
    assert info["fingerprint"] == context.fingerprint
    assert [piece["tokens"] for piece in info["pieces"]] == [37, 9]


def test_it_is_a_value(context):
    """Its parts cannot be replaced."""
    with pytest.raises(AttributeError):
        context.length = 3


def test_expand(context, model, tokens):
    """expand shares memory until it is used, refuses several texts, and equals the one context."""
    many = context.expand(3)
    assert (many.batch_size, len(many), many.lengths) == (3, 15, [15] * 3)
    assert many.layer(0)[0].data_ptr() == context.layer(0)[0].data_ptr()
    assert all(same_bits(many[i], context) for i in range(3))
    out = model.generate(torch.tensor([tokens(6, 1)] * 3), context=many, max_new_tokens=6)
    assert out.tolist() == [answer(model, context, tokens)] * 3
    assert same_bits(many[0], context)
    with pytest.raises(InputError, match=r"expand.*3.*context\[i\]"):
        many.expand(2)
    for n in (0, -1):
        with pytest.raises(InputError):
            context.expand(n)


def test_to(context):
    """to changes the precision and leaves the original; where nothing changes it is the context itself."""
    assert context.to() is context
    assert context.to("cpu", torch.float32) is context
    half = context.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.nbytes * 2 == context.nbytes
    assert context.dtype == torch.float32
    for i in range(3):
        for x, y in zip(half.layer(i), context.layer(i), strict=True):
            assert torch.equal(x, y.to(torch.bfloat16))
    assert same_bits(half.to(dtype=torch.float32).to(dtype=torch.bfloat16), half)
    assert half.pieces == context.pieces


def test_getitem_and_iteration(context):
    """Negative indices count from the end, others are an IndexError, so a batch can be iterated over."""
    batch = CompressedContext.stack([context, context.to()])
    assert same_bits(batch[-1], context)
    for i in (2, -3):
        with pytest.raises(IndexError):
            batch[i]
    assert [c.lengths for c in batch] == [[15], [15]]


def test_stack(context, model, tokens):
    """Gaps stand before shorter texts and are masked; nothing and contexts of different models are refused."""
    short = model.compress(torch.tensor([tokens(3)]))
    batch = CompressedContext.stack([short, context])
    assert batch.mask.tolist() == [[False] * 14 + [True], [True] * 15]
    assert batch.layer(0)[0][0, :, :14].abs().max() == 0
    assert CompressedContext.stack([context, context]).mask is None
    with pytest.raises(InputError, match="contexts"):
        CompressedContext.stack([])


# ---------------------------------------------------------------- save and load
@pytest.mark.parametrize("verify", ["full", "header"])
@pytest.mark.parametrize("with_model", [True, False])
def test_save_and_load(context, file, model, tokens, verify, with_model):
    """The same bits, the same description and the same answer, whichever way it is checked; the file is an ordinary
    safetensors file, and appending to what was loaded works."""
    loaded = CompressedContext.load(file, model=model if with_model else None, verify=verify)
    assert same_bits(loaded, context)
    for name in ("pieces", "fingerprint", "model_name", "segment_length", "versions", "lengths", "rate", "nbytes"):
        assert getattr(loaded, name) == getattr(context, name), name
    assert repr(loaded) == repr(context)
    assert answer(model, loaded, tokens) == answer(model, context, tokens)
    more = torch.tensor([tokens(21, 3)])
    assert same_bits(model.compress(more, context=loaded), model.compress(more, context=context))
    assert same_bits(loaded, context)
    with safe_open(file, framework="pt") as plain:
        assert len(plain.keys()) == 6
        assert plain.metadata()["format"] == "rcc-context"


def test_full_is_read_and_header_is_mapped(context, file, model, tokens):
    """verify="header" maps the file, allocates nothing for the keys and values, and never writes to it;
    verify="full" reads them into memory with room behind them."""
    before = file.read_bytes()
    full = CompressedContext.load(file, model)
    header = CompressedContext.load(file, model, verify="header")
    assert not mapped(full, file)
    assert full.blocks.writable
    assert full.blocks.capacity > len(full)
    assert mapped(header, file)
    assert not header.blocks.writable
    assert header.blocks.capacity == len(header)
    answer(model, header, tokens)
    model.compress(torch.tensor([tokens(5)]), context=header)
    with header.borrow(1) as cache:
        assert cache.layers[0].block[0].data_ptr() != header.layer(0)[0].data_ptr()
    assert mapped(header, file)
    assert file.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("verify", ["full", "header"])
def test_a_file_is_not_in_memory_twice(context, tmp_path, verify):
    """What was copied out of a mapped file is let go of, layer by layer; the file can be used again afterwards."""
    layers = [(torch.rand(1, 2, 2**15, 32), torch.rand(1, 2, 2**15, 32)) for _ in range(8)]
    piece = replace(context.pieces[0][0], positions=2**15)
    big = replace(context, blocks=KVBlocks(layers, 2**15, True), length=2**15, pieces=((piece,),), mask=None)
    big.save(tmp_path / "big.rcc")
    allocator.trim()  # else copies may go where memory is held already
    reset_peak(torch.device("cpu"))
    before = resident()
    loaded = CompressedContext.load(tmp_path / "big.rcc", verify=verify)
    with loaded.borrow(8) as cache:
        assert all(torch.equal(cache.layers[i].keys, layers[i][0]) for i in range(8))
    peak = peak_mb(torch.device("cpu")) * 1e6 - before
    assert peak < 1.35 * big.nbytes
    assert all(torch.equal(loaded.layer(i)[1], layers[i][1]) for i in range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_precision(context, model, tmp_path, dtype):
    """Each precision comes back as it is without a model, in the model's with one."""
    cast = context.to(dtype=dtype)
    cast.save(tmp_path / "c")
    for verify in ("full", "header"):
        loaded = CompressedContext.load(tmp_path / "c", verify=verify)
        assert loaded.dtype == dtype
        assert same_bits(loaded, cast)
        assert CompressedContext.load(tmp_path / "c", model, verify).dtype == torch.float32


def test_saving_a_part_of_something(context, model, tokens, batch, tmp_path):
    """A text of a batch (with and without gaps), a parent whose memory a longer context shares, and a context that was
    itself loaded are saved as if they were alone; several texts at once are refused."""
    short = model.compress(torch.tensor([tokens(3)]))
    stacked = CompressedContext.stack([short, context])
    together = model.compress(*batch([tokens(5), tokens(40, 2)]))
    parent = model.compress(torch.tensor([tokens(20)]))
    child = model.compress(torch.tensor([tokens(5)]), context=parent)
    cases = [stacked[0], stacked[1], together[0], together[1], parent, child, CompressedContext.stack([short])]
    for case in cases:
        case.save(tmp_path / "c")
        assert same_bits(CompressedContext.load(tmp_path / "c", model), case)
        CompressedContext.load(tmp_path / "c", model, "header").save(tmp_path / "d")
        assert same_bits(CompressedContext.load(tmp_path / "d", model), case)
    with pytest.raises(InputError, match=r"save.*2.*context\[i\]"):
        stacked.save(tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "d"]


def test_saving_over_the_file_that_is_mapped(context, model, tokens, tmp_path):
    """A mapped context that is saved over its own file, or whose file is replaced, keeps its content."""
    path = tmp_path / "c"
    context.save(path)
    header = CompressedContext.load(path, model, "header")
    header.save(path)
    model.compress(torch.tensor([tokens(8)])).save(path)
    assert same_bits(header, context)


def test_the_same_context_makes_the_same_bytes(context, tmp_path):
    """Two files of one context differ in the time of writing and the digest at most."""
    context.save(tmp_path / "a")
    context.save(tmp_path / "b")
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    size = 8 + struct.unpack("<Q", a[:8])[0]
    assert len(a) == len(b)
    assert a[size:] == b[size:]


# ---------------------------------------------------------------- refusals
def test_another_model(context, file, tiny):
    """A context is refused by any other model, before anything of it is used, in both ways of checking."""
    for verify in ("full", "header"):
        for other in (tiny("llama", seed=7), tiny("gpt_neox"), tiny("llama", segment_length=32)):
            with pytest.raises(ContextError, match=r"made by another model.*tiny-llama"):
                CompressedContext.load(file, other, verify)


@pytest.mark.parametrize("verify", ["full", "header"])
def test_truncation(file, tmp_path, verify):
    """A file cut anywhere is refused in both ways of checking: at every byte of the header, then in steps; so is one
    with more behind it."""
    data = file.read_bytes()
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


def rewrite(file: Path, target: Path, change, manifest_change=None) -> None:
    """A file with another header, with a right digest: what another version of rcc might write."""
    import hashlib

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
def test_versions_and_kinds(context, file, model, tokens, tmp_path, verify):
    """A newer format is refused with what to do; vectors are not a context and a context is not vectors; with an
    unchanged header the rewritten file is accepted, so it is the version that is refused."""
    path = tmp_path / "other"
    rewrite(file, path, None)
    assert same_bits(CompressedContext.load(path, model, verify), context)
    rewrite(file, path, lambda header: header["__metadata__"].update(version="2"))
    with pytest.raises(ContextError, match=r"version 2.*update rcc"):
        CompressedContext.load(path, verify=verify)
    rewrite(file, path, lambda header: header["__metadata__"].update(format="rcc-other"))
    with pytest.raises(ContextError, match=r"rcc-other.*not an rcc context"):
        CompressedContext.load(path, verify=verify)
    model.encode(torch.tensor([tokens(20)])).save(path)
    with pytest.raises(ContextError, match=r"rcc-vectors.*not an rcc context"):
        CompressedContext.load(path, verify=verify)
    with pytest.raises(ContextError, match=r"rcc-context.*not an rcc vectors"):
        CompressedVectors.load(file)


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
def test_manifests_that_make_no_sense(file, model, tmp_path, verify, with_model):
    """A manifest with a missing, wrong or contradicting entry is refused even where the digest is right."""
    wrong = []
    for name, change in MANIFESTS.items():
        path = tmp_path / "odd"
        rewrite(file, path, None, change)
        try:
            CompressedContext.load(path, model if with_model else None, verify)
            wrong.append(f"{name}: accepted")
        except Exception as error:
            if not isinstance(error, ContextError) or "\n" in str(error):
                wrong.append(f"{name}: {error!r}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_tensors_of_the_wrong_kind(file, model, tmp_path):
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
            rewrite(file, path, change)
            try:
                CompressedContext.load(path, model, verify)
                wrong.append(f"{name}, {verify}: accepted")
            except ContextError:
                pass
            except Exception as error:
                wrong.append(f"{name}, {verify}: {error!r}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("verify", ["full", "header"])
def test_what_is_not_a_context(context, tmp_path, verify):
    """A missing file, a folder, an empty file, a text, zeros, random bytes, JSON, another safetensors file: each is
    refused with its path; what cannot be opened is a FileError."""
    from safetensors.torch import save_file

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


@pytest.mark.parametrize("verify", ["full", "header"])
def test_a_header_of_many_brackets(file, tmp_path, verify):
    """JSON nested too deeply for the parser, with whatever digest, is damaged too: no RecursionError."""
    text = b'{"__metadata__":{"sha256":"' + b"0" * 64 + b'"},"x":' + b"[" * 200_000
    path = tmp_path / "deep"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ContextError):
        CompressedContext.load(path, verify=verify)
    if verify == "full":
        import hashlib

        whole = path.read_bytes()
        at = whole.index(b"0" * 64)
        path.write_bytes(whole[:at] + hashlib.sha256(whole).hexdigest().encode() + whole[at + 64 :])
        with pytest.raises(ContextError):
            CompressedContext.load(path, verify=verify)


# ---------------------------------------------------------------- damage
def use(context: CompressedContext) -> None:
    """What a caller does first with a context it was given."""
    repr(context)
    json.dumps(context.info())
    context.layer(0)
    assert context.nbytes > 0
    with context.borrow(1):
        pass


def load_damaged(path: Path, verify: str, model=None) -> str | None:
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


def mutations(data: bytes, count: int, seed: int):
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
def test_a_thousand_mutations(file, tmp_path, verify):
    """1,000 damaged files: verify="full" refuses each with an RCCError; verify="header" refuses it or loads something
    that can be looked at and borrowed; never another exception."""
    path = tmp_path / "damaged"
    data = file.read_bytes()
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
def test_every_byte_of_the_header(file, model, tmp_path, verify, kind):
    """Every single byte of the header damaged in several ways: as above, with the model at hand."""
    damage = {
        "lowest bit": lambda byte: byte ^ 1,
        "case bit": lambda byte: byte ^ 0x20,
        "highest bit": lambda byte: byte ^ 0x80,
        "zero": lambda byte: ord("0"),
        "quote": lambda byte: ord('"'),
    }[kind]
    path = tmp_path / "damaged"
    data = bytearray(file.read_bytes())
    wrong = []
    for at in range(8 + struct.unpack("<Q", data[:8])[0]):
        byte = data[at]
        data[at] = damage(byte)
        if data[at] != byte:
            path.write_bytes(data)
            problem = load_damaged(path, verify, model)
            if problem:
                wrong.append(f"byte {at} {bytes([byte])!r} → {bytes([data[at]])!r}: {problem}")
        data[at] = byte
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:20])


def test_every_byte_behind_the_header(file, tmp_path):
    """One byte of the keys and values changed, wherever it is: refused under verify="full"."""
    path = tmp_path / "damaged"
    data = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    for at in range(start, len(data), 23):
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        assert load_damaged(path, "full") is None
        data[at] ^= 1 << at % 8


def test_vectors_are_checked_the_same_way(model, tokens, tmp_path):
    """300 damaged files of vectors: each refused."""
    path = tmp_path / "v"
    model.encode(torch.tensor([tokens(20)])).save(path)
    data = path.read_bytes()
    for _, damaged in mutations(data, 300, seed=1):
        path.write_bytes(damaged)
        with pytest.raises(RCCError):
            CompressedVectors.load(path)


# ---------------------------------------------------------------- writing that fails
def test_places_that_cannot_be_written(context, tmp_path):
    """A folder that is missing, a path below a file, a folder in the file's place, a name that is too long, and no
    name at all: a FileError that names the path, and nothing left behind."""
    folder, plain = tmp_path / "folder", tmp_path / "plain"
    folder.mkdir()
    plain.write_text("x")
    for path in (tmp_path / "no" / "c", plain / "c", folder, tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot be written"):
            context.save(path)
    for path in ("", ".", "/"):
        with pytest.raises(FileError, match="cannot be written"):
            context.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain"]
    assert not list(folder.iterdir())
    assert plain.read_text() == "x"


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_full_disk(context, file, tmp_path, monkeypatch, step, older):
    """No space left while writing, flushing or renaming: a FileError that says so, no half-written file, no temporary
    one, and an older file unchanged."""
    path = tmp_path / "book.rcc"
    if older:
        path.write_bytes(file.read_bytes())
    if step == "write":
        import builtins

        real = builtins.open

        def full(name, mode="r", *args, **kwargs):
            opened = real(name, mode, *args, **kwargs)
            if "x" in mode or "w" in mode:

                class Full:
                    def __enter__(self):
                        opened.__enter__()
                        return self

                    def __exit__(self, *error):
                        return opened.__exit__(*error)

                    def __getattr__(self, attribute):
                        return getattr(opened, attribute)

                    def write(self, data):
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
        context.save(path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == (["book.rcc"] if older else [])
    if older:
        assert path.read_bytes() == file.read_bytes()
    context.save(path)
    assert same_bits(CompressedContext.load(path), context)


def test_a_file_system_that_is_full(context, tmp_path):
    """A real limit: the process may write files of 2,000 bytes only; nothing is left behind."""
    import resource
    import signal

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        with pytest.raises(FileError, match="cannot be written"):
            context.save(tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_writing(context, tmp_path, monkeypatch):
    """Ctrl-C in the middle leaves nothing, and an older file as it was."""

    def interrupt(*args):
        raise KeyboardInterrupt

    path = tmp_path / "c"
    path.write_text("older")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        context.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert path.read_text() == "older"


def test_two_writers(context, model, tokens, tmp_path):
    """Threads that save to one path, and read it, at once: every reader gets one whole file, description and contents
    of the same context, and one whole file is left."""
    path = tmp_path / "c"
    other = model.compress(torch.tensor([tokens(20, 5)]))
    twin = model.compress(torch.tensor([tokens(57, 6)]))  # as many positions as `context`
    assert len(twin) == len(context)
    errors: list[BaseException] = []

    def save(what: CompressedContext) -> None:
        try:
            for _ in range(10):
                what.save(path)
                loaded = CompressedContext.load(path, model)
                source = next(c for c in (context, twin, other) if c.source_sha256 == loaded.source_sha256)
                assert same_bits(loaded, source)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(what,)) for what in (context, other, twin)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


# ---------------------------------------------------------------- a value
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: _through_torch(value),
}


def _through_torch(value: Any) -> Any:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("source", ["made", "asked", "header", "batch", "expanded"])
def test_a_copy_answers_the_same(tiny, tokens, batch, tmp_path, how: str, source: str) -> None:
    model = tiny()
    ids, mask = batch([tokens(40), tokens(25)] if source == "batch" else [tokens(40)])
    context = model.compress(ids, mask, rate=4)
    if source == "asked":
        model.generate(torch.tensor([tokens(3)]), context=context, max_new_tokens=2, pad_token_id=0)
    if source == "header":
        context.save(tmp_path / "c.rcc")
        context = CompressedContext.load(tmp_path / "c.rcc", verify="header")
    if source == "expanded":
        context = context.expand(2)
    copied = COPIES[how](context)
    prompt = torch.tensor([tokens(5)] * context.batch_size)
    assert torch.equal(model(prompt, context=copied).logits, model(prompt, context=context).logits)
    assert (copied.pieces, copied.fingerprint, len(copied)) == (context.pieces, context.fingerprint, len(context))


def test_the_cache_that_generate_hands_out_is_the_callers(tiny, tokens) -> None:
    model = tiny()
    context = model.compress(torch.tensor([tokens(40)]), rate=4)
    how = {"context": context, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    configured = {"generation_config": GenerationConfig(return_dict_in_generate=True)}
    for settings in ({"return_dict_in_generate": True}, configured):
        out = model.generate(torch.tensor([tokens(4)]), **settings, **how)
        before = out.past_key_values.layers[0].keys.clone()
        model.generate(torch.tensor([tokens(4, seed=1)]), **how)
        model.compress(torch.tensor([tokens(30)]), rate=4, context=context)
        assert torch.equal(before, out.past_key_values.layers[0].keys)


# ---------------------------------------------------------------- what forward is asked for
@pytest.mark.parametrize("behind", [True, False])
def test_forward_gives_hidden_states_and_attentions(fresh, tokens, behind: bool) -> None:
    model = fresh(attn="eager")
    context = model.compress(torch.tensor([tokens(40)]), rate=4) if behind else None
    out = model(torch.tensor([tokens(5)]), context=context, output_hidden_states=True, output_attentions=True)
    assert [t.shape[1] for t in out.hidden_states] == [5] * 4
    assert [t.shape[2:] for t in out.attentions] == [(5, 15 if behind else 5)] * 3
    assert model(torch.tensor([tokens(5)]), context=context, use_cache=False, return_dict=True).hidden_states is None


@pytest.mark.parametrize("name", ["return_dict", "use_cache", "position_ids", "inputs_embeds", "past_key_values"])
def test_forward_refuses_by_name_what_it_cannot_give(tiny, tokens, name: str) -> None:
    value = {"return_dict": False, "use_cache": True}.get(name, torch.zeros(1, 5))
    with pytest.raises(InputError, match=name):
        tiny()(torch.tensor([tokens(5)]), **{name: value})


@pytest.mark.parametrize("wrong", ["c.rcc", Path("c.rcc"), 5, torch.zeros(1)])
@pytest.mark.parametrize("use", ["forward", "generate", "compress"])
def test_what_is_no_context_is_refused_by_name(tiny, tokens, use: str, wrong: Any) -> None:
    with pytest.raises(InputError, match="context must be a CompressedContext"):
        getattr(tiny(), use)(torch.tensor([tokens(5)]), context=wrong)
