"""Heat maps of a passkey test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...text.counts import show_count
from .folders import Finished, SampleLists
from .groups import ChartGroup, shade
from .tables import Cell, Table, heat_map


def passkey(runs: list[Finished], samples: SampleLists) -> Iterator[ChartGroup]:
    """Yield accuracy by length and position, beside the control's, for each variant."""
    for variant in dict.fromkeys(cell["key"]["variant"] for run in runs for cell in run.cells):
        heat = [by_position(run, variant, samples) for run in runs]
        yield ChartGroup(f"Variant {variant}", heat=[table for table in heat if table.rows])


def by_position(run: Finished, variant: str, samples: SampleLists) -> Table:
    """Return the share of keys found by length, rate and position of the key, and the control's."""
    names = {"whole": "found in the text", "replaced": "control: key replaced"}
    rows: dict[tuple[int, int], dict[tuple[str, str], Cell | str]] = {}
    for key, cell, link in samples.cells(run):
        if key["variant"] == variant:
            row = rows.setdefault((key["length"], key["rate"]), {})
            row[names[key["context"]], key["position"]] = shade(cell, "right", link, percent=True)
    columns: dict[str, list[str]] = {}
    for heading in names.values():
        if positions := dict.fromkeys(position for row in rows.values() for at, position in row if at == heading):
            columns[heading] = list(positions)
    shown: dict[tuple[str, ...], Any] = {(show_count(n), f"{rate}×"): rows[n, rate] for n, rate in sorted(rows)}
    return heat_map(run.name, ["tokens", "rate"], columns, shown)
