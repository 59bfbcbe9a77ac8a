"""Folders whose JSON is damaged at random, each file by its own reader: an RCCError in one sentence, or it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import Command
from damage import DEEP, read_damaged, read_damaged_lines
from rcc import FileError, ModelError, RCCForCausalLM, checkpoints
from rcc.data.corpus import open_text
from rcc.data.sources import Source
from rcc.evaluation import compare, results
from rcc.evaluation.html import page as report
from rcc.evaluation.qa import reading
from rcc.planning import plan as planning
from rcc.planning import shapes
from rcc.training.checkpointing import load_about
from rcc.training.progress import Log

WHOLE = Path(__file__).parent / "fixtures" / "56825c2"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of a model, evaluations and a run."""
    shutil.copytree(WHOLE, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    return tmp_path / "w"


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


# ---------------------------------------------------------------- shapes and bases
def test_shapes_and_their_plans(folder: Path) -> None:
    read_damaged(folder / "model/decoder/config.json", 150, lambda: shapes.find("model/decoder"))
    read_damaged(folder / "model/decoder/config.json", 6, lambda: planning.plan("model/decoder"))


@pytest.mark.parametrize("text", [DEEP, "[]", '{"model_type": 5}', '{"model_type": "llama", "hidden_size": "x"}'])
def test_the_plan_of_a_malformed_shape_is_refused_in_one_sentence(command: Command, folder: Path, text: str) -> None:
    (folder / "model/decoder/config.json").write_text(text)
    code, out, said = command("plan", "model/decoder")
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert "model/decoder/config.json" in said


@pytest.mark.parametrize("layers", [2**70, 1e9, float("inf")])
def test_more_layers_than_memory_could_hold_are_refused(folder: Path, layers: float) -> None:
    """transformers would make them one by one, until nothing is left."""
    edit(folder / "model/decoder/config.json", num_hidden_layers=layers)
    for read in (shapes.find, planning.plan, RCCForCausalLM.from_base):
        with pytest.raises(ModelError, match="num_hidden_layers"):
            read("model/decoder")


@pytest.mark.parametrize(("file", "count"), [("config.json", 60), ("generation_config.json", 20)])
def test_the_settings_of_a_base(folder: Path, file: str, count: int) -> None:
    read_damaged(folder / "model/decoder" / file, count, lambda: RCCForCausalLM.from_base("model/decoder"))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(folder: Path, file: str) -> None:
    read_damaged(folder / "model/decoder" / file, 60, lambda: checkpoints.load_tokenizer("model/decoder"))


def test_the_index_of_weights_in_parts(folder: Path) -> None:
    base = folder / "model/decoder"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "part.safetensors")
    names = dict.fromkeys(list(tensors)[:4], "part.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    read_damaged(index, 40, lambda: checkpoints.weights_sha256(base))


# ---------------------------------------------------------------- evaluations and runs
def test_rows_of_questions(folder: Path) -> None:
    read_damaged_lines(folder / "questions.jsonl", 60, lambda: reading.open_questions(["questions.jsonl"], None, []))


@pytest.mark.filterwarnings("ignore:invalid value")  # of figures that are infinite
@pytest.mark.parametrize(("task", "by"), [("qa", ["method", "rate"]), ("reconstruction", ["length", "context"])])
def test_an_evaluation_that_goes_on(folder: Path, task: str, by: list[str]) -> None:
    """Samples that are none are measured again."""
    settings = json.loads((folder / task / "settings.json").read_text())
    del settings["task"]
    keys = [json.loads(line)["key"] for line in (folder / task / "samples.jsonl").read_text().splitlines()]

    def go_on() -> None:
        run = results.Results(task, settings, folder / task, cluster="text")
        run.collect([results.Case(key, lambda: {"score": 0.5}) for key in keys])
        assert {json.dumps(row["key"]) for row in run.rows} >= set(map(json.dumps, keys))
        run.finish(by, "a table\n")

    read_damaged_lines(folder / task / "samples.jsonl", 30, go_on)
    read_damaged(folder / task / "settings.json", 20, go_on)


@pytest.mark.parametrize("task", ["qa", "reconstruction"])
def test_the_samples_of_a_report(folder: Path, task: str) -> None:
    file = folder / task / "samples.jsonl"
    read_damaged_lines(file, 15, lambda: report.page([folder / task]))
    read_damaged_lines(file, 15, lambda: compare.compare(folder / task, folder / task))


@pytest.mark.parametrize("file", ["about.json", "trainer_state.json"])
def test_what_a_checkpoint_says_of_itself(folder: Path, file: str) -> None:
    checkpoint = folder / "run/stages/1-s/checkpoints/checkpoint-2"
    read_damaged(checkpoint / file, 60, lambda: load_about(checkpoint))
    (checkpoint / file).write_text(DEEP)
    with pytest.raises(FileError, match=rf"{file} is damaged"):
        load_about(checkpoint)


def test_tokens_that_are_kept_are_made_again_where_they_are_damaged(folder: Path, tmp_path: Path) -> None:
    tokenizer = checkpoints.load_tokenizer("model")

    def read() -> None:
        corpus = open_text(Source("texts.jsonl"), tokenizer)
        assert (len(corpus), corpus.broken, corpus.lengths.tolist()) == (3, 0, [130] * 3)

    read()
    (info,) = (tmp_path / "home" / "tokens").glob("*/info.json")
    read_damaged(info, 80, read)


def test_the_log_of_a_run(folder: Path) -> None:
    """Lines that are none of ours are forgotten when a run goes on."""
    read_damaged_lines(folder / "run/log.jsonl", 60, lambda: Log(folder / "run/log.jsonl").rewind("s", 2))
