"""Memory and time by length: what is computed is what is allocated, and what is measured is of one process each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from conftest import Command, make_model, tokens
from rcc import InputError, RCCConfig, RCCForCausalLM, SideConfig
from rcc.evaluation import results
from rcc.evaluation.evaluation import evaluate
from rcc.evaluation.resources import process as resources_process
from rcc.evaluation.resources import run as resources
from rcc.evaluation.resources.process import Job
from rcc.evaluation.resources.settings import ResourcesSettings
from rcc.evaluation.resources.subject import Subject, loadable
from rcc.evaluation.resources.table import ResourcesReport
from rcc.planning import blueprint as planning
from rcc.planning.reading import Reading
from rcc.runtime import memory


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on the disk: 512 positions, segments of 16 tokens, rates 4 (the default), 8 and 16."""
    path = tmp_path_factory.mktemp("model") / "small"
    make_model(dtype=torch.bfloat16, rates=(4, 8, 16)).save_pretrained(path, full=True)
    return path


def measured(subject: Subject, lengths: list[int], folder: Path | None = None, **settings: Any) -> results.Results:
    """Run the evaluation of these settings."""
    return evaluate(resources.ResourcesEvaluation(subject, ResourcesSettings(lengths, **settings)), folder)


@pytest.fixture
def call(command: Command) -> Callable[..., Any]:
    """`rcc eval resources …` inside this process → exit code, output and errors."""
    return partial(command, "eval", "resources")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Processes that measure nothing: a second for every 1,000 tokens read plain, and a hundredth for a context."""
    jobs: list[Job] = []

    def measure(job: Job) -> dict[str, Any]:
        jobs.append(job)
        return {
            "compress": {"positions": 1, "weights_bytes": 50, "kv_bytes": 50, "file_bytes": 60, "compress_seconds": 1.0}
            | {"compress_peak_bytes": 110},
            "ask": {"ask_peak_bytes": 120, "load_seconds": 0.001, "first_token_seconds": 0.01},
            "plain": {"weights_bytes": 50, "kv_bytes": 400, "plain_peak_bytes": 500}
            | {"plain_first_token_seconds": job.length / 1000},
        }[job.task]

    monkeypatch.setattr(resources_process, "measure", measure)
    return jobs


# ---------------------------------------------------------------- computed
BASE, HEAD, MAPS = 1_414_647_808, 50_304 * 2048, 24 * 2048**2
"""Parameters of Pythia-1.4B, its head, which an encoder lacks, and projections P_0 … P_23 (P_24 reaches no cache)."""


def test_the_papers_table_without_weights() -> None:
    """Weights and KV cache are those of a calculation by hand; the paper's column stands beside them."""
    command = [sys.executable, "-m", "rcc", "eval", "resources", "--shape", "pythia-1.4b"]
    command += ["--lengths", "2k,64k,1M,2M"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert sum("(computed)" in cell for cell in lines[0]) == 4
    rows = {(row[0], row[1]): row[2:] for row in lines[2:]}
    weights = 2 * (2 * BASE - HEAD + MAPS)
    own = f"{weights / 1e6:,.0f}"
    assert rows["none", "–"] == ["0", own, own, "0", "1.00", "–", f"{2 * BASE / 1e6:,.0f}", "7,664", "4,078"]
    for name, size, paper in (
        ("2k", 2**11, ["7,788", "6,322"]),
        ("64k", 2**16, ["9,302", "61,928"]),
        ("1M", 2**20, ["29,944", "–"]),
        ("2M", 2**21, ["64,858", "–"]),
    ):
        for rate in (8, 32):
            positions, floor, peak, beyond, ratio, file, plain, *published = rows[name, f"{rate}×"]
            n = size // rate
            assert positions == f"{n:,}{'*' if n > 2048 - 33 else ''}"
            assert floor == f"{(weights + n * 196_608) / 1e6:,.0f}"
            assert file == f"{n * 196_608 / 1e6:,.0f}"
            assert float(ratio) <= 1.15
            assert 0 < number(beyond) == pytest.approx(number(peak) - number(floor), abs=1.1)
            assert number(plain) > (2 * BASE + size * 196_608) / 1e6
            assert published == (paper if rate == 32 else ["–", paper[1]])
    assert "computed without weights" in done.stdout


def number(text: str) -> float:
    return float(re.sub("[,*≈ ]", "", text))


def small(window: int = 4096, **more: Any) -> planning.Blueprint:
    shape = AutoConfig.for_model(
        "llama",
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        **more,
    )
    config = RCCConfig(
        segment_length=64, rates=[4], share_base=False, encoder=SideConfig(0), decoder=SideConfig(0), **more
    )
    return planning.Blueprint(config, shape, shape)


def allocated(run: Callable[[], Any]) -> int:
    """Bytes that torch allocates at most, the second time."""
    run()
    return memory.allocated(run)


@pytest.mark.parametrize("length", [64, 1000, 4096])
def test_what_is_counted_is_allocated(length: int) -> None:
    """The peak of `compress`, by counting sizes, is what torch allocates for the real model.

    In float32: in bfloat16 the CPU's attention allocates buffers of its own, which differ from processor to processor
    (on one, a sixth of what this small model holds).
    """
    blueprint = replace(small(), dtype=torch.float32)
    model = blueprint.build("cpu")
    ids = torch.tensor([tokens(length)])
    real = allocated(lambda: model.compress(ids, batch_tokens=256))
    counted = Reading(blueprint).compress(length, 4, 256)
    assert counted == pytest.approx(real, rel=0.02)


def test_a_state_space_encoder_is_estimated() -> None:
    shape = AutoConfig.for_model("mamba", vocab_size=512, hidden_size=128, num_hidden_layers=4, state_size=4)
    reading = Reading(replace(small(), encoder=shape))
    assert reading.compress(4096, 4, 256) > (1024 + 512) * planning.position_bytes(reading.blueprint.build())


# ---------------------------------------------------------------- measured
def test_measured(folder: Path, tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are those of the model and its context; the stored context answers as the one in memory does; results are
    kept, and nothing is measured twice."""
    out = tmp_path / "out"
    args = ["--model", folder, "--lengths", "256,1k", "--rates", "4", "--output", out, "--json", "--device", "cpu"]
    args += ["--question-tokens", "5", "--limit", "1"]
    code, printed, _ = call(*args)
    assert code == 0
    model = RCCForCausalLM.from_pretrained(folder)
    ids = np.random.default_rng(256).integers(1, 97, 256)
    context = model.compress(torch.tensor([ids.tolist()]), rate=4)
    asked = torch.tensor([ids[:5].tolist()])
    answer = model.generate(asked, context=context, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]

    data, rows = results.load(out)
    plain, rcc = rows
    assert rcc["key"] == {"reader": "rcc", "length": 256, "rate": 4}
    assert (rcc["positions"], rcc["kv_bytes"]) == (64, context.nbytes)
    assert rcc["weights_bytes"] == sum(p.nbytes for p in model.parameters())
    assert rcc["compress_peak_bytes"] >= rcc["weights_bytes"] + rcc["kv_bytes"]
    assert rcc["file_bytes"] > rcc["kv_bytes"]
    assert rcc["token"] == str(int(answer))
    assert rcc["load_seconds"] < 1
    assert plain["kv_bytes"] == 4 * context.nbytes
    assert plain["plain_peak_bytes"] >= plain["weights_bytes"] + plain["kv_bytes"]
    assert rcc["first_token_ratio"] == pytest.approx(plain["plain_first_token_seconds"] / rcc["first_token_seconds"])
    assert {rcc["source"], plain["source"]} == {"measured"}
    assert json.loads(printed)["cells"][1]["kv_bytes"]["mean"] == context.nbytes
    assert data["settings"]["fingerprint"] == model.fingerprint
    assert (out / "memory.png").stat().st_size > 10_000
    assert sorted(p.name for p in out.iterdir()) == [
        "memory.png",
        "results.json",
        "samples.jsonl",
        "settings.json",
        "table.md",
    ]
    before = (out / "samples.jsonl").read_bytes()
    monkeypatch.setattr(resources_process, "measure", lambda job: pytest.fail("measured again"))
    assert call(*args)[0] == 0
    assert (out / "samples.jsonl").read_bytes() == before


def test_a_shape_is_measured_with_random_weights(pretend: list[Job]) -> None:
    """Its window is widened; what does not fit the machine is left out."""
    subject = Subject("small", small(window=256))
    run = measured(subject, [1024, 2**32], rates=[4], plain=True)
    assert [job.task for job in pretend] == ["plain", "compress", "ask"]
    shapes = [job.model for job in pretend]
    assert all(isinstance(shape, planning.Blueprint) for shape in shapes)
    assert [shape.decoder.max_position_embeddings for shape in shapes] == [1024 + 544, 256 + 544, 256 + 544]
    assert subject.blueprint.decoder.max_position_embeddings == 256
    skipped = [row.get("skipped") for row in run.rows]
    assert skipped[0] is None is skipped[2]
    for reason, positions in ((skipped[1], 2**32), (skipped[3], 2**30)):
        assert reason.startswith(f"weights and KV cache take {positions * subject.position_bytes / 1e9:,.0f}"[:-2])
    assert any("random weights" in note for note in run.notes)


def test_cells_that_do_not_fit(folder: Path, pretend: list[Job]) -> None:
    """A prefix that is too long says so; by default the lowest trained rate that fits is used; plain reading beyond
    the window is extrapolated, and marked."""
    subject = loadable(str(folder))
    run = measured(subject, [64, 2048, 2**15], question_tokens=8)
    keys = [(r["key"]["reader"], r["key"]["length"], r["key"].get("rate"), r.get("source")) for r in run.rows]
    assert keys == [
        *(("plain", n, None, "measured") for n in (64, 126, 252, 504)),
        ("plain", 2048, None, "extrapolated"),
        ("plain", 2**15, None, "extrapolated"),
        ("rcc", 64, 4, "measured"),
        ("rcc", 2048, 8, "measured"),
        ("rcc", 2**15, 16, None),
    ]
    rows = run.rows
    assert rows[4]["plain_first_token_seconds"] == pytest.approx(2.048)
    assert rows[4]["kv_bytes"] == 2048 * subject.position_bytes
    assert rows[7]["first_token_ratio"] == pytest.approx(204.8)
    assert rows[8]["skipped"] == "2,048 positions and a question do not fit the decoder's window of 512"
    table = ResourcesReport(run).table()
    assert re.search(r"\| 2k \| 8× \|.* ≈ \d", table)
    assert "≈ 205×" in table
    assert "| 32k | 16× | 2,048 positions and a question do not fit" in table
    assert any(note.startswith("≈ beyond") for note in run.notes)


# ---------------------------------------------------------------- parts
def test_extrapolation() -> None:
    """Exact where the rule is; never a negative share."""
    for a, b in ((0.1, 1e-5), (0.2, 0.0), (0.0, 1e-4)):
        points = [(n, a * n + b * n * n) for n in (1000, 2000, 4000)]
        assert resources.extrapolate(points, 100_000) == pytest.approx(a * 1e5 + b * 1e10)
    assert resources.extrapolate([(100, 2.0)], 200) >= 4.0
    assert resources.extrapolate([(100, 2.0), (200, 3.0)], 1000) > 3.0


@pytest.mark.parametrize("count", [10, 64, 1000])
def test_a_repeated_text_has_different_segments(count: int) -> None:
    ids = np.random.default_rng(0).integers(1, 10_000, count)
    text = resources.repeat_text(ids, 4096, 16)
    assert len(text) == 4096
    assert set(text) <= set(ids)
    batch = text[:1024].reshape(-1, 16)
    assert len(np.unique(batch, axis=0)) > len(batch) // 3


def test_real_text(folder: Path, pretend: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(1, 90, dtype=np.int64)
    seen, measure = [], resources_process.measure

    def look(job: Job) -> dict[str, Any]:
        seen.append(np.load(job.text))
        return measure(job)

    monkeypatch.setattr(resources_process, "measure", look)
    run = measured(loadable(str(folder)), [256], text=ids, plain=False)
    assert (seen[0] == resources.repeat_text(ids, 256, 16)).all()
    assert "the given text" in run.notes[1]


REFUSALS = {
    "both": (["--shape", "pythia-1.4b", "--model", "x"], "give one of them"),
    "unknown shape": (["--shape", "pythia-9b"], "is neither a known shape"),
    "unknown encoder": (["--shape", "pythia-1.4b", "--encoder", "pythia-9b"], "is neither a known shape"),
    "unknown model": (["--model", "nothing"], "is neither a shipped model"),
    "no length": (["--lengths", "2k,,4k"], "is no whole number above 0"),
    "too short": (["--shape", "pythia-1.4b", "--lengths", "1k"], "less than one segment"),
    "a rate": (["--shape", "pythia-1.4b", "--rates", "7"], "does not divide the segment"),
    "a model's rate": (["--rates", "7"], "does not divide the segment"),
    "no rate": (["--rates", "8,x"], "is no whole number above 0"),
    "no batch": (["--batch-tokens", "0"], "is no whole number above 0"),
    "segment": (["--segment-length", "128"], "--segment-length is for a shape"),
    "random": (["--random"], "--random is for a shape"),
    "one base": (["--shape", "pythia-1.4b", "--encoder", "pythia-1.4b", "--share-base"], "leave out --encoder"),
    "data": (["--shape", "pythia-1.4b", "--data", __file__], "leave it out with --shape"),
    "device": (["--shape", "pythia-1.4b", "--device", "cpu"], "add --random"),
    "no device": (["--device", "abacus"], "device abacus is unknown"),
    "dtype": (["--dtype", "int4"], "dtype int4 is unknown"),
    "segment too long": (["--shape", "pythia-1.4b", "--segment-length", "4096"], "use a shorter segment"),
}


@pytest.mark.parametrize(("args", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(args: list[str], words: str, call: Command) -> None:
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"rcc: [^\n]+\.\n", err)
    assert words in err


def test_refusals_of_the_function(folder: Path, tmp_path: Path) -> None:
    subject = loadable(str(folder))
    with pytest.raises(InputError, match="question_tokens must be at least 1"):
        measured(subject, [256], question_tokens=0)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        measured(subject, [256], folder=tmp_path)
