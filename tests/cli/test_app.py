"""The command line's verbs as a user meets them: real processes and the real small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import LIMIT, RCC, Result, environment, process
from conftest import Call
from rcc import CompressedContext, RCCForCausalLM, load_tokenizer
from rcc.runtime import precision
from short_text import MODEL, info

pytestmark = pytest.mark.usefixtures("cli_home")


VERBS = ("compress", "ask", "chat", "reconstruct", "inspect", "train", "models", "convert-checkpoint")


def test_compress(compressed_text: tuple[Path, Result], text_length: int) -> None:
    path, result = compressed_text
    assert result.ok().out == ""
    size = f"{text_length:,} tokens at 4× in {-(-text_length // 4):,} positions"
    assert re.fullmatch(rf"{re.escape(f'{path}: {size}')}, [0-9.]+ MB\n", result.err)  # and no progress in a pipe
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("hardware", "wanted"), [(False, torch.float32), (True, torch.bfloat16)])
def test_precision_follows_the_cpu(
    call: Call,
    short_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hardware: bool,
    wanted: torch.dtype,
) -> None:
    """What it computes in; the file stays as the model is stored, and what is asked for is done."""
    used, compress = [], RCCForCausalLM.compress

    def noted(model: RCCForCausalLM, *args: Any, **kwargs: Any) -> Any:
        used.append(model.dtype)
        return compress(model, *args, **kwargs)

    monkeypatch.setattr(precision, "has_bfloat16", lambda: hardware)
    monkeypatch.setattr(RCCForCausalLM, "compress", noted)
    short = tmp_path / "short.txt"
    short.write_text(short_text.read_text(encoding="utf-8")[:300], encoding="utf-8")
    for more, computed, stored in (
        ((), wanted, torch.bfloat16),
        (("--context", tmp_path / "0.rcc"), wanted, torch.bfloat16),
        (("--dtype", "bfloat16"), torch.bfloat16, torch.bfloat16),
        (("--dtype", "float32"), torch.float32, torch.float32),
    ):
        path = tmp_path / f"{len(used)}.rcc"
        call("compress", short, "-o", path, *more).ok()
        assert used[-1] == computed
        assert CompressedContext.load(path).dtype == stored
    assert call("ask", tmp_path / "1.rcc", "Who?", "--max-new-tokens", "2").ok().err == ""


def test_inspect(call: Call, compressed_file: Path, text_length: int) -> None:
    described = info(call, compressed_file)
    assert {"source_tokens", "rate", "positions", "bytes", "model", "fingerprint"} <= set(described)
    assert (described["source_tokens"], described["rate"], described["positions"]) == (
        text_length,
        4,
        -(-text_length // 4),
    )
    assert described["model"] == MODEL
    assert re.fullmatch("[0-9a-f]{64}", described["fingerprint"])
    assert 0.99 < described["bytes"] / compressed_file.stat().st_size <= 1
    told = call("inspect", compressed_file).ok()
    assert re.search(rf"^source tokens +{text_length:,}$", told.out, re.M)
    assert told.err == ""


def test_ask_in_a_pipe(compressed_file: Path) -> None:
    """The answer and nothing else; it arrives as it is written."""
    asked = subprocess.Popen(
        [*RCC, "ask", compressed_file, "What happens in the story?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        bufsize=0,
    )
    assert asked.stdout is not None
    assert asked.stderr is not None
    pieces = []
    while data := os.read(asked.stdout.fileno(), 1024):
        pieces.append(data.decode())
        if len(pieces) == 1:
            assert asked.poll() is None  # still writing
    assert asked.wait(LIMIT) == 0
    answer = "".join(pieces)
    assert len(pieces) > 3
    assert answer.count("\n") == 1
    assert answer.endswith("\n")
    assert len(answer.split()) > 3
    assert "<|im" not in answer
    assert asked.stderr.read() == b""


def test_ask_in_json(call: Call, compressed_file: Path) -> None:
    questions = ["Who is the father?", "Where is the village?"]
    plain = call("ask", compressed_file, *questions).ok()
    answers = json.loads(call("ask", compressed_file, *questions, "--json").ok().out)
    assert answers["model"] == MODEL
    assert answers["fingerprint"] == info(call, compressed_file)["fingerprint"]
    assert [row["question"] for row in answers["answers"]] == questions
    # what is streamed is the answer
    assert plain.out == "".join(f"{row['question']}\n{row['answer']}\n" for row in answers["answers"])
    assert all(row["answer"] and row["mode"] == "human" for row in answers["answers"])


def test_ask_in_other_modes(call: Call, compressed_file: Path) -> None:
    for mode in ("reconstruct", "compress"):
        question = "Who is the father?"
        (row,) = json.loads(call("ask", compressed_file, question, "--mode", mode, "--json").ok().out)["answers"]
        assert row["mode"] == mode
        assert ("reconstructed_question" in row) == (mode == "reconstruct")
        assert call("ask", compressed_file, question, "--mode", mode).ok().out == row["answer"] + "\n"


def test_max_new_tokens(call: Call, compressed_file: Path) -> None:
    answer = call("ask", compressed_file, "Describe the village.", "--max-new-tokens", "3").ok().out
    assert len(load_tokenizer(MODEL)(answer.strip())["input_ids"]) <= 3


def test_standard_input_append_and_force(
    call: Call, short_text: Path, compressed_file: Path, tmp_path: Path, text_length: int
) -> None:
    eight, both = tmp_path / "eight.rcc", tmp_path / "both.rcc"
    process("compress", "-", "-o", eight, "--rate", "8", stdin=short_text.read_bytes()).ok()
    assert (info(call, eight)["rate"], info(call, eight)["positions"]) == (8, -(-text_length // 8))
    before = compressed_file.read_bytes()
    call(
        "compress", "-", "-o", both, "--context", compressed_file, "--rate", "8", stdin=b"And then they all went home."
    ).ok()
    described = info(call, both)
    assert compressed_file.read_bytes() == before
    assert described["rate"] == [4, 8]
    assert [piece["rate"] for piece in described["pieces"]] == [4, 8]
    assert described["pieces"][0]["tokens"] == text_length
    assert described["positions"] == sum(piece["positions"] for piece in described["pieces"])
    assert "at 4×/8×" in call("compress", short_text, "-o", both, "--context", eight, "--rate", "4", "--force").ok().err
    # two sources are two segments; what is read is not written to
    call("compress", short_text, short_text, "-o", eight, "--context", eight, "--rate", "8", "--force").refused(
        "one of the inputs"
    )
    grown = tmp_path / "grown.rcc"
    result = call("compress", short_text, short_text, "-o", grown, "--context", eight, "--rate", "8").ok()
    assert f"{3 * text_length:,} tokens at 8×" in result.err
    assert len(info(call, grown)["pieces"]) == 3


def test_links_are_written_through(call: Call, short_text: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real.rcc", tmp_path / "link.rcc"
    link.symlink_to(real)
    call("compress", short_text, "-o", link).ok()
    assert link.is_symlink()
    call("compress", short_text, "-o", link).refused("exists")
    assert info(call, real)["rate"] == 4


def test_automatic_rate(call: Call, compressed_file: Path, tmp_path: Path, text_length: int) -> None:
    """4× where it fits, 8× where only that does; the numbers and what to do where nothing does."""
    from rcc.context.cache import SPARE

    config = RCCForCausalLM.from_pretrained(MODEL)
    room = config.window - SPARE
    held = -(-text_length // 4)
    assert config.fitting_rate([4 * room]) == 4
    assert config.fitting_rate([4 * room + 1]) == 8
    assert (
        config.fitting_rate([4 * (room - held) + 1], config.compress(torch.ones(1, text_length, dtype=torch.long))) == 8
    )
    long = tmp_path / "long.txt"
    long.write_text("word " * (16 * room + 50))
    said = call("compress", long, "-o", tmp_path / "long.rcc").refused("tokens do not fit", f"{16 * room:,}")
    assert re.search(r"highest trained rate, 16, they take [0-9,]+ positions", said)
    assert "give at most" in said
    # the same at a rate that is named
    call("compress", long, "-o", tmp_path / "long.rcc", "--rate", "4").refused("window", "higher rate or less text")
    call("ask", long, "Who?").refused("tokens do not fit")
    assert not (tmp_path / "long.rcc").exists()


def test_untrained_rate_warns(short_text: Path, tmp_path: Path) -> None:
    done = process("compress", short_text, "-o", tmp_path / "two.rcc", "--rate", "2").ok()
    warning, summary = done.err.splitlines()
    assert warning == f"rcc: {MODEL} was not trained at rate 2, only at 4, 8, 16: expect little of it."
    assert "at 2×" in summary


def test_ask_a_text(call: Call, short_text: Path, cli_home: Path, tmp_path: Path) -> None:
    question = "Who is the father?"
    first = process("ask", short_text, question).ok()
    (stored,) = (cli_home / "contexts").iterdir()
    assert first.err.startswith(f"kept as {stored}: ")
    again = call("ask", short_text, question).ok()
    assert again.err.startswith(f"read {stored}: ")
    assert again.out == first.out
    # by content, wherever it comes from
    assert call("ask", "-", question, stdin=short_text.read_bytes()).ok().err == again.err
    other = call("ask", short_text, question, "--rate", "8").ok()
    assert "at 8×" in other.err
    assert len(list((cli_home / "contexts").iterdir())) == 2
    # a damaged one is made again
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    repaired = call("ask", short_text, question).ok()
    assert repaired.err.startswith(f"kept as {stored}: ")
    assert repaired.out == first.out
    assert info(call, stored)["rate"] == 4


def test_ask_a_text_where_nothing_can_be_kept(
    call: Call, short_text: Path, cli_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "home"
    other.mkdir()
    (other / "bases").symlink_to(cli_home / "bases")
    (other / "contexts").write_text("a file")
    monkeypatch.setenv("RCC_HOME", str(other))
    done = call("ask", short_text, "Who is the father?").ok()
    assert done.err.startswith("not kept for the next time: ")
    assert done.out.strip()


def test_chat_in_a_pipe(compressed_file: Path) -> None:
    done = process("chat", compressed_file, stdin=b"Who is the father?\nWhere?\n\nNot asked any more\n").ok()
    assert len(done.out.splitlines()) == 2
    assert all(line.strip() for line in done.out.splitlines())
    assert done.err == ""


def test_chat_bad_input(call: Call, compressed_file: Path) -> None:
    call("chat", "-", stdin=b"Who?\n").refused("name a file")
    call("chat", compressed_file, stdin=b"Gr\xfc\xdfe?\n").refused("UTF-8")


def test_reconstruct(call: Call, compressed_file: Path, short_text: Path) -> None:
    written = call("reconstruct", compressed_file, "--tokens", "20").ok()
    assert written.out.startswith("SIMPLE SUSAN")  # the first ten tokens of the text are the prompt
    assert written.err == ""
    figures = json.loads(call("reconstruct", compressed_file, "--tokens", "20", "--json").ok().out)
    assert (figures["prompt"] + figures["text"]).strip() == written.out.strip()
    prompt = "In a retired hamlet on the borders of Wales,"
    assert prompt in short_text.read_text(encoding="utf-8")
    assert call("reconstruct", compressed_file, "--tokens", "5", "--prompt", prompt).ok().out.startswith(prompt)


def test_reconstruct_against_the_text(call: Call, compressed_file: Path, short_text: Path, text_length: int) -> None:
    done = call("reconstruct", compressed_file, "--against", short_text, "--tokens", "30").ok()
    assert done.err == ""
    assert "SIMPLE SUSAN" in done.out
    assert re.search(r"^written freely: [0-9.]+% of 30 tokens", done.out, re.M)
    (share,) = re.findall(r"^whole text: ([0-9.]+)% of [0-9,]+ tokens recovered", done.out, re.M)
    figures = json.loads(
        call("reconstruct", compressed_file, "--against", short_text, "--tokens", "30", "--json").ok().out
    )
    assert figures["same_text"] is True
    assert figures["source_tokens"] == text_length
    assert figures["tokens_recovered"] == pytest.approx(float(share) / 100, abs=6e-4)
    assert figures["tokens_recovered"] > 0.6
    # what was written and the text's own words can be read off the marks
    marked = done.out.split("written freely")[0]
    truth = re.sub(r" ?\{\+(.*?)\+\}", r" \1", re.sub(r" ?\[-.*?-\]", "", marked, flags=re.S), flags=re.S)
    assert " ".join(short_text.read_text(encoding="utf-8").split()).startswith(" ".join(truth.split()))


def test_reconstruct_against_another_text(call: Call, compressed_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 3)
    done = call("reconstruct", compressed_file, "--against", other, "--tokens", "5").ok()
    assert "not the text that was compressed" in done.err
    assert "does not occur" in done.err
    figures = json.loads(call("reconstruct", compressed_file, "--against", other, "--tokens", "5", "--json").ok().out)
    assert figures["same_text"] is False
    other.write_text("too short")
    short = call("reconstruct", compressed_file, "--against", other, "--tokens", "1")
    assert short.code == 2
    assert short.err.endswith("rcc: the text has 2 tokens: at least 11 are needed to measure recovery.\n")


def test_quick_commands_do_not_import_torch(compressed_file: Path, short_text: Path) -> None:
    check = """
