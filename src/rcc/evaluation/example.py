"""The repository's example text, for evaluations that were given no other."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = Path("examples/simple-susan.txt")


def example_text() -> Path | None:
    """Where the example is: below the working folder or, of an editable installation, with its source; or None."""
    places = [EXAMPLE, Path(__file__).resolve().parents[3] / EXAMPLE]
    return next((place for place in places if place.is_file()), None)
