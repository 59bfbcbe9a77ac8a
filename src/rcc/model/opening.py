"""A model's name → the compressor that it becomes: an RCC model, or a selection of a language model's own KV pairs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import checkpoints
from ..config import RCCConfig
from ..context import container
from ..defaults import default_model
from ..errors import InputError, ModelError
from ..runtime.precision import computing
from .compressor import Compressor
from .rcc import RCCForCausalLM
from .selection.names import SELECTION, rule_in, rule_of
from .selection.rules import RULES
from .selection.selection import CHUNK_LENGTH, Selection

ALL_GPUS = "auto"
"""The device that stands for all GPUs of the machine."""
COMPRESSORS = ("rcc", SELECTION, *(f"{SELECTION}-{rule}" for rule in RULES if rule != "repeat"))
"""Ways to compress; `selection` is the rule `repeat`."""


def open_compressor(
    model: str | Path | None,
    device: str,
    dtype: torch.dtype | None,
    *,
    adapters: str = "merged",
    compressor: str | None = None,
    made: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Compressor, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        model: a shipped model's name, a base's, a folder, a GGUF file, or a hub id; None: the one that made the context
            `made`, or without that :func:`rcc.defaults.default_model`.
        device: to compute on; :data:`ALL_GPUS`: accelerate spreads a language model over them.
        dtype: to compute in; None: as stored, or float32 on a CPU without bfloat16.
        adapters: of an RCC model, see :meth:`RCCForCausalLM.from_pretrained`.
        compressor: one of :data:`COMPRESSORS`; None: the one that made the context `made`, or else, by the folder, an
            RCC model is one, and another language model's KV pairs are selected. A selection of an RCC model is of its
            base.
        made: a context file, which is checked whole before the model is loaded for it.
        progress: is told what is being done where that takes long.

    Raises:
        InputError: an unknown compressor, or all GPUs for an RCC model.
        ModelError: the model cannot be found, loaded or used so.
        ContextError, FileError: `made` is damaged or cannot be read.
    """
    check_compressor(compressor)
    manifest = None if made is None else container.read(Path(made), "context", "full").manifest
    model = _model_of(model, manifest)
    rule, chunk_length = rule_of(compressor or SELECTION), CHUNK_LENGTH
    if manifest is not None and compressor != "rcc":
        its_rule, its_chunk_length = _selection_of(manifest)
        chunk_length = its_chunk_length or chunk_length
        if compressor is None and its_rule:
            compressor, rule = SELECTION, its_rule
    selected = language_model(model, compressor, progress)
    if selected is None:
        if device == ALL_GPUS:
            raise InputError(f"device {device} is for selections, and {model} is an RCC model: name one device.")
        options: dict[str, Any] = {"device": device, "dtype": dtype, "adapters": adapters, "progress": progress}
        rcc = RCCForCausalLM.from_pretrained(model, **options)
        if dtype is None:
            rcc.to(computing(rcc.dtype, device))
        return rcc, checkpoints.load_tokenizer(model)
    name, folder = selected
    where: dict[str, Any] = {"device_map": "auto"} if device == ALL_GPUS else {"device": device}
    selection = Selection.from_pretrained(folder, name, rule, chunk_length, dtype=dtype, **where)
    return selection, selection.tokenizer


def language_model(
    model: str, compressor: str | None, progress: Callable[[str], None] | None = None
) -> tuple[str, Path] | None:
    """Return the name and the folder of the language model whose KV pairs are selected; None: an RCC model compresses.

    Args:
        model: as in :func:`open_compressor`.
        compressor: likewise.
        progress: likewise.

    Raises:
        ModelError: there is no such model, or it was not trained for rcc and is to compress.
        FileError: a base cannot be fetched.
    """
    base, folder = _find(model, progress)
    if base is None and compressor in (None, "rcc"):
        return None
    if compressor == "rcc":
        raise ModelError(f"{model} was not trained for rcc: leave the compressor open, or name an RCC model.")
    if base is None:
        base = RCCConfig.load(folder).base["decoder"].source
        folder = checkpoints.resolve_base(base, relative_to=folder, progress=progress)
    return base if base in checkpoints.BASES or not os.path.exists(os.path.expanduser(base)) else folder.name, folder


def check_compressor(name: str | None) -> None:
    """Raise InputError unless a name is one of :data:`COMPRESSORS`, or None."""
    if name is not None and name not in COMPRESSORS:
        raise InputError(f"compressor {name!r} is unknown: use one of {', '.join(COMPRESSORS)}.")


def _selection_of(manifest: dict[str, Any]) -> tuple[str, int | None]:
    """Return the rule and the chunk's length of the selection that made a context file; of another one "" and None."""
    rule, length = rule_in(str(manifest.get("compressor", ""))), manifest.get("segment_length")
    return (rule, length if isinstance(length, int) else None) if rule else ("", None)


def _model_of(model: str | Path | None, manifest: dict[str, Any] | None) -> str:
    """Return the model to load: the one that is named, that made a context file, or the default."""
    if model is not None:
        return str(model)
    if manifest is None:
        return default_model()
    name = str(manifest.get("model"))
    if name not in checkpoints.shipped_models() and name not in checkpoints.BASES:
        raise ModelError(f"the context was made by {name}: name that model's folder as the model.")
    return name


def _find(model: str | Path, progress: Callable[[str], None] | None) -> tuple[str | None, Path]:
    """Return the name of a language model that is none of rcc's, or None; and the folder, or GGUF file."""
    if str(model) in checkpoints.BASES:
        return str(model), checkpoints.resolve_base(model, progress=progress)
    if checkpoints.is_gguf(file := Path(model).expanduser()):
        return str(model), file
    folder = checkpoints.resolve_model(model)
    settings: Any = None
    with suppress(OSError, ValueError, RecursionError):  # of which RCCConfig tells
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    plain = isinstance(settings, dict) and isinstance(settings.get("model_type"), str)
    return (str(model) if plain and settings["model_type"] != "rcc" else None), folder
