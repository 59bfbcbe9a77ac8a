"""`rcc eval qa`: questions as they stand in their files, metrics against values worked out by hand, methods against
transformers' own generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rcc
from json_lines import write_rows
from rcc import RCCForCausalLM, SideConfig, checkpoints
from rcc.cli.app import app
from rcc.evaluation.qa import reading
from rcc.evaluation.qa import run as qa
from rcc.evaluation.qa.settings import BASELINES, TUNED, QASettings
from rcc.model import answering
from rcc.text import prompting
from rcc.text.tokens import token_ids
from rcc.training.recipe import Recipe
from rcc.training.run import Run

TOKENIZER = rcc.load_tokenizer("rcc-smollm2-135m")
FACTS = [
    ("zoo", "The old lion of the zoo is called Brutus. He sleeps all day long.", "What is the lion called?", "Brutus"),
    ("zoo", "The old lion of the zoo is called Brutus. He sleeps all day long.", "What does he do?", "sleeps"),
    ("sea", "A ship left the harbour with nine sailors. Three of them were cooks.", "How many sailors?", "nine"),
    ("sea", "The lighthouse was built in 1811 by two brothers from Leith.", "When was it built?", "1811"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"id": f"{name}/{i}", "context": text, "question": question, "answers": [answer]}
        for i, (name, text, question, answer) in enumerate(FACTS)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "facts.jsonl", rows)


@pytest.fixture(scope="module")
def model() -> RCCForCausalLM:
    return RCCForCausalLM.from_pretrained("rcc-smollm2-135m")


# ---------------------------------------------------------------- methods


def answer(
    model: RCCForCausalLM, methods: list[Any], data: Path, **protocol: Any
) -> dict[tuple[Any, ...], dict[str, Any]]:
    asked, _ = reading.read([str(data)])
    run = qa.QAEvaluation(TOKENIZER, asked, methods, QASettings(rates=[4], max_new_tokens=6, **protocol))
    return {(c.key["method"], c.key["mode"], c.key["question"]): c.measure() for c in run.cases()}


def test_plain_is_the_base(model: RCCForCausalLM, data: Path) -> None:
    """What the base writes after the whole chat prompt, by transformers alone; the same decoder after parts of it."""
    methods = qa.make_methods(model, TOKENIZER, [], ["plain", "truncated", "bm25", "no-context"], hint="Be short.")
    rows = answer(model, methods, data)
    base = AutoModelForCausalLM.from_pretrained(checkpoints.resolve_base("smollm2-135m-instruct"), dtype=torch.bfloat16)
    for i, (name, text, question, _) in enumerate(FACTS):
        parts = [prompting.HEADER, text, f"\n\n{question} Be short.{prompting.TURN}"]
        ids = torch.cat([token_ids(TOKENIZER, part, allow_special=True) for part in parts], 1)
        end = token_ids(TOKENIZER, prompting.END, allow_special=True).item()
        out = base.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0)
        written = TOKENIZER.decode(out[0, ids.shape[1] :]).split(prompting.END)[0].strip()
        row = rows["plain", "", f"{name}/{i}"]
        assert row["written"] == written
        n = len(TOKENIZER(text)["input_ids"])
        assert (row["positions"], row["context_tokens"], row["cut"]) == (n, n, 0)
        assert row["bytes"] == n * 30 * 3 * 64 * 2 * 2  # layers, KV heads, head size, keys and values, bfloat16
        for other in ("truncated", "bm25"):
            assert rows[other, "", f"{name}/{i}"]["positions"] == -(-n // 4)
        assert rows["no-context", "", f"{name}/{i}"]["positions"] == 0
        assert rows["bm25", "", f"{name}/{i}"]["compress_seconds"] == 0
        assert row["first_token_seconds"] > 0


def test_a_text_beyond_the_window(model: RCCForCausalLM, data: Path) -> None:
    """Plain text loses its middle, and says so."""
    method: Any
    (method,) = qa.make_methods(model, TOKENIZER, [], ["plain"], room=model.window - 28)
    assert 0 < method.room < 18
    row = answer(model, [method], data)["plain", "", "zoo/0"]
    assert (row["positions"], row["cut"]) == (method.room, 1.0)


def test_contexts_are_asked_as_rcc_ask_does(model: RCCForCausalLM, data: Path) -> None:
    """Each mode, from one context for both questions about a text."""
    methods = qa.make_methods(model, TOKENIZER, prompting.MODES, [], beside={"twin": model})
    rows = answer(model, methods, data)
    for i, (name, text, question, _) in enumerate(FACTS):
        context = model.compress(token_ids(TOKENIZER, text), rate=4)
        for mode in prompting.MODES:
            asked = prompting.build(question, mode)
            wanted = answering.ask(model, TOKENIZER, context, asked, 6, do_sample=False)
            row = rows["rcc", mode, f"{name}/{i}"]
            assert (row.get("instruction"), row["written"]) == wanted
            assert ("instruction_accuracy" in row) == (mode == "reconstruct")
            assert row["positions"] == len(context)
            assert rows["twin", mode, f"{name}/{i}"]["written"] == row["written"]
    seconds = {rows["rcc", "human", f"zoo/{i}"]["compress_seconds"] for i in (0, 1)}
    assert len(seconds) == 1  # read once


def test_a_pack_is_compressed_once(model: RCCForCausalLM, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All questions about the texts of a pack are asked of one context."""
    compress, read = model.compress, []

    def noted(ids: torch.Tensor, **how: Any) -> Any:
        read.append(TOKENIZER.decode(ids[0]))
        return compress(ids, **how)

    monkeypatch.setattr(model, "compress", noted)
    methods = qa.make_methods(model, TOKENIZER, ["human"], [])
    assert len(answer(model, methods, data, pad_to=512)) == len(FACTS)
    assert len(read) == 1
    assert all(text in read[0] for _, text, _, _ in FACTS)