import sys
from rcc.cli.app import main
try:
    main()
finally:
    assert "torch" not in sys.modules and "transformers" not in sys.modules, "imported"
"""
    seen = {}
    for args in (
        ["--version"],
        ["models"],
        ["--help"],
        ["compress", "--help"],
        ["compress", "nothing", "-o", "x.rcc"],
        ["ask", "x.rcc", "Who?", "--mode", "guess"],
        ["inspect", str(compressed_file)],
        ["contexts"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", check, *args], capture_output=True, text=True, env=environment(), timeout=LIMIT
        )
        assert "imported" not in done.stderr
        seen[args[0], args[-1]] = done
    import rcc

    assert seen["--version", "--version"].stdout == f"rcc {rcc.__version__}\n"
    assert "rcc ask book.rcc" in seen["--help", "--help"].stdout
    assert all(verb in seen["--help", "--help"].stdout for verb in VERBS)
    assert "--force" in seen["compress", "--help"].stdout
    assert seen["compress", "x.rcc"].returncode == 2
    assert seen["ask", "guess"].returncode == 2
    assert "mode" in seen["ask", "guess"].stderr


def test_models(call: Call, cli_home: Path) -> None:
    rows = {row["name"]: row for row in json.loads(call("models", "--json").ok().out)}
    most = {name: max(row["rates"]) for name, row in rows.items()}
    assert most == {MODEL: 16, f"{MODEL}-passkey": 512, "rcc-qwen2.5-0.5b": 16}
    assert rows[MODEL]["rates"] == [4, 8, 16]
    told = call("models").ok().out
    for name, row in rows.items():
        assert row["base_ready"] is (row["base"] == "smollm2-135m-instruct")  # the one in this home
        assert Path(row["folder"]).is_dir()
        assert not row["base_ready"] or row["base_folder"].startswith(str(cli_home))
        assert name in told
        assert row["folder"] in told
