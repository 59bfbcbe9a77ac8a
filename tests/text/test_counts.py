"""Numbers and names as people write them."""

from __future__ import annotations

import pytest

from rcc import InputError
from rcc.text.counts import parse_choices, parse_count, parse_counts, show_count


def test_counts() -> None:
    for text, number in (("512", 512), ("8k", 8192), ("1M", 2**20), (" 2K ", 2048), ("1m", 2**20), ("128k", 2**17)):
        assert parse_count(text, "--x") == number
        assert parse_count(show_count(number), "--x") == number
    assert (show_count(8192), show_count(2**20), show_count(1000)) == ("8k", "1M", "1000")
    assert parse_counts("8k, 32k,8192", "--x") == [8192, 32768]
    for text in ("", "8k,", "0", "-1", "1.5k", "8kB", "k", "1e3", "9999999999"):
        with pytest.raises(InputError, match=r"^--lengths '.*' is no whole number above 0: .*\.$"):
            parse_counts(text, "--lengths")


def test_choices() -> None:
    """Each once, in their order; all and none stand for all of them and no name, where that is meant, and alone."""
    known = ("red", "green", "blue")
    assert parse_choices("green, red,green", "--hues", known) == ["green", "red"]
    assert parse_choices("all", "--hues", known, optional=True) == list(known)
    assert parse_choices(" none", "--hues", known, optional=True) == []
    for text, said in (
        ("red,none", "--hues none stands alone: leave out the others, or name some of red, green, blue."),
        ("all,none", "--hues all stands alone: leave out the others, or name some of red, green, blue."),
        ("red,pink", "--hues 'pink' is unknown: use some of red, green, blue; or all, or none."),
        ("", "--hues '' is unknown: use some of red, green, blue; or all, or none."),
    ):
        with pytest.raises(InputError) as error:
            parse_choices(text, "--hues", known, optional=True)
        assert str(error.value) == said
    for text in ("all", "none"):
        with pytest.raises(InputError, match=f"^--hues '{text}' is unknown: use some of red, green, blue\\.$"):
            parse_choices(text, "--hues", known)
