"""Plain text in UTF-8."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import FileError, InputError


def read_text(source: str | Path) -> str:
    """Return the text in a file, without a byte order mark and with plain line ends.

    Args:
        source: a file; `-` is standard input. It is read once, whole, so a pipe will do.

    Raises:
        FileError: the file cannot be read.
        InputError: it is empty, or no text in UTF-8.
    """
    name = "standard input" if source == "-" else str(source)
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except FileNotFoundError:
        raise FileError(f"{source} does not exist.") from None
    except IsADirectoryError:
        raise FileError(f"{source} is a folder: name a text file.") from None
    except OSError as error:
        raise FileError(f"{source} cannot be read: {error.strerror or error}.") from None
    if b"\0" in data[: 1 << 20]:
        raise InputError(f"{name} is not a text but a binary file: give it as UTF-8 text.")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 text (byte {data[error.start]:#04x} at position {error.start:,}):"
            " convert it, for instance with iconv."
        ) from None
    if not text.strip():
        raise InputError(f"{name} is empty: there is nothing to compress.")
    return text
