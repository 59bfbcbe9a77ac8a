"""Files that commit 56825c2 made, read by the code of today: the same bytes, tokens and tables.

tests/fixtures/make.py made them with the sources of that commit. A context's file names the moment at which it was
written, so of saved contexts all bytes are compared but that date and the digest that covers it; and a folder's
settings name the release of sacrebleu. Everything else is the same to the byte, but for what is computed anew, which
may differ between machines in a float's last digits; and a model's own tensors now stand in its file in the order of
their names, which changes neither its fingerprint nor its SHA-256 in config.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import Command
from fixtures.make import ids, tables, without_date
from rcc import CompressedContext, CompressedVectors, RCCForCausalLM
from rcc.evaluation import metrics, results
from rcc.evaluation.html import page as report

OLD = Path(__file__).parent / "fixtures" / "56825c2"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
BASE = "decoder/model.safetensors"
CONTEXTS = ["one", "appended"]
EVALUATIONS: dict[str, list[str]] = {"reconstruction": [], "qa": ["--hint", "Answer in a few words."]}
"""And options whose default was another then."""


@pytest.fixture(scope="module")
def model() -> RCCForCausalLM:
    return RCCForCausalLM.from_pretrained(OLD / "model", dtype=torch.float32)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of all files, whose paths are relative to it."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "old"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(raw: bytes) -> dict[str, Any]:
    size = int.from_bytes(raw[:8], "little")
    made: dict[str, Any] = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["rcc"])
    return made


# ---------------------------------------------------------------- models and contexts
def test_the_files_are_those_that_the_old_commit_made() -> None:
    for name, file in {"one": "one.rcc", "appended": "appended.rcc", "vectors": "one.vectors"}.items():
        assert sha256((OLD / file).read_bytes()) == EXPECTED[name]["sha256"]


def test_the_model_loads_and_is_the_one_that_its_contexts_name(model: RCCForCausalLM, tmp_path: Path) -> None:
    assert model.fingerprint == EXPECTED["fingerprint"]
    changed = RCCForCausalLM.from_pretrained(OLD / "model", dtype=torch.float32)
    with torch.no_grad():
        next(changed.parameters()).mul_(1)  # after which it is computed, where config.json said it before
    assert changed.fingerprint == EXPECTED["fingerprint"]
    for name in CONTEXTS:
        assert CompressedContext.load(OLD / f"{name}.rcc").fingerprint == model.fingerprint
    model.save_pretrained(tmp_path / "m", full=True)
    assert (tmp_path / "m" / BASE).read_bytes() == (OLD / "model" / BASE).read_bytes()
    own, old = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", OLD / "model"))
    assert own.keys() == old.keys()
    assert all(torch.equal(own[name], old[name]) for name in old)
    before, after = (json.loads((f / "config.json").read_text()) for f in (OLD / "model", tmp_path / "m"))
    assert before.items() <= after.items()


@pytest.mark.parametrize("verify", ["full", "header"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_gives_the_same_tokens(model: RCCForCausalLM, name: str, verify: str) -> None:
    expected = EXPECTED[name]
    context = CompressedContext.load(OLD / f"{name}.rcc", model, verify=verify)
    assert expected["info"].items() <= context.info().items()
    for prompt, written in zip(expected["prompts"], expected["tokens"], strict=True):
        x = torch.tensor([prompt])
        how = {"max_new_tokens": len(written), "do_sample": False, "eos_token_id": 2**31 - 1, "pad_token_id": 0}
        out = model.generate(x, torch.ones_like(x), context=context, **how)
        assert out[0, len(prompt) :].tolist() == written


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_saved_again_is_the_same_file(model: RCCForCausalLM, tmp_path: Path, name: str) -> None:
    raw = (OLD / f"{name}.rcc").read_bytes()
    for with_model in (None, model):
        CompressedContext.load(OLD / f"{name}.rcc", with_model).save(tmp_path / "c.rcc")
        again = (tmp_path / "c.rcc").read_bytes()
        assert without_date(again) == without_date(raw)
        assert sha256(without_date(again)) == EXPECTED[name]["sha256_without_date"]
        assert CompressedContext.load(tmp_path / "c.rcc").info() == CompressedContext.load(OLD / f"{name}.rcc").info()


def test_vectors_saved_again_are_the_same_file(tmp_path: Path) -> None:
    CompressedVectors.load(OLD / "one.vectors").save(tmp_path / "v")
    assert (tmp_path / "v").read_bytes() == (OLD / "one.vectors").read_bytes()


def test_what_is_made_anew_of_vectors_and_texts_is_what_was_made(model: RCCForCausalLM, tmp_path: Path) -> None:
    """Text 4 of make.py, compressed by the code of today."""
    old, vectors = CompressedContext.load(OLD / "one.rcc"), CompressedVectors.load(OLD / "one.vectors")
    torch.testing.assert_close(model.encode(ids(75, 4), rate=4).states, vectors.states)
    for made in (model.prefix(vectors), model.compress(ids(75, 4), rate=4)):
        for i in range(len(old.blocks.layers)):
            torch.testing.assert_close(made.layer(i), old.layer(i))
        made.save(tmp_path / "c.rcc")
        fields = [manifest(path.read_bytes()) for path in (OLD / "one.rcc", tmp_path / "c.rcc")]
        before, after = ({k: v for k, v in m.items() if k not in ("created", "versions")} for m in fields)
        assert before == after


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_is_shown_as_it_was(command: Command, copied: Path, name: str) -> None:
    code, out, _ = command("inspect", f"{name}.rcc", "--json")
    assert code == 0
    assert json.loads(EXPECTED[name]["inspected"]).items() <= json.loads(out).items()


# ---------------------------------------------------------------- evaluations
def of_this_sacrebleu(text: str, task: str) -> str:
    before = results.load(OLD / task)[0]["settings"].get("bleu", "")
    return text.replace(before, metrics.bleu_settings()) if before else text


@pytest.mark.parametrize("task", EVALUATIONS)
def test_an_evaluation_that_goes_on_has_nothing_to_do(command: Command, copied: Path, task: str) -> None:
    """Every sample is found in the folder, and the tables made of them are those of then."""
    settings = copied / task / "settings.json"
    settings.write_text(of_this_sacrebleu(settings.read_text(), task))
    files = {name: (copied / task / name).read_bytes() for name in ("samples.jsonl", "settings.json")}
    before = results.load(copied / task)[0]
    code, out, said = command(*EXPECTED[task]["command"].split(), *EVALUATIONS[task])
    assert code == 0, said
    assert out == of_this_sacrebleu(EXPECTED[task]["printed"], task)
    assert files == {name: (copied / task / name).read_bytes() for name in files}
    assert (copied / task / "table.md").read_text() == of_this_sacrebleu((OLD / task / "table.md").read_text(), task)
    after = results.load(copied / task)[0]
    for data in (before, after):
        del data["made"]  # today, here
    assert json.loads(of_this_sacrebleu(json.dumps(before), task)) == after


@pytest.mark.parametrize("task", EVALUATIONS)
def test_the_report_of_an_evaluation_has_the_same_tables(task: str) -> None:
    assert tables(report.page([OLD / task])) == EXPECTED[task]["report"]


# ---------------------------------------------------------------- training
def test_a_run_goes_on_from_its_checkpoint(command: Command, copied: Path) -> None:
    """Two more steps: the same samples, so the same losses and the same weights."""
    threads = f"run.threads={torch.get_num_threads()}"  # the recipe's own would outlast the test
    code, _, said = command("train", "run/recipe.yaml", "-o", "run", "--resume", "--set", threads)
    assert code == 0, said
    log = [json.loads(line) for line in (copied / "run" / "log.jsonl").read_text().splitlines()]
    for row, expected in zip(log, EXPECTED["run"]["log"], strict=True):
        assert {**row, "loss": 0, "seconds": 0} == {**expected, "loss": 0, "seconds": 0}
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    state = copied / "run" / "stages" / "1-s" / "checkpoints" / "checkpoint-4" / "state.pt"
    norms = {name: float(t.norm()) for name, t in torch.load(state, weights_only=True)["weights"].items()}
    assert norms == pytest.approx(EXPECTED["run"]["norms"], rel=1e-3, abs=1e-6)
    assert RCCForCausalLM.from_pretrained(copied / "run").config.name == "t"
