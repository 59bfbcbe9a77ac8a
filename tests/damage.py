"""JSON damaged at random, and what a reader may do with it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rcc import RCCError

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    float("inf"),
    float("nan"),
    "x",
    "",
    "\ud800",
    "\0",
    [],
    [[]],
    {},
    {"a": 1},
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


def damaged(value: Any, count: int) -> Iterator[Any]:
    """Copies of a value, each with one place taken out or changed."""
    rng, every = random.Random(0), list(paths(value))
    for _ in range(count):
        changed = copy.deepcopy(value)
        *parents, last = rng.choice(every)
        inner = changed
        for key in parents:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[last]
        else:
            inner[last] = rng.choice(VALUES)
        yield changed


def attempt(read: Callable[[], object]) -> None:
    said = ""
    try:
        read()
    except RCCError as error:
        said = str(error)
    assert "\n" not in said.strip()


DEEP = "[" * 50_000
"""Nested deeper than a parser's stack."""

ODD = [DEEP, "5", "{}", "[]", "null", "", "\x00", '"x"']
"""What is no table of settings, or no JSON."""


def read_damaged(file: Path, count: int, read: Callable[[], object]) -> None:
    """Read a file of JSON, damaged in many ways; it is whole again afterwards."""
    good = file.read_text()
    for text in [*(json.dumps(data) for data in damaged(json.loads(good), count)), *ODD]:
        file.write_text(text)
        attempt(read)
    file.write_text(good)


def read_damaged_lines(file: Path, count: int, read: Callable[[], object]) -> None:
    """Damage JSON lines: the first one itself, and odd lines before and after all others."""
    first, *others = file.read_text().splitlines(keepends=True)
    for text in [*(json.dumps(data) for data in damaged(json.loads(first), count)), *ODD]:
        file.write_text("".join([text + "\n", *others]))
        attempt(read)
    for text in ODD:
        file.write_text("".join([first, *others, text + "\n"]))
        attempt(read)
    file.write_text("".join([first, *others]))
