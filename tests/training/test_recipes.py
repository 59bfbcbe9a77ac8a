"""Every recipe runs: a few steps on a tiny model of the same families, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import STATE_SPACE
from rcc import RCCForCausalLM
from rcc.cli.app import app
from rcc.model import backbones
from rcc.planning import shapes
from rcc.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
WORDS = "the old miller told his daughter that seven ships had left the harbour before the storm came "


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes folders of tiny backbones of a family, with a tokenizer of bytes."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        bytewise = Tokenizer(models.BPE(letters, []))
        bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bytewise.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise)
        tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        tokenizer.save_pretrained(folder)
        shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        if family not in STATE_SPACE:
            shape |= {"num_attention_heads": 4, "max_position_embeddings": 4096, "pad_token_id": 0}
        shape |= {
            "mamba": {"state_size": 4, "time_step_rank": 4},
            "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
            "llama": {"num_key_value_heads": 2},
            "qwen2": {"num_key_value_heads": 2},
            "qwen3": {"num_key_value_heads": 2},
            "gemma3_text": {
                "num_key_value_heads": 2,
                "head_dim": 16,
                "sliding_window": 64,
                "sliding_window_pattern": 2,
            },
        }.get(family, {})
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": f"Chapter {i}. " + WORDS * 30} for i in range(20)]
    rows = [{"context": f"{WORDS}{i}.", "question": "Who?", "answers": ["the old miller"]} for i in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _family(recipe: dict[str, Any], side: str) -> str:
    return shapes.find(recipe["model"][side], recipe["model"].get("shapes")).model_type


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, backbone: Any, data: Path, tmp_path: Path) -> None:
    """The recipe's own tasks, stages, groups and frozen parts; only sizes and paths are made small."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    sides = [side for side in ("encoder", "decoder") if recipe["model"].get(side)]
    sets = [f"model.{side}={backbone(_family(recipe, side))}" for side in sides]
    rates = recipe["model"]["rates"]
    direct = recipe["model"].get("prefix") == "direct"  # whose rate 1 is another way to read
    small = {rate: rate if direct else 4 * 2**i for i, rate in enumerate(rates)}
    sets += ["model.segment_length=32", f"model.rates={list(small.values())}"]
    if "max_position_embeddings" in recipe["model"]:
        sets.append("model.max_position_embeddings=2048")
    for key, file in (("text", "text.jsonl"), ("questions", "questions.jsonl")):
        for name in (key, f"evaluation_{key}"):
            for i in range(len(recipe.get("data", {}).get(name, []))):
                sets += [f"data.{name}.{i}.path={data / file}", f"data.{name}.{i}.include=[]"]
                sets.append(f"data.{name}.{i}.exclude=[]")
    if any(
        recipe.get("data", {}).get(f"evaluation_{key}") for key in ("text", "questions")
    ):  # the same file stands for both: it may not be left out
        sets += ["data.evaluation_text=[]", "data.evaluation_questions=[]"]
    sets.append("data.held_out=0.3")
    for i, stage in enumerate(recipe["stages"]):
        sets += [
            f"stages.{i}.max_steps=2",
            f"stages.{i}.lengths={[384 * 2 ** min(n, 2) for n in range(len(stage['lengths']))]}",
            f"stages.{i}.target_tokens=200",
            f"stages.{i}.batch_tokens=768",
            f"stages.{i}.rates={[small[rate] for rate in stage.get('rates', rates)]}",
        ]
    sets += [
        "run.device=cpu",
        f"run.threads={torch.get_num_threads()}",
        "run.evaluation_samples=1",
        "run.log_steps=1",
        "run.compile=false",
    ]
    sets.append("run.workers=0")
    arguments = ["train", str(path), "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(app, [*arguments, *(word for value in sets for word in ("--set", value))])
    assert done.exit_code == 0, done.output + repr(done.exception)

    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for stage in recipe["stages"]:
        losses = [row["loss"] for row in rows if row["stage"] == stage["name"] and "loss" in row]
        assert len(losses) == 2
        assert all(0 < loss < 20 for loss in losses)
    model = RCCForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.states == recipe["model"].get("states", "all")
    assert model.config.direct == direct
    assert recipe["stages"][-1]["name"] in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize(
    ("encoder", "decoder"), [("mamba", "llama"), ("mamba2", "gemma3_text"), ("gemma3_text", "gemma3_text")]
)
def test_families_learn(encoder: str, decoder: str, backbone: Any, data: Path, tmp_path: Path) -> None:
    """Fifty steps of `rcc train` lower the loss of Mamba as encoder and of Gemma 3 as decoder and as both."""
    recipe = {
        "name": "tiny",
        "model": {
            "encoder": str(backbone(encoder)),
            "decoder": str(backbone(decoder)),
            "segment_length": 32,
            "rates": [4],
        },
        "data": {"text": [{"path": str(data / "text.jsonl")}]},
        "stages": [
            {
                "name": "only",
                "tasks": {"reconstruction": 1},
                "lengths": [192],
                "target_tokens": 96,
                "batch_tokens": 768,
                "max_steps": 50,
                "groups": {"all": {"learning_rate": 3.0e-3, "schedule": "constant"}},
            }
        ],
        "run": {"device": "cpu", "threads": torch.get_num_threads(), "log_steps": 1, "evaluation_samples": 0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(losses) == 50
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_as_it_stands(path: Path) -> None:
    """It is valid unchanged, names its own file in its command, and its families are supported."""
    recipe = Recipe.load(path)
    assert f"recipes/{path.name}" in path.read_text(encoding="utf-8")
    for side in ("decoder", "encoder") if recipe.model.decoder else ("encoder",):
        backbones.check_family(shapes.find(getattr(recipe.model, side), recipe.model.shapes), side)


def test_dry_run_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a model that is nowhere on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for a connection
    done = CliRunner().invoke(app, ["train", str(ROOT / "recipes/pythia-1.4b-reconstruction.yaml"), "--dry-run"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    for part in ("stage 2: long", "1,414,647,808", "FLOP", "GB weights"):
        assert part in done.output
