"""The command line as a user meets it: real processes, real terminals, the real default model.

Bad input runs inside this process, through `main` as the shell would call it, because starting Python and torch
anew costs seconds each time; nothing of the model is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import LIMIT, RCC, Result, Terminal, environment, process
from conftest import make_home
from rcc import CompressedContext, Engine, RCCForCausalLM, checkpoints, load_tokenizer
from rcc.runtime import precision

BOOK = Path(__file__).resolve().parents[2] / "examples" / "simple-susan.txt"
MODEL = "rcc-smollm2-135m"
VERBS = ("compress", "ask", "chat", "reconstruct", "inspect", "train", "models", "convert-checkpoint")


# ---------------------------------------------------------------- what it works on
@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own: the base is there already, contexts are not."""
    folder = make_home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 600 words of the example."""
    words = re.findall(r"\S+\s+", BOOK.read_text(encoding="utf-8"))[:600]
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text("".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compressed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("context") / "short.rcc"
    return path, process("compress", text, "-o", path)


@pytest.fixture
def context(compressed: tuple[Path, Result]) -> Path:
    return compressed[0]


@pytest.fixture(scope="module")
def length(text: Path) -> int:
    """Tokens of the text."""
    return len(load_tokenizer(MODEL)(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])


def info(call: Callable[..., Result], path: Path) -> dict[str, Any]:
    return json.loads(call("inspect", path, "--json").ok().out)


# ---------------------------------------------------------------- the main path
def test_compress(compressed: tuple[Path, Result], length: int) -> None:
    path, result = compressed
    assert result.ok().out == ""
    size = f"{length:,} tokens at 4× in {-(-length // 4):,} positions"
    assert re.fullmatch(rf"{re.escape(f'{path}: {size}')}, [0-9.]+ MB\n", result.err)  # and no progress in a pipe
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("cpu", "onednn", "avx512", "avx512_bf16", "wanted"),
    [
        ("AVX2", False, False, False, False),
        ("AVX-512 without bfloat16: oneDNN emulates it", True, True, False, False),
        ("AVX-512 with it", True, True, True, True),
        ("ARM with it", True, False, False, True),
    ],
)
def test_bfloat16_counts_where_it_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, cpu: str, onednn: bool, avx512: bool, avx512_bf16: bool, wanted: bool
) -> None:
    """What torch says of each kind of CPU."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert precision.has_bfloat16() is wanted, cpu


