"""`rcc report`: figures against the samples of the folders; what models write stays text; a browser that reads it."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import word_tokens
from conftest import MakeModel, MakeTokens
from rcc import InputError
from rcc.evaluation.evaluation import Evaluation, evaluate, finish
from rcc.evaluation.html import page as report
from rcc.evaluation.html.folders import SampleLists, read
from rcc.evaluation.html.tables import figures_of
from rcc.evaluation.passkey.run import PasskeyEvaluation
from rcc.evaluation.passkey.settings import PasskeySettings
from rcc.evaluation.reconstruction.documents import open_texts
from rcc.evaluation.reconstruction.run import ReconstructionEvaluation
from rcc.evaluation.reconstruction.settings import ReconstructionSettings
from rcc.evaluation.resources.run import ResourcesEvaluation
from rcc.evaluation.resources.settings import ResourcesSettings
from rcc.evaluation.resources.subject import shaped
from rcc.evaluation.results import Case, Results, Skipped

HOSTILE = "</script><script>window.hacked = 1</script><!-- <img src=x onerror='window.hacked = 2'> \ud83d"
"""What a model may write; the end is half a character."""
SETS, BUCKETS, RATES = ("squad", "<b>hotpotqa</b>"), ("0-2k", "2k-8k"), (4, 8, 16)
METHODS = {"rcc": ("human", "reconstruct")} | dict.fromkeys(("rcc-last", "truncate", "bm25", "kvpress-snapkv"), ("",))
WHOLE = {"plain": 0.8, "plain-tuned": 0.9, "no-context": 0.1}
BY = ("method", "mode", "rate")


# ---------------------------------------------------------------- folders
def make_qa(folder: Path, better: float = 0.0, questions: int = 12) -> Path:
    """A folder of the task `qa`, with invented figures."""
    run = Results("qa", {"model": "<i>tiny</i>", "fingerprint": "f00"}, folder, notes=[f"note of {HOSTILE[:20]}"])

    def measure(key: dict[str, Any]) -> dict[str, Any]:
        if (key["method"], key["rate"]) == ("kvpress-snapkv", 16):
            raise Skipped("no press keeps <nothing>")
        chance, rate = random.Random(str(key)), key["rate"]
        tokens = chance.randint(500, 1500) * (1 if key["bucket"] == "0-2k" else 4)
        score = WHOLE.get(key["method"], 0.7 + better - math.log2(rate or 1) / 10) * chance.uniform(0.8, 1)
        held = math.ceil(tokens / rate) if rate else 0 if key["method"] == "no-context" else tokens
        row = {"score": score, "f1": score / 2, "context_tokens": tokens, "positions": held, "bytes": held * 23040}
        row |= {"compress_seconds": tokens / 1000 if rate else 0.0, "first_token_seconds": 0.01 + held / 4000}
        row |= {"asked": f"Who? {key['question']}", "answers": ["Susan", "she"], "written": HOSTILE}
        return row if key["mode"] != "reconstruct" else {**row, "instruction_accuracy": 0.9}

    ways = [(method, mode, rate) for method, modes in METHODS.items() for mode in modes for rate in RATES]
    keys: list[dict[str, Any]] = [
        dict(zip(BY, way, strict=True)) | {"set": SETS[i % 2], "bucket": BUCKETS[i // 2 % 2], "question": f"q{i}"}
        for way in [*ways, *((method, "human", 0) for method in WHOLE)]
        for i in range(questions)
    ]
    run.collect(Case(key, partial(measure, key)) for key in keys)
    run.finish(BY, "", None, {"by_length": run.cells((*BY, "bucket")), "by_set": run.cells((*BY, "set"))})
    return folder


@pytest.fixture(scope="module")
def folders(tiny: MakeModel, tokens: MakeTokens, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each task, as the tasks themselves write it; `qa` and what is not known yet are invented."""
    top = tmp_path_factory.mktemp("folders")
    tokenizer = word_tokens.word_tokenizer()
    data = top / "texts.jsonl"
    rows = [{"text": word_tokens.words(tokens(140, seed))} for seed in (1, 2, 3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = open_texts([str(data)], "text", tokenizer)
    asked = ReconstructionSettings(rates=[1, 4, 8], lengths=[64, 128], prompts=3, target_tokens=8)
    hidden = PasskeySettings([512, 1024], rates=[1, 16], keys=2, variants=["plain", "several"])
    sizes = ResourcesSettings([2048, 2**16], measured=False)
    evaluations: dict[str, Evaluation] = {
        "recon": ReconstructionEvaluation(tiny(window=128), tokenizer, texts, asked),
        "passkey": PasskeyEvaluation(tiny(), tokenizer, hidden),
        "resources": ResourcesEvaluation(shaped("pythia-1.4b", rates=[32]), sizes),
    }
    for name, evaluation in evaluations.items():
        finish(evaluation, evaluate(evaluation, top / name))
    tea = Results("tea <b>time</b>", {"model": "any"}, top / "tea")
    figures = {"warm": math.nan, "cups": 3.0, "said": HOSTILE}
    tea.collect([Case({"leaf": "<u>green</u>", "cup": n}, lambda: figures) for n in range(4)])
    tea.finish(("leaf",), "")
    make_qa(top / "qa")
    make_qa(top / "other" / "qa", better=0.1)
    names = ("qa", "recon", "passkey", "resources", "tea")
    return {"other": top / "other" / "qa"} | {name: top / name for name in names}


# ---------------------------------------------------------------- reading a page back
class PageReader(HTMLParser):
    """What a page holds: tables as rows of (text, small print, list of samples), headings, scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, str, str | None]]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.links: set[int] = set()
        self.tags: list[str] = []
        self.text: list[str] = []
        self._where: list[str] = []
        self._cell: list[Any] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self._where.append(tag)
        if "data-s" in attributes:
            self.links.add(int(attributes["data-s"] or ""))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ["", "", None]
        elif tag == "script":
            self.scripts.append((attributes, ""))
        if self._cell is not None and "data-s" in attributes:
            self._cell[2] = attributes["data-s"]

    def handle_endtag(self, tag: str) -> None:
        while self._where and self._where.pop() != tag:
            pass
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append((self._cell[0].strip(), self._cell[1], self._cell[2]))
            self._cell = None

    def handle_data(self, text: str) -> None:
        if self._where[-1:] == ["script"]:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + text)
            return
        self.text.append(text)
        if self._cell is not None:
            self._cell["small" in self._where] += text

    def samples(self) -> dict[str, Any]:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("type") == "application/json"))

    def table(self, *head: str) -> list[dict[str, tuple[str, str, str | None]]]:
        """The first table with these columns: its rows by column."""
        for rows in self.tables:
            names = [text for text, *_ in rows[0]]
            if set(head) <= set(names):
                return [dict(zip(names, row, strict=False)) for row in rows[1:]]
        raise AssertionError(f"no table has {head}")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- figures and samples
def test_every_figure_and_its_samples(folders: dict[str, Path]) -> None:
    """Each figure of the tables is the mean of the samples, as the file has them, that it opens."""
    page = PageReader(report.page([folders["qa"]], limit=1000))
    data, measured = page.samples(), [row for row in rows_of(folders["qa"]) if "skipped" not in row]
    table = page.table("method", "mode", "rate", "samples", "score", "held, MB")
    ways = len(METHODS) + 1
    assert len(table) == ways * len(RATES) + len(WHOLE)
    for row in table:
        key: dict[str, Any] = {
            "method": row["method"][0],
            "mode": row["mode"][0].replace("–", ""),
            "rate": row["rate"][0],
        }
        key["rate"] = 0 if key["rate"] == "–" else int(key["rate"].removesuffix("×"))
        members = [sample for sample in measured if sample["key"].items() >= key.items()]
        if key["method"] == "kvpress-snapkv" and key["rate"] == 16:
            assert row["samples"][0] == "not measured: no press keeps <nothing>"
            continue
        assert row["samples"][0] == str(len(members)) == "12"
        mean = sum(sample["score"] for sample in members) / 12
        assert row["score"][0] == f"{mean:.3f}"
        low, high = map(float, row["score"][1].split("–"))
        assert low <= mean <= high
        assert float(row["held, MB"][0]) == pytest.approx(sum(s["bytes"] for s in members) / 12e6, abs=0.06)
        shown = data["lists"][int(row["score"][2])]
        assert [data["rows"][i]["key"] for i in shown["rows"]] == [sample["key"] for sample in members]
        assert shown["all"] == 12
    sets = page.table("method", *SETS)
    for row in sets[:3]:
        members = [s for s in measured if s["key"].items() >= {"method": "rcc", "mode": "human"}.items()]
        members = [s for s in members if row["method"][0] == f"rcc · human · {s['key']['rate']}×"]
        for name in SETS:
            scores = [s["score"] for s in members if s["key"]["set"] == name]
            assert row[name][0] == f"{sum(scores) / len(scores):.3f}"
            assert row[name][1].endswith(f"n\u00a0{len(scores)}")
    text = "".join(page.text)
    assert f"note of {HOSTILE[:20]}" in text
    assert "Quality against compression" in text


def test_samples_come_to_their_figures(folders: dict[str, Path]) -> None:
    """Of every task and every list of cells: the samples of a figure have its mean and its number."""
    samples, seen = SampleLists(10**9), 0
    for run in read(list(folders.values())):
        for grouping in run.groupings:
            for _, cell, link in samples.cells(run, grouping):
                assert (link is None) == ("skipped" in cell)
                for figure in figures_of([cell]):
                    rows = [samples.rows[i] for i in samples.lists[link]["rows"]]
                    values = [float(row[figure]) for row in rows if figure in row]
                    assert sum(values) / len(values) == pytest.approx(cell[figure]["mean"], rel=1e-3, nan_ok=True)
                    assert len(values) == cell[figure]["n"]
                    seen += 1
    assert seen > 500


def test_points_lead_to_their_samples(folders: dict[str, Path]) -> None:
    """What a point of a chart is called belongs to its samples; every list of samples is led to."""
    html = report.page([folders["qa"]], limit=1000)
    page = PageReader(html)
    data = page.samples()
    assert page.links == set(range(len(data["lists"])))
    points = re.findall(r'<g class="point"[^>]* data-s="(\d+)">\s*<title>(.*?)</title>', html)
    assert len(points) > 100
    for number, title in points:
        method = re.match(r"[a-z0-9-]+", title)[0]
        rows = [data["rows"][i] for i in data["lists"][int(number)]["rows"]]
        assert {row["key"]["method"] for row in rows} == {method}
        assert title.endswith(f", n {len(rows)}")
        if match := re.search(r"([\d.]+) tokens a position: ", title):
            ratio = sum(r["context_tokens"] for r in rows) / sum(r["positions"] for r in rows)
            assert float(match[1]) == pytest.approx(ratio, abs=0.051)


def test_the_limit(folders: dict[str, Path]) -> None:
    """No figure has more samples than the limit, and all methods have the same questions; 0 is none."""
    page = PageReader(report.page([folders["qa"], folders["other"]], limit=3))
    data = page.samples()
    asked = []
    for row in page.table("method", "mode", "rate", "samples", "score"):
        if row["samples"][2] is not None:
            shown = data["lists"][int(row["samples"][2])]
            asked.append({data["rows"][i]["key"]["question"] for i in shown["rows"]})
            assert (len(shown["rows"]), shown["all"]) == (3, 12)
    assert len(asked) > 10
    assert all(questions == asked[0] for questions in asked)
    assert asked[0] != {"q0", "q1", "q2"}  # drawn, not the first ones
    html = report.page([folders["qa"]], limit=0)
    assert "data-s=" not in html.split("<style>")[0] + html.split("</style>")[1].split("<script")[0]
    assert PageReader(html).samples() == {"rows": [], "lists": []}


def test_reconstruction(folders: dict[str, Path]) -> None:
    """Controls are apart, skipped cells say why, and positions have charts of their own."""
    html = report.page([folders["recon"]])
    page, text = PageReader(html), "".join(PageReader(html).text)
    data = json.loads((folders["recon"] / "results.json").read_text(encoding="utf-8"))
    for row, cell in zip(page.table("tokens", "rate", "context", "accuracy"), data["cells"], strict=True):
        assert row["context"][0] == cell["key"]["context"]
        if "skipped" in cell:
            assert row["samples"][0] == f"not measured: {cell['skipped']}"
        else:
            assert row["accuracy"][0] == f"{cell['accuracy']['mean']:.3f}"
            assert row["samples"][0] == str(cell["accuracy"]["n"])
    assert any("skipped" in cell for cell in data["cells"])
    for line in re.findall(r'<g class="(line [^"]*)">(.*?)</g>\s*</g>', html, re.S):
        name = re.search(r'class="name"[^>]*>(.*?)<', line[1])
        if name and name[1] in ("shuffled", "wrong", "no-context", "plain-text"):
            assert "soft" in line[0]
            assert ("level" in line[0]) == (name[1] in ("no-context", "plain-text"))
        elif name:
            assert "soft" not in line[0]
    for wanted in ("place in the segment", "token at which the prompt begins", "By length", *data["notes"]):
        assert wanted in text
    by_place = next(entry for entry in data["by_place"] if (entry["length"], entry["rate"]) == (64, 4))
    for i, value in enumerate(by_place["group"]):
        drawn = re.search(rf"<title>4×, part {i + 1} of 4: ([\d.]+)", html)
        assert float(drawn[1]) == pytest.approx(value["mean"], abs=5e-4)


def test_passkey(folders: dict[str, Path]) -> None:
    """A heat map for each variant: shares by length and position, beside the control's; what does not fit says so."""
    page = PageReader(report.page([folders["passkey"]]))
    measured = rows_of(folders["passkey"])
    heats = [rows for rows in page.tables if any(text == "control: key replaced" for text, *_ in rows[0])]
    assert len(heats) == 2
    positions = ("start", "middle", "end")
    for variant, (_, head, *rows) in zip(("plain", "several"), heats, strict=True):
        assert [text for text, *_ in head] == ["tokens", "rate", *positions, *positions]
        names = [(row[0][0], row[1][0]) for row in rows]
        assert names == [("512", "1×"), ("512", "16×"), ("1k", "1×"), ("1k", "16×")]
        assert rows[2][2][0].startswith("not measured: 1k tokens at 1× take 1,024 positions")
        wanted = {"variant": variant, "length": 512, "rate": 16}
        columns = itertools.product(("whole", "replaced"), positions)
        for (context, position), (share, small, _) in zip(columns, rows[1][2:], strict=True):
            key = {**wanted, "context": context, "position": position}
            outcomes = [row["right"] for row in measured if row["key"].items() >= key.items()]
            assert share == f"{sum(outcomes) / len(outcomes):.0%}"
            assert small.endswith(f"n\u00a0{len(outcomes)}")


def test_resources(folders: dict[str, Path]) -> None:
    """Memory by length: computed, the floor, the base's, and the paper's own figures."""
    html = report.page([folders["resources"]])
    row = next(
        row for row in rows_of(folders["resources"]) if row["key"] == {"reader": "rcc", "length": 65536, "rate": 32}
    )
    floor = (row["weights_bytes"] + row["kv_bytes"]) / 1e6
    for title in (
        f"RCC 32×, 64k tokens, computed: {row['compress_peak_bytes'] / 1e6:,.0f}, n 1",
        f"floor 32×, 64k tokens, computed: {floor:,.0f}, n 1",
        "paper, RCC 32×, 64k tokens: 9,302, n 1",
        "paper, plain, 64k tokens: 61,928, n 1",
    ):
        assert f"<title>{title}</title>" in html
    assert "plain, 64k tokens, computed: " in html
    assert {cell["beyond window"][0] for cell in PageReader(html).table("reader", "beyond window")} == {"yes", "no"}


def test_folders_together(folders: dict[str, Path]) -> None:
    """Sections in one order, each folder with a name of its own; a task that is not known has its table."""
    page = PageReader(report.page(list(folders.values())))
    text = "".join(page.text)
    heads = ["Answers", "Reconstruction", "Passkey", "Memory and time", "tea <b>time</b>"]
    offsets = [text.rindex(head) for head in heads]
    assert offsets == sorted(offsets)
    assert "other/qa" in text
    assert f"{folders['qa'].parent.name}/qa" in text
    assert {"rcc human A", "rcc human B", "plain A", "plain B"} <= set(map(str.strip, page.text))
    (row,) = page.table("leaf", "samples", "cups", "warm")
    assert {name: cells[0] for name, cells in row.items()} == {
        "leaf": "<u>green</u>",
        "samples": "4",
        "cups": "3",
        "warm": "nan",
    }


# ---------------------------------------------------------------- nothing but text
def test_what_models_write_stays_text(folders: dict[str, Path]) -> None:
    """No tag comes from a sample, a name, a note or a setting; the samples are what they were."""
    html = report.page(list(folders.values()))
    page = PageReader(html)
    assert page.tags.count("script") == 2
    assert not {"img", "iframe", "u", "i", "object", "embed"} & set(page.tags)
    assert "<!--" not in html
    rows = page.samples()["rows"]
    assert HOSTILE in [row.get("written") for row in rows]
    assert [row["warm"] for row in rows if "warm" in row] == ["nan"] * 4
    ours = rows_of(folders["recon"])
    for row in (row for row in rows if "truth" in row):
        same = next(other for other in ours if other["key"] == row["key"])
        assert (row["written"], row["truth"]) == (same["written"], same["truth"])
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)


def test_nothing_is_fetched_and_only_one_script_runs(folders: dict[str, Path]) -> None:
    page = report.page([folders["recon"]])
    assert not re.search(r"https?://|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")|\ssrc=", page)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1].replace("&#39;", "'")
    code = next(text for attrs, text in PageReader(page).scripts if not attrs)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


# ---------------------------------------------------------------- the command
def call(*args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rcc", "report", *map(str, args)], capture_output=True, text=True)


def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    """As a user types it; what exists is replaced only when that is asked for."""
    out = tmp_path / "report.html"
    done = call(folders["qa"], folders["tea"], "-o", out, "--samples", "2")
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r".*report\.html: 2 evaluations, \d+\.\d MB\n", done.stderr)
    assert out.read_bytes().decode() == report.page([folders["qa"], folders["tea"]], 2).replace("\ud83d", "?")
    done = call(folders["tea"], "-o", out)
    assert (done.returncode, done.stderr) == (2, f"rcc: {out} exists: use --force to replace it.\n")
    before = out.read_bytes()
    assert call(folders["tea"], "-o", out, "--force").returncode == 0
    assert out.read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_refusals(folders: dict[str, Path], tmp_path: Path) -> None:
    """One sentence and code 2, and no page."""
    begun, damaged, odd = tmp_path / "begun", tmp_path / "damaged", tmp_path / "odd"
    Results("qa", {}, begun)
    for folder, text in ((damaged, "{"), (odd, '{"format_version": 1, "task": "qa"}')):
        shutil.copytree(folders["tea"], folder)
        (folder / "results.json").write_text(text, encoding="utf-8")
    newer = json.loads((folders["tea"] / "results.json").read_text(encoding="utf-8")) | {"format_version": 2}
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer/results.json").write_text(json.dumps(newer), encoding="utf-8")
    (tmp_path / "newer/samples.jsonl").write_text("", encoding="utf-8")
    for given_, words in (
        ([begun], "begun holds no finished evaluation: it has no results.json."),
        ([tmp_path / "none"], "none holds no finished evaluation"),
        ([damaged], "damaged holds no readable evaluation"),
        ([odd], "odd holds no readable evaluation: make it again."),
        ([tmp_path / "newer"], "format version 2"),
        ([folders["tea"], folders["tea"]], "is named more than once"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            report.page(given_)
    done = call(folders["tea"], begun, "-o", tmp_path / "report.html")
    assert done.returncode == 2
    assert re.fullmatch(r"rcc: [^\n]+ holds no finished evaluation: it has no results\.json\.\n", done.stderr)
    assert call("-o", tmp_path / "report.html").returncode == 2
    done = call(folders["tea"], "-o", tmp_path / "no" / "report.html")
    assert (done.returncode, "does not exist" in done.stderr) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"begun", "damaged", "odd", "newer"}


# ---------------------------------------------------------------- in a browser
OVERLAPS = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const edge = svg.getBoundingClientRect().right + 2;
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.filter(([, box]) => box.width).flatMap(([a, p], i, all) => [
    ...(p.left < 0 || p.right > edge ? [`${a} stands outside`] : []),
    ...all.slice(i + 1).filter(([, q]) =>
      Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
      Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3).map(([b]) => `${a} upon ${b}`),
  ]);
})"""
FLAGS = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")


@pytest.fixture(scope="module")
def open_page(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """A page of all folders in a real browser; at the end nothing was fetched, logged or run that should not."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if name and (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: install one, or name it in $CHROMIUM")
    reason = "playwright is missing: pip install 'rcc-context[dev]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    page_file = tmp_path_factory.mktemp("page") / "report.html"
    report.write(page_file, report.page(list(folders.values())))
    said: list[str] = []
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=program,
            args=[*FLAGS, "--disable-component-update", *(["--no-sandbox"] if os.geteuid() == 0 else [])],
        )

        def open_it(width: int = 1280, **more: Any) -> Any:
            page = browser.new_context(viewport={"width": width, "height": 800}, **more).new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: said.append(request.url))
            page.goto(page_file.as_uri())
            return page

        yield open_it
        browser.close()
    assert set(said) == {page_file.as_uri()}


