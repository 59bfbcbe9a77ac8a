"""`rcc eval reconstruction`: figures against computations that share no code with it, the folder, what it refuses."""

from __future__ import annotations

import json
import logging
import math
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import reference as ref
from conftest import make_home
from rcc import InputError, RCCConfig, RCCForCausalLM
from rcc.evaluation import compare, metrics, results
from rcc.evaluation.plain import base_decoder, read_plain
from rcc.evaluation.reconstruction.run import CONTROLS, Documents, Protocol, Reconstruction, open_texts
from rcc.evaluation.reconstruction.table import Report, by_place
from rcc.evaluation.results import Results, interval

ROOT = Path(__file__).resolve().parents[2]
LENGTH, TARGET = 64, 8
PROTOCOL = Protocol(rates=[4], lengths=[LENGTH], prompts=2, target_tokens=TARGET)
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
    """One token a word: `w7` is token 7."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, "w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory) -> Path:
    """A model as `--model` takes it."""
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path, full=True)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def documents(tokens) -> list[list[int]]:
    return [[0, 0, *tokens(LENGTH + 3, seed)] for seed in (1, 2, 3)]  # token 0 stands in prompts, too


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="module")
def data(documents, tmp_path_factory) -> Path:
    """Three texts that are long enough, and a short one."""
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": words(ids)} for ids in [*documents, documents[0][: LENGTH - 1]]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def measuring(tiny, tokenizer, data) -> Callable[..., Reconstruction]:
    def make(model: RCCForCausalLM | None = None, paths: list[Path] | None = None, **settings: Any) -> Reconstruction:
        texts = open_texts([str(path) for path in paths or [data]], "text", tokenizer)
        return Reconstruction(model or tiny(), tokenizer, texts, replace(PROTOCOL, **settings))

    return make


def collect(run: Reconstruction, folder: Path | None = None) -> Results:
    found = Results("reconstruction", run.settings(), folder, cluster="document", notes=run.notes())
    found.collect(run.cases())
    return found


# ---------------------------------------------------------------- by hand
def test_metrics_by_hand():
    truth = "the cat sat on the mat"
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples
    assert metrics.bleu("the cat sat on a mat", truth) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert metrics.bleu("the cat sat on", truth) == pytest.approx(math.exp(1 - 6 / 4))  # all right, but short
    assert (metrics.bleu(truth, truth), metrics.bleu("dogs bark", truth)) == (1, 0)
    assert metrics.bleu("the cat", "the cat") == 1  # too short for a quadruple
    assert re.search(r"eff:yes\|tok:13a\|smooth:exp\|version:2", metrics.bleu_settings())
    # in common, in order: the cat on the, of 5 words written and 6 of the truth
    assert metrics.rouge_l("The cat on the dog.", truth) == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert metrics.matching([1, 2, 9, 4], [1, 2, 3, 4]) == (3 / 4, 2)
    assert metrics.matching([1, 2], [1, 2]) == (1, 2)
    assert metrics.matching([9, 2], [1, 2]) == (1 / 2, 0)


def test_the_papers_protocol():
    """At 2,048 tokens it is the paper's: five prompts 300 apart, 500 tokens behind each; others in proportion."""
    protocol = Protocol(rates=[32], lengths=[2048])
    assert protocol.spans(2048) == [(start, start + 510) for start in (0, 300, 600, 900, 1200)]
    assert protocol.spans(512) == [(start, start + 135) for start in (0, 75, 150, 225, 300)]
    assert protocol.spans(8192)[-1] == (4800, 4800 + 510)  # not more than the paper's
    assert replace(protocol, prompts=1).starts(2048) == [0]
    assert replace(protocol, target_tokens=300).spans(512)[-1] == (300, 512)  # the text ends


