"""The table of a passkey test, by hand."""

from __future__ import annotations

from typing import Any

from rcc.evaluation.passkey.settings import BY
from rcc.evaluation.passkey.table import PasskeyReport
from rcc.evaluation.results import Results


def test_the_table() -> None:
    """By hand: 19 of 20 found at the start, 20 of 20 at the end; beside the paper's row for its lengths only."""
    settings: dict[str, Any] = {
        "variants": ["plain"],
        "positions": ["start", "end"],
        "model": "m",
        "batch_tokens": None,
        "prose": {},
    }
    run = Results("passkey", settings)

    def row(length: int, position: str, context: str, sample: int, right: bool) -> None:
        names = (*BY, "sample")
        key = dict(zip(names, ("plain", 512, length, position, context, sample), strict=True))
        more = {"text": {"segments": 64}, "segments_read": 5 + sample, "seconds": 2.0, "peak_mb": 100.0 + sample}
        run.rows.append({"key": key, "right": right, **more})

    for length in (2**13, 2**15):
        for sample in range(20):
            row(length, "start", "whole", sample, sample != 7)
            row(length, "end", "whole", sample, True)
        row(length, "start", "replaced", 0, False)
    skipped = {"variant": "plain", "rate": 4, "length": 2**20, "position": "start", "context": "whole", "sample": 0}
    run.rows.append({"key": skipped, "skipped": "1M tokens at 4× take too much"})
    lines = PasskeyReport(run).table().splitlines()[2:]
    figures = "95.0% [76.4%, 99.1%] | 100.0% [83.9%, 100.0%] | 0 of 1 | 2.00 | 119 | 24 of 64 |"
    assert lines == [
        f"| plain | 8k | 512× | {figures}",
        f"| plain | 32k | 512× | {figures}",
        "| plain, the paper's | 32k | 512× | 99% | 100% | – | – | – | – |",
        "| plain | 1M | 4× | does not fit | does not fit | – | – | – | – |",
        "| plain, the paper's | 1M | 512× | 100% | 100% | – | – | – | – |",
    ]
