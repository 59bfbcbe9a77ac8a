"""Keys of cells and samples, and how a page writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ...text.counts import show_count


def name_of(key: Mapping[str, Any]) -> str:
    """Return one text for keys that are the same, whatever their order."""
    return json.dumps(key, sort_keys=True)


def joined(*parts: str, between: str = " ") -> str:
    """Join the parts that are not empty."""
    return between.join(filter(None, parts))


def keys_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys that tell cells apart, of which a cell may lack some."""
    return list(dict.fromkeys(name for cell in cells for name in cell["key"]))


def describe(key: Mapping[str, Any]) -> str:
    """Write a key: `{"method": "rcc", "rate": 8, "length": 512, "start": 75}` → `rcc · 8× · 512 tokens · start 75`."""
    parts = []
    for name, value in key.items():
        text = text_of(key, name)
        if name == "length":
            text += " tokens"
        elif text and name != "rate" and not isinstance(value, str):
            text = f"{name} {text}"
        parts.append(text)
    return joined(*parts, between=" · ")


def text_of(key: Mapping[str, Any], name: str) -> str:
    """Write a part of a key as a table shows it; nothing for none, and for the rate of what does not compress."""
    value = key.get(name)
    if value is None or (name == "rate" and not value):
        return ""
    if name == "rate":
        return f"{value}×"
    return show_count(value) if name == "length" and isinstance(value, int) else str(value)
