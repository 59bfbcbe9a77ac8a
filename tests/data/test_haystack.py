"""Texts that hide a key: they hide what they should, where they should."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rcc
from rcc import RCCConfig
from rcc.data.haystack import (
    FILLER,
    OPENING,
    POSITIONS,
    QUESTION,
    VARIANTS,
    Text,
    is_right,
    make_text,
    passkey_ids,
    prose_sentences,
)
from rcc.model import segments
from rcc.text.tokens import token_ids

TOKENIZER: Any = rcc.load_tokenizer("rcc-smollm2-135m")
BOOK = Path(__file__).resolve().parents[2] / "examples/simple-susan.txt"
TOKENS = 1500


def encode(text: str) -> np.ndarray:
    return token_ids(TOKENIZER, text)[0].numpy()


@pytest.fixture(scope="module")
def sentences() -> list[np.ndarray]:
    """The book's first few thousand tokens."""
    return [encode(s) for s in itertools.islice(prose_sentences(BOOK.read_text(encoding="utf-8")), 200)]


@pytest.fixture
def write(sentences: list[np.ndarray]) -> Callable[..., Text]:
    """A text of the default model's tokens."""

    def make(variant: str, position: str = "middle", sample: int = 0, length: int = TOKENS, seed: int = 0) -> Text:
        return make_text(variant, position, length, sample, encode, seed, sentences)

    return make


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_texts(variant: str, position: str, write: Callable[..., Text], sentences: list[np.ndarray]) -> None:
    """The key stands where it should, as often as the wording says, in a text of the length that was asked for."""
    longest = max(map(len, sentences if variant == "prose" else map(encode, FILLER)))
    keys, starts = set(), set()
    for sample in range(6):
        text = write(variant, position, sample)
        assert TOKENS - longest < len(text.ids) <= TOKENS
        whole = TOKENIZER.decode(text.ids)
        times = 1 if variant.startswith("niah") else 2
        assert whole.count(text.key) == times
        start, end = text.key_at
        assert TOKENIZER.decode(text.ids[start:end]).count(text.key) == times
        low, high = POSITIONS[position]
        told = encode(VARIANTS[variant].opening)
        filler = len(text.ids) - len(told) - (end - start)  # and, where there are several keys, the others
        # sentences are counted: those of prose are long and short; other keys may stand before it
        slack = 0.1 if variant == "prose" else (150 if VARIANTS[variant].others else longest) / filler
        assert low - slack <= (start - len(told)) / filler <= high + slack
        assert re.fullmatch(r"\d{5}|\d{7}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text.key)
        keys.add(text.key)
        starts.add(start)
    assert len(keys) == 6
    assert len(starts) > 3


def test_the_plain_text_is_the_one_of_training(write: Callable[..., Text]) -> None:
    """Token by token the text that models are trained on, and its question."""
    text = write("plain")
    depths = (np.arange(0, 1, 1e-3) * 1).tolist()
    assert any(np.array_equal(passkey_ids(int(text.key), w, TOKENS, encode), text.ids) for w in depths)
    assert text.question == QUESTION
    assert TOKENIZER.decode(text.ids).startswith(OPENING + " The grass is green.")


def test_wordings(write: Callable[..., Text]) -> None:
    """What hides the key, what else is hidden, and what is asked."""
    several, similar, ruler = write("several"), write("similar"), write("niah-multikey")
    hidden = dict(re.findall(r"The pass key of (\w+) is (\d{5})\. Remember it\.", TOKENIZER.decode(several.ids)))
    asked = re.fullmatch(r"What is the pass key of (\w+)\? The pass key of \1 is", several.question)[1]
    assert len(hidden) == 4
    assert hidden[asked] == several.key
    hidden = dict(re.findall(r"The (\w+ \w+) is (\d{5})\. Remember it\. \2 is the \1\.", TOKENIZER.decode(similar.ids)))
    assert len(hidden) == 4
    assert hidden["pass key"] == similar.key
    assert similar.question == QUESTION
    whole = TOKENIZER.decode(ruler.ids)
    assert whole.startswith("A special magic number is hidden within the following text. Make sure to memorize it. I ")
    hidden = dict(re.findall(r" One of the special magic numbers for (\w+) is: (\d{7})\. ", whole))
    asked = re.fullmatch(
        r"What is the special magic number for (\w+) mentioned in the provided text\?"
        r" The special magic number for \1 mentioned in the provided text is",
        ruler.question,
    )[1]
    assert len(hidden) == 4
    assert hidden[asked] == ruler.key
    assert TOKENIZER.decode(write("niah-single").ids).count("One of the special magic numbers for") == 1
    uuid = write("uuid")
    assert f" The pass key is {uuid.key}. Remember it. {uuid.key} is the pass key." in TOKENIZER.decode(uuid.ids)


def test_prose(write: Callable[..., Text], sentences: list[np.ndarray]) -> None:
    """Real prose from any sentence on, again from its beginning where it ends; whole sentences, of a bounded length."""
    first, other = (TOKENIZER.decode(write("prose", sample=sample).ids) for sample in range(2))
    assert first[: len(OPENING) + 50] != other[: len(OPENING) + 50]
    book = " ".join(BOOK.read_text(encoding="utf-8").split())
    assert first[len(OPENING) : len(OPENING) + 300] in book
    assert list(prose_sentences('He  said:\n"Go!" And (so.)\nshe' + " went" * 80)) == [
        ' He said: "Go!"',
        " And (so.)",
        " she" + " went" * 39,
        " went" * 40,
        " went",
    ]
    long = make_text("prose", "end", 3 * sum(map(len, sentences)), 0, encode, 0, sentences)
    assert TOKENIZER.decode(long.ids).count(TOKENIZER.decode(sentences[5])) >= 2


def test_texts_are_drawn_by_the_seed(write: Callable[..., Text]) -> None:
    """The same sample is the same text, whatever was made before; another seed, position or length is another."""
    one, again = write("several", "start", 3), write("several", "start", 3)
    assert np.array_equal(one.ids, again.ids)
    assert (one.key, one.question, one.key_at) == (again.key, again.question, again.key_at)
    others = [
        write("several", "end", 3),
        write("several", "start", 3, seed=1),
        write("several", "start", 3, TOKENS + 1),
    ]
    assert len({one.key, *(other.key for other in others)}) == 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padding", ["none", "repeat"])
def test_the_control_holds_no_key(variant: str, padding: str, write: Callable[..., Text]) -> None:
    """Where the key's segments are replaced nothing of it is left, and all other segments are as they were."""
    config = RCCConfig(segment_length=64, rates=[4], segment_padding=padding)
    for position in POSITIONS:
        text = write(variant, position)
        control = text.replaced(segments.split(torch.arange(len(text.ids)), config))
        assert len(control) == len(text.ids)
        assert text.key not in TOKENIZER.decode(control)
        start, end = text.key_at
        before, after = (segments.split(torch.from_numpy(ids), config) for ids in (text.ids, control))
        parts = segments.split(torch.arange(len(control)), config)
        own = {int(i) for part in parts if set(range(start, end)) & set(part.tolist()) for i in part}
        for old, new, part in zip(before, after, parts, strict=True):
            assert own & set(part.tolist()) or torch.equal(old, new)  # what pads the first segment stands in the last
        if variant == "plain":
            assert not re.search(r"\d", TOKENIZER.decode(control))


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" 12345.", True),
        ("12345", True),
        (': "12345". It is', True),
        (" 12345 is the pass key.", True),
        (" 123456.", False),
        (" 1234.", False),
        (" 12345-6", False),
        (" 54321. 12345", False),
        (" the number 12345", False),
        ("", False),
    ],
)
def test_scoring(written: str, right: bool) -> None:
    assert is_right(written, "12345") is right
