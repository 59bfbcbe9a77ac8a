"""A plan as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any


def lines(data: dict[str, Any]) -> Iterator[str]:
    """Yield a plan as text, line by line."""
    for side in filter(None, (data["backbone"], data["encoder"])):
        facts = [side["family"], f"{side['layers']} layers of width {side['hidden_size']:,}"]
        if side["attention_heads"]:
            facts.append(f"{side['attention_heads']} heads")
            if side["key_value_heads"] != side["attention_heads"]:
                facts[-1] += f" ({side['key_value_heads']} of keys and values)"
            facts.append(f"a window of {side['window']:,} positions")
        yield f"{side['name']}: {', '.join(facts)}"

    base = data["backbone"]["parameters"]
    names = {
        "projections": "projections",
        "sink": "sink",
        "encoder": f"encoder, {'a second copy' if data['encoder'] is None else data['encoder']['name']}",
        "lora_encoder": f"{data['learns']}, encoder",
        "lora_decoder": f"{data['learns']}, decoder",
    }
    yield "\nparameters"
    yield from _table(
        ["base", f"{base:,}"],
        *([names[key], f"{count:,}"] for key, count in data["added"].items()),
        ["in all", f"{data['parameters']:,}", f"{data['parameters'] / base - 1:.1%} more than the base"],
    )

    plain = data["reading"][0]
    yield f"\ncompressed context, segments of {data['segment_length']:,} tokens"
    yield f"  {data['position_bytes']:,} bytes a position, {data['dtype']}"
    yield from _table(
        ["", "longest text, tokens", f"KV cache of {plain['texts'][-1]['tokens']:,}"],
        *([_rate(r), f"{r['longest_text']:,}", _gb(r["texts"][-1]["kv_bytes"])] for r in data["reading"]),
    )
    yield f"  beside {data['reserve']:,} positions for a question and its answer"

    yield f"\nmemory to serve, {data['dtype']} weights and KV cache; what a pass works with comes on top"
    table = [["text, tokens", *(_rate(r) for r in data["reading"])]]
    for i, text in enumerate(plain["texts"]):
        cells = [r["texts"][i] for r in data["reading"]]
        table.append([f"{text['tokens']:,}", *(_gb(c["bytes"]) + (" " if c["fits"] else "*") for c in cells)])
    yield from _table(*table)
    if any("*" in cell for row in table for cell in row):
        yield "  * does not fit the window"

    first = data["training"][0]
    yield f"\nmemory to train, {first['texts']} text a batch and {first['decoder_tokens']} decoder tokens"
    table = [["what learns", "text, tokens", "rate", "state", "activations", "with checkpointing"]]
    for row in data["training"]:
        sizes = (f"about {_gb(row[f'estimated_{what}_bytes'])}" for what in ("activations", "checkpointed"))
        name = ", ".join([row["learns"], *(f"{side} frozen" for side in row["frozen"])])
        table.append([name, f"{row['context_tokens']:,}", _rate(row), _gb(row["state_bytes"]), *sizes])
    yield from _table(*table)
    yield "  state: weights, gradients and AdamW's moments; activations are estimates, and grow with the texts a batch"


def _rate(row: dict[str, Any]) -> str:
    return "plain" if row["rate"] is None else f"{row['rate']}×"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _table(*rows: list[str]) -> Iterator[str]:
    """Yield rows of cells: the first column to the left, numbers to the right, a remark after the second as it is."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    for first, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)]
        yield "  ".join(["", first.ljust(widths[0]), *aligned]).rstrip()
