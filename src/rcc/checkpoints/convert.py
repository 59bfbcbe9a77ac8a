"""The authors' published checkpoint → a model folder of ours, tensor by tensor.

Their folder holds a GPT-NeoX base's config.json and one tree of names in any number of safetensors files: a decoder,
within it an encoder of the same shape, and the projections (:mod:`rcc.checkpoints.published`).
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast

from .. import checkpoints
from ..config import BaseReference, RCCConfig, SideConfig
from ..context import file as fileformat
from ..errors import FileError, InputError, ModelError, RCCError
from ..model.fingerprint import fingerprint_of
from ..model.loading import WEIGHTS
from ..model.rcc import RCCForCausalLM
from ..runtime import atomic
from .published import DTYPES, UNKNOWN, Fate, Stored, match, our_name, read_json, stored_tensors

Progress = Callable[[int, int], None]
"""Called with bytes done so far and bytes to do."""

SEGMENT_LENGTH, RATE = 2048, 32
"""The published checkpoint's; no file of it says so."""


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
        """Say in a few words how many tensors were used and how many were not."""
        count = Counter(tensor.fate for tensor in self.tensors)
        unknown = sum(tensor.note == UNKNOWN for tensor in self.tensors)
        return f"{count['used']} tensors used, {count['ignored']} ignored ({unknown} of them unknown)"


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
        source: the folder that the checkpoint was downloaded to.
        out: a new folder, or an empty one.
        tokenizer: a folder that holds the model's tokenizer; None: `source`, if it has one.
        segment_length: tokens of a segment in its training, which no file of it says.
        rate: the compression rate that it was trained at, which no file says either.
        progress: called before each tensor with bytes done and bytes to do; each is read twice, and counts twice.

    Raises:
        InputError: `source` is no folder, `out` is not free, the tokenizer does not fit, or segment or rate cannot be.
        ModelError: the checkpoint is not a GPT-NeoX one, damaged or contradictory.
        IncompleteError: it lacks tensors, or has them in another shape.
        FileError: something cannot be read or written.
    """
    source, target = Path(source), _free(out)
    settings = _base_config(source)
    words = Path(tokenizer) if tokenizer is not None else source if checkpoints.has_tokenizer(source) else None
    tokens = None if words is None else _load_tokenizer(words, settings)
    config = RCCConfig(
        segment_length=segment_length,
        rates=[rate],
        segment_padding="repeat",
        share_base=False,
        encoder=SideConfig(lora_rank=0),
        decoder=SideConfig(lora_rank=0),
        name=target.name,
    )
    sources, fates = match(source, stored_tensors(source), _wanted(source, config, settings), settings)
    settings.dtype = functools.reduce(torch.promote_types, {DTYPES[stored.dtype] for stored in sources.values()})

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
            _write(work, config, sources, settings, progress)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}.") from error
    return Conversion(Path(out), fates, settings.dtype, words)


# ---------------------------------------------------------------- what is asked for
def _free(out: str | Path) -> Path:
    """Return the folder to write, with symbolic links followed, after making sure that it is free."""
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
    """Return the configuration of both sides, as the installed transformers has it."""
    if not source.is_dir():
        raise InputError(f"{source} is not a folder: name the folder that the checkpoint was downloaded to.")
    data = read_json(source / "config.json", "the checkpoint's base is described there, get it from where the rest is")
    checkpoints.check_depth(data, source / "config.json")
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
    """Return the names and shapes in the state dict of our model, in order."""
    try:
        with torch.device("meta"):  # without storage
            make: list[Any] = [AutoModel.from_config, AutoModelForCausalLM.from_config]  # which have no types
            encoder, decoder = (from_config(settings, trust_remote_code=False) for from_config in make)
            model = RCCForCausalLM(config, encoder, decoder)
    except RCCError:
        raise
    except Exception as error:  # a setting that transformers first looks at here
        raise _no_model(source, error) from error
    return {name: tuple(tensor.shape) for name, tensor in sorted(model.state_dict().items())}


def _no_model(source: Path, error: Exception) -> ModelError:
    reason = str(error).strip().rpartition("\n")[2].strip().rstrip(".") or type(error).__name__
    return ModelError(f"{source / 'config.json'} describes no GPT-NeoX model ({reason}): get it again.")


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


def _write(folder: Path, config: RCCConfig, sources: dict[str, Stored], settings: Any, progress: Progress) -> None:
    """Write weights, hashes and configuration into a folder that has subfolders for both sides already."""
    sizes = {s: DTYPES[s.dtype].itemsize * torch.Size(s.shape).numel() for s in sources.values()}
    done, total = 0, 2 * sum(sizes[stored] for stored in sources.values())  # written, then read for the fingerprint

    def read(stored: Stored) -> Tensor:
        nonlocal done
        progress(done, total)
        done += sizes[stored]
        return stored.read()

    files: dict[str, dict[str, Stored]] = {"decoder": {}, "encoder": {}, ".": {}}
    for name, stored in sources.items():
        subfolder, stored_name = our_name(name)
        if not (settings.tie_word_embeddings and stored_name == "embed_out.weight"):  # the table itself is stored only
            files[subfolder][stored_name] = stored
    for subfolder, tensors in files.items():
        lazy = {name: (DTYPES[s.dtype], s.shape, functools.partial(read, s)) for name, s in tensors.items()}
        fileformat.write_weights(folder / subfolder / WEIGHTS, lazy)
        digest = checkpoints.weights_sha256(folder / subfolder)
        if subfolder == ".":
            config.weights_sha256 = digest
        else:
            config.base[subfolder] = BaseReference(subfolder, digest)
    state = ((name, read(stored)) for name, stored in sources.items())
    config.fingerprint = fingerprint_of(config, state, settings.dtype)
    config.save(folder)
    progress(total, total)