def test_contexts_kept_in_8_bits(model: RCCForCausalLM, data: Path) -> None:
    """`kv` says how contexts are kept that a question is asked of; a text that is not compressed stays as it is."""
    methods = qa.make_methods(model, TOKENIZER, ["human"], ["plain"])
    small, large = answer(model, methods, data, kv="int8"), answer(model, methods, data)
    for i, (name, text, question, _) in enumerate(FACTS):
        context = model.compress(token_ids(TOKENIZER, text), rate=4).to(dtype="int8")
        wanted = answering.ask(model, TOKENIZER, context, prompting.build(question, "human"), 6, do_sample=False)
        assert small["rcc", "human", f"{name}/{i}"]["written"] == wanted[1]
        key = next(key for key in large if key[0] == "plain" and key[2] == f"{name}/{i}")
        assert small[key]["written"] == large[key]["written"]
    assert qa.QAEvaluation(TOKENIZER, [], methods, QASettings(rates=[4], kv="int8")).settings()["kv"] == "int8"


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose decoder learnt two steps from plain text."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = {"model.segment_length": 32, "stages.0.max_tokens": "null", "stages.0.max_steps": 2}
    settings |= {"stages.0.lengths": [64], "stages.0.target_tokens": 48, "stages.0.batch_tokens": 64}
    settings |= {"data.questions": f"[{{path: {data}}}]", "data.evaluation_questions": "[]", "data.held_out": 0}
    settings |= {"run.evaluation_samples": 0, "stages.0.tasks.instruction.distractors": 0}
    recipe = Recipe.load(
        Path(__file__).resolve().parents[3] / "recipes/smollm2-135m-plain.yaml",
        [f"{key}={value}" for key, value in settings.items()],
    )
    Run(recipe, folder / "run").go()
    return folder / "run"


def test_plain_stage(tuned: Path) -> None:
    """The decoder alone learnt."""
    fresh = RCCForCausalLM.from_base(
        "smollm2-135m-instruct",
        config=rcc.RCCConfig(segment_length=32, rates=[8], encoder=SideConfig(1), decoder=SideConfig(16)),
    ).own_state_dict()
    learnt = RCCForCausalLM.from_pretrained(tuned).own_state_dict()
    changed = {name.split(".")[0] for name, w in learnt.items() if ".lora_B." in name and bool(w.any())}
    assert changed == {"decoder"}
    assert all(torch.equal(w, fresh[name].to(w)) for name, w in learnt.items() if name.startswith("projections."))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", "qa", *arguments])


def test_command(data: Path, tuned: Path, tmp_path: Path) -> None:
    """A folder that can be gone on with and added to; a table that names every method."""
    folder = tmp_path / "qa"
    common = ["--data", str(data), "--max-new-tokens", "4", "--output", str(folder)]
    done = run(*common, "--limit", "1", "--modes", "human", "--rates", "4", "--baselines", "bm25")
    assert done.exit_code == 0, done.output
    first = (folder / "samples.jsonl").read_text().splitlines()
    assert len(first) == 2 * 2
    done = run(*common, "--modes", "human,reconstruct", "--rates", "4", "--tuned", str(tuned), "--json")
    assert done.exit_code == 0, done.output
    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert lines[: len(first)] == first
    assert len(lines) == 4 * (2 + 4 + 1)
    result = json.loads((folder / "results.json").read_text())
    cells = {(c["key"]["method"], c["key"]["mode"]): c for c in result["cells"]}
    assert set(cells) == {
        *(("rcc", mode) for mode in ("human", "reconstruct")),
        *((name, "") for name in (*BASELINES, TUNED)),
    }
    assert all(cell["score"]["n"] == 4 for cell in cells.values())
    assert {c["key"]["set"] for c in result["by_set"]} == {"zoo", "sea"}
    assert result["ceiling"] == TUNED
    table = (folder / "table.md").read_text()
    assert "| rcc, reconstruct | 4× | 4 |" in table
    assert "| plain-tuned | – | 4 |" in table
    assert "Score by set" in table
    assert (folder / "score-by-rate.png").stat().st_size > 5000
    row = json.loads(lines[-1])
    assert row["asked"]
    assert row["answers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nothing"], "suite 'nothing' is unknown: use one of longbench, coqa, squad, drop."),
        (["--suite", "longbench"], "the suite longbench reads a local copy"),
        (["--modes", "shout"], "shout"),
        (["--baselines", "magic"], "magic"),
        (["--beside", "other"], "--beside other is not NAME=MODEL"),
        (["--beside", "plain=rcc-smollm2-135m"], "--beside plain=… is the name of another row"),
        (["--include", "nobody"], "include nobody leaves no question"),
        (["--rates", "5"], "rate=5 does not divide the segment"),
        (["--data", "no-such.jsonl"], "no-such.jsonl does not exist"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, "--output", str(tmp_path / "out"))
    assert isinstance(done.exception, rcc.RCCError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_file_without_the_field(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "texts.jsonl", [{"text": "no question here"}])
    done = run("--data", str(path))
    assert f"{path} has no question that can be used: {path}:1: no field 'context'" in str(done.exception)
