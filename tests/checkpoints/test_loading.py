"""Folders from somebody else: what is loaded is what is hashed, and none of their code runs."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rcc
from conftest import MakeBackbone
from rcc import InputError, ModelError, RCCError, RCCForCausalLM, checkpoints

SOURCES = sorted(Path(rcc.__file__).parent.rglob("*.py"))
OUR_OWN = {"RCCForCausalLM", "Selection", "loading", "GenerationConfig"}


def loading_calls() -> list[tuple[str, ast.Call]]:
    """Every call of `from_pretrained` and `from_config` in the package that may reach transformers' Auto classes."""
    calls = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                if node.func.attr in ("from_pretrained", "from_config") and owner not in OUR_OWN:
                    calls.append((f"{file.name}:{node.lineno}", node))
    return calls


def test_no_call_of_the_package_lets_a_folder_run_code() -> None:
    calls = loading_calls()
    assert len(calls) >= 7
    for caller, call in calls:
        trusted = [word.value for word in call.keywords if word.arg == "trust_remote_code"]
        assert [getattr(value, "value", None) for value in trusted] == [False], caller


@pytest.fixture
def base(tmp_path: Path, backbone: MakeBackbone) -> Path:
    backbone("llama", window=4096).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize("known", [True, False])
def test_code_of_a_base_is_neither_run_nor_asked_about(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    asked = []
    monkeypatch.setattr(builtins, "input", lambda *said: asked.append(said) or "yes")
    (base / "conf.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\nC = M = T = object\n")
    auto_map = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "conf.M", "AutoModel": "conf.M"}
    edit(base / "config.json", auto_map=auto_map, **({} if known else {"model_type": "unheard-of"}))
    if known:
        RCCForCausalLM.from_base(base)
    else:
        with pytest.raises(ModelError):
            RCCForCausalLM.from_base(base)
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["conf.T", None]}})
    )
    with pytest.raises(ModelError):
        checkpoints.load_tokenizer(base)
    assert asked == []
    assert not (tmp_path / "RAN").exists()


def test_an_argument_that_trusts_code_is_refused_by_name(base: Path) -> None:
    with pytest.raises(InputError, match="trust_remote_code"):
        RCCForCausalLM.from_base(base, trust_remote_code=True)


def test_attention_that_is_code_of_the_hub_is_refused(base: Path) -> None:
    edit(base / "config.json", _attn_implementation="somebody/kernel", attn_implementation="somebody/kernel")
    with pytest.raises(ModelError, match="code"):
        RCCForCausalLM.from_base(base)


def other_weights(file: Path) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, 7.0) for name, tensor in load_file(file).items()}


def test_pickles_and_adapters_and_named_files_beside_the_weights_are_not_looked_at(base: Path, tmp_path: Path) -> None:
    """What is hashed, here a file of another name, is what is loaded."""
    expected = RCCForCausalLM.from_base(base).decoder.state_dict()
    torch.save(other_weights(base / "model.safetensors"), base / "pytorch_model.bin")
    save_file(other_weights(base / "model.safetensors"), base / "other.bin")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    shutil.copytree(base, tmp_path / "elsewhere")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "elsewhere"), "r": 4}
    (base / "adapter_config.json").write_text(json.dumps(settings))
    edit(base / "config.json", transformers_weights="other.bin")
    model = RCCForCausalLM.from_base(base)
    assert model.config.base["decoder"].sha256 == checkpoints.weights_sha256(base)
    for name, tensor in model.decoder.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "gone.safetensors", "w.bin", 5])
def test_an_index_that_leads_out_of_the_folder_is_refused(base: Path, name: object) -> None:
    save_file(other_weights(base / "model.safetensors"), base.parent / "outside.safetensors")
    (base / "model.safetensors").rename(base / "decoy.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(base / "decoy.safetensors"), name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RCCError, match=r"index\.json"):
        RCCForCausalLM.from_base(base)
    with pytest.raises(RCCError, match=r"index\.json"):
        checkpoints.weights_sha256(base)


def test_an_index_over_files_of_the_folder_is_followed(base: Path) -> None:
    expected = RCCForCausalLM.from_base(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model = RCCForCausalLM.from_base(base)
    assert model.config.base["decoder"].sha256 == expected.config.base["decoder"].sha256
    assert torch.equal(model.decoder.lm_head.weight, expected.decoder.lm_head.weight)


def test_of_a_tensor_in_two_files_the_hashed_one_is_loaded(base: Path) -> None:
    expected = RCCForCausalLM.from_base(base)
    save_file(other_weights(base / "model.safetensors"), base / "model.fp16.safetensors")
    model = RCCForCausalLM.from_base(base)
    assert model.config.base["decoder"].sha256 == expected.config.base["decoder"].sha256
    assert torch.equal(model.decoder.lm_head.weight, expected.decoder.lm_head.weight)
