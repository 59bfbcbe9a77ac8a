"""The authors' published checkpoint → a model folder of ours, tensor by tensor.

Their folder holds a GPT-NeoX base's config.json and one tree of names in any number of safetensors files: a decoder,
within it an encoder of the same shape, and the projections. Some files say `mamba` where others say `rcc_encoder`.

| theirs                                         | ours                                                           |
|------------------------------------------------|----------------------------------------------------------------|
| `gpt_neox.…`, `embed_out.weight`               | `decoder/`                                                     |
| `gpt_neox.rcc_encoder.gpt_neox.…`              | `encoder/`                                                     |
| `gpt_neox.rcc_encoder2gpt_embed.weight`        | `projections.0.weight`                                         |
| `gpt_neox.rcc_encoder2gpt_A_matrix.N.weight`   | `projections.N+1.weight`; the last one reaches no KV entry     |
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast

from .. import checkpoints
from ..config import BaseReference, RCCConfig
from ..context import file as fileformat
from ..errors import FileError, InputError, ModelError, RCCError
from ..model.fingerprint import fingerprint_of
from ..model.loading import WEIGHTS
from ..model.rcc import RCCForCausalLM
from ..runtime import atomic

Progress = Callable[[int, int], None]
"""Called with bytes done so far and bytes to do."""

SEGMENT_LENGTH, RATE = 2048, 32
"""The published checkpoint's; no file of it says so."""

