"""Dataclasses as plain data, as JSON and YAML have it. The fields of a nested one may stand in the outer one's table.

So a file says `encoder_lora_rank: 16` where the code says `config.encoder.lora_rank`.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """A key of a dataclass's table.

    Attributes:
        hint: the type of its value.
        required: whether there is no default.
    """

    hint: Any
    required: bool


@dataclass(frozen=True)
class _Inline:
    prefix: str
    without: Collection[str]


def inline(prefix: str = "", without: Collection[str] = ()) -> dict[str, Any]:
    """Return the metadata of a field that holds a dataclass whose fields stand in the outer one's table.

    Args:
        prefix: before the names of its fields, as they are in the table.
        without: fields that are not in the table.
    """
    return {"inline": _Inline(prefix, without)}


def settings_of(cls: type) -> dict[str, Setting]:
    """Return the keys of a dataclass's table, in order."""
    hints, settings = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        within = field.metadata.get("inline")
        if within is None:
            required = field.default is MISSING and field.default_factory is MISSING
            settings[field.name] = Setting(hints[field.name], required)
        else:
            inner = settings_of(hints[field.name])
            settings |= {within.prefix + key: inner[key] for key in inner if key not in within.without}
    return settings


def make(cls: type[T], table: Mapping[str, Any]) -> T:
    """Return a dataclass made from the values of its table; what is missing there has its default."""
    hints, values = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        within = field.metadata.get("inline")
        if within is not None:
            keys = {key: within.prefix + key for key in settings_of(hints[field.name]) if key not in within.without}
            inner = {key: table[outer] for key, outer in keys.items() if outer in table}
            values[field.name] = make(hints[field.name], inner)
        elif field.name in table:
            values[field.name] = table[field.name]
    return cls(**values)


def to_plain(value: Any) -> Any:
    """Return plain data: of a dataclass its table, from which :func:`make` makes it again."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return copy.deepcopy(value)
    table: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        within, plain = field.metadata.get("inline"), to_plain(getattr(value, field.name))
        if within is None:
            table[field.name] = plain
        else:
            table |= {within.prefix + key: inner for key, inner in plain.items() if key not in within.without}
    return table
