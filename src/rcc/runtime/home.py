"""The folder for what rcc makes or fetches."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """Return the folder for what rcc makes or fetches: $RCC_HOME, else the user's cache folder. Not created here."""
    named = os.environ.get("RCC_HOME")
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("rcc")
