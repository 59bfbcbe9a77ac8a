"""Patterns by which tasks find sentences, names and numbers in a text."""

from __future__ import annotations

import re

SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]")
NAME = re.compile(r"(?<=[a-z,;] )(?:[A-Z][a-z]+\.? )*[A-Z][a-z]{2,}")
NUMBER = re.compile(r"\b\d+(?:[.,]\d+)*\b")
YEAR = re.compile(r"1\d{3}|20\d\d")
