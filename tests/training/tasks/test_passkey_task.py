"""The task `passkey`: a number hidden in filler."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rcc.data.haystack import FILLER, OPENING, QUESTION, passkey_ids, passkey_text
from rcc.errors import InputError
from rcc.training.tasks import Passkey
from task_samples import (
    MARKS,
    TOKENIZER,
    check_sizes,
    ids,
    sampled,
)


def taken_apart(text: str) -> tuple[int, int, int]:
    """Key, sentences before it, sentences in all."""
    before, key, again, after = re.fullmatch(
        re.escape(OPENING) + r"(.*) The pass key is (\d{5})\. Remember it\. (\d{5}) is the pass key\.(.*)", text
    ).groups()
    assert key == again
    stops = before.count("."), after.count(".")
    return int(key), stops[0], sum(stops)


@pytest.mark.parametrize("length", [100, 101, 113, 127, 512, 5000])
def test_passkey_text(length: int) -> None:
    longest = max(len(ids(sentence)) for sentence in FILLER)
    seen = []
    for seed in range(40):
        sample = sampled(Passkey(), None, length, 32, seed)
        check_sizes(sample, length, 32, 64)
        assert len(sample.pieces[0]) > length - longest
        key, before, sentences = taken_apart(TOKENIZER.decode(sample.pieces[0]))
        assert sample.pieces[0].tolist() == ids(passkey_text(key, before, sentences))
        assert np.concatenate([sample.prompt, sample.target]).tolist() == [*ids(f"{QUESTION} {key}."), MARKS.eos]
        assert sample.prompt.tolist() == ids(QUESTION)
        seen.append((key, before))
    assert len({key for key, _ in seen}) == 40


def test_passkey_stands_anywhere() -> None:
    shares = []
    for seed in range(400):
        _, before, sentences = taken_apart(TOKENIZER.decode(sampled(Passkey(), None, 2000, 32, seed).pieces[0]))
        shares.append(before / sentences)
    for quarter in range(1, 4):
        assert np.quantile(shares, quarter / 4) == pytest.approx(quarter / 4, abs=0.07)
    ends = [taken_apart(TOKENIZER.decode(passkey_ids(12345, depth, 2000, MARKS.encode))) for depth in (0.0, 1.0)]
    assert [before for _, before, _ in ends] == [0, ends[0][2]]


def test_passkey_needs_room() -> None:
    with pytest.raises(InputError, match="give at least") as error:
        sampled(Passkey(), None, 20, 32)
    least = int(re.findall(r"\d+", str(error.value))[-1])
    assert len(sampled(Passkey(), None, least, 32).pieces[0]) == least
    with pytest.raises(InputError, match="target_tokens=17"):
        sampled(Passkey(), None, 512, 17)
