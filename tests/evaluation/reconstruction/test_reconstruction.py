"""`rcc eval reconstruction`: figures against computations that share no code with it, the folder, what it refuses."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

import reference as ref
from conftest import Command, MakeBackbone, MakeExpected, MakeModel, MakeTokens
from rcc import InputError, RCCForCausalLM
from rcc.evaluation import compare, metrics, results
from rcc.evaluation.evaluation import evaluate, finish
from rcc.evaluation.reconstruction.documents import open_texts
from rcc.evaluation.reconstruction.run import ReconstructionEvaluation
from rcc.evaluation.reconstruction.settings import CONTROLS, ReconstructionSettings
from rcc.evaluation.reconstruction.table import ReconstructionReport
from rcc.evaluation.results import Results
from short_text import make_home
from word_tokens import word_tokenizer, words

ROOT = Path(__file__).resolve().parents[3]
LENGTH, TARGET = 64, 8
ASKED = ReconstructionSettings(rates=[4], lengths=[LENGTH], prompts=2, target_tokens=TARGET)
STARTS = [0, 38]  # 64 · 1200 / 2048 is 37.5


# ---------------------------------------------------------------- what it works on
@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = make_home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(folder))
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def folder(tiny: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `--model` takes it."""
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path, full=True)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def documents(tokens: MakeTokens) -> list[list[int]]:
    return [[0, 0, *tokens(LENGTH + 3, seed)] for seed in (1, 2, 3)]  # token 0 stands in prompts, too


@pytest.fixture(scope="module")
def data(documents: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three texts that are long enough, and a short one."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": words(ids)} for ids in [*documents, documents[0][: LENGTH - 1]]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def measuring(
    tiny: MakeModel, tokenizer: PreTrainedTokenizerFast, data: Path
) -> Callable[..., ReconstructionEvaluation]:
    def make(
        model: RCCForCausalLM | None = None, paths: list[Path] | None = None, **settings: Any
    ) -> ReconstructionEvaluation:
        texts = open_texts([str(path) for path in paths or [data]], "text", tokenizer)
        return ReconstructionEvaluation(model or tiny(), tokenizer, texts, replace(ASKED, **settings))

    return make


def collect(run: ReconstructionEvaluation, folder: Path | None = None) -> Results:
    return evaluate(run, folder)


