"""Shapes of known models, and where a shape is looked up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import make_backbone
from rcc import checkpoints
from rcc.planning import shapes


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def folder_of(body: Any, folder: Path) -> Path:
    """A folder with a config.json and nothing else."""
    body.config.save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_published_counts(name: str) -> None:
    """The model of a known shape has as many parameters as the public one, under each of its names."""
    shape = shapes.SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.find(name))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    for other in shape.ids:
        assert shapes.find(other).to_dict() == shapes.find(other.upper()).to_dict() == model.config.to_dict()


def test_names_are_one_models() -> None:
    names = Counter(name.lower() for known, shape in shapes.SHAPES.items() for name in (known, *shape.ids))
    assert max(names.values()) == 1
    assert "smollm2-135m-instruct" in names
    assert set(checkpoints.BASES) <= set(names)


def test_where_a_shape_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file or folder, under the model's folder first; then what a recipe says; then what is known."""
    monkeypatch.chdir(tmp_path)
    for name, layers in (("pythia-1.4b", 2), ("model/base", 3), ("base", 4)):
        folder_of(make_backbone("llama", layers), tmp_path / name)
    described = {"qwen3-4b": {"model_type": "llama", "num_hidden_layers": 5}}

    def layers_of(name: str | Path, **more: Any) -> int:
        return shapes.find(name, described, **more).num_hidden_layers

    assert layers_of("pythia-1.4b") == layers_of(Path("pythia-1.4b/config.json")) == 2
    assert layers_of("base") == 4
    assert layers_of("base", relative_to=tmp_path / "model") == 3
    assert layers_of("qwen3-4b") == 5
    assert layers_of("EleutherAI/pythia-1.4b") == 24


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hub id the config.json is fetched, and nothing else."""
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder_of(make_backbone("llama"), tmp_path / "hub"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert shapes.find("some/model").num_hidden_layers == 3
    assert asked == [("some/model", ["config.json"])]
