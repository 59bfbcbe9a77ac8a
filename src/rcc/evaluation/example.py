"""The repository's example text, for evaluations that were given no other."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = Path("examples/simple-susan.txt")


def example_text() -> Path | None:
    """Return the example's path, below the working folder or with the source of an editable installation; or None."""
    paths = [EXAMPLE, Path(__file__).resolve().parents[3] / EXAMPLE]
    return next((path for path in paths if path.is_file()), None)