def test_places_by_hand():
    """Which tokens stand where in segment and group: samples made up, with one and with two documents."""
    config = RCCConfig(segment_length=16, rates=[4])

    def row(document: int, start: int, recalled: str, context: str = "real") -> dict[str, Any]:
        key = {"length": 64, "rate": 4, "document": document, "start": start, "context": context}
        return {"key": key, "recalled": recalled}

    # the targets begin at tokens 10 and 48, places 10 and 0 of a segment
    rows = [row(0, 0, "110100"), row(0, 38, "10"), row(1, 0, "000000", "wrong"), {**row(1, 0, ""), "skipped": "why"}]
    found = by_place(rows, 64, 4, config)
    means = [None if v is None else v.mean for v in found["segment"]]  # pairs of places
    assert means == [0.5, None, None, None, None, 1.0, 0.5, 0.0]
    # places 10 … 15 are 2, 3, 0, 1, 2, 3 of their groups, 0 and 1 those
    assert [(v.mean, v.n) for v in found["group"]] == [(0.5, 2), (0.5, 2), (0.5, 2), (0.5, 2)]
    rows.append(row(1, 0, "010000"))
    assert by_place(rows, 64, 4, config)["segment"][5] == interval([1, 1, 0, 1], [0, 0, 1, 1])
    # 60 tokens: 4 of padding stand before them, so the target begins at place 14
    moved = [row(0, 0, "10")]
    moved[0]["key"]["length"] = 60
    repeating = RCCConfig(segment_length=16, rates=[4], segment_padding="repeat")
    assert by_place(moved, 60, 4, repeating)["segment"][7] == interval([1, 0], [0, 0])
    assert by_place(moved, 60, 4, config)["segment"][5] == interval([1, 0], [0, 0])


# ---------------------------------------------------------------- against the reference
@pytest.mark.parametrize("share", [True, False])
def test_every_context_is_what_it_says(tiny, backbone, expected, documents, measuring, tokenizer, share):
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


def test_every_context_of_a_direct_prefix_is_what_it_says(tiny, documents, measuring):
    """Accuracy behind the real and the shuffled context, computed once more without a cache; at rate 1, too."""
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


def test_a_base_is_read_without_a_trace(fresh, backbone):
    """Within `base_decoder` the decoder is its base; behind it all is as before: results, fingerprint, what learns."""
    model, base = fresh(), backbone("llama", seed=1)
    next(p for name, p in model.decoder.named_parameters() if ".lora_" in name).requires_grad_(False)
    ids = torch.arange(1, 30)[None]
    learning = [p.requires_grad for p in model.parameters()]
    own, fingerprint = model(ids).logits, model.fingerprint
    with torch.no_grad(), base_decoder(model):
        torch.testing.assert_close(model(ids).logits, base(ids).logits)
        context = read_plain(model, ids[0, :20])
        torch.testing.assert_close(model(ids[:, 20:], context=context).logits, base(ids).logits[:, 20:])
        assert (len(context), context.rate) == (20, 1)
    assert torch.equal(model(ids).logits, own)
    assert not torch.allclose(own, base(ids).logits, atol=1e-2)
    assert [p.requires_grad for p in model.parameters()] == learning
    assert model.fingerprint == fingerprint


def test_work_is_bounded_and_done_once(tiny, measuring, monkeypatch):
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
    assert sorted(read) == 4 * [4] + 4 * [8]  # the first one again, behind the last


# ---------------------------------------------------------------- documents
def test_documents(tokenizer, data, documents, tmp_path):
    """Of several texts the beginnings, a short one left out; one text is cut; another document is never the same."""
    texts = open_texts([str(data)], "text", tokenizer)
    found = Documents(texts, LENGTH, seed=0)
    assert (len(found), found.too_short) == (3, 1)
    assert [found[i].tolist() for i in range(3)] == [ids[:LENGTH] for ids in documents]
    assert sorted(map(found.another, range(3))) == [0, 1, 2]
    assert all(found.another(i) != i for i in range(3))
    assert {tuple(Documents(texts, LENGTH, seed).order) for seed in range(20)} > {tuple(found.order)}
    (tmp_path / "one.txt").write_text(words(documents[0]), encoding="utf-8")
    cut = Documents(open_texts([str(tmp_path / "one.txt")], "text", tokenizer), 20, seed=0)
    assert [cut[i].tolist() for i in range(len(cut))] == [documents[0][i : i + 20] for i in (0, 20, 40)]


