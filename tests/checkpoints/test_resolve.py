"""Names of models and bases → folders, and tokenizers."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_helpers import one_sentence, start
from rcc import checkpoints
from rcc.checkpoints import resolve
from rcc.errors import ModelError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "weights" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


def test_resolve_a_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoints.resolve_model(model) == checkpoints.resolve_model(str(model)) == model
    assert checkpoints.resolve_base(f"{model}/") == model
    monkeypatch.chdir(model.parents[1])
    assert checkpoints.resolve_model("weights/mine") == Path("weights/mine")
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
    assert messages[6].startswith(f"'nobody/nothing' is neither a known base ({', '.join(checkpoints.BASES)})")


# ---------------------------------------------------------------- tokenizer
def test_no_tokenizer(model: Path) -> None:
    with pytest.raises(ModelError) as caught:
        checkpoints.load_tokenizer(model)
    assert str(caught.value) == f"{model} has no tokenizer: tokenizer.json is missing."
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        checkpoints.load_tokenizer(model)
    assert one_sentence(str(caught.value))


def test_a_tokenizer_without_weights(default_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that has no weights gives its tokenizer; of a hub id everything but the weights is fetched for it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    for file in default_base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    words = checkpoints.load_tokenizer(default_base)("Hello there")["input_ids"]
    for name in (folder, "some/model"):
        assert checkpoints.load_tokenizer(name)("Hello there")["input_ids"] == words
    assert len(asked) == 1
    assert "*.json" in asked[0]
    assert "*.safetensors" not in asked[0]
    with pytest.raises(ModelError, match=r"no \*.safetensors"):
        checkpoints.resolve_base(folder)
