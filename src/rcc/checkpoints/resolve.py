"""Names of models and bases → folders: in this package, on the disk, on the hub, or made at first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import RCCConfig
from ..errors import ModelError, brief
from .bases import BASES
from .gguf_models import is_gguf, source
from .hashing import weight_files
from .making import ensure_base

if TYPE_CHECKING:  # transformers takes seconds to import: each function imports what it needs
    from transformers import PreTrainedTokenizerBase


# ---------------------------------------------------------------- finding a folder
def shipped_models() -> dict[str, Path]:
    """Return the models inside this package: name → folder."""
    return {p.parent.name: p.parent for p in sorted((Path(__file__).parents[1] / "weights").glob("*/config.json"))}


def resolve_model(name: str | Path, weights: bool = True) -> Path:
    """Return the folder of a model: a shipped name, else a local folder, else a hub id, which is fetched.

    A name that looks like a path, and any ``Path``, is never looked up on the hub. Without ``weights`` they need not be
    there, and are not fetched.

    Raises:
        ModelError: there is no such model, or its folder lacks config.json or a `*.safetensors` file.
    """
    shipped = shipped_models()
    if os.fspath(name) in shipped:
        return _complete(shipped[os.fspath(name)], weights)
    return _find(name, "a shipped model", shipped, None, weights)


def resolve_base(
    ref: str | Path,
    relative_to: Path | None = None,
    progress: Callable[[str], None] | None = None,
    weights: bool = True,
) -> Path:
    """Return the folder of a base: a name in BASES, else a local folder, else a hub id, which is fetched.

    A relative folder is looked up under ``relative_to`` (the model's folder), then in the working folder. Without
    ``weights`` they need not be there, and are not fetched (but for a base in BASES, which comes whole).

    Raises:
        ModelError: there is no such base, or its folder lacks config.json or a `*.safetensors` file.
        FileError: a base in BASES could not be fetched or made, see :func:`ensure_base`.
    """
    if os.fspath(ref) in BASES:
        return ensure_base(os.fspath(ref), progress)
    return _find(ref, "a known base", BASES, relative_to, weights)


def _find(ref: str | Path, kind: str, names: Iterable[str], relative_to: Path | None, weights: bool) -> Path:
    text = os.fspath(ref)
    candidates = [Path(os.path.expanduser(text))]
    if relative_to is not None:
        candidates.insert(0, Path(relative_to) / text)
    for path in candidates if text else []:
        if os.path.isdir(path):  # unlike Path.is_dir, never raises: any string may be asked for
            return _complete(path, weights)
        if os.path.isfile(path):
            raise ModelError(f"{path} is a file where a model's folder is needed: name the folder it is in.")
    # what a model folder is made of; never pickles or code
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    folder = fetch(ref, f"{text!r} is neither {kind} ({', '.join(names) or 'there are none'})", patterns)
    return _complete(folder, weights)


def fetch(ref: str | Path, neither: str, patterns: list[str]) -> Path:
    """Fetch a hub repository's files, or those that the hub's cache has already, and return their folder.

    Args:
        ref: a hub id.
        neither: how a message begins that says what `ref` is not.
        patterns: globs of the files to fetch.

    Raises:
        ModelError: `ref` is or looks like a path, or the hub does not give it.
    """
    text = os.fspath(ref)
    looks_like_path = text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or text.endswith(os.sep)
    if isinstance(ref, Path) or looks_like_path or not text:
        raise ModelError(f"{neither} nor a folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own errors, httpx's, OSError and ValueError
        why = _hub_reason(error)
        raise ModelError(f"{neither}, nor a folder, nor could it be fetched from the hub: {why}.") from error


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner restricts access"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    if isinstance(error, errors.HFValidationError):
        return "that is not a valid hub name"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no connection"
    return brief(error)


def _complete(folder: Path, weights: bool) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    if weights:
        weight_files(folder)
    return folder


# ---------------------------------------------------------------- tokenizer
def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model or base: the one in its folder or GGUF file, or else in its base's.

    Args:
        name: as for :func:`resolve_model`; or a GGUF file.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    folder = Path(name) if is_gguf(name) else resolve_model(name, weights=False)
    # asked first: for a folder without one transformers goes on to the hub, or makes an empty tokenizer
    if not is_gguf(folder) and not has_tokenizer(folder):
        base = None
        with suppress(ModelError):  # a plain base has no configuration of ours
            base = RCCConfig.load(folder).base.get("decoder")
        if base is None:
            raise ModelError(f"{folder} has no tokenizer: tokenizer.json is missing.")
        return load_tokenizer(resolve_base(base.source, relative_to=folder, weights=False))
    from transformers import AutoTokenizer

    try:
        with source(folder) as (place, more):
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False, **more)
    except Exception as error:  # OSError, ValueError, and plain Exception from the Rust side
        raise ModelError(f"the tokenizer in {folder} cannot be loaded ({brief(error)}).") from error


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer's files."""
    return any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
