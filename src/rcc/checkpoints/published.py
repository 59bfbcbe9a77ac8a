"""The published checkpoint's tensors: what its files hold, and which of ours each one is.

| theirs                                         | ours                                                           |
|------------------------------------------------|----------------------------------------------------------------|
| `gpt_neox.…`, `embed_out.weight`               | `decoder/`                                                     |
| `gpt_neox.rcc_encoder.gpt_neox.…`              | `encoder/`                                                     |
| `gpt_neox.rcc_encoder2gpt_embed.weight`        | `projections.0.weight`                                         |
| `gpt_neox.rcc_encoder2gpt_A_matrix.N.weight`   | `projections.N+1.weight`; the last one reaches no KV entry     |
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FileError, ModelError
from .hashing import add_tensor, read_tensor

DECODER = "gpt_neox."
ENCODER = "gpt_neox.rcc_encoder."
PROJECTION = "gpt_neox.rcc_encoder2gpt_"
_MAMBA = re.compile(r"^gpt_neox\.mamba(?=\.|2gpt_)")
_BUFFER = re.compile(r"\.(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
UNKNOWN = "unknown: the model has no such tensor"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in one of the checkpoint's files.

    Attributes:
        file: where it is.
        name: as that file has it.
        shape: of its values.
        dtype: as safetensors calls it: `BF16`, ….
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Return its values, mapped.

        Raises:
            ModelError, FileError: the file is damaged or cannot be read.
        """
        try:
            return read_tensor(self.file, self.name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.file, error) from error

    def digest(self) -> str:
        """Return the SHA-256 of its type, shape and values."""
        digest = hashlib.sha256()
        add_tensor(digest, "", self.read())
        return digest.hexdigest()


@dataclass(frozen=True)
class Fate:
    """What became of one tensor.

    Attributes:
        name: the checkpoint's.
        fate: `"used"`, `"ignored"`, or, where the checkpoint cannot be converted, `"missing"` or `"misshapen"`.
        note: where it went, or why it went nowhere.
    """

    name: str
    fate: str
    note: str


class IncompleteError(ModelError):
    """A checkpoint that lacks tensors, or has them in another shape; `tensors` lists them all, and the others."""

    def __init__(self, message: str, tensors: list[Fate]):
        super().__init__(message)
        self.tensors = tensors


