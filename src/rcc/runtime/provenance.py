"""What made a file: library versions, the commit of a source checkout, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def libraries() -> dict[str, str]:
    """Return the versions of rcc and of the libraries that its results depend on."""
    import torch
    import transformers

    from .. import __version__

    return {"rcc": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def commit() -> dict[str, str]:
    """Return `{"commit": …}` of a source checkout, `-dirty` where it was changed; an empty dict elsewhere."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return {"commit": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.SubprocessError):
        return {}


def machine() -> dict[str, str | int]:
    """Return processor, threads and GPU of this process."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    facts: dict[str, str | int] = {
        "python": platform.python_version(),
        "processor": processor,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts
