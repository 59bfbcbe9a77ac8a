"""The figures of a reconstruction by the places of tokens."""

from __future__ import annotations

from typing import Any

from conftest import make_model
from rcc.evaluation.reconstruction.table import by_place, padding_before
from rcc.evaluation.results import interval


def test_places_by_hand() -> None:
    """Which tokens stand where in segment and group: samples made up, with one and with two documents."""

    def row(document: int, start: int, recalled: str, context: str = "real") -> dict[str, Any]:
        key = {"length": 64, "rate": 4, "document": document, "start": start, "context": context}
        return {"key": key, "recalled": recalled}

    # the targets begin at tokens 10 and 48, places 10 and 0 of a segment
    rows = [row(0, 0, "110100"), row(0, 38, "10"), row(1, 0, "000000", "wrong"), {**row(1, 0, ""), "skipped": "why"}]
    shares = by_place(rows, 64, 4, 16)
    means = [None if v is None else v.mean for v in shares["segment"]]  # pairs of places
    assert means == [0.5, None, None, None, None, 1.0, 0.5, 0.0]
    # places 10 … 15 are 2, 3, 0, 1, 2, 3 of their groups, 0 and 1 those
    assert [(v.mean, v.n) for v in shares["group"]] == [(0.5, 2), (0.5, 2), (0.5, 2), (0.5, 2)]
    rows.append(row(1, 0, "010000"))
    assert by_place(rows, 64, 4, 16)["segment"][5] == interval([1, 1, 0, 1], [0, 0, 1, 1])
    # 60 tokens: 4 of padding stand before them, so the target begins at place 14
    moved = [row(0, 0, "10")]
    moved[0]["key"]["length"] = 60
    padding = padding_before(make_model(segment_padding="repeat"), 60)
    assert by_place(moved, 60, 4, 16, padding)["segment"][7] == interval([1, 0], [0, 0])
    assert by_place(moved, 60, 4, 16)["segment"][5] == interval([1, 0], [0, 0])