@pytest.mark.parametrize(("hardware", "wanted"), [(False, torch.float32), (True, torch.bfloat16)])
def test_precision_follows_the_cpu(
    call: Callable[..., Result],
    text: Path,
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
    short.write_text(text.read_text(encoding="utf-8")[:300], encoding="utf-8")
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


def test_inspect(call: Callable[..., Result], context: Path, length: int) -> None:
    found = info(call, context)
    assert {"source_tokens", "rate", "positions", "bytes", "model", "fingerprint"} <= set(found)
    assert (found["source_tokens"], found["rate"], found["positions"]) == (length, 4, -(-length // 4))
    assert found["model"] == MODEL
    assert re.fullmatch("[0-9a-f]{64}", found["fingerprint"])
    assert 0.99 < found["bytes"] / context.stat().st_size <= 1
    told = call("inspect", context).ok()
    assert re.search(rf"^source tokens +{length:,}$", told.out, re.M)
    assert told.err == ""


def test_ask_in_a_pipe(context: Path) -> None:
    """The answer and nothing else; it arrives as it is written."""
    asked = subprocess.Popen(
        [*RCC, "ask", context, "What happens in the story?"],
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


def test_ask_in_json(call: Callable[..., Result], context: Path) -> None:
    questions = ["Who is the father?", "Where is the village?"]
    plain = call("ask", context, *questions).ok()
    found = json.loads(call("ask", context, *questions, "--json").ok().out)
    assert found["model"] == MODEL
    assert found["fingerprint"] == info(call, context)["fingerprint"]
    assert [row["question"] for row in found["answers"]] == questions
    # what is streamed is the answer
    assert plain.out == "".join(f"{row['question']}\n{row['answer']}\n" for row in found["answers"])
    assert all(row["answer"] and row["mode"] == "human" for row in found["answers"])


def test_ask_in_other_modes(call: Callable[..., Result], context: Path) -> None:
    for mode in ("reconstruct", "compress"):
        question = "Who is the father?"
        (row,) = json.loads(call("ask", context, question, "--mode", mode, "--json").ok().out)["answers"]
        assert row["mode"] == mode
        assert ("reconstructed_question" in row) == (mode == "reconstruct")
        assert call("ask", context, question, "--mode", mode).ok().out == row["answer"] + "\n"


def test_max_new_tokens(call: Callable[..., Result], context: Path) -> None:
    answer = call("ask", context, "Describe the village.", "--max-new-tokens", "3").ok().out
    assert len(load_tokenizer(MODEL)(answer.strip())["input_ids"]) <= 3


def test_standard_input_append_and_force(
    call: Callable[..., Result], text: Path, context: Path, tmp_path: Path, length: int
) -> None:
    eight, both = tmp_path / "eight.rcc", tmp_path / "both.rcc"
    process("compress", "-", "-o", eight, "--rate", "8", stdin=text.read_bytes()).ok()
    assert (info(call, eight)["rate"], info(call, eight)["positions"]) == (8, -(-length // 8))
    before = context.read_bytes()
    call("compress", "-", "-o", both, "--context", context, "--rate", "8", stdin=b"And then they all went home.").ok()
    found = info(call, both)
    assert context.read_bytes() == before
    assert found["rate"] == [4, 8]
    assert [piece["rate"] for piece in found["pieces"]] == [4, 8]
    assert found["pieces"][0]["tokens"] == length
    assert found["positions"] == sum(piece["positions"] for piece in found["pieces"])
    assert "at 4/8×" in call("compress", text, "-o", both, "--context", eight, "--rate", "4", "--force").ok().err
    # two sources are two segments; what is read is not written to
    call("compress", text, text, "-o", eight, "--context", eight, "--rate", "8", "--force").refused("one of the inputs")
    grown = tmp_path / "grown.rcc"
    result = call("compress", text, text, "-o", grown, "--context", eight, "--rate", "8").ok()
    assert f"{3 * length:,} tokens at 8×" in result.err
    assert len(info(call, grown)["pieces"]) == 3


def test_links_are_written_through(call: Callable[..., Result], text: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real.rcc", tmp_path / "link.rcc"
    link.symlink_to(real)
    call("compress", text, "-o", link).ok()
    assert link.is_symlink()
    call("compress", text, "-o", link).refused("exists")
    assert info(call, real)["rate"] == 4


def test_automatic_rate(call: Callable[..., Result], context: Path, tmp_path: Path, length: int) -> None:
    """4× where it fits, 8× where only that does; the numbers and what to do where nothing does."""
    from rcc.context.cache import SPARE

    config = RCCForCausalLM.from_pretrained(MODEL)
    room = config.window - SPARE
    held = -(-length // 4)
    assert config.fitting_rate([4 * room]) == 4
    assert config.fitting_rate([4 * room + 1]) == 8
    assert config.fitting_rate([4 * (room - held) + 1], config.compress(torch.ones(1, length, dtype=torch.long))) == 8
    long = tmp_path / "long.txt"
    long.write_text("word " * (16 * room + 50))
    said = call("compress", long, "-o", tmp_path / "long.rcc").refused("tokens do not fit", f"{16 * room:,}")
    assert re.search(r"highest trained rate, 16, they take [0-9,]+ positions", said)
    assert "give at most" in said
    # the same at a rate that is named
    call("compress", long, "-o", tmp_path / "long.rcc", "--rate", "4").refused("window", "higher rate or less text")
    call("ask", long, "Who?").refused("tokens do not fit")
    assert not (tmp_path / "long.rcc").exists()


def test_untrained_rate_warns(text: Path, tmp_path: Path) -> None:
    done = process("compress", text, "-o", tmp_path / "two.rcc", "--rate", "2").ok()
    warning, summary = done.err.splitlines()
    assert warning == f"rcc: {MODEL} was not trained at rate 2, only at 4, 8, 16: expect little of it."
    assert "at 2×" in summary


# ---------------------------------------------------------------- a text instead of a context
def test_ask_a_text(call: Callable[..., Result], text: Path, home: Path, tmp_path: Path) -> None:
    question = "Who is the father?"
    first = process("ask", text, question).ok()
    (kept,) = (home / "contexts").iterdir()
    assert first.err.startswith(f"kept as {kept}: ")
    again = call("ask", text, question).ok()
    assert again.err.startswith(f"read {kept}: ")
    assert again.out == first.out
    # by content, wherever it comes from
    assert call("ask", "-", question, stdin=text.read_bytes()).ok().err == again.err
    other = call("ask", text, question, "--rate", "8").ok()
    assert "at 8×" in other.err
    assert len(list((home / "contexts").iterdir())) == 2
    # a damaged one is made again
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    repaired = call("ask", text, question).ok()
    assert repaired.err.startswith(f"kept as {kept}: ")
    assert repaired.out == first.out
    assert info(call, kept)["rate"] == 4


def test_ask_a_text_where_nothing_can_be_kept(
    call: Callable[..., Result], text: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "home"
    other.mkdir()
    (other / "bases").symlink_to(home / "bases")
    (other / "contexts").write_text("a file")
    monkeypatch.setenv("RCC_HOME", str(other))
    done = call("ask", text, "Who is the father?").ok()
    assert done.err.startswith("not kept for the next time: ")
    assert done.out.strip()


# ---------------------------------------------------------------- chat
def test_chat_in_a_pipe(context: Path) -> None:
    done = process("chat", context, stdin=b"Who is the father?\nWhere?\n\nNot asked any more\n").ok()
    assert len(done.out.splitlines()) == 2
    assert all(line.strip() for line in done.out.splitlines())
    assert done.err == ""


def test_chat_on_a_terminal(context: Path) -> None:
    chat = Terminal("chat", context, "--max-new-tokens", "8000")
    chat.wait_for("> ")
    chat.type("Who is the father?" + " And who is the mother?" * 40 + "\r")
    chat.wait_for("rcc: [^\n]*window of 8,192")
    chat.wait_for(r"window(.|\n)*> ")  # one question too long is not the end
    chat.type("\x04")
    assert chat.end() == 0
    assert "Traceback" not in chat.screen


def test_chat_answers_on_a_terminal(context: Path) -> None:
    chat = Terminal("chat", context, "--max-new-tokens", "40")
    chat.wait_for("> ")
    chat.type("Who is the father?\r")
    chat.wait_for(r"\?\r?\n(.|\n)*\n\r?> ")  # whatever it answers
    # Python misses a Ctrl-C that falls between a prompt and the moment at which readline begins to wait behind it
    assert chat.end("\x03") == 130
    assert "rcc: interrupted." in chat.screen
    assert "Traceback" not in chat.screen


def test_chat_bad_input(call: Callable[..., Result], context: Path) -> None:
    call("chat", "-", stdin=b"Who?\n").refused("name a file")
    call("chat", context, stdin=b"Gr\xfc\xdfe?\n").refused("UTF-8")


# ---------------------------------------------------------------- reconstruct
def test_reconstruct(call: Callable[..., Result], context: Path, text: Path) -> None:
    written = call("reconstruct", context, "--tokens", "20").ok()
    assert written.out.startswith("SIMPLE SUSAN")  # the first ten tokens of the text are the prompt
    assert written.err == ""
    found = json.loads(call("reconstruct", context, "--tokens", "20", "--json").ok().out)
    assert (found["prompt"] + found["text"]).strip() == written.out.strip()
    prompt = "In a retired hamlet on the borders of Wales,"
    assert prompt in text.read_text(encoding="utf-8")
    assert call("reconstruct", context, "--tokens", "5", "--prompt", prompt).ok().out.startswith(prompt)


def test_reconstruct_against_the_text(call: Callable[..., Result], context: Path, text: Path, length: int) -> None:
    done = call("reconstruct", context, "--against", text, "--tokens", "30").ok()
    assert done.err == ""
    assert "SIMPLE SUSAN" in done.out
    assert re.search(r"^written freely: [0-9.]+% of 30 tokens", done.out, re.M)
    (share,) = re.findall(r"^whole text: ([0-9.]+)% of [0-9,]+ tokens recovered", done.out, re.M)
    found = json.loads(call("reconstruct", context, "--against", text, "--tokens", "30", "--json").ok().out)
    assert found["same_text"] is True
    assert found["source_tokens"] == length
    assert found["tokens_recovered"] == pytest.approx(float(share) / 100, abs=6e-4)
    assert found["tokens_recovered"] > 0.6
    # what was written and the text's own words can be read off the marks
    marked = done.out.split("written freely")[0]
    truth = re.sub(r" ?\{\+(.*?)\+\}", r" \1", re.sub(r" ?\[-.*?-\]", "", marked, flags=re.S), flags=re.S)
    assert " ".join(text.read_text(encoding="utf-8").split()).startswith(" ".join(truth.split()))


def test_reconstruct_against_another_text(call: Callable[..., Result], context: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("It was the best of times, it was the worst of times, it was the age of wisdom. " * 3)
    done = call("reconstruct", context, "--against", other, "--tokens", "5").ok()
    assert "not the text that was compressed" in done.err
    assert "does not occur" in done.err
    found = json.loads(call("reconstruct", context, "--against", other, "--tokens", "5", "--json").ok().out)
    assert found["same_text"] is False
    other.write_text("too short")
    short = call("reconstruct", context, "--against", other, "--tokens", "1")
    assert short.code == 2
    assert short.err.endswith("rcc: the text has 2 tokens: at least 11 are needed to measure recovery.\n")


# ---------------------------------------------------------------- terminals, pipes and signals
def test_progress_on_a_terminal(text: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(text.read_text(encoding="utf-8") * 12, encoding="utf-8")  # more than one batch
    terminal = Terminal("compress", long, "-o", tmp_path / "x.rcc")
    assert terminal.end() == 0
    assert "loading the model" in terminal.text
    assert "compressing" in terminal.text
    assert re.search(r"[1-9][0-9,.]* tokens/s, [0-9]+:[0-9]{2}:[0-9]{2} left", terminal.text)
    assert re.search(r"x\.rcc: [0-9,]+ tokens at 4× in [0-9,]+ positions", terminal.text)


def test_forced_colours_are_no_terminal(text: Path, tmp_path: Path) -> None:
    done = process("compress", text, "-o", tmp_path / "x.rcc", FORCE_COLOR="1").ok()
    assert "compressing" not in done.err
    assert len(done.err.splitlines()) == 1


def test_interrupt_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal("compress", BOOK, "-o", tmp_path / "x.rcc")
    terminal.wait_for("compressing")
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "rcc: interrupted." in terminal.text
    assert "Traceback" not in terminal.screen
    assert terminal.screen.rstrip().endswith("rcc: interrupted.")
    assert "\x1b[?25h" in terminal.screen  # the cursor is back
    assert list(tmp_path.iterdir()) == []


SLOW_DISK = "import os, time; os.fsync = lambda fd: time.sleep(600); from rcc.cli.app import main; main()"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_signal_while_writing(text: Path, tmp_path: Path, name: str, code: int) -> None:
    """The moment that matters: all is written but the rename. The old file stays, whole."""
    old = tmp_path / "x.rcc"
    old.write_text("the old one")
    command = [sys.executable, "-c", SLOW_DISK, "compress", text, "-o", old, "--force"]
    running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + LIMIT
    while not any(p.stat().st_size > 1e6 for p in tmp_path.glob(".*.tmp")):
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    running.send_signal(getattr(signal, name))
    out, err = running.communicate(timeout=LIMIT)
    assert running.returncode == code
    assert (out, b"Traceback" in err) == (b"", False)
    assert old.read_text() == "the old one"
    left = [p.name for p in tmp_path.iterdir() if p != old]
    assert left == [] or name == "SIGKILL"  # nobody can clean up after that one


def test_reader_that_goes_away(context: Path) -> None:
    command = (
        f"{' '.join(RCC)} ask {context} 'Describe the village.' 'Who?' 'Where?' | head -1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=LIMIT, env=environment(), text=True)
    assert done.stdout == "Describe the village.\n141\n"
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*RCC, "models"], stdout=full, stderr=subprocess.PIPE, env=environment(), text=True)
    assert (done.returncode, done.stderr) == (2, "rcc: No space left on device.\n")


def test_poor_terminals() -> None:
    done = process("models", PYTHONIOENCODING="ascii").ok()
    assert "4?, 8?" in done.out
    closed = subprocess.run(["bash", "-c", f"{' '.join(RCC)} models >&- 2>&- <&-"], env=environment())
    assert closed.returncode == 0


# ---------------------------------------------------------------- quick commands
def test_quick_commands_do_not_import_torch(context: Path, text: Path) -> None:
    check = """
import sys
from rcc.cli.app import main
try:
    main()
finally:
    assert "torch" not in sys.modules and "transformers" not in sys.modules, "imported"
"""
    seen = {}
    for args in (["--version"], ["models"], ["--help"], ["compress", "--help"], ["compress", "nothing", "-o", "x.rcc"]):
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


def test_models(call: Callable[..., Result], home: Path) -> None:
    rows = {row["name"]: row for row in json.loads(call("models", "--json").ok().out)}
    most = {name: max(row["rates"]) for name, row in rows.items()}
    assert most == {MODEL: 16, f"{MODEL}-passkey": 512, "rcc-qwen2.5-0.5b": 16}
    assert rows[MODEL]["rates"] == [4, 8, 16]
    told = call("models").ok().out
    for name, row in rows.items():
        assert row["base_ready"] is (row["base"] == "smollm2-135m-instruct")  # the one in this home
        assert Path(row["folder"]).is_dir()
        assert not row["base_ready"] or row["base_folder"].startswith(str(home))
        assert name in told
        assert row["folder"] in told


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["does not exist"]),
        (b"", ["is empty"]),
        (b" \n\t \r\n", ["is empty"]),
        (b"\x7fELF\x02\0\0\0abc", ["binary"]),
        ("Grüße aus Köln".encode("latin-1"), ["not UTF-8", "0xfc at position 2"]),
        ("hello".encode("utf-16"), ["binary"]),
    ],
    ids=["missing", "empty", "blank", "binary", "latin-1", "utf-16"],
)
def test_bad_text(
    call: Callable[..., Result], tmp_path: Path, folder: Path, home: Path, content: bytes | None, words: list[str]
) -> None:
    source = tmp_path / "source.txt"
    if content is not None:
        source.write_bytes(content)
        call("compress", "-", "-o", folder / "x.rcc", stdin=content).refused("standard input", *words)
    call("compress", source, "-o", folder / "x.rcc").refused("source.txt", *words)
    call("ask", source, "Who?").refused("source.txt", *words)
    call("reconstruct", "none.rcc", "--against", source).refused("source.txt", *words)


def test_a_folder_is_no_text(call: Callable[..., Result], tmp_path: Path, folder: Path) -> None:
    call("compress", tmp_path, "-o", folder / "x.rcc").refused("is a folder")
    call("ask", tmp_path, "Who?").refused("is a folder")


def test_bad_output(call: Callable[..., Result], text: Path, tmp_path: Path, folder: Path) -> None:
    """Refused before any work."""
    old = tmp_path / "old.rcc"
    old.write_text("old")
    call("compress", text, "-o", old).refused("exists", "--force")
    assert old.read_text() == "old"
    call("compress", text, "-o", folder).refused("is a folder")
    call("compress", text, "-o", folder / "none" / "x.rcc").refused("does not exist")
    call("compress", text, "-o", old / "x.rcc").refused("is not a folder")
    call("compress", text, "-o", tmp_path / ("x" * 250)).ok()
    call("compress", text, "-o", folder / ("x" * 300)).refused("cannot be written")
    call("compress", text, "-o", "/dev/null").refused("not a regular file")
    call("compress", text, "-o", "/proc/x.rcc").refused("cannot be written")
    if os.geteuid():  # root may write anywhere
        folder.chmod(0o500)
        call("compress", text, "-o", folder / "x.rcc").refused("cannot be written", "ermission")


def test_file_size_limit(call: Callable[..., Result], text: Path, folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        result = call("compress", text, "-o", folder / "x.rcc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    result.refused("cannot be written", "File too large")


def test_full_disk(call: Callable[..., Result], text: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted; the limit on file size is tested above")
    try:
        call("compress", text, "-o", small / "x.rcc").refused("cannot be written", "No space left")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("rate", ["0", "-4", "1.5", "abc", "²", "9" * 5000, ""])
def test_bad_rate(call: Callable[..., Result], text: Path, folder: Path, rate: str) -> None:
    call("compress", text, "-o", folder / "x.rcc", "--rate", rate).refused("is not a rate")


def test_rate_that_does_not_divide(call: Callable[..., Result], text: Path, context: Path, folder: Path) -> None:
    call("compress", text, "-o", folder / "x.rcc", "--rate", "3").refused("256", "1, 2, 4, 8, 16, 32, 64, 128, 256")
    call("ask", context, "Who?", "--rate", "8").refused("compressed already")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--device", "abacus", ["device abacus is unknown", "cpu"]),
        ("--device", "meta", ["device meta cannot be used here"]),
        ("--device", "cuda:99", ["device cuda:99 cannot be used here"]),
        ("--dtype", "int8", ["dtype int8 is unknown", "bfloat16"]),
        ("--dtype", "nn", ["dtype nn is unknown"]),
        ("--model", "", ["neither a shipped model"]),
        ("--model", "./nothing-here", ["neither a shipped model", "nor a folder"]),
        ("--model", "nobody/nothing", ["nor could it be fetched"]),
    ],
)
def test_bad_option(
    call: Callable[..., Result], text: Path, folder: Path, option: str, value: str, words: list[str]
) -> None:
    call("compress", text, "-o", folder / "x.rcc", option, value).refused(*words)


def test_bad_usage(call: Callable[..., Result], text: Path, context: Path, folder: Path) -> None:
    call("compress", text).refused("--output", "rcc compress --help")
    call("compress", "-o", folder / "x.rcc").refused("sources")
    call("compres").refused("compres")
    call("ask", context).refused("questions")
    call("ask", context, "Who?", "--colour").refused("--colour")
    call("ask", context, "Who?", "--max-new-tokens", "0").refused("--max-new-tokens")
    call("ask", context, "Who?", "--mode", "shout").refused("'shout' is unknown", "human, reconstruct, compress")
    call("ask", context, " ").refused("the question is empty")
    nothing = call()
    assert (nothing.code, "Traceback" in nothing.err) == (2, False)
    assert "compress" in nothing.err  # the help


def test_bad_question(call: Callable[..., Result], context: Path) -> None:
    call("ask", context, "word " * 9000).refused("window of 8,192")
    call("ask", context, "Who?", "--max-new-tokens", "9000").refused("window of 8,192")
    call("ask", context, "Gr\udcfc\udcdfe?").refused("UTF-8")  # how Python passes on an argument in Latin-1
    call("reconstruct", context, "--prompt", "").refused("prompt is empty")


def test_bad_model_folder(call: Callable[..., Result], text: Path, folder: Path, tmp_path: Path) -> None:
    mine, shipped = tmp_path / "mine", checkpoints.shipped_models()[MODEL]
    mine.mkdir()
    call("compress", text, "-o", folder / "x.rcc", "--model", mine).refused("no config.json")
    shutil.copy(shipped / "config.json", mine)
    call("compress", text, "-o", folder / "x.rcc", "--model", mine).refused("no *.safetensors")
    weights = bytearray((shipped / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (mine / "model.safetensors").write_bytes(weights)
    call("compress", text, "-o", folder / "x.rcc", "--model", mine).refused("SHA-256")
    (mine / "config.json").write_text('{"model_type": "gpt2"}')
    call("compress", text, "-o", folder / "x.rcc", "--model", mine).refused("is not an RCC model")
    call("compress", text, "-o", folder / "x.rcc", "--model", mine / "config.json").refused("is a file")


def test_context_of_another_model(call: Callable[..., Result], text: Path, context: Path, tmp_path: Path) -> None:
    model = RCCForCausalLM.from_pretrained(MODEL)
    with torch.no_grad():
        next(iter(model.projections.parameters())).mul_(1.01)
    model.save_pretrained(tmp_path / "mine")
    other = tmp_path / "other.rcc"
    model.compress(torch.arange(1, 200)[None]).save(other)
    call("ask", other, "Who?").refused("made by another model")
    call("reconstruct", other).refused("made by another model")
    call("compress", text, "-o", tmp_path / "x.rcc", "--context", other).refused("made by another model")
    call("ask", context, "Who?", "--model", tmp_path / "mine").refused("made by another model")
    assert call("ask", other, "Who?", "--model", tmp_path / "mine").ok().err == ""
    assert not (tmp_path / "x.rcc").exists()
    # one that does not come with rcc has to be named
    model.config.name = "mine"
    model.compress(torch.arange(1, 200)[None]).save(other)
    call("ask", other, "Who?").refused("made by mine", "as the model")


def test_bad_context(call: Callable[..., Result], text: Path, context: Path, tmp_path: Path, folder: Path) -> None:
    bad = tmp_path / "bad.rcc"
    for verb in (["ask", bad, "Who?"], ["inspect", bad], ["reconstruct", bad]):
        bad.unlink(missing_ok=True)
        call(*verb).refused("bad.rcc", "No such file")
        bad.touch()
        call(*verb).refused("bad.rcc", "is empty")
        for size in (5, 3000, context.stat().st_size // 2, context.stat().st_size - 1):
            bad.write_bytes(context.read_bytes()[:size])
            call(*verb).refused("bad.rcc", "damaged")
    call("inspect", text).refused("damaged or not an rcc context")
    call("compress", text, "-o", folder / "x.rcc", "--context", bad).refused("damaged")
    # without the name's help too
    cut = tmp_path / "cut"
    cut.write_bytes(context.read_bytes()[:3000])
    call("ask", cut, "Who?").refused("damaged")


def test_context_of_a_newer_format(call: Callable[..., Result], context: Path, tmp_path: Path) -> None:
    newer, data = tmp_path / "newer.rcc", context.read_bytes()
    data = data.replace(b'"version":"1"', b'"version":"2"', 1)
    (old,) = re.findall(rb'"sha256":"([0-9a-f]{64})"', data[:3000])
    blank = data.replace(old, b"0" * 64, 1)
    newer.write_bytes(blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1))
    for verb in (["ask", newer, "Who?"], ["inspect", newer]):
        call(*verb).refused("format version 2", "update rcc")


def flips(data: bytes) -> Sequence[int]:
    """Places in the length, the header (format, digest, manifest, shapes) and all over the tensors."""
    size = 8 + int.from_bytes(data[:8], "little")
    named = [
        data.index(word) + len(word) + 2 for word in (b'"format"', b'"sha256"', b"fingerprint", b"keys.0", b"shape")
    ]
    spread = [size + i * (len(data) - size - 1) // 7 for i in range(8)]
    return [0, 3, 7, 8, *named, size // 2, size - 1, *spread, len(data) - 2]


def test_one_byte_changed(call: Callable[..., Result], context: Path, tmp_path: Path) -> None:
    whole, changed = context.read_bytes(), tmp_path / "changed.rcc"
    places = flips(whole)
    assert len(places) >= 20
    for i, place in enumerate(places):
        changed.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << i % 8)]) + whole[place + 1 :])
        call("ask", changed, "Who?").refused("changed.rcc" if place > 8 else "")
    done = process("ask", changed, "Who?")
    done.refused("changed.rcc", "damaged")


def test_out_of_memory(call: Callable[..., Result], text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error of an allocation that no machine can serve."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1 << 60, dtype=torch.uint8)

    def huge(*args: Any, **kwargs: Any) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(Engine, "compress", huge)
    call("compress", text, "-o", folder / "x.rcc").refused("out of memory", "--rate")
