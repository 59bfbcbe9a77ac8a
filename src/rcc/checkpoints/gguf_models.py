"""Language models that are one GGUF file, as transformers reads them: dequantized when they are loaded.

Those of :data:`rcc.checkpoints.BASES` are made into folders instead, see :mod:`.dequantizing`.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # transformers takes seconds to import: each function imports what it needs
    from transformers import PreTrainedModel


def is_gguf(path: str | Path) -> bool:
    """Return whether a path is a GGUF file's, by its name."""
    return Path(path).suffix == ".gguf" and os.path.isfile(path)


@contextmanager
def source(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what transformers' `from_pretrained` takes for a model's folder or GGUF file: a folder, and arguments.

    A GGUF file is shown in a folder of its own: of one with a tokenizer's files beside it transformers would read
    those, too.
    """
    if not is_gguf(path):
        yield str(path), {}
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.absolute())
        yield folder, {"gguf_file": path.name}


def load_gguf(kind: Any, path: Path, **settings: Any) -> PreTrainedModel:
    """Load a GGUF file as a class of transformers' models, dequantized.

    Args:
        kind: the class.
        path: the file.
        **settings: go to its `from_pretrained`.
    """
    import transformers
    from transformers.utils import logging

    # newer versions would rather fetch a kernel from the hub, which is code
    config = getattr(transformers, "GgufConfig", None)
    how = {} if config is None else {"quantization_config": config(dequantize=True)}
    with source(path) as (folder, file), ExitStack() as stack:
        if not logging.is_progress_bar_enabled():  # which one bar of this reader does not ask about
            stack.enter_context(redirect_stderr(io.StringIO()))
        model: PreTrainedModel = kind.from_pretrained(folder, trust_remote_code=False, **file, **how, **settings)
        return model
