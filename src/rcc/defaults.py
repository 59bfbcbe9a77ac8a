"""What is used where nothing is named; the command line reads it before torch is loaded."""

from __future__ import annotations

import os

DEFAULT_MODEL = "rcc-qwen2.5-0.5b"
BUDGET = 4096
"""Positions that a context takes at most where the rate is chosen for it: a first token within a second or so."""


def default_model() -> str:
    """Return the model to use where none is named: $RCC_MODEL, else :data:`DEFAULT_MODEL`."""
    return os.environ.get("RCC_MODEL") or DEFAULT_MODEL