DECODER = "gpt_neox."
ENCODER = "gpt_neox.rcc_encoder."
PROJECTION = "gpt_neox.rcc_encoder2gpt_"
_MAMBA = re.compile(r"^gpt_neox\.mamba(?=\.|2gpt_)")
_BUFFER = re.compile(r"\.(attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in one of the checkpoint's files.

    Attributes:
        name: as that file has it.
        dtype: as safetensors calls it: `BF16`, ….
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Its values, mapped.

        Raises:
            ModelError, FileError: the file is damaged or cannot be read.
        """
        try:
            return checkpoints.read_tensor(self.file, self.name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.file, error) from error

    def digest(self) -> str:
        """SHA-256 of its type, shape and values."""
        digest = hashlib.sha256()
        checkpoints.add_tensor(digest, "", self.read())
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


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_checkpoint` did.

    Attributes:
        out: the folder that was written.
        tensors: every tensor of the checkpoint, in the order of their names.
        dtype: that the model has unless it is loaded in another one.
        tokenizer: the folder that the tokenizer came from; None: there was none.
    """

    out: Path
    tensors: list[Fate]
    dtype: torch.dtype
    tokenizer: Path | None

    def summary(self) -> str:
        """How many tensors were used and how many not, in a few words."""
        count = Counter(tensor.fate for tensor in self.tensors)
        unknown = sum(tensor.note == _UNKNOWN for tensor in self.tensors)
        return f"{count['used']} tensors used, {count['ignored']} ignored ({unknown} of them unknown)"


class IncompleteError(ModelError):
    """A checkpoint that lacks tensors, or has them in another shape; `tensors` lists them all, and the others."""

    def __init__(self, message: str, tensors: list[Fate]):
        super().__init__(message)
        self.tensors = tensors


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    *,
    segment_length: int = SEGMENT_LENGTH,
    rate: int = RATE,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Make a folder for :meth:`RCCForCausalLM.from_pretrained` of one in the authors' layout.

    One tensor at a time is in memory, as it is stored, and is written so; where types are mixed, the model is
    loaded in the narrowest one that holds them all. The folder appears by one rename, complete.

    Args:
        out: a new folder, or an empty one.
        tokenizer: a folder that holds the model's tokenizer; None: `source`, if it has one.
        segment_length, rate: what the checkpoint was trained with, which it does not say.

    Raises:
        InputError: `source` is no folder, `out` is not free, the tokenizer is none or has more tokens than the model,
            or segment or rate cannot be.
        ModelError: the checkpoint is not a GPT-NeoX one, or damaged or contradictory; :class:`IncompleteError`: it
            lacks tensors, or has them in another shape.
        FileError: something cannot be read or written.
    """
    source, target = Path(source), _free(out)
    settings = _base_config(source)
    words = None if tokenizer is None else Path(tokenizer)
    if words is None and checkpoints.has_tokenizer(source):
        words = source
    tokens = None if words is None else _load_tokenizer(words, settings)
    config = RCCConfig(
        segment_length=segment_length,
        rates=[rate],
        segment_padding="repeat",
        share_base=False,
        encoder_lora_rank=0,
        decoder_lora_rank=0,
        name=target.name,
    )
    wanted = _wanted(source, config, settings)
    places, fates = _match(source, _stored(source), wanted, settings)
    settings.dtype = functools.reduce(torch.promote_types, {_DTYPES[stored.dtype] for stored in places.values()})

    try:
        with atomic.new_folder(target) as work:
            for side, architecture in (("decoder", "GPTNeoXForCausalLM"), ("encoder", "GPTNeoXModel")):
                (work / side).mkdir()
                settings.architectures = [architecture]
                settings.save_pretrained(work / side)
            if tokens is not None:
                _save_tokenizer(tokens, work / "decoder")
            if (source / "generation_config.json").is_file():
                shutil.copyfile(source / "generation_config.json", work / "decoder" / "generation_config.json")
            _write(work, config, places, settings, progress)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}.") from error
    return Conversion(Path(out), fates, settings.dtype, words)


# ---------------------------------------------------------------- what is asked for
def _free(out: str | Path) -> Path:
    """The folder to write, behind any symbolic links."""
    target = Path(os.path.realpath(out))
    if os.path.lexists(target) and not target.is_dir():
        raise InputError(f"{out} is a file: name a new folder.")
    try:
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"{out} is not empty: name a new folder.")
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}.") from None
    if not target.parent.is_dir():
        raise InputError(f"{out} cannot be written: {Path(out).parent} is not a folder.")
    return target


def _base_config(source: Path) -> Any:
    """The configuration of both sides, in today's form."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: name the folder that the checkpoint was downloaded to.")
    data = _read_json(source / "config.json", "the checkpoint's base is described there, get it from where the rest is")
    if data.get("model_type") != "gpt_neox":
        raise ModelError(
            f"{source} is not a checkpoint of the authors: its config.json is of the family"
            f" {data.get('model_type')!r}, and theirs are 'gpt_neox'."
        )
    data.pop("auto_map", None)  # the name of code that is not copied
    try:
        return GPTNeoXConfig.from_dict(data)
    except Exception as error:  # transformers has its own for each way to be wrong
        raise _no_model(source, error) from error


def _wanted(source: Path, config: RCCConfig, settings: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the state dict of our model, in order."""
    try:
        with torch.device("meta"):  # without storage
            kinds = AutoModel, AutoModelForCausalLM
            model = RCCForCausalLM(config, *(kind.from_config(settings, trust_remote_code=False) for kind in kinds))
    except RCCError:
        raise
    except Exception as error:  # a setting that transformers first looks at here
        raise _no_model(source, error) from error
    return {name: tuple(tensor.shape) for name, tensor in sorted(model.state_dict().items())}


def _no_model(source: Path, error: Exception) -> ModelError:
    reason = str(error).strip().rpartition("\n")[2].strip().rstrip(".") or type(error).__name__
    return ModelError(f"{source / 'config.json'} describes no GPT-NeoX model ({reason}): get it again.")


def _read_json(file: Path, remedy: str) -> dict[str, Any]:
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


def _load_tokenizer(folder: Path, settings: Any) -> Any:
    if not checkpoints.has_tokenizer(folder):
        raise InputError(f"{folder} has no tokenizer: name a folder with tokenizer.json.")
    # what transformers picks for GPT-NeoX replaces the splitting rules that a tokenizer.json has by its own
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        most = max(tokenizer.get_vocab().values(), default=-1)
    except Exception as error:  # OSError, ValueError, and plain Exception from the Rust side
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(f"the tokenizer in {folder} cannot be loaded ({reason}): get it again.") from error
    if most >= settings.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has token ids up to {most}, and the model only {settings.vocab_size} tokens:"
            " name the folder of the one that belongs to it."
        )
    return tokenizer


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # how a full disk shows itself on the Rust side
        raise OSError(str(error)) from error


# ---------------------------------------------------------------- what is there
def _stored(source: Path) -> list[Stored]:
    """Every tensor in the folder's safetensors files, without reading any values."""
    files = sorted(p for p in source.glob("*.safetensors") if p.is_file())
    if not files:
        pickles = sorted(p.name for p in source.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        only = f", only {pickles[0]}, which can hold any code and is not read" if pickles else ""
        raise ModelError(f"{source} has no *.safetensors file{only}: get the checkpoint in that format.")
    for index in sorted(source.glob("*.safetensors.index.json")):
        named = _read_json(index, "").get("weight_map")
        for name in sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []:
            if not (source / name).is_file():
                raise ModelError(f"{source} lacks {name}, which {index.name} names: get that file too.")
    found = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found.append(Stored(file, name, tuple(part.get_shape()), part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise _unreadable(file, error) from error
    return found


def _unreadable(file: Path, error: Exception) -> ModelError | FileError:
    if isinstance(error, OSError) and error.strerror:
        return FileError(f"{file} cannot be read: {error.strerror}.")
    return ModelError(f"{file} is damaged or cut short ({str(error).strip().rstrip('.')}): get it again.")


# ---------------------------------------------------------------- what goes where
_UNKNOWN = "unknown: the model has no such tensor"


def _theirs(name: str) -> str:
    """A name in our model's state dict → the checkpoint's."""
    if name == "decoder.lm_head.weight":
        return "embed_out.weight"
    side, _, rest = name.partition(".")
    if side == "decoder":
        return rest  # `gpt_neox.` stands there already
    if side == "encoder":
        return f"{ENCODER}gpt_neox.{rest}"
    number = int(rest.removesuffix(".weight"))
    return PROJECTION + (f"A_matrix.{number - 1}.weight" if number else "embed.weight")


def _ours(name: str) -> tuple[str, str]:
    """A name in our model's state dict → the subfolder of the model's folder that it is in, and its name there."""
    if name == "decoder.lm_head.weight":
        return "decoder", "embed_out.weight"  # as everything but transformers 5 calls it
    side, _, rest = name.partition(".")
    return (".", name) if side == "projections" else (side, rest)


def _match(
    source: Path, found: list[Stored], wanted: dict[str, tuple[int, ...]], settings: Any
) -> tuple[dict[str, Stored], list[Fate]]:
    """What each tensor of our model's state dict is made of, and what becomes of each of the checkpoint's.

    Args:
        wanted: the state dict's names and shapes, in order.
    """
    by_name: dict[str, list[Stored]] = {}
    for stored in found:
        by_name.setdefault(_MAMBA.sub("gpt_neox.rcc_encoder", stored.name), []).append(stored)
    says_mamba = any(_MAMBA.match(stored.name) for stored in found)
    goes = {_theirs(name): name for name in wanted}
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
        elif first.dtype not in _DTYPES:
            raise ModelError(
                f"{first.name} in {first.file} is stored as {first.dtype}: get the checkpoint in bfloat16, float16 or"
                " float32."
            )
        else:
            fates.append(Fate(first.name, "used", "/".join(_ours(goes[name])).removeprefix("./")))
        fates += [Fate(other.name, "ignored", f"the same as in {first.file.name}") for other in copies[1:]]
    missing = [name.replace("rcc_encoder", "mamba") if says_mamba else name for name in goes if name not in by_name]
    fates += misshapen + [Fate(name, "missing", "the model needs it") for name in missing]
    if missing or misshapen:
        raise IncompleteError(_incomplete(source, missing, misshapen), fates)
    return {name: by_name[tied.get(name, _theirs(name))][0] for name in wanted}, fates


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _incomplete(source: Path, missing: list[str], misshapen: list[Fate]) -> str:
    if missing:
        more = f", one of {len(missing)} tensors that are missing" if len(missing) > 1 else ""
        return f"{source} lacks {missing[0]}{more}: get all files of the checkpoint."
    first = misshapen[0]
    more = f" ({len(misshapen)} tensors do not fit)" if len(misshapen) > 1 else ""
    return f"{first.name} in {source} {first.note}{more}: get the config.json that belongs to it."


def _reason(name: str, settings: Any) -> str:
    """Why a tensor of the checkpoint that our model has no place for is left out."""
    if name == f"{DECODER}embed_out.weight":
        return "a second embed_out.weight, which nothing reads"
    if name == f"{ENCODER}embed_out.weight":
        return "the encoder's output layer, which nothing reads"
    if name == f"{PROJECTION}A_matrix.{settings.num_hidden_layers - 1}.weight":
        return "its term, behind the last block, reaches no KV entry"
    if name == "embed_out.weight":
        return "config.json ties it to gpt_neox.embed_in.weight"
    if _BUFFER.search(name):
        return "a buffer of older transformers, computed from config.json"
    return _UNKNOWN


def _check_tied(source: Path, by_name: dict[str, list[Stored]]) -> None:
    table, *_ = by_name.get("gpt_neox.embed_in.weight", [None])
    for other in by_name.get("embed_out.weight", []):
        if table is not None and other.digest() != table.digest():
            raise ModelError(
                f"{source / 'config.json'} ties embed_out.weight to gpt_neox.embed_in.weight, but they differ: set"
                " tie_word_embeddings to false."
            )


# ---------------------------------------------------------------- writing
def _write(folder: Path, config: RCCConfig, places: dict[str, Stored], settings: Any, progress: Progress) -> None:
    """Write weights, hashes and configuration into a folder that has subfolders for both sides already."""
    sizes = {s: _DTYPES[s.dtype].itemsize * torch.Size(s.shape).numel() for s in places.values()}
    done, total = 0, 2 * sum(sizes[stored] for stored in places.values())  # written, then read for the fingerprint

    def read(stored: Stored) -> Tensor:
        nonlocal done
        progress(done, total)
        done += sizes[stored]
        return stored.read()

    files: dict[str, dict[str, Stored]] = {"decoder": {}, "encoder": {}, ".": {}}
    for name, stored in places.items():
        where, there = _ours(name)
        if not (settings.tie_word_embeddings and there == "embed_out.weight"):  # the table itself is stored only
            files[where][there] = stored
    for where, tensors in files.items():
        lazy = {name: (_DTYPES[s.dtype], s.shape, functools.partial(read, s)) for name, s in tensors.items()}
        fileformat.write_weights(folder / where / WEIGHTS, lazy)
        digest = checkpoints.weights_sha256(folder / where)
        if where == ".":
            config.weights_sha256 = digest
        else:
            config.base[where] = BaseReference(where, digest)
    state = ((name, read(stored)) for name, stored in places.items())
    config.fingerprint = fingerprint_of(config, state, settings.dtype)
    config.save(folder)
    progress(total, total)