# ---------------------------------------------------------------- against the reference
@pytest.mark.parametrize("share", [True, False])
def test_every_context_is_what_it_says(
    tiny: MakeModel,
    backbone: MakeBackbone,
    expected: MakeExpected,
    documents: list[list[int]],
    measuring: Callable[..., ReconstructionEvaluation],
    tokenizer: PreTrainedTokenizerFast,
    share: bool,
) -> None:
    """Each figure of each sample, computed once more without a cache, a batch or LoRA that is switched off."""
    model = tiny() if share else tiny(share=False)
    run = measuring(model, rates=[4, 16], batch=3)
    rows = {json.dumps(row["key"]): row for row in collect(run).rows}
    assert len(rows) == len(run) == 3 * 2 * (2 * 3 + 2)
    reading = expected(model)
    encoder, decoder, projections = reading.weights
    plain = backbone("llama", seed=1) if share else decoder  # the tiny model's base as it was made
    texts = [ids[:LENGTH] for ids in documents]
    order = run.documents[LENGTH].order
    assert sorted(order) == [0, 1, 2]

    def shuffled(text: list[int], rate: int, prompt: list[int]) -> torch.Tensor:
        vectors = ref.compressed_vectors(encoder, text, 16, rate)
        mixed = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))]
        assert not torch.equal(mixed, vectors)
        return ref.decode(decoder, projections, ref.decoder_inputs(mixed, 3), prompt)

    ways: dict[str, Callable[[int, int, list[int]], torch.Tensor]] = {
        "real": lambda i, rate, prompt: reading.logits([texts[i]], prompt, rate),
        "shuffled": lambda i, rate, prompt: shuffled(texts[i], rate, prompt),
        "wrong": lambda i, rate, prompt: reading.logits([texts[order[(order.index(i) + 1) % 3]]], prompt, rate),
        "no-context": lambda i, rate, prompt: ref.decode(decoder, projections, [], prompt),
        "plain-text": lambda i, rate, prompt: plain(torch.tensor([texts[i] + prompt])).logits[0, LENGTH:],
    }
    with torch.no_grad():
        for row in rows.values():
            key = row["key"]
            i, start, rate = key["document"], key["start"], key.get("rate", 0)
            assert start in STARTS
            span = texts[i][start : start + 10 + TARGET]
            logits = ways[key["context"]](i, rate, span)[9:-1]
            right = (logits.argmax(-1) == torch.tensor(span[10:])).tolist()
            assert row["recalled"] == "".join(map(str, map(int, right)))
            assert row["accuracy"] == pytest.approx(sum(right) / TARGET)
            assert row["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(span[10:])).item(), rel=1e-4)
            assert (row["prompt"], row["truth"]) == (words(span[:10]), words(span[10:]))
            if i == order[0]:
                new: list[int] = []
                while len(new) < TARGET:
                    new.append(int(ways[key["context"]](i, rate, span[:10] + new)[-1].argmax()))
                assert row["written"] == words(new)
                assert row["exact"] == sum(a == b for a, b in zip(new, span[10:], strict=True)) / TARGET
                assert row["bleu"] == metrics.bleu(words(new), words(span[10:]))


def test_every_context_of_a_direct_prefix_is_what_it_says(
    tiny: MakeModel, documents: list[list[int]], measuring: Callable[..., ReconstructionEvaluation]
) -> None:
    """Accuracy after the real and the shuffled context, computed once more without a cache; at rate 1, too."""
    model = tiny(prefix="direct")
    run = measuring(model, rates=[4, 1], batch=3)
    texts = [ids[:LENGTH] for ids in documents]
    with torch.no_grad():
        for row in collect(run).rows:
            key = row["key"]
            if key["context"] not in ("real", "shuffled"):
                continue
            text, start = texts[key["document"]], key["start"]
            terms = ref.direct_terms(model, text, key["rate"])
            order = torch.arange(len(terms[0]))
            if key["context"] == "shuffled":
                order = torch.randperm(len(order), generator=torch.Generator().manual_seed(0))
            span = text[start : start + 10 + TARGET]
            fixed = [torch.cat([sink[None], term[order]]) for sink, term in zip(model.sink, terms, strict=True)]
            embeds = model.decoder.get_input_embeddings()(torch.tensor(span))
            hidden = model.decoder.model.norm(ref.run_blocks(model.decoder, fixed, embeds)[1])
            logits = model.decoder.lm_head(hidden)[9:-1]
            assert row["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(span[10:])).item(), rel=1e-4)


def test_work_is_bounded_and_done_once(
    tiny: MakeModel, measuring: Callable[..., ReconstructionEvaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are as large as was asked for, and a document's context serves as its neighbour's wrong one."""
    sizes, read = [], []
    model = tiny()
    generate, encode = model.generate, model.encode
    monkeypatch.setattr(
        model, "generate", lambda ids, *args, **kw: sizes.append(len(ids)) or generate(ids, *args, **kw)
    )
    monkeypatch.setattr(model, "encode", lambda ids, **kw: read.append(kw["rate"]) or encode(ids, **kw))
    collect(measuring(model, rates=[4, 8], batch=4))
    assert sizes == 3 * [4, 2, 4, 2, 2, 2]
    assert sorted(read) == 4 * [4] + 4 * [8]  # the first one again, after the last


# ---------------------------------------------------------------- the folder
def test_resuming(
    measuring: Callable[..., ReconstructionEvaluation],
    fresh: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the middle, it goes on: the same samples, and nothing that was finished is measured again; documents
    and rates can be added."""
    whole = collect(measuring(), tmp_path / "whole")
    model, measured = fresh(), list[Any]()
    original = ReconstructionEvaluation._measure

    def counting(self: Any, length: int, number: int, rate: int, kinds: list[str]) -> Any:
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append((number, rate, *kinds))
        return original(self, length, number, rate, kinds)

    monkeypatch.setattr(ReconstructionEvaluation, "_measure", counting)
    with pytest.raises(KeyboardInterrupt):
        collect(measuring(model), tmp_path / "killed")
    lines = (tmp_path / "killed/samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (3 + 1 + 1) + 2 * 3  # the first document, and the contexts of the second
    # the last line cut short, and one sample of those that were measured with it not yet there
    (tmp_path / "killed/samples.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20], encoding="utf-8")
    seen, measured[:] = set(measured), []
    monkeypatch.setattr(
        ReconstructionEvaluation, "_measure", lambda *args: measured.append(args[2:4]) or original(*args)
    )
    again = collect(measuring(model), tmp_path / "killed")
    assert [{**row, "took": 0} for row in again.rows] == [{**row, "took": 0} for row in whole.rows]
    assert len(seen) == 4
    order = measuring().documents[LENGTH].order
    assert measured == [(order[1], 4), (order[1], None), (order[1], None), (order[2], 4)] + 2 * [(order[2], None)]

    fewer = collect(measuring(documents=1, controls=()), tmp_path / "grown")
    assert len(fewer.rows) == 2
    grown = collect(measuring(rates=[4, 8], controls=()), tmp_path / "grown")
    assert len(grown.rows) == 2 * 3 * 2
    with pytest.raises(InputError, match="other settings"):
        collect(measuring(target_tokens=5), tmp_path / "grown")


def test_the_folder_of_a_run(measuring: Callable[..., ReconstructionEvaluation], tmp_path: Path) -> None:
    """Table, plots and JSON; cells that cannot be are named; two runs are compared sample by sample."""
    run = measuring(rates=[4, 16])
    measured = collect(run, tmp_path / "a")
    finish(run, measured)
    names = {"accuracy-by-place", "accuracy-by-rate", "accuracy-by-start", "bleu-by-rate", "heat"}
    plots = {f"{name}-{LENGTH}.png" for name in names}
    files = {"results.json", "samples.jsonl", "settings.json", "table.md"} | plots
    assert {p.name for p in (tmp_path / "a").iterdir()} == files
    assert all((tmp_path / "a" / name).read_bytes()[:4] == b"\x89PNG" for name in plots)
    data, rows = results.load(tmp_path / "a")
    contexts = ["real", "shuffled", "wrong"]
    keys = [(cell["key"]["context"], cell["key"].get("rate")) for cell in data["cells"]]
    assert set(keys) == {(c, r) for c in contexts for r in (4, 16)} | {("no-context", None), ("plain-text", None)}
    for cell in data["by_start"]:
        key = cell["key"]
        accuracies = [row["accuracy"] for row in rows if row["key"].items() >= key.items()]
        assert cell["accuracy"]["mean"] == pytest.approx(sum(accuracies) / len(accuracies))
        assert cell["accuracy"]["n"] == 3
    assert [(entry["length"], entry["rate"]) for entry in data["by_place"]] == [(LENGTH, 4), (LENGTH, 16)]
    assert len(data["by_place"][1]["group"]) == 16
    table = (tmp_path / "a/table.md").read_text(encoding="utf-8")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:10]] == [f"| {kind}" for kind in contexts * 2] + [
        "| no-context",
        "| plain-text",
    ]
    mean = next(cell for cell in data["cells"] if cell["key"] == {"length": 64, "rate": 4, "context": "real"})
    assert f"| real | 64 | 4× | 6 | {mean['bleu']['mean']:.3f} [" in table
    assert "| 0 | 38 |" in table
    assert "| rate | 0–1 | 2–3 | 4–5 |" in table
    assert "1 of 4 texts have fewer than 64 tokens" in table
    assert all(f"{kind}: {meaning}" in table for kind, meaning in CONTROLS.items())

    other = measuring(documents=2, controls=("wrong",))
    again = collect(other, tmp_path / "b")
    finish(other, again)
    differences, notes = compare.compare(tmp_path / "a", tmp_path / "b")
    assert {d.key["context"] for d in differences} == {"real", "wrong"}
    assert all(d.change.mean == pytest.approx(0, abs=1e-6) for d in differences)
    assert notes == [f"{len(rows) - 8} samples of {tmp_path / 'a'} are not in the other and were left out."]


def test_what_does_not_fit_says_so(
    tiny: MakeModel, measuring: Callable[..., ReconstructionEvaluation], tmp_path: Path, data: Path
) -> None:
    """A rate or a control that cannot be is a cell that says why; the others are measured."""
    run = measuring(tiny(window=64), rates=[1, 4, 16], documents=2)
    report: Any = finish(run, collect(run, tmp_path / "out"))
    why = "64 positions of context and 18 tokens of prompt and answer are more than the decoder's window of 64"
    cells = {(cell["key"]["context"], cell["key"].get("rate")): cell for cell in report.cells}
    for which in (("real", 1), ("wrong", 1), ("plain-text", None)):
        assert cells[which]["skipped"] == why
    assert cells["real", 4]["bleu"].n == 4
    assert f"| real | 64 | 1× | 0 | {why} |" in report.table()
    assert "| 1× |" not in report.table().split("By where")[1]

    one = tmp_path / "one.txt"
    one.write_text(json.loads(data.read_text().splitlines()[0])["text"], encoding="utf-8")
    alone = measuring(paths=[one], rates=[16], lengths=[48])  # three vectors, and no other document
    lone = {cell["key"]["context"]: cell for cell in collect(alone).cells(["context"])}
    assert lone["wrong"] == {"key": {"context": "wrong"}, "skipped": "there is no other document"}
    assert "bleu" in lone["shuffled"]
    nothing = measuring(tiny(window=20), rates=[4], controls=())
    empty = finish(nothing, collect(nothing, tmp_path / "none"))
    assert empty.plots() == {}


def test_an_untrained_rate_is_said_once(
    fresh: MakeModel, measuring: Callable[..., ReconstructionEvaluation], caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh(rates=(4, 8))
    with caplog.at_level(logging.INFO):
        results = collect(measuring(model, rates=[4, 2], documents=2))
    assert len([record for record in caplog.records if record.name.startswith("rcc")]) == 1
    assert [note for note in results.notes if "not trained" in note] == [
        "rcc was not trained at 2×, only at 4×, 8×: expect little of it."
    ]
    assert "| 2× (untrained) |" in ReconstructionReport(results, model).table()


# ---------------------------------------------------------------- the command
def test_refusals(command: Command, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is one sentence that names it, and exit code 2, before any folder is made."""
    for name, text in {"empty.txt": "", "empty.jsonl": "", "short.txt": "w1 w2", "cut.jsonl": "{"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "other.jsonl").write_text('{"body": "w1"}\n', encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("w1", encoding="utf-8")
    good = ["--data", data, "--lengths", "64", "--target-tokens", "4", "--limit", "1"]
    for args, *said in (
        (["--data", tmp_path / "empty.txt"], "empty.txt has no row that can be used"),
        (["--data", tmp_path / "empty.jsonl"], "empty.jsonl is empty"),
        (["--data", tmp_path / "cut.jsonl"], "cut.jsonl"),
        (["--data", tmp_path / "none.txt"], "none.txt does not exist"),
        (["--data", tmp_path / "other.jsonl"], "other.jsonl has no row with a field 'text'", "body"),
        (["--data", data, "--field", "body"], "no row with a field 'body'"),
        (["--data", tmp_path / "short.txt"], "no text has 512 tokens, the longest has 2"),
        ([*good, "--lengths", "64,1k"], "no text has 1,024 tokens"),
        ([*good, "--lengths", "15"], "15 tokens is less than one segment", "at least 16"),
        ([*good, "--lengths", "16"], "of 16 tokens none is left"),
        ([*good, "--lengths", "many"], "--lengths 'many'"),
        ([*good, "--rates", "5"], "rate=5 does not divide the segment of 16 tokens"),
        ([*good, "--rates", "4,x"], "--rates 'x'"),
        ([*good, "--prompts", "50"], "no room for 50 prompts"),
        ([*good, "--prompts", "0"], "--prompts"),
        ([*good, "--controls", "wrong,right"], "--controls 'right' is unknown", "plain-text"),
        ([*good, "--output", tmp_path / "full"], "is not empty and holds no evaluation"),
        ([*good, "--output", tmp_path / "short.txt" / "x"], "cannot be written"),
    ):
        code, out, err = command("eval", "reconstruction", "--model", folder, *args)
        assert (code, out) == (2, ""), (args, err)
        assert re.fullmatch(r"rcc: [^\n]+\.\n", err), err
        assert all(words in err for words in said), err
    assert {p.name for p in (tmp_path / "full").iterdir()} == {"thesis.txt"}
    for module in ("sacrebleu", "rouge_score", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            code, out, err = command("eval", "reconstruction", "--model", folder, *good, "-o", tmp_path / "out")
            assert (code, out) == (2, "")
            assert err == f"rcc: this evaluation needs {module}: pip install 'rcc-context[eval]'.\n"
    assert not (tmp_path / "out").exists()


def test_the_command_on_a_tiny_model(command: Command, folder: Path, data: Path, tmp_path: Path) -> None:
    """Without a folder the table is all there is; with --json the same figures; without controls the text alone."""
    args = ["--model", folder, "--data", data, "--lengths", "64", "--target-tokens", "4", "--limit", "2"]
    code, out, err = command("eval", "reconstruction", *args, "--rates", "4,8")
    assert (code, err) == (0, "")
    assert out.startswith("| context | tokens | rate | samples | BLEU-4 | ROUGE-L |")
    assert "| wrong | 64 | 8× | 10 |" in out
    code, out, err = command("eval", "reconstruction", *args, "--controls", "none", "--json", "-o", tmp_path / "out")
    assert code == 0
    printed = json.loads(out)
    assert printed == results.load(tmp_path / "out")[0]
    assert [cell["key"] for cell in printed["cells"]] == [
        {"length": 64, "rate": rate, "context": "real"} for rate in (4, 1, 2, 8, 16)
    ]
    code, out, err = command("eval", "reconstruction", *args, "--controls", "none", "--kv", "int4")
    assert (code, out, err.count("int4")) == (2, "", 1)


@pytest.mark.parametrize("prefix", ["residual", "direct"])
def test_contexts_kept_in_8_bits(
    tiny: MakeModel, documents: list[list[int]], measuring: Callable[..., ReconstructionEvaluation], prefix: str
) -> None:
    """`kv` says how a context is kept that is continued; the folder notes it."""
    model = tiny(prefix=prefix)
    run = measuring(model, rates=[4], controls=[], kv="int8")
    assert run.settings()["kv"] == "int8"
    assert "kv" not in measuring(model, rates=[4]).settings()
    for row in collect(run).rows:
        key = row["key"]
        text = torch.tensor(documents[key["document"]][:LENGTH])
        eight = model.compress(text[None], rate=4).to(dtype="int8")
        span = text[key["start"] : key["start"] + 10 + TARGET]
        logits = model(span[None], context=eight).logits[0, 9:-1]
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, span[10:]).item(), rel=1e-4)


def test_the_command_on_the_default_model(tmp_path: Path) -> None:
    """As a user types it, on the text of the repository: its own context gives far more than another's or none, and
    the order of its vectors matters."""
    few = ["--limit", "2", "--lengths", "256", "--rates", "4", "--prompts", "2", "--target-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "rcc", "eval", "reconstruction", *few, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{tmp_path / 'out'}: results.json, samples.jsonl, table.md and plots\n"
    assert done.stdout == (tmp_path / "out/table.md").read_text(encoding="utf-8")
    data, rows = results.load(tmp_path / "out")
    assert (data["settings"]["model"], data["settings"]["data"]) == ("rcc-smollm2-135m", ["simple-susan.txt"])
    assert all(len(row["recalled"]) == 12 for row in rows)
    book = (ROOT / "examples/simple-susan.txt").read_text(encoding="utf-8")
    assert all(row["prompt"] + row["truth"] in book for row in rows)
    cells = {cell["key"]["context"]: cell for cell in data["cells"]}
    assert set(cells) == {"real", *CONTROLS}
    loss = {kind: cell["loss"]["mean"] for kind, cell in cells.items()}
    assert loss["real"] < loss["shuffled"] < loss["wrong"] - 1
    assert loss["plain-text"] < loss["wrong"] - 1
    for control in ("wrong", "no-context"):
        assert cells["real"]["accuracy"]["mean"] > cells[control]["accuracy"]["mean"] + 0.2
        assert cells["real"]["bleu"]["mean"] > 2 * cells[control]["bleu"]["mean"]