def test_browser_samples(open_page: Callable[..., Any]) -> None:
    """A click on a figure, or on a point of a chart, shows its samples; they can be searched, ordered and paged."""
    page = open_page()
    page.locator("#qa details").first.locator("summary").click()
    row = page.locator("#qa details tbody tr").first
    assert row.locator("th").all_inner_texts() == ["rcc", "human", "4×"]
    row.locator("[data-s]").nth(1).click()
    dialog = page.locator("dialog")
    assert dialog.locator("h2").inner_text().endswith("qa · rcc · human · 4×")
    assert dialog.locator("header p").inner_text() == "12 samples"
    assert dialog.locator("article").count() == 10
    assert HOSTILE[:-1] in dialog.locator("article").first.inner_text()
    assert "Susan | she" in dialog.locator("article").first.inner_text()
    dialog.get_by_text("Next →").click()
    assert dialog.locator("article").count() == 2
    assert dialog.locator("output").inner_text() == "11–12 of 12"
    dialog.locator("select").select_option(label="lowest score first")
    shown = [float(re.search(r"score ([\d.]+)", text)[1]) for text in dialog.locator("article").all_inner_texts()]
    assert shown == sorted(shown)
    dialog.locator("input").fill("who? q11")
    assert dialog.locator("article").count() == 1
    dialog.locator("input").fill("nobody")
    assert "No sample" in dialog.locator("#list").inner_text()
    dialog.get_by_label("Close").click()
    assert not dialog.is_visible()
    assert page.evaluate("window.hacked") is None
    point = page.locator("#reconstruction figure:visible .point[data-s]").first
    point.dispatch_event("click")  # a mouse may find another point upon it
    assert point.locator("title").text_content().startswith(dialog.locator("h2").inner_text().split(" · ")[-1])
    assert "marked: words that stand in the original" in dialog.locator("header p").inner_text()
    assert page.evaluate("window.hacked") is None


