"""Memory settings without which a CPU run spends its time on page faults."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def configure() -> bool:
    """Make glibc keep freed memory instead of giving each large tensor back to the system.

    With its defaults every large tensor is mapped and unmapped, and a small model reads text 18 times slower. To
    be called before torch allocates; the command line does so itself. Returns whether it applies to this system.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1_000_000_000))
    return all(mallopt(key, value) == 1 for key, value in settings)


def trim() -> None:
    """Give the memory that is free back to the system at once, where :func:`configure` made glibc keep it."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
