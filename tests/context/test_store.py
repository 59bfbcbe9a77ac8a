"""The store: the files are all there is; safe between processes and against being killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import batch, make_model, tokens
from rcc import CompressedContext, ContextStore, InputError, RCCForCausalLM

NAMES = [f"{i:032x}" for i in range(5)]


@pytest.fixture(scope="module")
def model() -> RCCForCausalLM:
    return make_model("llama")


@pytest.fixture(scope="module")
def context(model: RCCForCausalLM) -> CompressedContext:
    return model.compress(batch([tokens(24)])[0], rate=4)


def test_a_context_is_found_by_its_address(model: RCCForCausalLM, context: CompressedContext, tmp_path: Path) -> None:
    store = ContextStore(tmp_path / "contexts")
    address = store.address(model.fingerprint, 4, ["a" * 64], torch.float32)
    others = {
        store.address("other", 4, ["a" * 64], torch.float32),
        store.address(model.fingerprint, 8, ["a" * 64], torch.float32),
        store.address(model.fingerprint, 4, ["b" * 64], torch.float32),
        store.address(model.fingerprint, 4, ["a" * 64], torch.bfloat16),
    }
    assert address not in others
    assert len(others) == 4
    assert store.get(address, model) is None
    path = store.put(address, context)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    same = store.get(address, model)
    assert same is not None
    assert same.pieces == context.pieces
    assert torch.equal(same.layer(0)[0], context.layer(0)[0])


def test_listed_from_the_files_alone(context: CompressedContext, tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    for name in NAMES[:3]:
        store.put(name, context)
    store.path(NAMES[1]).write_bytes(b"damaged")
    (tmp_path / "notes.txt").write_text("not a context")
    listed = {stored.address: stored for stored in ContextStore(tmp_path).list()}
    assert set(listed) == set(NAMES[:3])
    assert listed[NAMES[0]].tokens == context.source_tokens
    assert listed[NAMES[0]].positions == len(context)
    assert listed[NAMES[1]].model == ""
    assert store.get(NAMES[1]) is None
    store.put(NAMES[1], context)  # which makes a damaged one whole
    assert store.get(NAMES[1]) is not None


def test_the_least_recently_used_go_first(context: CompressedContext, tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    for age, name in enumerate(NAMES):
        path = store.put(name, context)
        os.utime(path, (1e9 + age, 1e9 + age))
    size = path.stat().st_size
    assert store.get(NAMES[0]) is not None  # and is now the most recently used
    assert [stored.address for stored in store.list()] == [NAMES[0], NAMES[4], NAMES[3], NAMES[2], NAMES[1]]
    assert [path.stem for path in store.prune(2 * size)] == [NAMES[1], NAMES[2], NAMES[3]]
    assert {stored.address for stored in store.list()} == {NAMES[0], NAMES[4]}
    limited = ContextStore(tmp_path, max_bytes=2 * size)
    limited.put(NAMES[2], context)
    assert {stored.address for stored in store.list()} == {NAMES[0], NAMES[2]}
    ContextStore(tmp_path, max_bytes=1).put(NAMES[3], context)  # the newest stays, whatever the limit
    assert {stored.address for stored in store.list()} == {NAMES[3]}


def test_removed_by_the_beginning_of_an_address(context: CompressedContext, tmp_path: Path) -> None:
    store = ContextStore(tmp_path)
    for name in ("ab" + NAMES[0][2:], "ac" + NAMES[0][2:]):
        store.put(name, context)
    for wrong in ("a", "", "b", "../"):
        with pytest.raises(InputError, match="stored context"):
            store.remove(wrong)
    store.remove("ab")
    assert [stored.address[:2] for stored in store.list()] == ["ac"]


PUT = """
import os, sys, time
from rcc import CompressedContext, ContextStore
context = CompressedContext.load(sys.argv[1])
if sys.argv[3] == "slow":
    os.fsync = lambda handle: (print("writing", flush=True), time.sleep(600))
for _ in range(5):
    ContextStore(sys.argv[2], max_bytes=10**6).put(sys.argv[4], context)
"""


def test_processes_put_at_once_and_a_killed_one_leaves_nothing(context: CompressedContext, tmp_path: Path) -> None:
    context.save(tmp_path / "x.rcc")
    folder = tmp_path / "contexts"

    def start(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PUT, str(tmp_path / "x.rcc"), str(folder), how, NAMES[0]]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    running = [start("fast") for _ in range(2)]
    results = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    store = ContextStore(folder)
    assert [stored.address for stored in store.list()] == [NAMES[0]]
    slow = start("slow")
    assert slow.stdout is not None
    assert slow.stdout.readline() == "writing\n"
    slow.send_signal(signal.SIGKILL)
    slow.communicate(timeout=60)
    assert [stored.address for stored in store.list()] == [NAMES[0]]
    assert store.get(NAMES[0]) is not None
    left = list(folder.glob(".rcc-*.tmp"))
    assert len(left) == 1
    os.utime(left[0], (time.time() - 7200,) * 2)
    store.prune(10**9)
    assert not left[0].exists()
