"""`rcc eval passkey`: the texts hide what they should, where they should; a model that can find a key does."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Command
from learning import LENGTH, PART, SPLIT, make_base, passkey_words
from rcc import InputError, RCCConfig, RCCForCausalLM, SideConfig, checkpoints
from rcc.data.haystack import POSITIONS, make_text
from rcc.evaluation import results
from rcc.evaluation.evaluation import evaluate, ignore
from rcc.evaluation.passkey import run as task
from rcc.evaluation.passkey.settings import BY, PasskeySettings
from rcc.evaluation.passkey.table import PasskeyReport
from rcc.text.tokens import token_ids

BOOK = Path(__file__).resolve().parents[3] / "examples/simple-susan.txt"


# ---------------------------------------------------------------- a model that can
@pytest.fixture(scope="module")
def able(passkey_model: tuple[Path, set[int]]) -> tuple[RCCForCausalLM, Any]:
    """A model that finds keys in texts of LENGTH tokens, and its tokenizer."""
    return RCCForCausalLM.from_pretrained(passkey_model[0]), checkpoints.load_tokenizer(passkey_model[0])


def passkey(
    model: RCCForCausalLM,
    tokenizer: Any,
    lengths: list[int],
    folder: Path | None = None,
    progress: Callable[[int], None] = ignore,
    **settings: Any,
) -> results.Results:
    """Run the evaluation of these settings."""
    return evaluate(task.PasskeyEvaluation(model, tokenizer, PasskeySettings(lengths, **settings)), folder, progress)


@pytest.fixture
def call(command: Command) -> Callable[..., Any]:
    """`rcc eval passkey …` inside this process → exit code, output and errors."""
    return partial(command, "eval", "passkey")


def test_keys_are_found(passkey_model: tuple[Path, set[int]], tmp_path: Path) -> None:
    """From the command line: (nearly) all keys, none of the controls; samples, figures, table and plot are kept."""
    folder = tmp_path / "out"
    options: list[str | Path] = ["--lengths", str(LENGTH), "--keys", "20", "--controls", "10", "--output", folder]
    done = subprocess.run(
        [sys.executable, "-m", "rcc", "eval", "passkey", "--model", passkey_model[0], *options, "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{folder}: results.json, samples.jsonl, table.md and plots\n"
    data, rows = results.load(folder)
    assert len(rows) == 3 * (20 + 10)
    outcomes = [row["right"] for row in rows if row["key"]["context"] == "whole"]
    assert np.mean(outcomes) >= 0.95
    assert not any(row["right"] for row in rows if row["key"]["context"] == "replaced")
    assert all(row["right"] == (row["written"].strip(" .") == row["answer"]) for row in rows)
    assert {cell["key"]["position"] for cell in data["cells"]} == set(POSITIONS)
    assert data["cells"][0]["right"]["n"] == 20
    assert data["settings"]["fingerprint"] == RCCForCausalLM.from_pretrained(passkey_model[0]).fingerprint
    assert done.stdout.startswith((folder / "table.md").read_text().split("\n\n")[0])
    assert re.search(rf"\| plain \| {LENGTH} \| 4× \| .* \| 0 of 30 \| ", done.stdout)
    assert "those that repeat (filler) were read once" in done.stdout
    assert (folder / "passkey-plain.png").stat().st_size > 1000


def test_reading_equal_segments_once_changes_nothing(able: tuple[RCCForCausalLM, Any]) -> None:
    """The context of a text whose equal segments were read once is that of the full read, in float32 up to rounding;
    the encoder took as many segments as are different."""
    model, tokenizer = able
    text = make_text("plain", "middle", 640, 0, lambda s: token_ids(tokenizer, s)[0].numpy())
    ids = torch.from_numpy(text.ids)[None]
    contexts, read = [], []
    for batch_tokens in (PART, 4096):
        with task.counted_segments(model) as segments:
            contexts.append(model.compress(ids, batch_tokens=batch_tokens))
        read.append(sum(segments))
    full, once = contexts
    segments = ids[0].split(PART)
    assert read == [len(segments), len({tuple(s.tolist()) for s in segments})]
    assert len(segments) == 20
    for layer in range(2):
        for a, b in zip(full.layer(layer), once.layer(layer), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_cells_that_do_not_fit(able: tuple[RCCForCausalLM, Any], caplog: pytest.LogCaptureFixture) -> None:
    """A prefix beyond the window is said so in its cell, and the others go on; untrained rates are noted once."""
    with caplog.at_level(logging.WARNING, "rcc"):
        run = passkey(*able, [320, LENGTH], rates=[1, 4, 8], keys=2, positions=["start"])
    cells = {(cell["key"]["length"], cell["key"]["rate"], cell["key"]["context"]): cell for cell in run.cells(BY)}
    assert "skipped" in cells[320, 1, "whole"]
    assert "right" in cells[LENGTH, 1, "whole"]
    assert "right" in cells[320, 4, "whole"]
    reason = (
        "320 tokens at 1× take 320 positions, with the question and the answer more than the decoder's window of 256"
    )
    assert run.notes[0] == f"Not measured: {reason}."
    assert "| plain | 320 | 1× | does not fit | – | – | – | – |" in PasskeyReport(run).table()
    untrained = [note for note in run.notes if "not trained at" in note]
    assert [re.search(r"not trained at (\d)×, only at 4×:", note)[1] for note in untrained] == ["1", "8"]
    assert [tuple(record.args)[1] for record in caplog.records] == [1, 8]
    # nothing fits by itself: the highest trained rate says so; a length beyond any memory is not even written
    run = passkey(*able, [2000, 10**14], keys=1, positions=["end"])
    assert [(row["key"]["rate"], "skipped" in row) for row in run.rows] == [(4, True)] * 4


def test_going_on(able: tuple[RCCForCausalLM, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation with a limit, and one that was interrupted, go on in their folder with what is missing."""
    model, tokenizer = able
    made = []
    compress = model.compress

    def watched(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 5:
            raise KeyboardInterrupt
        return compress(*args, **kwargs)

    monkeypatch.setattr(model, "compress", watched)
    seen: list[int] = []
    options: dict[str, Any] = {"keys": 2, "positions": ["start", "end"], "folder": tmp_path / "out"}
    passkey(model, tokenizer, [LENGTH], limit=1, **options, progress=seen.append)
    assert len(made) == 4
    assert seen[-1] == 4 * LENGTH
    assert len(seen) > 4  # also while a text is read
    assert seen == sorted(seen)
    with pytest.raises(KeyboardInterrupt):
        passkey(model, tokenizer, [LENGTH], **options)
    run = passkey(model, tokenizer, [LENGTH], **options)
    assert len(made) == 4 + 1 + 2
    assert len({json.dumps(row["key"]) for row in run.rows}) == len(run.rows) == 6
    with pytest.raises(InputError, match="other settings"):
        passkey(model, tokenizer, [LENGTH], **options, seed=1)


# ---------------------------------------------------------------- a long text
MEASURE = """
import json, sys
from rcc.runtime import allocator
allocator.configure()
from rcc import RCCForCausalLM, load_tokenizer
from rcc.evaluation.evaluation import evaluate
from rcc.evaluation.passkey.run import PasskeyEvaluation
from rcc.evaluation.passkey.settings import PasskeySettings
model = RCCForCausalLM.from_pretrained(sys.argv[1])
prose = {"book": open(sys.argv[2], encoding="utf-8").read()}
settings = PasskeySettings([2**16, 2**18], keys=1, controls=0, positions=["middle"], variants=["plain", "prose"],
                           prose=prose)
run = evaluate(PasskeyEvaluation(model, load_tokenizer(sys.argv[1]), settings))
print(json.dumps(run.rows))
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Four times the text takes, beside its prefix and its token ids, next to no more memory."""
    config = RCCConfig(segment_length=64, rates=[64], encoder=SideConfig(0), decoder=SideConfig(0), share_base=False)
    base = make_base(tmp_path / "base", passkey_words(), SPLIT, window=8192)
    RCCForCausalLM.from_base(base, base, config).save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "model", BOOK], capture_output=True, text=True, check=True
    )
    rows = {(row["key"]["variant"], row["key"]["length"]): row for row in json.loads(done.stdout)}
    assert rows["plain", 2**18]["segments_read"] < 100
    assert rows["prose", 2**18]["segments_read"] > 4000
    if "peak_mb" not in rows["plain", 2**16]:
        pytest.skip("this system does not say")
    for variant in ("plain", "prose"):
        short, long = (rows[variant, length] for length in (2**16, 2**18))
        # keys and values of two layers of 64 numbers in float32; then the ids some times over, a mask, what is kept
        prefix = (long["text"]["positions"] - short["text"]["positions"]) * 2 * 2 * 64 * 4 / 1e6
        assert long["peak_mb"] - short["peak_mb"] < prefix + 60  # all of the prose at once takes 500


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--variants", "plain,haiku"], ("--variants 'haiku' is unknown", "niah-multikey")),
        (["--positions", "top"], ("--positions 'top' is unknown", "middle")),
        (["--lengths", "8q"], ("--lengths '8q'", "1M")),
        (["--lengths", "31"], ("31 tokens", "less than one segment", "32")),
        (["--lengths", "40"], ("no room for the passkey's text", "give at least")),
        (["--lengths", "72", "--rates", "x"], ("--rates 'x'",)),
        (["--lengths", "72", "--rates", "5"], ("rate=5 does not divide the segment of 32 tokens",)),
        (["--lengths", "72", "--batch-tokens", "0"], ("--batch-tokens '0'",)),
        (["--keys", "0"], ("'--keys'", "1")),
        (["--controls", "-1"], ("'--controls'", "0")),
        (["--limit", "0"], ("'--limit'", "1")),
        (["--seed", "-1"], ("'--seed'", "0")),
        (["--filler-data", "book.txt"], ("--filler-data is for the variant prose",)),
        (["--variants", "prose", "--filler-data", "none.txt"], ("none.txt does not exist",)),
        (["--lengths", "72", "--device", "abacus"], ("device abacus",)),
    ],
)
def test_refusals(args: list[str], words: tuple[str, ...], passkey_model: Any, call: Callable[..., Any]) -> None:
    """One sentence, exit code 2, nothing else."""
    code, out, err = call("--model", passkey_model[0], *args)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"rcc: [^\n]+\.\n", err), err
    for word in words:
        assert word in err


