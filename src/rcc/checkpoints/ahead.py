"""Weights are hashed by a core of its own while torch and transformers are imported, which takes as long."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from ..config import RCCConfig
from ..defaults import default_model
from ..errors import RCCError
from .bases import BASES
from .hashing import begin_sha256
from .making import made_base
from .resolve import shipped_models

_HEADER = 1 << 20
"""Bytes of a context's header that are looked at, at most."""


def hash_ahead(model: str | None, made: str | Path | None) -> None:
    """Begin to hash the weights of a model and of its bases, where they lie on this machine.

    Whatever is wrong with them is told by what loads the model later.

    Args:
        model: a name or folder; None: the model that made the context file `made`, or without that the default one.
        made: a context file.
    """
    with suppress(RCCError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        name = model or (_maker(Path(made)) if made is not None else default_model())
        folder = shipped_models().get(name) or Path(name).expanduser()
        bases = {base.source for base in RCCConfig.load(folder).base.values()}
        begin_sha256(folder)
        for source in bases:
            path = made_base(source) if source in BASES else folder / source
            if path is not None and path.is_dir():
                begin_sha256(path)


def _maker(context: Path) -> str:
    """Return the name of the model that made a context, by the file's header, which is not checked here."""
    with context.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(min(size, _HEADER)))["__metadata__"]
    return str(json.loads(metadata["rcc"])["model"])
