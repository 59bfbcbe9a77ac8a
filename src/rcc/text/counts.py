"""Numbers and names as people write them: `8k`, `1M`, `plain,bm25`."""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import InputError

UNITS = {"": 1, "k": 1024, "m": 1024**2}


def parse_count(text: str, option: str) -> int:
    """Read a number of tokens: `512`, `8k` (8 · 1,024), `1M` (1,024²).

    Raises:
        InputError: it is something else.
    """
    match = re.fullmatch("([1-9][0-9]{0,8})([km]?)", text.strip().lower())
    if not match:
        raise InputError(f"{option} {text!r} is no whole number above 0: write it as 512, 8k or 1M.")
    return int(match[1]) * UNITS[match[2]]


def parse_counts(text: str, option: str) -> list[int]:
    """Read numbers with commas between them, each once, as :func:`parse_count` reads them.

    Raises:
        InputError: one of them is something else.
    """
    return list(dict.fromkeys(parse_count(part, option) for part in text.split(",")))


def parse_choices(text: str, option: str, known: Collection[str], optional: bool = False) -> list[str]:
    """Return names with commas between them, each once.

    Args:
        text: `plain,bm25`; blanks around a name do not count.
        option: what the text was given for, as the user calls it.
        known: the names that there are.
        optional: whether `all` and `none` may stand for all of them and for no name.

    Raises:
        InputError: one of them is not known, or `all` or `none` does not stand alone.
    """
    whole = {"all": list(known), "none": []} if optional else {}
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    if len(names) == 1 and names[0] in whole:
        return whole[names[0]]
    for name in names:
        if name in whole:
            raise InputError(f"{option} {name} stands alone: leave out the others, or name some of {', '.join(known)}.")
        if name not in known:
            also = "; or all, or none" if optional else ""
            raise InputError(f"{option} {name!r} is unknown: use some of {', '.join(known)}{also}.")
    return names


def show_count(count: int) -> str:
    """Write a number as :func:`parse_count` reads it, in the shortest form that is exact."""
    for unit in ("M", "k"):
        if count % UNITS[unit.lower()] == 0:
            return f"{count // UNITS[unit.lower()]}{unit}"
    return str(count)


def parse_rate(text: str | None) -> int | str:
    """Return a rate as people write it: a whole number, or `auto`, also for None.

    Raises:
        InputError: it is something else.
    """
    if text in (None, "auto"):
        return "auto"
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise InputError(f"rate {text} is not a rate: use a whole number such as 8, or auto.")
    return int(text)


def parse_bytes(text: str) -> int:
    """Return a size in bytes: `500MB`, `2GB`, `0`, in powers of a thousand.

    Raises:
        InputError: it is something else.
    """
    match = re.fullmatch("([0-9]{1,9})(|kb|mb|gb|tb)", text.strip().lower())
    if not match:
        raise InputError(f"{text!r} is no size: write it as 500MB or 2GB.")
    factor: int = 1000 ** ("", "kb", "mb", "gb", "tb").index(match[2])
    return int(match[1]) * factor
