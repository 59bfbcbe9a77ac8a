"""Every evaluation of a language model that nobody trained for rcc, and of a model beside selections of its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import rcc
from command_line import Result
from conftest import make_backbone, randomise
from json_lines import write_rows
from rcc import RCCConfig, RCCForCausalLM
from rcc.evaluation.evaluation import evaluate
from rcc.evaluation.passkey.run import PasskeyEvaluation
from rcc.evaluation.passkey.settings import PasskeySettings
from rcc.evaluation.qa import run as qa
from rcc.evaluation.qa.questions import Question
from rcc.evaluation.qa.settings import BASELINES, QASettings
from rcc.evaluation.reconstruction.documents import open_texts
from rcc.evaluation.reconstruction.run import ReconstructionEvaluation
from rcc.evaluation.reconstruction.settings import ReconstructionSettings
from rcc.evaluation.resources import process
from rcc.model.selection.selection import Selection
from rcc.text.tokens import token_ids

Call = Callable[..., Result]
CHUNK = 64
TEXT = "The old lion of the zoo is called Brutus. He sleeps all day long, and eats at night when nobody looks. " * 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return rcc.load_tokenizer("rcc-smollm2-135m")


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's folder, of a tiny random model."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shape: dict[str, Any] = {"layers": 2, "hidden": 16, "window": 1024, "vocab_size": len(tokenizer), "eos_token_id": 2}
    make_backbone("llama", **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An RCC model's folder, on that base."""
    folder = tmp_path_factory.mktemp("model") / "ours"
    config = RCCConfig(segment_length=32, rates=[2, 4], name="ours")
    randomise(RCCForCausalLM.from_base(base, config=config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def selection(base: Path, tokenizer: PreTrainedTokenizerBase) -> Selection:
    return Selection.from_pretrained(base, "tiny", chunk_length=CHUNK)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"id": "zoo/0", "context": TEXT, "question": "What is the lion called?", "answers": ["Brutus"]},
        {"id": "sea/0", "context": TEXT[::-1], "question": "When was it built?", "answers": ["1811"]},
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "facts.jsonl", rows)


# ---------------------------------------------------------------- reconstruction
@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_reconstruction_at_1x_is_plain_reading(
    selection: Selection, tokenizer: PreTrainedTokenizerBase, text: Path
) -> None:
    """All pairs are the model's own cache after the header; other rates and contexts are measured, and differ."""
    asked = ReconstructionSettings([1, 4], [80], prompts=2, target_tokens=12, documents=2)
    evaluation = ReconstructionEvaluation(selection, tokenizer, open_texts([str(text)], "text", tokenizer), asked)
    run = evaluate(evaluation)
    rows = {tuple(row["key"].get(k) for k in ("context", "rate", "document", "start")): row for row in run.rows}
    assert len(rows) == len(evaluation) == 2 * 2 * (2 * 3 + 2)
    losses = set()
    for (kind, _, document, start), row in rows.items():
        if kind == "plain-text":
            exact = rows["real", 1, document, start]
            assert exact["loss"] == pytest.approx(row["loss"], abs=1e-4)
            assert exact["written"] == row["written"]
            losses |= {round(rows[other]["loss"], 4) for other in rows if other[2:] == (document, start)}
    assert len(losses) == 4 * 7  # no other two are equal
    assert run.settings["compressor"] == "selection, rule repeat"
    assert "tiny was not trained for rcc. Its contexts: selection, rule repeat." in run.notes
    assert "untrained" not in evaluation.report(run).table()


def test_what_does_not_fit_the_window_is_said(
    selection: Selection, tokenizer: PreTrainedTokenizerBase, text: Path
) -> None:
    """To the very position: the header stands before the text."""
    text.write_text(TEXT * 8)
    corpora = open_texts([str(text)], "text", tokenizer)
    fits = selection.window - len(selection.header) - 10 - 8
    for length, measured in ((fits, True), (fits + 1, False)):
        asked = ReconstructionSettings([1], [length], 1, 8, ["no-context"], documents=1)
        rows = evaluate(ReconstructionEvaluation(selection, tokenizer, corpora, asked)).rows
        assert ["loss" in row for row in rows] == [measured, True]


