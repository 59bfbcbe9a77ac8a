"""What a terminal may show: nothing that somebody else wrote moves its cursor or hides its text."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console as RichConsole

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, hides or reorders what a terminal shows; and halves of characters."""


def shown(text: object, lines: bool = False) -> str:
    """Return a text that somebody else may have written as a terminal may show it: control characters escaped.

    Args:
        text: anything; what is no string is shown as `str` has it.
        lines: whether it may have several lines, and tabs.
    """

    def escape(match: re.Match[str]) -> str:
        character = match[0]
        if lines and character in "\n\t":
            return character
        code = ord(character)
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character) or (
            f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
        )

    return CONTROL.sub(escape, str(text))


class Console(RichConsole):
    """A console on which no text can do more than be read."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, with control characters escaped but for the ends of lines and tabs."""
        super().print(*(_harmless(thing) for thing in objects), **options)

    def status(self, status: Any, **options: Any) -> Any:
        """Show what is being done, on one line."""
        return super().status(shown(status), **options)


def _harmless(thing: Any) -> Any:
    if isinstance(thing, str):
        return shown(thing, lines=True)
    return thing
