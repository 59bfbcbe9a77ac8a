"""What a backbone looks like without its weights: known public models, and what a config.json says of others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoints
from ..config import RCCConfig
from ..errors import InputError, ModelError, brief

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Shape:
    """A public model as its config.json describes it, without what decides no size.

    Attributes:
        parameters: as published; the model made of `config` has as many.
        ids: hub ids, and other names, of models of this shape.
        config: keyword arguments of the transformers configuration, `model_type` included.
    """

    parameters: int
    ids: tuple[str, ...]
    config: dict[str, Any]


_LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "tie_word_embeddings": False,
}
_QWEN3_4B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "tie_word_embeddings": True,
}

SHAPES = {
    "gemma-3-1b": Shape(
        999_885_952,
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3-8b": Shape(
        8_030_261_248,
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct"),
        {**_LLAMA_8B, "max_position_embeddings": 8192},
    ),
    "llama-3.1-8b": Shape(
        8_030_261_248,
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        {**_LLAMA_8B, "max_position_embeddings": 131072},
    ),
    "mamba-370m": Shape(
        371_516_416,
        ("state-spaces/mamba-370m-hf",),
        {
            "model_type": "mamba",
            "vocab_size": 50280,
            "hidden_size": 1024,
            "num_hidden_layers": 48,
            "intermediate_size": 2048,
            "state_size": 16,
            "conv_kernel": 4,
            "time_step_rank": 64,
        },
    ),
    "mamba-1.4b": Shape(
        1_372_178_432,
        ("state-spaces/mamba-1.4b-hf",),
        {
            "model_type": "mamba",
            "vocab_size": 50280,
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "intermediate_size": 4096,
            "state_size": 16,
            "conv_kernel": 4,
            "time_step_rank": 128,
        },
    ),
    "mistral-7b": Shape(  # v0.3: the first version's window slides
        7_248_023_552,
        ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        {
            "model_type": "mistral",
            "vocab_size": 32768,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "pythia-1.4b": Shape(
        1_414_647_808,
        ("EleutherAI/pythia-1.4b", "EleutherAI/pythia-1.4b-deduped"),
        {
            "model_type": "gpt_neox",
            "vocab_size": 50304,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 8192,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2.5-coder-0.5b": Shape(
        494_032_768,
        ("Qwen/Qwen2.5-Coder-0.5B", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "qwen2.5-coder-0.5b-instruct"),
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": Shape(4_022_468_096, ("Qwen/Qwen3-4B",), {**_QWEN3_4B, "max_position_embeddings": 40960}),
    "qwen3-4b-2507": Shape(
        4_022_468_096,
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Thinking-2507"),
        {**_QWEN3_4B, "max_position_embeddings": 262144},
    ),
    "smollm2-135m": Shape(
        134_515_008,
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
}
"""By the names that :func:`find` takes; their ids do as well."""


def find(
    name: str | Path, described: Mapping[str, dict[str, Any]] | None = None, relative_to: Path | None = None
) -> PreTrainedConfig:
    """Return a backbone's configuration; weights need not be there, and none are fetched.

    Args:
        name: a config.json or a folder with one, a name or an id in :data:`SHAPES`, or a hub id, whose config.json
            is fetched.
        described: shapes by name, as in a recipe; they come before :data:`SHAPES`.
        relative_to: where a relative path is looked up first.

    Raises:
        ModelError: there is nothing of that name, or it describes no backbone.
        InputError: `described` has the name, but no model_type.
    """
    text = os.fspath(name)
    paths = [Path(relative_to) / text] if relative_to is not None else []
    for path in [*paths, Path(os.path.expanduser(text))] if text else []:
        if os.path.isdir(path):  # unlike Path.is_dir, never raises
            if not os.path.isfile(path / "config.json"):
                raise ModelError(f"{path} is not a model folder: it has no config.json.")
            return _read(path / "config.json")
        if os.path.exists(path):
            return _read(path)
    if described is not None and text in described:
        if "model_type" not in described[text]:
            raise InputError(f"model.shapes.{text} has no model_type: add it.")
        return _made(described[text], f"model.shapes.{text}")
    for known, shape in SHAPES.items():
        if text.lower() in (known, *(i.lower() for i in shape.ids)):
            return _made(shape.config, known)
    if text in (shipped := checkpoints.shipped_models()):
        return _read(shipped[text] / "config.json")  # which says what it is instead
    neither = f"{text!r} is neither a known shape ({', '.join(SHAPES)}), a config.json file"
    return _read(checkpoints.fetch(name, neither, ["config.json"]) / "config.json")


def _read(file: Path) -> PreTrainedConfig:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not JSON: name a model's config.json, or the folder it is in.") from None
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ModelError(f"{file} has no model_type: name a config.json that transformers wrote.")
    if data["model_type"] == "rcc":
        base = RCCConfig.load(file.parent).base.get("decoder") if file.name == "config.json" else None
        raise ModelError(
            f"{file} is an rcc model's, not a backbone's: `rcc models` lists what comes with rcc"
            f"{f', and its base is {base.source}' if base is not None else ''}."
        )
    return _made(data, str(file))


def _made(keywords: Mapping[str, Any], source: str) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    checkpoints.check_depth(keywords, source)
    settings = dict(keywords)
    family = settings.pop("model_type")
    if family not in CONFIG_MAPPING:  # whoever asks for a side will refuse it by name
        config = PreTrainedConfig()
        config.model_type = family  # type: ignore[misc]  # a class's in transformers: this shape has no class
        return config
    try:
        return AutoConfig.for_model(family, **settings)
    except Exception as error:  # transformers' own, of values that make no sense
        why = brief(" ".join(str(error).split()))
        raise ModelError(f"{source} does not describe a {family} model ({why}).") from error
