"""What transformers says beside its work."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Silence transformers' warnings and progress bars: the command line has its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
