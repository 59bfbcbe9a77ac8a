"""Models are saved and loaded as they are, and damaged folders are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import conftest
import reference as ref
from conftest import MakeBackbone, MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, FAMILIES, assert_same_model, one, prompt_logits, sides
from rcc import (
    FileError,
    InputError,
    ModelError,
    RCCConfig,
    RCCError,
    RCCForCausalLM,
    SideConfig,
)


def test_backbones_given_as_modules_are_left_alone(backbone: MakeBackbone, tokens: MakeTokens) -> None:
    """The reference on the original modules, which rcc never touched, gives the same: nothing of rcc is in them."""
    decoder, encoder = backbone("llama", seed=5), backbone("gpt_neox", seed=6)
    before = [{k: v.clone() for k, v in side.state_dict().items()} for side in (decoder, encoder)]
    config = RCCConfig(segment_length=16, rates=[4])
    model = RCCForCausalLM.from_base(encoder, decoder, config=config)
    with torch.no_grad():
        for weight in model.projections.parameters():
            weight.normal_(0, 0.1)
    projections: list[torch.Tensor] = [linear.get_parameter("weight") for linear in model.projections]
    ids, prompt = tokens(37), tokens(6, 1)
    want, _ = ref.reference(encoder.gpt_neox, decoder, projections, [ids], prompt, segment=16, rate=4)
    got = prompt_logits(model, model.compress(one(ids)), prompt)
    torch.testing.assert_close(got, want, **CLOSE)
    for side, weights in zip((decoder, encoder), before, strict=True):
        assert not any(m._forward_pre_hooks for m in side.modules())
        assert all(torch.equal(v, weights[k]) for k, v in side.state_dict().items())


def save_base(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder)
    return folder


CASES = [
    ("llama", True, 4, torch.float32),
    ("llama", True, 4, torch.bfloat16),
    ("gpt_neox", True, 4, torch.float32),
    ("llama", False, 0, torch.float32),
    ("gpt_neox", False, 0, torch.bfloat16),
    ("gpt_neox", False, 4, torch.bfloat16),
]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("family", "share", "lora", "dtype"), CASES)
def test_save_and_load(
    backbone: MakeBackbone,
    tokens: MakeTokens,
    tmp_path: Path,
    family: str,
    share: bool,
    lora: int,
    dtype: torch.dtype,
    full: bool,
) -> None:
    """save_pretrained → from_pretrained gives the same model bit for bit, twice in a row, with bases written along or
    referred to, shared or separate, and in the precision it was saved in; a reference writes no base, `full` makes the
    folder complete; weights at most once."""
    decoder = save_base(backbone(family, seed=1), tmp_path / "lower", dtype)
    encoder = save_base(backbone(family, layers=2, hidden=32, seed=2), tmp_path / "upper", dtype)
    config = RCCConfig(segment_length=16, rates=[4], encoder=SideConfig(lora), decoder=SideConfig(lora))
    model = RCCForCausalLM.from_base(decoder if share else encoder, None if share else decoder, config)
    conftest.randomise(model)
    assert model.dtype == dtype
    folder = tmp_path / "model"
    model.save_pretrained(folder, full=full)
    has_base = full or not lora
    assert (folder / "decoder").exists() == has_base
    assert (folder / "encoder").exists() == (has_base and not share)
    if has_base:
        shutil.rmtree(decoder)
        shutil.rmtree(encoder)
        written = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        unique = {p.data_ptr(): p.nbytes for p in model.parameters()}
        assert written < sum(unique.values()) + 100_000
    loaded = RCCForCausalLM.from_pretrained(folder)
    assert_same_model(model, loaded, tokens)
    moved = tmp_path / "elsewhere" / "model"
    loaded.save_pretrained(moved, full=full)
    shutil.rmtree(folder)
    assert_same_model(model, RCCForCausalLM.from_pretrained(moved), tokens)


@sides
def test_save_and_load_of_a_model_made_of_modules(
    fresh: MakeModel, tokens: MakeTokens, tmp_path: Path, sides: dict[str, Any]
) -> None:
    """Bases that came as modules have no folder to refer to: they are written without being asked for."""
    model = fresh(**sides)
    model.save_pretrained(tmp_path / "model")
    assert_same_model(model, RCCForCausalLM.from_pretrained(tmp_path / "model"), tokens)


@pytest.mark.parametrize("share", [True, False])
def test_a_model_cast_with_to_is_saved_in_that_precision(
    fresh: MakeModel, backbone: MakeBackbone, tokens: MakeTokens, tmp_path: Path, share: bool
) -> None:
    """`.to(bfloat16)`, save, load: the same model bit for bit."""
    base = save_base(backbone("llama", seed=1), tmp_path / "base")
    config = RCCConfig(segment_length=16, rates=[4], share_base=share)
    model = conftest.randomise(RCCForCausalLM.from_base(base, config=config)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", full=True)
    assert_same_model(model, RCCForCausalLM.from_pretrained(tmp_path / "model"), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cast_leaves_positions_exact(fresh: MakeModel, family: str) -> None:
    """`.to(bfloat16)` casts weights, not the rotary frequencies: rounded, position 2,000 would be turned by radians."""
    model, cast = fresh(family), fresh(family).to(torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    frequencies = [(name, b) for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert len(frequencies) >= 2
    for name, buffer in frequencies:
        assert torch.equal(dict(cast.named_buffers())[name].float(), buffer), name


def test_a_reference_to_a_relative_folder_survives_a_change_of_folder(
    backbone: MakeBackbone, tokens: MakeTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base named by a relative path is found again from another working folder."""
    save_base(backbone("llama"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = RCCForCausalLM.from_base("base", config=RCCConfig(segment_length=16, rates=[4]))
    model.save_pretrained("out/model")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert loaded.fingerprint == model.fingerprint


def test_settings_survive(fresh: MakeModel, tmp_path: Path) -> None:
    """Every setting comes back from config.json; encoder and decoder rules too."""
    config: dict[str, Any] = {
        "states": "all",
        "layer_map": "average",
        "segment_padding": "repeat",
        "lora_alpha": 6.0,
        "name": "a name",
        "segment_length": 24,
        "rates": (3, 8),
    }
    model = fresh("llama", share=False, layers=(2, 3), lora=2, **config)
    model.save_pretrained(tmp_path / "m")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "m").config
    for key, value in config.items():
        assert getattr(loaded, key) == (list(value) if key == "rates" else value)
    assert loaded.encoder.lora_rank == 2


def test_loading_in_another_precision(
    fresh: MakeModel, expected: MakeExpected, tokens: MakeTokens, tmp_path: Path
) -> None:
    """A float32 model loaded in bfloat16 reads a float32 context of its own, and the other way round."""
    model = fresh("llama")
    model.save_pretrained(tmp_path / "m")
    half = RCCForCausalLM.from_pretrained(tmp_path / "m", dtype="bfloat16")
    prompt = tokens(6, 1)
    want = expected(model).logits([tokens(37)], prompt)
    for maker, reader in ((model, half), (half, model), (half, half)):
        got = prompt_logits(reader, maker.compress(one(tokens(37))), prompt).float()
        assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rates": [3]}, "rate=3.*16"),
        ({"rates": []}, "rates"),
        ({"segment_length": 0}, "segment_length"),
        ({"segment_length": 4.0}, "segment_length"),
        ({"states": "some"}, "states='some'.*all, last"),
        ({"readout": "memory"}, "readout='memory'"),
        ({"layer_map": "x"}, "layer_map='x'"),
        ({"segment_padding": "left"}, "segment_padding='left'"),
        ({"encoder": SideConfig(-1)}, "encoder_lora_rank"),
        ({"decoder": 4}, "decoder must be a SideConfig"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    """A configuration is checked where it is made."""
    with pytest.raises(InputError, match=words):
        RCCConfig(**{"segment_length": 16, "rates": [4], **settings})


def test_unsupported_family(backbone: MakeBackbone, tmp_path: Path) -> None:
    """A family without a test is refused by name, as a module, as a folder and on either side."""
    other = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=32))
    folder = save_base(other, tmp_path / "gpt2")
    for pair in ([other], [other, backbone("llama")], [backbone("llama"), other], [folder], [str(folder)]):
        with pytest.raises(ModelError, match=r"'gpt2'.*not supported.*llama"):
            RCCForCausalLM.from_base(*pair)