def test_a_context_is_written_back_beside_its_text(call: Call, base: Path, tmp_path: Path) -> None:
    text, context = tmp_path / "text.txt", tmp_path / "text.rcc"
    text.write_text(TEXT)
    call("compress", text, "-o", context, "--model", base, "--rate", 2).ok()
    options = ("reconstruct", context, "--model", base, "--tokens", 8, "--json")
    written = json.loads(call(*options).ok().out)
    assert written["prompt"] == "The old lion of the zoo is called Brutus."[: len(written["prompt"])]
    beside = json.loads(call(*options, "--against", text).ok().out)
    assert (beside["same_text"], beside["text"]) == (True, written["text"])
    assert beside["tokens_measured"] > 100


# ---------------------------------------------------------------- passkey
def test_keys_are_asked_of_a_selection(selection: Selection, tokenizer: PreTrainedTokenizerBase) -> None:
    """What is written is what the model writes after the context and the question; the control lacks the key."""
    asked = PasskeySettings([200], rates=[1, 4, 3], keys=1, positions=["middle"])
    evaluation = PasskeyEvaluation(selection, tokenizer, asked)
    run = evaluate(evaluation)
    assert len(run.rows) == 3 * 2
    for row in run.rows:
        key, text = row["key"], evaluation.text(row["key"])
        ids = text.ids if key["context"] == "whole" else text.replaced(evaluation._segments(text))
        read = tokenizer.decode(ids)
        assert (text.key in read) == (key["context"] == "whole")
        context = selection.compress(torch.from_numpy(ids)[None], rate=key["rate"])
        question = token_ids(tokenizer, text.question)
        out = selection.generate(question, context=context, max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(out[0, question.shape[1] :], skip_special_tokens=True).startswith(row["written"])
        assert row["text"]["positions"] == len(context)
        assert row["text"]["segments"] == -(-len(ids) // CHUNK)
    table = evaluation.report(run).table()
    assert "| plain | 200 | 3× |" in table
    assert not [note for note in run.notes if "not trained at" in note or "were read once" in note]


# ---------------------------------------------------------------- resources
def test_resources_of_a_selection(
    call: Call, base: Path, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are those of the model and its context, of a folder and of an RCC model's base."""
    monkeypatch.setattr(process, "measure", lambda job: process.TASKS[job.task](job))  # in this process
    monkeypatch.setattr(process, "_load_libraries", lambda device: None)
    selection = Selection.from_pretrained(base, "tiny")
    ids = torch.arange(1, 101)[None]
    for model, options in ((base, []), (ours, ["--compressor", "selection"])):
        folder = tmp_path / model.name
        common = ["--lengths", 100, "--rates", 4, "--question-tokens", 5, "--device", "cpu", "--output", folder]
        table = call("eval", "resources", "--model", model, *options, *common).ok().out
        assert "selection, peak MB" in table
        assert "Its contexts: selection, rule repeat." in table
        plain, row = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
        context = selection.compress(ids, rate=4)
        assert (row["positions"], row["kv_bytes"]) == (25, context.nbytes)
        assert row["weights_bytes"] == plain["weights_bytes"] == sum(p.nbytes for p in selection.decoder.parameters())
        assert plain["kv_bytes"] == 4 * context.nbytes
        settings = json.loads((folder / "results.json").read_text())["settings"]
        assert settings["fingerprint"] == selection.fingerprint
    call("eval", "resources", "--model", base, "--compressor", "rcc").refused("was not trained for rcc")
    call("eval", "resources", "--shape", "pythia-1.4b", "--compressor", "selection").refused("--compressor")


# ---------------------------------------------------------------- questions
def test_questions_to_a_language_model(call: Call, base: Path, data: Path, tmp_path: Path) -> None:
    """Its own selection is the first row; the others read by the same model, and at 1x they are equal."""
    folder = tmp_path / "qa"
    common = ["--model", base, "--data", data, "--max-new-tokens", 4, "--output", folder, "--json"]
    done = call("eval", "qa", *common, "--rates", "1,4", "--baselines", "all").ok()
    cells = {(c["key"]["method"], c["key"]["mode"]) for c in json.loads(done.out)["cells"]}
    assert cells == {("selection", ""), *((name, "") for name in BASELINES)}
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    written = {(r["key"]["method"], r["key"]["rate"], r["key"]["question"]): r for r in rows}
    for name in ("zoo/0", "sea/0"):
        assert written["selection", 1, name]["written"] == written["plain", 0, name]["written"]
        assert written["selection", 1, name]["bytes"] == written["plain", 0, name]["bytes"] > 0
        assert written["no-context", 0, name]["bytes"] == 0
    assert "as few words as possible" in (folder / "table.md").read_text() + done.out
    call("eval", "qa", *common, "--modes", "compress").refused('mode "compress"')
    call("eval", "qa", *common, "--beside", f"x={base}").refused("was not trained for rcc")


def test_untrained_rows_are_asked_in_the_same_words(selection: Selection, tokenizer: PreTrainedTokenizerBase) -> None:
    question = Question("a/1", "a", TEXT, "What is it?", ("x",))
    names = ["plain", "truncated", "bm25", "selection-stride"]
    methods = qa.make_methods(selection, tokenizer, selection.modes, names, hint="Be short.", room=64)
    prompts = {method.prompt(question).decoder_text for method in methods}
    assert prompts == {selection.chat.prompt("What is it? Be short.").decoder_text}
    (alone,) = qa.make_methods(selection, tokenizer, [], ["no-context"], hint="Be short.")
    assert alone.prompt(question).decoder_text == f"{selection.chat.header}What is it? Be short.{selection.chat.turn}"
    # `rcc ask` adds nothing
    assert "short" not in selection.prompt("What is it?", "human").decoder_text


ROWS = ["plain", "bm25", "selection", "selection-expected", "selection-stride"]


def test_a_model_beside_selections_of_its_base(call: Call, ours: Path, data: Path, tmp_path: Path) -> None:
    """Interrupted after some questions, the same command goes on; every row has every question once."""
    folder = tmp_path / "qa"
    common = ["eval", "qa", "--model", ours, "--data", data, "--rates", "2,4", "--baselines", ",".join(ROWS)]
    common += ["--modes", "human", "--max-new-tokens", 4, "--output", folder]
    call(*common).ok()
    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 * (1 + 5 * 2)
    half = lines[: len(lines) // 2]
    (folder / "samples.jsonl").write_text("\n".join(half) + "\n")
    table = call(*common).ok().out
    again = (folder / "samples.jsonl").read_text().splitlines()
    assert again[: len(half)] == half
    assert [json.loads(line)["key"] for line in again] == [json.loads(line)["key"] for line in lines]
    for name in ROWS[1:]:
        for rate in (2, 4):
            assert f"| {name} | {rate}× | 2 |" in table
    assert "| rcc, human | 4× | 2 |" in table


def test_progress_counts_every_answer(ours: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = RCCForCausalLM.from_pretrained(ours)
    asked = [Question(f"a/{i}", "a", TEXT, "What is it?", ("x",)) for i in range(2)]
    methods = qa.make_methods(model, tokenizer, ["human"], ROWS, room=64)
    evaluation = qa.QAEvaluation(tokenizer, asked, methods, QASettings([2, 4], max_new_tokens=2))
    seen: list[int] = []
    evaluate(evaluation, progress=seen.append)
    assert seen[-1] == len(evaluation) == 2 * (1 + 5 * 2)
    assert seen == sorted(set(seen))