def stored_tensors(source: Path) -> list[Stored]:
    """Return every tensor in the folder's safetensors files, without reading any values.

    Raises:
        ModelError: there is no such file, one is damaged, or an index names a file that is not there.
        FileError: a file cannot be read.
    """
    files = sorted(p for p in source.glob("*.safetensors") if p.is_file())
    if not files:
        pickles = sorted(p.name for p in source.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        only = f", only {pickles[0]}, which can hold any code and is not read" if pickles else ""
        raise ModelError(f"{source} has no *.safetensors file{only}: get the checkpoint in that format.")
    for index in sorted(source.glob("*.safetensors.index.json")):
        named = read_json(index, "").get("weight_map")
        for name in sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []:
            if not (source / name).is_file():
                raise ModelError(f"{source} lacks {name}, which {index.name} names: get that file too.")
    tensors = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    tensors.append(Stored(file, name, tuple(part.get_shape()), part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    return tensors


def _unreadable(file: Path, error: Exception) -> ModelError | FileError:
    if isinstance(error, OSError) and error.strerror:
        return FileError(f"{file} cannot be read: {error.strerror}.")
    return ModelError(f"{file} is damaged or cut short ({str(error).strip().rstrip('.')}): get it again.")


def their_name(name: str) -> str:
    """Return the checkpoint's name for a tensor of our model's state dict."""
    if name == "decoder.lm_head.weight":
        return "embed_out.weight"
    side, _, rest = name.partition(".")
    if side == "decoder":
        return rest  # `gpt_neox.` stands there already
    if side == "encoder":
        return f"{ENCODER}gpt_neox.{rest}"
    number = int(rest.removesuffix(".weight"))
    return PROJECTION + (f"A_matrix.{number - 1}.weight" if number else "embed.weight")


def our_name(name: str) -> tuple[str, str]:
    """Return which subfolder of the model's folder holds a tensor of our state dict, and its name there."""
    if name == "decoder.lm_head.weight":
        return "decoder", "embed_out.weight"  # as everything but transformers 5 calls it
    side, _, rest = name.partition(".")
    return (".", name) if side == "projections" else (side, rest)


def match(
    source: Path, tensors: list[Stored], wanted: dict[str, tuple[int, ...]], settings: Any
) -> tuple[dict[str, Stored], list[Fate]]:
    """Find what each tensor of our model's state dict is made of, and what becomes of each of the checkpoint's.

    Args:
        source: the checkpoint's folder, for messages.
        tensors: all that its files hold, as :func:`stored_tensors` returns them.
        wanted: the state dict's names and shapes, in order.
        settings: the GPT-NeoX configuration of both sides.

    Returns:
        The stored tensor for each name in `wanted`; and the fate of each stored one, in the order of their names.

    Raises:
        ModelError: two files hold different tensors of one name, or a type that cannot be used.
        IncompleteError: a tensor is missing or has another shape.
    """
    by_name: dict[str, list[Stored]] = {}
    for stored in tensors:
        by_name.setdefault(_MAMBA.sub("gpt_neox.rcc_encoder", stored.name), []).append(stored)
    says_mamba = any(_MAMBA.match(stored.name) for stored in tensors)
    goes = {their_name(name): name for name in wanted}
    tied = {}
    if settings.tie_word_embeddings:
        goes.pop("embed_out.weight")
        tied = {"decoder.lm_head.weight": "gpt_neox.embed_in.weight"}
        _check_tied(source, by_name)
    fates, misshapen = [], []
    for name, copies in sorted(by_name.items(), key=lambda item: _natural(item[0])):
        first, shape = copies[0], wanted.get(goes.get(name, ""))
        if shape is None:
            fates += [Fate(stored.name, "ignored", _reason(name, settings)) for stored in copies]
            continue
        for other in copies[1:]:
            if (other.shape, other.dtype) != (first.shape, first.dtype) or other.digest() != first.digest():
                raise ModelError(
                    f"{other.name} in {other.file.name} is not what {first.name} in {first.file.name} is: keep the"
                    f" files of one checkpoint only in {source}."
                )
        if first.shape != shape:
            note = f"has shape {list(first.shape)} instead of {list(shape)}, which config.json asks for"
            misshapen.append(Fate(first.name, "misshapen", note))
        elif first.dtype not in DTYPES:
            raise ModelError(
                f"{first.name} in {first.file} is stored as {first.dtype}: get the checkpoint in bfloat16, float16 or"
                " float32."
            )
        else:
            fates.append(Fate(first.name, "used", "/".join(our_name(goes[name])).removeprefix("./")))
        fates += [Fate(other.name, "ignored", f"the same as in {first.file.name}") for other in copies[1:]]
    missing = [name.replace("rcc_encoder", "mamba") if says_mamba else name for name in goes if name not in by_name]
    fates += misshapen + [Fate(name, "missing", "the model needs it") for name in missing]
    if missing or misshapen:
        raise IncompleteError(_incomplete(source, missing, misshapen), fates)
    return {name: by_name[tied.get(name, their_name(name))][0] for name in wanted}, fates


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key to sort names by, layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _incomplete(source: Path, missing: list[str], misshapen: list[Fate]) -> str:
    if missing:
        more = f", one of {len(missing)} tensors that are missing" if len(missing) > 1 else ""
        return f"{source} lacks {missing[0]}{more}: get all files of the checkpoint."
    first = misshapen[0]
    more = f" ({len(misshapen)} tensors do not fit)" if len(misshapen) > 1 else ""
    return f"{first.name} in {source} {first.note}{more}: get the config.json that belongs to it."


def _reason(name: str, settings: Any) -> str:
    """Say why a tensor of the checkpoint is not used by our model."""
    if name == f"{DECODER}embed_out.weight":
        return "a second embed_out.weight, which nothing reads"
    if name == f"{ENCODER}embed_out.weight":
        return "the encoder's output layer, which nothing reads"
    if name == f"{PROJECTION}A_matrix.{settings.num_hidden_layers - 1}.weight":
        return "its term, after the last block, reaches no KV entry"
    if name == "embed_out.weight":
        return "config.json ties it to gpt_neox.embed_in.weight"
    if _BUFFER.search(name):
        return "a buffer of older transformers, computed from config.json"
    return UNKNOWN


def _check_tied(source: Path, by_name: dict[str, list[Stored]]) -> None:
    table, *_ = by_name.get("gpt_neox.embed_in.weight", [None])
    for other in by_name.get("embed_out.weight", []):
        if table is not None and other.digest() != table.digest():
            raise ModelError(
                f"{source / 'config.json'} ties embed_out.weight to gpt_neox.embed_in.weight, but they differ: set"
                " tie_word_embeddings to false."
            )


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file of the checkpoint.

    Args:
        file: which.
        remedy: what to do where there is no such file; the end of a message.

    Raises:
        ModelError: it is missing, damaged or not an object. FileError: it cannot be read.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent} has no {file.name}: {remedy}.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}): get it again.") from None
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} is not a JSON object: get it again.")
    return data
