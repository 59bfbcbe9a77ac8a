"""kvpress's answers: what rcc's side sends and keeps, and, where kvpress's environment has been made, the answers.

Making it takes minutes and 1.4 GB: `python scripts/kvpress_answers.py` does, these tests do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import load_script, make_backbone, tokens
from rcc import FileError, InputError, load_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/kvpress_answers.py"
REQUEST: dict[str, Any] = {"id": "a", "context": [5, 6, 7, 8], "question": [9], "keep": 2}


kvpress = load_script("scripts/kvpress_answers.py")

# stands for a worker: says what it was started with and asked; of the context [1], nothing more
WORKER = """#!{python}
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["context"] == [1]:
        sys.exit(7)
    row = {{"id": request["id"], "press": request["press"], "tokens": request["question"], "words": sys.argv[1:]}}
    row["outside"] = os.environ.get("PYTHONPATH")
    print(json.dumps(row), flush=True)
"""


@pytest.fixture
def env(tmp_path: Path) -> Path:
    """An environment that is complete, and whose Python answers at once."""
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").write_text(WORKER.format(python=sys.executable))
    (folder / "bin/python").chmod(0o755)
    (folder / kvpress.MADE).touch()
    return folder


# ---------------------------------------------------------------- the protocol
def test_every_request_is_asked_with_every_press(env: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with its own, and not with what is done already; the worker is told what to do and sees nothing of rcc."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    requests = [REQUEST, {**REQUEST, "id": 2, "press": "tova"}]
    options = {"max_new_tokens": 5, "stop": [2, 3], "dtype": "float32", "done": {("a", "knorm")}}
    rows = list(kvpress.answers(requests, "base", env, ["snapkv", "knorm", "none"], **options))
    assert [(row["id"], row["press"]) for row in rows] == [("a", "snapkv"), ("a", "none"), (2, "tova")]
    told = "--worker --base base --max-new-tokens 5 --device cpu --dtype float32 --stop 2 --stop 3"
    assert rows[0]["words"] == [str(SCRIPT), *told.split()]
    assert rows[0]["outside"] is None
    assert list(kvpress.answers([REQUEST], "base", env, done={("a", "snapkv")})) == []


def test_a_worker_that_ends_is_said(env: Path) -> None:
    made = kvpress.answers([REQUEST, {**REQUEST, "id": "b", "context": [1]}], "base", env)
    assert next(made)["id"] == "a"
    with pytest.raises(FileError, match="ended with code 7"):
        next(made)


def test_a_worker_ends_with_its_reader(env: Path) -> None:
    """Who takes no more answers leaves no process behind."""
    made = kvpress.answers([REQUEST, {**REQUEST, "id": "b"}], "base", env)
    next(made)
    worker = made.gi_frame.f_locals["worker"]
    assert worker.poll() is None
    made.close()
    assert worker.poll() is not None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({**REQUEST, "id": None}, "request 1 has no id"),
        ([], "request 1 has no id"),
        ({**REQUEST, "context": []}, "request 1: context must be a list of token ids"),
        ({**REQUEST, "question": "Who?"}, "request 1: question must be a list of token ids"),
        ({**REQUEST, "keep": 0}, "request 1: keep must be a whole number above 0"),
        ({**REQUEST, "press": "wine"}, "press 'wine' is unknown: use some of snapkv"),
    ],
)
def test_requests_that_cannot_be_used(request_: Any, message: str, env: Path) -> None:
    """Are refused before anything is computed."""
    with pytest.raises(InputError, match=message):
        next(kvpress.answers([request_], "base", env))


def test_the_script_goes_on_where_it_ended(env: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last line that was not finished is written anew, the others stay."""
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out.jsonl"
    requests.write_text("".join(json.dumps({**REQUEST, "id": i}) + "\n" for i in range(3)))
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "base" / name).touch()
    words = [str(SCRIPT), str(requests), str(out), "--env", str(env), "--base", str(tmp_path / "base")]
    monkeypatch.setattr(sys, "argv", words)
    kvpress.main()
    whole = out.read_text()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [0, 1, 2]
    first = '{"id": 0, "press": "snapkv", "kept": true}\n'
    out.write_text(first + whole.splitlines()[1][:30])
    kvpress.main()
    assert out.read_text().splitlines() == [first.strip(), *whole.splitlines()[1:]]
    kvpress.main()
    assert len(out.read_text().splitlines()) == 3
    out.write_text("{\n" + first)
    with pytest.raises(SystemExit) as stop:
        kvpress.main()
    assert stop.value.code == 2


