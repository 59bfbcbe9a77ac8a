"""Import transformers, and keep it from saying anything beside its work."""

from __future__ import annotations

import gc
import sys


def import_transformers() -> None:
    """Import torch and what every model needs of transformers, which takes seconds, and silence it.

    Nearly all that an import makes stays to the end, so Python's garbage collector is off meanwhile, and leaves these
    objects out of its searches after it: searching them again and again took a sixth of the imports' time.
    """
    collects = "torch" not in sys.modules and gc.isenabled()
    if collects:
        gc.disable()
    try:
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401  # transformers imports at first use
    finally:
        if collects:
            gc.freeze()
            gc.enable()
    quiet_transformers()


def quiet_transformers() -> None:
    """Silence transformers' warnings and progress bars: the command line has its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
