"""What a selection is called: on the command line and in tables `selection-expected`, in files by its rule."""

from __future__ import annotations

SELECTION = "selection"
"""The command line's name of the rule `repeat`, and what the names of the others begin with."""


def rule_of(compressor: str) -> str:
    """Return the rule of a selection by the command line's name of it."""
    return compressor.removeprefix(SELECTION).removeprefix("-") or "repeat"


def compressor_name(made: str) -> str:
    """Return the command line's name of what a context's file calls its compressor."""
    rule = made.removeprefix(f"{SELECTION}, rule ")
    return "rcc" if not made else SELECTION if rule == "repeat" else f"{SELECTION}-{rule}"