def test_the_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch first; one that is not complete is made anew; what cannot be made is an error."""
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        ran.append(command)
        if "venv" in command:
            (tmp_path / "env/bin").mkdir(parents=True, exist_ok=True)
            (tmp_path / "env/bin/python").touch()
        if "broken" in str(command):
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, "kvpress==0.5.5\n")

    monkeypatch.setattr(kvpress.subprocess, "run", run)
    for _ in range(2):
        kvpress.make_environment(tmp_path / "env")
    assert [command[-1] for command in ran] == [str(tmp_path / "env"), "torch==2.13.0", "torch==2.13.0", "freeze"]
    assert ran[0][1:4] == ["-m", "venv", "--clear"]
    assert "kvpress==0.5.5" in ran[2]
    assert (tmp_path / "env" / kvpress.MADE).read_text() == "kvpress==0.5.5\n"
    with pytest.raises(FileError, match="for kvpress cannot be made"):
        kvpress.make_environment(tmp_path / "broken")
    assert not kvpress.is_made(tmp_path / "broken")


# ---------------------------------------------------------------- the answers
# run in kvpress's environment: the plain base's greedy tokens, and what kvpress's own pipeline answers
DIRECTLY = """
import json, sys
import torch
from kvpress import *
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

base, context, question, new, presses = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ids = torch.tensor([context + question])
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
found = {"none": out[0, ids.shape[1]:].tolist()}
pipe = pipeline("kv-press-text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(base))
given = {"context_ids": torch.tensor([context]), "questions_ids": [torch.tensor([question])]}
for name, ratio in presses.items():
    press = globals()[name](compression_ratio=ratio)
    found[name] = pipe._forward(given, max_new_tokens=new, press=press)[0]
print(json.dumps(found))
"""
NEW = 10


@pytest.fixture(scope="module")
def environment() -> Path:
    path: Path = kvpress.environment()
    if not kvpress.is_made(path):
        pytest.skip(f"kvpress's environment is not in {path}: scripts/kvpress_answers.py makes it")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, default_base: Path) -> Path:
    """The folder of a tiny random model with the default base's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), load_tokenizer(default_base)
    make_backbone("llama", vocab_size=len(tokenizer), eos_token_id=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def up_to_end(written: list[int]) -> list[int]:
    return written[: written.index(2)] if 2 in written else written


@pytest.mark.parametrize("which", ["base", "default_base"])
def test_answers_are_those_of_the_base_and_of_kvpress(
    which: str, environment: Path, request: pytest.FixtureRequest
) -> None:
    """With everything kept, the plain base's, whatever the press; with a part, those of kvpress's own pipeline,
    which is asked for the same share. No more is kept than was asked for."""
    base = request.getfixturevalue(which)
    length, keep, more = 160, 50, 130
    context, question = tokens(length), tokens(12, 1)
    asked = {"context": context, "question": question}
    ratios = {name: 1 - (keep + 0.5) / length for name in kvpress.PRESSES if name not in ("none", "random")}
    ratios["snapkv"] = 1 - (more + 0.5) / length
    classes = {kvpress.PRESSES[name]: ratio for name, ratio in ratios.items()}
    given = json.dumps([str(base), context, question, NEW, classes])
    done = subprocess.run(
        [environment / "bin/python", "-c", DIRECTLY, given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    right = json.loads(done.stdout.splitlines()[-1])
    requests = [{**asked, "id": "all", "keep": 10_000}, {**asked, "id": "third", "keep": keep}]
    requests.append({**asked, "id": "more", "keep": more, "press": "snapkv"})
    options = {"max_new_tokens": NEW, "dtype": "float32"}
    made = kvpress.answers(requests, base, environment, list(kvpress.PRESSES), **options)
    rows = {(row["id"], row["press"]): row for row in made}
    assert len(rows) == 2 * len(kvpress.PRESSES) + 1
    plain = rows["third", "none"]
    written, tokenizer = up_to_end(right["none"]), load_tokenizer(base)
    for (name, press), row in rows.items():
        positions = more if name == "more" else keep if name == "third" and press != "none" else length
        assert row["positions"] == positions
        assert row["bytes"] == plain["bytes"] // length * positions
        assert 0 < row["compress_seconds"] < row["total_seconds"]
        assert 0 < row["first_token_seconds"] < row["total_seconds"]
        if positions == length:
            assert row["tokens"] == written
        elif name == ("more" if press == "snapkv" else "third") and press in ratios:
            assert tokenizer.decode(row["tokens"], skip_special_tokens=True) == right[kvpress.PRESSES[press]]
    assert rows["third", "snapkv"]["settings"] == {"window_size": 25}
    assert "settings" not in rows["more", "snapkv"]
    assert any(rows["third", press]["tokens"] != written for press in ratios)


def test_the_pruned_answer_is_that_of_a_masked_text(environment: Path, base: Path) -> None:
    """StreamingLLM, which keeps the first four positions and the last ones, is the base that reads the whole text but
    does not see the others: positions are counted as in the text. By transformers alone, in this environment."""
    from transformers import AutoModelForCausalLM

    context, question, keep = tokens(60), tokens(5, 1), 20
    request = {"id": 1, "context": context, "question": question, "keep": keep}
    options = {"max_new_tokens": NEW, "dtype": "float32"}
    (row,) = kvpress.answers([request], base, environment, ["streaming_llm"], **options)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    cache = model(torch.tensor([context]), use_cache=True).past_key_values
    seen = torch.tensor([[1] * 4 + [0] * (60 - keep) + [1] * (keep - 4)])
    written, ids = [], torch.tensor([question])
    for _ in range(NEW):
        positions = cache.get_seq_length() + torch.arange(ids.shape[1])[None]
        seen = torch.cat([seen, torch.ones_like(ids)], 1)
        logits = model(ids, attention_mask=seen, position_ids=positions, past_key_values=cache).logits
        ids = logits[:, -1:].argmax(-1)
        written.append(int(ids))
    assert row["tokens"] == up_to_end(written)


def test_what_a_press_refuses_is_a_row_that_says_so(environment: Path, base: Path) -> None:
    """And the others go on."""
    short = {"id": "short", "context": tokens(4), "question": tokens(2), "keep": 2}
    window = json.loads((base / "config.json").read_text())["max_position_embeddings"]
    long = {"id": "long", "context": tokens(3) * window, "question": tokens(2), "keep": 2}
    fine = {"id": "fine", "context": tokens(40), "question": tokens(2), "keep": 2}
    rows = list(kvpress.answers([short, long, fine], base, environment, ["streaming_llm"], max_new_tokens=2))
    assert "n_sink=4" in rows[0]["error"]
    assert f"more than the base's {window} positions" in rows[1]["error"]
    assert rows[2]["positions"] == 2


# ---------------------------------------------------------------- rows of an evaluation
ROWS = SCRIPT.parent / "kvpress_rows.py"


def rows(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROWS), *arguments], capture_output=True, text=True, check=False)


def test_rows_beside_an_evaluation(environment: Path, tmp_path: Path) -> None:
    """The questions that a folder was asked, answered by its base, in its table; again, nothing is asked twice."""
    data, folder = tmp_path / "facts.jsonl", tmp_path / "qa"
    text = "The old lion of the zoo is called Brutus. He sleeps all day long. " * 4
    asked = {"id": "zoo/1", "context": text, "question": "What is the lion called?", "answers": ["Brutus"]}
    data.write_text(json.dumps(asked) + "\n")
    command = ["eval", "qa", "--data", str(data), "--modes", "human", "--rates", "4", "--baselines", "plain"]
    done = subprocess.run(
        [sys.executable, "-m", "rcc", *command, "--max-new-tokens", "8", "--output", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    options = [str(folder), "--press", "snapkv", "--press", "none", "--rates", "4", "--env", str(environment)]
    for _ in range(2):
        done = rows(*options)
        assert done.returncode == 0, done.stderr
        assert "| kvpress snapkv | 4× | 1 |" in done.stdout
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    by_method = {row["key"]["method"]: row for row in samples}
    assert len(samples) == len(by_method) == 4
    # what is pruned by nothing says what the base says
    assert by_method["kvpress none"]["written"] == by_method["plain"]["written"]
    assert by_method["kvpress snapkv"]["positions"] == by_method["rcc"]["positions"]
    assert by_method["kvpress snapkv"]["bytes"] == by_method["rcc"]["bytes"]
    assert "kvpress snapkv" in (folder / "table.md").read_text()


def test_rows_without_an_evaluation(tmp_path: Path) -> None:
    done = rows(str(tmp_path))
    assert done.returncode == 2
    assert "holds no finished evaluation" in done.stderr