def test_the_example_is_the_default(tokenizer, tmp_path, monkeypatch):
    """From the repository's folder, or from a source checkout; elsewhere a file is asked for."""
    monkeypatch.chdir(tmp_path)
    here = open_texts([], "text", tokenizer)  # this source checkout's
    assert Path(here[0].source.path) == ROOT / "examples/simple-susan.txt"
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/simple-susan.txt").write_text("w1 w2", encoding="utf-8")
    assert open_texts([], "text", tokenizer)[0].tokens_total == 2
    monkeypatch.setattr("rcc.evaluation.example.EXAMPLE", Path("examples/none.txt"))
    with pytest.raises(InputError, match="--data is missing"):
        open_texts([], "text", tokenizer)


# ---------------------------------------------------------------- the folder
def test_resuming(measuring, fresh, tmp_path, monkeypatch):
    """Killed in the middle, it goes on: the same samples, and nothing that was finished is measured again; documents
    and rates can be added."""
    whole = collect(measuring(), tmp_path / "whole")
    model, measured = fresh(), []
    original = Reconstruction._measure

    def counting(self, length, number, rate, kinds):
        if len(measured) == 4:
            raise KeyboardInterrupt
        measured.append((number, rate, *kinds))
        return original(self, length, number, rate, kinds)

    monkeypatch.setattr(Reconstruction, "_measure", counting)
    with pytest.raises(KeyboardInterrupt):
        collect(measuring(model), tmp_path / "killed")
    lines = (tmp_path / "killed/samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (3 + 1 + 1) + 2 * 3  # the first document, and the contexts of the second
    # the last line cut short, and one sample of those that were measured with it not yet there
    (tmp_path / "killed/samples.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20], encoding="utf-8")
    seen, measured[:] = set(measured), []
    monkeypatch.setattr(Reconstruction, "_measure", lambda *args: measured.append(args[2:4]) or original(*args))
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


def test_the_folder_of_a_run(measuring, tmp_path):
    """Table, plots and JSON; cells that cannot be are named; two runs are compared sample by sample."""
    run = measuring(rates=[4, 16])
    found = collect(run, tmp_path / "a")
    Report(found, run.model.config).finish()
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
        some = [row["accuracy"] for row in rows if row["key"].items() >= key.items()]
        assert cell["accuracy"]["mean"] == pytest.approx(sum(some) / len(some))
        assert cell["accuracy"]["n"] == 3
    assert [(place["length"], place["rate"]) for place in data["by_place"]] == [(LENGTH, 4), (LENGTH, 16)]
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
    Report(again, other.model.config).finish()
    differences, notes = compare.compare(tmp_path / "a", tmp_path / "b")
    assert {d.key["context"] for d in differences} == {"real", "wrong"}
    assert all(d.change.mean == pytest.approx(0, abs=1e-6) for d in differences)
    assert notes == [f"{len(rows) - 8} samples of {tmp_path / 'a'} are not in the other and were left out."]


def test_what_does_not_fit_says_so(tiny, measuring, tmp_path, data):
    """A rate or a control that cannot be is a cell that says why; the others are measured."""
    run = measuring(tiny(window=64), rates=[1, 4, 16], documents=2)
    report = Report(collect(run, tmp_path / "out"), run.model.config)
    report.finish()
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
    cells = {cell["key"]["context"]: cell for cell in collect(alone).cells(["context"])}
    assert cells["wrong"] == {"key": {"context": "wrong"}, "skipped": "there is no other document"}
    assert "bleu" in cells["shuffled"]
    nothing = measuring(tiny(window=20), rates=[4], controls=())
    empty = Report(collect(nothing, tmp_path / "none"), nothing.model.config)
    empty.finish()
    assert empty.plots() == {}


def test_an_untrained_rate_is_said_once(fresh, measuring, caplog):
    model = fresh(rates=(4, 8))
    with caplog.at_level(logging.INFO):
        found = collect(measuring(model, rates=[4, 2], documents=2))
    assert len([record for record in caplog.records if record.name.startswith("rcc")]) == 1
    assert [note for note in found.notes if "not trained" in note] == [
        "rcc was not trained at 2×, only at 4×, 8×: expect little of it."
    ]
    assert "| 2× (untrained) |" in Report(found, model.config).table()


# ---------------------------------------------------------------- the command
def test_refusals(command, folder, data, tmp_path, monkeypatch):
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
        ([*good, "--lengths", "15"], "15 tokens is below one segment", "at least 16"),
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


def test_the_command_on_a_tiny_model(command, folder, data, tmp_path):
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


def test_the_command_on_the_default_model(tmp_path):
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