def test_more_refusals(
    able: tuple[RCCForCausalLM, Any],
    passkey_model: Any,
    call: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder of something else; prose where there is none; a library's caller is told the same."""
    (tmp_path / "thesis.txt").write_text("words")
    code, out, err = call("--model", passkey_model[0], "--lengths", "72", "--output", tmp_path)
    assert (code, out) == (2, "")
    assert "is not empty and holds no evaluation" in err
    monkeypatch.setattr("rcc.evaluation.example.EXAMPLE", Path("examples/none.txt"))
    code, out, err = call("--model", passkey_model[0], "--variants", "prose")
    assert (code, out) == (2, "")
    assert "--filler-data" in err
    for options, word in (
        ({"variants": ["haiku"]}, "variant 'haiku' is unknown"),
        ({"positions": ["top"]}, "position 'top' is unknown"),
        ({"keys": 0}, "keys must be at least 1, not 0"),
        ({"controls": -1}, "controls must be at least 0, not -1"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"variants": ["prose"]}, "give one in prose"),
    ):
        with pytest.raises(InputError, match=word):
            passkey(*able, [LENGTH], **options)
    with pytest.raises(InputError, match="less than one segment"):
        passkey(*able, [])


def test_json(passkey_model: Any, call: Callable[..., Any]) -> None:
    """`--json` prints figures and notes and nothing else; without --output nothing is kept."""
    code, out, err = call(
        "--model", passkey_model[0], "--lengths", "72", "--keys", "2", "--controls", "0", "--positions", "end", "--json"
    )
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["cells"][0]["key"] == {
        "variant": "plain",
        "rate": 4,
        "length": 72,
        "position": "end",
        "context": "whole",
    }
    assert data["cells"][0]["right"]["n"] == 2
    assert data["notes"]
