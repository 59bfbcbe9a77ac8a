"""What can go wrong, by name. Every message is one sentence that says what is wrong and what to do about it.

The command line prints the message and exits with code 2; library users catch :class:`RCCError`, or the
built-in type that each class also is.
"""

from __future__ import annotations

import re


class RCCError(Exception):
    """Base of every error that rcc raises on purpose."""


class InputError(RCCError, ValueError):
    """An argument that cannot be used as it is: the message names it."""


class WindowError(InputError):
    """More positions than the decoder can address."""


class ContextError(RCCError, ValueError):
    """A compressed context that is damaged, of a newer format, or made by another model."""


class ModelError(RCCError, ValueError):
    """A model folder or backbone that cannot be used."""


class FileError(RCCError, OSError):
    """A file or folder that cannot be read, written or fetched."""


class ExistsError(FileError):
    """A file that was not to be replaced."""


def brief(error: Exception | str) -> str:
    """Return the first line of a message, without addresses, for use inside a sentence."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    line = re.sub(r"https?://\S+|host='[^']*'", "…", text.strip().splitlines()[0])
    return (line if len(line) <= 120 else line[:119] + "…").rstrip(" .:")
