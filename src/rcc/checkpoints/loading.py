"""Backbones, configurations and tokenizers out of folders that nobody vouches for: data is read, code never runs.

transformers would look for more than was asked for: code that a folder's `auto_map` names (after asking on the
terminal), an adapter that leads to another base, pickles, an index or a setting that names files elsewhere. So it is
handed a configuration and tensors: those of the files that :func:`rcc.checkpoints.weights_sha256` hashes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ModelError, RCCError, brief
from .gguf_models import is_gguf, load_gguf, source
from .hashing import weight_files

if TYPE_CHECKING:  # transformers takes seconds to import: each function imports what it needs
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

ELSEWHERE = ("trust_remote_code", "code_revision", "revision", "subfolder", "variant", "gguf_file", "use_safetensors")
"""Arguments of transformers that choose other files than those of the folder, or run code."""

MOST_LAYERS = 10_000
"""Blocks of a backbone at most, see :func:`check_depth`."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that :func:`weights_sha256` hashes, mapped: they are read when they are used.

    Raises:
        ModelError: there are none, or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            tensors |= load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the weights in {folder} cannot be read ({brief(str(error))}): get them again.") from error
    return tensors


def load_backbone(folder: Path, head: bool, config: PreTrainedConfig | None = None, **settings: Any) -> PreTrainedModel:
    """Load a backbone's folder with transformers: its configuration, and the weights that are hashed.

    Args:
        folder: with config.json and `*.safetensors`; nothing else in it is read but a generation_config.json. Or a GGUF
            file.
        head: with the language model's head, as a decoder has it.
        config: what :func:`load_config` read of it; None: it is read here.
        **settings: go to transformers' `from_pretrained`.

    Raises:
        InputError: a setting that would look elsewhere than in the folder.
        ModelError: the folder describes no model that transformers knows, its weights do not fit, or they are quantized
            and the library for that is missing.
    """
    for name in ELSEWHERE:
        if settings.pop(name, None):
            raise InputError(f"{name} cannot be used: a backbone is read from its folder, and code in it never runs.")
    from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig

    try:
        # of the model, not of its configuration
        own: dict[str, Any] = {
            name: settings.pop(name) for name in ("dtype", "attn_implementation") if name in settings
        }
        if config is None:
            config, settings = load_config(folder, own.get("attn_implementation"), **settings)
        config.transformers_weights = None  # the name of a file that would be loaded instead
        mapping = (AutoModelForCausalLM if head else AutoModel)._model_mapping
        if type(config) not in mapping:
            raise ModelError(f"{folder} cannot be used: transformers has no language model {config.model_type!r}.")
        kinds: Any = mapping[type(config)]
        kind = kinds[0] if isinstance(kinds, (list, tuple)) else kinds
        settings = {"config": config, **own, **settings}
        model: PreTrainedModel
        if is_gguf(folder):
            model = load_gguf(kind, folder, **settings)
        else:
            model = kind.from_pretrained(None, state_dict=read_weights(folder), trust_remote_code=False, **settings)
        # where transformers dequantizes, its model's configuration says nothing of it any more
        if getattr(model.config, "quantization_config", None) and getattr(model, "hf_quantizer", None) is None:
            raise ModelError(f"{folder} is quantized in a way that transformers does not know: get it in bfloat16.")
        model.name_or_path = config._name_or_path = str(folder)
        if model.can_generate() and (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except RCCError:
        raise
    except ImportError as error:
        raise ModelError(f"{folder} needs a library that is not installed ({brief(error)}).") from error
    except Exception as error:  # transformers has its own for each way to be wrong
        raise ModelError(f"{folder} cannot be loaded as a language model ({brief(error)}).") from error
    return model


def check_depth(settings: Mapping[str, Any], source: object) -> None:
    """Raise ModelError where a configuration has more layers than any model.

    transformers would make them one by one, until memory ends.
    """
    depth = settings.get("num_hidden_layers")
    if isinstance(depth, (int, float)) and depth > MOST_LAYERS:
        raise ModelError(f"{source} has num_hidden_layers {depth}, more than any model: at most {MOST_LAYERS:,}.")


def load_config(folder: Path, attention: str | None = None, **settings: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """Read a backbone's configuration.

    Args:
        folder: where config.json is; or a GGUF file, whose weights then count as stored in bfloat16.
        attention: that the caller chose, which takes the place of the configuration's.
        **settings: take the place of those in the file.

    Returns:
        The configuration, and those of `settings` that it does not have.

    Raises:
        ModelError: it cannot be read, or names a kernel, which is code, for its attention.
    """
    import torch
    from transformers import AutoConfig

    gguf = is_gguf(folder)
    file = folder if gguf else folder / "config.json"
    raw: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError):  # of which transformers tells
        raw = None if gguf else json.loads(file.read_text(encoding="utf-8"))
    if isinstance(raw, dict):
        check_depth(raw, file)
    try:
        with source(folder) as (place, more):
            config, rest = AutoConfig.from_pretrained(
                place, local_files_only=True, trust_remote_code=False, return_unused_kwargs=True, **more, **settings
            )
    except RecursionError:
        raise ModelError(f"{file} is nested too deep: get it again.") from None
    except Exception as error:  # OSError, ValueError, and what a value of the wrong type runs into
        raise ModelError(f"{file} cannot be read ({brief(error)}): get it again.") from error
    if gguf:
        check_depth(config.to_dict(), file)
        config.dtype = torch.bfloat16  # as a base's GGUF file is dequantized
        rest.pop("gguf_file", None)
    if attention is None and "/" in str(getattr(config, "_attn_implementation", "")):
        raise ModelError(f"{file} names code for its attention, which is not run: take it out.")
    return config, rest
