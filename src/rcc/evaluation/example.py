"""The repository's example text, for evaluations that were given no other."""

from __future__ import annotations

from pathlib import Path

EXAMPLE = Path("examples/simple-susan.txt")


def example_text() -> Path | None:
    """Where the example is: below the working folder or, of an editable installation, with its source; or None."""
    candidates = [EXAMPLE, Path(__file__).resolve().parents[3] / EXAMPLE]
    return next((path for path in candidates if path.is_file()), None)