def test_contradicting_bases(backbone: MakeBackbone) -> None:
    """A shared base and a decoder of its own contradict each other."""
    with pytest.raises(InputError, match="share_base"):
        RCCForCausalLM.from_base(backbone("llama"), backbone("llama"), config=RCCConfig(share_base=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    conftest.make_model("llama").save_pretrained(folder, full=True)
    return folder


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def edit(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text())
    data.update(changes)
    file.write_text(json.dumps(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "no weights of the base": (lambda f: (f / "decoder" / "model.safetensors").unlink(), "decoder"),
    "no base": (lambda f: shutil.rmtree(f / "decoder"), "decoder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json"),
    "no config of the base": (lambda f: (f / "decoder" / "config.json").unlink(), "decoder"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not an RCC model"),
    "a newer format": (lambda f: edit(f / "config.json", format_version=99), "format version 99.*update rcc"),
    "an unknown setting": (lambda f: edit(f / "config.json", taste="sweet"), "taste"),
    "a plain model": (lambda f: edit(f / "config.json", model_type="llama"), "not an RCC model.*from_base"),
    "rates of another type": (lambda f: edit(f / "config.json", rates=4), r"config\.json|rates"),
    "base of another type": (lambda f: edit(f / "config.json", base=[1]), r"config\.json|base"),
    "base incomplete": (
        lambda f: edit(f / "config.json", base={"decoder": {"source": "decoder"}}),
        r"config\.json|base",
    ),
    "names no base": (lambda f: edit(f / "config.json", base={}), "no base for the decoder"),
    "another rank": (lambda f: edit(f / "config.json", encoder_lora_rank=8), "shape"),
    "another side": (lambda f: edit(f / "config.json", encoder_lora_rank=0), "unknown tensor"),
    "weights changed": (lambda f: flip(f / "model.safetensors", -1), "damaged|changed"),
    "weights' header changed": (lambda f: flip(f / "model.safetensors", 20), "damaged|changed"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "damaged|changed"),
    "weights empty": (lambda f: os.truncate(f / "model.safetensors", 0), "damaged|changed"),
    "base changed": (lambda f: flip(f / "decoder" / "model.safetensors", -1), "SHA-256|trained on|damaged"),
    "base cut": (lambda f: os.truncate(f / "decoder" / "model.safetensors", 5000), "SHA-256|trained on|damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model_folder(saved: Path, tmp_path: Path, damage: str) -> None:
    """Every way in which a model's folder can be incomplete, damaged or of another version is refused in one line."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(RCCError, match=words) as caught:
        RCCForCausalLM.from_pretrained(folder)
    assert isinstance(caught.value, (ModelError, InputError))
    assert "\n" not in str(caught.value)


def test_missing_model(tmp_path: Path) -> None:
    """A folder that is not there, an empty one, and a file in its place."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(ModelError, match=path.name):
            RCCForCausalLM.from_pretrained(path)
        with pytest.raises(ModelError, match=path.name):
            RCCForCausalLM.from_base(path)


def test_model_folder_that_cannot_be_written(tiny: MakeModel, tmp_path: Path) -> None:
    """Saving a model below a file says which folder cannot be written."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="cannot be written"):
        tiny("llama").save_pretrained(tmp_path / "file" / "model")
