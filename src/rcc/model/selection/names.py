"""What a selection is called: on the command line and in tables `selection-expected`, in files by its rule."""

from __future__ import annotations

SELECTION = "selection"
"""The command line's name of the rule `repeat`, and what the names of the others begin with."""


def rule_of(compressor: str) -> str:
    """Return the rule of a selection by the command line's name of it."""
    return compressor.removeprefix(SELECTION).removeprefix("-") or "repeat"


def made_by(rule: str) -> str:
    """Return what a context's file calls a selection by a rule."""
    return f"{SELECTION}, rule {rule}"


def rule_in(made: str) -> str:
    """Return the rule in what a context's file calls its compressor; empty: it is no selection."""
    kind, _, rule = made.partition(", rule ")
    return rule if kind == SELECTION else ""


def compressor_name(made: str) -> str:
    """Return the command line's name of what a context's file calls its compressor."""
    rule = rule_in(made)
    return "rcc" if not made else SELECTION if rule == "repeat" else f"{SELECTION}-{rule}"
