"""Plain data, as YAML has it, made into dataclasses and checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from ..errors import InputError
from ..runtime.plain import make, settings_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check(good: bool, key: str, value: Any, wanted: str) -> None:
    """Raise InputError that names a key, its value and what is wanted of it, unless the value is good."""
    if not good:
        raise InputError(f"{key} must be {wanted}, not {value!r}.")


def unknown(path: str, key: Any, known: Any) -> str:
    """Return the message for an unknown key, which names the nearest known one."""
    near = difflib.get_close_matches(str(key), list(known), 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}."
    return f"{path} is unknown: {hint}"


# ---------------------------------------------------------------- YAML → plain data
class TwiceError(InputError):
    """A table names a setting twice."""


class _Loader(yaml.SafeLoader):
    """YAML without the rule that of two settings of one name the last one counts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = (key.tag, key.value) if isinstance(key.value, str) else id(key), key.start_mark.line + 1
            if name in lines:
                raise TwiceError(
                    f"{key.value!r} stands twice in one table, in lines {lines[name]} and {line}: leave one."
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """Return the plain data of a YAML text.

    Raises:
        TwiceError: a table names a setting twice. Others, by yaml and by what it makes of values: it is not YAML.
    """
    return yaml.load(text, _Loader)


def override(data: Any, setting: str) -> None:
    """Set one value in plain data: `stages.0.max_tokens=1e6`.

    Raises:
        InputError: it is not of that form, or there is no such entry.
    """
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise InputError(f"override {setting}: write it as key=value, for instance stages.0.max_tokens=1e6.")
    try:
        value = parse(text)
    except TwiceError as error:
        raise InputError(f"override {path}: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, RecursionError):
        value = text
    *parents, last = path.split(".")
    table = data
    for i, key in enumerate([*parents, last]):
        if isinstance(table, list):
            if not key.isdigit() or int(key) > len(table) - (i < len(parents)):
                raise InputError(f"override {setting}: there is no entry {key} (there are {len(table)}, from 0).")
            index: Any = int(key)
            if index == len(table):
                table.append(None)  # one more entry
        elif isinstance(table, dict):
            index = key
            if i < len(parents) and table.get(key) is None:
                table[key] = {}
        else:
            raise InputError(f"override {setting}: {'.'.join(path.split('.')[:i])} has no settings inside.")
        if i < len(parents):
            table = table[index]
    table[index] = value


T = TypeVar("T", bound="DataclassInstance")
"""A dataclass of settings."""


# ---------------------------------------------------------------- plain data → dataclasses
def build(cls: type[T], data: Any, path: str) -> T:
    """Return a dataclass made from plain data, checked key by key.

    Args:
        cls: the dataclass; its types say what each value may be.
        data: as YAML has it: a table.
        path: the data's own key, for messages; empty for a whole recipe.

    Raises:
        InputError: one sentence that names the key, and the nearest known one where it is unknown.
    """
    if not isinstance(data, dict):
        raise InputError(f"{path or 'the recipe'} must be a table of settings, not {data!r}.")
    known = settings_of(cls)
    for key in data:
        if key not in known:
            raise InputError(unknown(_join(path, key), key, known))
    values = {key: _convert(known[key].hint, value, _join(path, key)) for key, value in data.items()}
    for key, setting in known.items():
        if key not in values and setting.required:
            raise InputError(f"{_join(path, key)} is missing.")
    try:
        return make(cls, values)
    except InputError as error:
        message = str(error)
        prefix = f"{path}." if path and not message.startswith(path.partition(".")[0]) else ""
        raise InputError(prefix + message) from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, {} if value is None else value, path)
    if origin is list:
        if not isinstance(value, list):
            value = [value]  # one entry may stand alone
        return [_convert(arguments[0], v, f"{path}.{i}") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{path} must be a table of settings, not {value!r}.")
        return {str(k): _convert(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    return _scalar(hint, value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and not isinstance(value, (dict, list, bool)) and value is not None:
        return str(value)
    if hint in (int, float) and not isinstance(value, bool):
        try:  # YAML reads 1e-4, without a point, as text
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if hint is float and number == number:
            return number
        if hint is int and number == number and number.is_integer():
            return int(number)
    words = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    raise InputError(f"{path} must be {words[hint]}, not {value!r}.")


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
