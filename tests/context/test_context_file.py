"""A context's file gives back the same bits, read or mapped."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from appended_context import answer
from conftest import MakeBatch, MakeTokens
from equality import same_bits
from rcc import CompressedContext, InputError, RCCForCausalLM
from rcc.context.cache import KVBlocks
from rcc.runtime import allocator
from rcc.runtime.memory import peak_mb, reset_peak, resident


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


@pytest.mark.parametrize("verify", ["full", "header"])
@pytest.mark.parametrize("with_model", [True, False])
def test_save_and_load(
    appended: CompressedContext,
    appended_file: Path,
    tiny_llama: RCCForCausalLM,
    tokens: MakeTokens,
    verify: str,
    with_model: bool,
) -> None:
    """The same bits, the same description and the same answer, whichever way it is checked; the file is an ordinary
    safetensors file, and appending to what was loaded works."""
    loaded = CompressedContext.load(appended_file, model=tiny_llama if with_model else None, verify=verify)
    assert same_bits(loaded, appended)
    for name in ("pieces", "fingerprint", "model_name", "segment_length", "versions", "lengths", "rate", "nbytes"):
        assert getattr(loaded, name) == getattr(appended, name), name
    assert repr(loaded) == repr(appended)
    assert answer(tiny_llama, loaded, tokens) == answer(tiny_llama, appended, tokens)
    more = torch.tensor([tokens(21, 3)])
    assert same_bits(tiny_llama.compress(more, context=loaded), tiny_llama.compress(more, context=appended))
    assert same_bits(loaded, appended)
    with safe_open(appended_file, framework="pt") as plain:
        assert len(plain.keys()) == 6
        assert plain.metadata()["format"] == "rcc-context"


def test_full_is_read_and_header_is_mapped(
    appended: CompressedContext, appended_file: Path, tiny_llama: RCCForCausalLM, tokens: MakeTokens
) -> None:
    """verify="header" maps the file, allocates nothing for the keys and values, and never writes to it;
    verify="full" reads them into memory with room after them."""
    before = appended_file.read_bytes()
    full = CompressedContext.load(appended_file, tiny_llama)
    header = CompressedContext.load(appended_file, tiny_llama, verify="header")
    assert not mapped(full, appended_file)
    assert full.blocks.writable
    assert full.blocks.capacity > len(full)
    assert mapped(header, appended_file)
    assert not header.blocks.writable
    assert header.blocks.capacity == len(header)
    answer(tiny_llama, header, tokens)
    tiny_llama.compress(torch.tensor([tokens(5)]), context=header)
    with header.borrow(1) as cache:
        assert cache.layers[0].block[0].data_ptr() != header.layer(0)[0].data_ptr()
    assert mapped(header, appended_file)
    assert appended_file.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("verify", ["full", "header"])
def test_a_file_is_not_in_memory_twice(appended: CompressedContext, tmp_path: Path, verify: str) -> None:
    """What was copied out of a mapped file is let go of, layer by layer; the file can be used again afterwards."""
    layers = [(torch.rand(1, 2, 2**15, 32), torch.rand(1, 2, 2**15, 32)) for _ in range(8)]
    piece = replace(appended.pieces[0][0], positions=2**15)
    big = replace(appended, blocks=KVBlocks(layers, 2**15, True), length=2**15, pieces=((piece,),), mask=None)
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
def test_every_precision(
    appended: CompressedContext, tiny_llama: RCCForCausalLM, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Each precision comes back as it is without a model, in the model's with one."""
    cast = appended.to(dtype=dtype)
    cast.save(tmp_path / "c")
    for verify in ("full", "header"):
        loaded = CompressedContext.load(tmp_path / "c", verify=verify)
        assert loaded.dtype == dtype
        assert same_bits(loaded, cast)
        assert CompressedContext.load(tmp_path / "c", tiny_llama, verify).dtype == torch.float32


def test_saving_a_part_of_something(
    appended: CompressedContext, tiny_llama: RCCForCausalLM, tokens: MakeTokens, batch: MakeBatch, tmp_path: Path
) -> None:
    """A text of a batch (with and without gaps), a parent whose memory a longer context shares, and a context that was
    itself loaded are saved as if they were alone; several texts at once are refused."""
    short = tiny_llama.compress(torch.tensor([tokens(3)]))
    stacked = CompressedContext.stack([short, appended])
    together = tiny_llama.compress(*batch([tokens(5), tokens(40, 2)]))
    parent = tiny_llama.compress(torch.tensor([tokens(20)]))
    child = tiny_llama.compress(torch.tensor([tokens(5)]), context=parent)
    cases = [stacked[0], stacked[1], together[0], together[1], parent, child, CompressedContext.stack([short])]
    for case in cases:
        case.save(tmp_path / "c")
        assert same_bits(CompressedContext.load(tmp_path / "c", tiny_llama), case)
        CompressedContext.load(tmp_path / "c", tiny_llama, "header").save(tmp_path / "d")
        assert same_bits(CompressedContext.load(tmp_path / "d", tiny_llama), case)
    with pytest.raises(InputError, match=r"save.*2.*context\[i\]"):
        stacked.save(tmp_path / "e")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "d"]


def test_saving_over_the_file_that_is_mapped(
    appended: CompressedContext, tiny_llama: RCCForCausalLM, tokens: MakeTokens, tmp_path: Path
) -> None:
    """A mapped context that is saved over its own file, or whose file is replaced, keeps its content."""
    path = tmp_path / "c"
    appended.save(path)
    header = CompressedContext.load(path, tiny_llama, "header")
    header.save(path)
    tiny_llama.compress(torch.tensor([tokens(8)])).save(path)
    assert same_bits(header, appended)


def test_the_same_context_makes_the_same_bytes(appended: CompressedContext, tmp_path: Path) -> None:
    """Two files of one context differ in the time of writing and the digest at most."""
    appended.save(tmp_path / "a")
    appended.save(tmp_path / "b")
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    size = 8 + struct.unpack("<Q", a[:8])[0]
    assert len(a) == len(b)
    assert a[size:] == b[size:]