def test_browser_keyboard(open_page: Callable[..., Any]) -> None:
    """Tab leads to the figures of a table, arrows from one to the next, Enter to the samples and Escape back."""
    page = open_page()
    table = page.locator("#passkey table").first
    table.locator("[data-s]").first.focus()
    page.keyboard.press("ArrowRight")
    second = table.locator("[data-s]").nth(1)
    assert second.evaluate("figure => figure === document.activeElement")
    assert table.locator("[tabindex='0']").count() == 1
    page.keyboard.press("Enter")
    assert "passkey" in page.locator("dialog h2").inner_text()
    page.keyboard.press("Escape")
    assert second.evaluate("figure => figure === document.activeElement")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_browser_layout(open_page: Callable[..., Any], width: int, scheme: str) -> None:
    """Nothing is wider than the screen, a phone's included; what is written in a chart does not overlap."""
    page = open_page(width, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == (scheme == "dark")
    overlaps = page.evaluate(OVERLAPS)
    assert overlaps == []
    page.locator("figure:visible .point[data-s]").first.dispatch_event("click")
    assert page.evaluate("document.querySelector('dialog').scrollWidth") <= width
    assert page.evaluate("document.querySelector('#list').scrollWidth") <= width


def test_browser_without_scripts(open_page: Callable[..., Any]) -> None:
    """Charts, tables and notes are there; what only a script does is not spoken of."""
    page = open_page(java_script_enabled=False)
    assert page.locator("#qa figure:visible svg .curve").count() > 20
    page.locator("#reconstruction summary").first.click()
    assert page.locator("#reconstruction table").first.is_visible()
    assert not page.get_by_text("Click a figure").is_visible()
