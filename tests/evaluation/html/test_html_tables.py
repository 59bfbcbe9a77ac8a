"""Figures as a page's tables show them."""

from __future__ import annotations

import math
from typing import Any

from rcc.evaluation.html.tables import digits


def test_digits() -> None:
    """As many places for all of a column as its smallest figure needs."""
    columns: Any = [0.5, 0.02], [3.0, 12.0], [4.133, 0.2], [812.4], [51_540.2, 12.6], [1200.5, 12.6], [math.nan], []
    assert [digits(column) for column in columns] == [3, 0, 3, 0, 0, 1, 0, 0]
