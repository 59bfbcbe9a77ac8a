"""Which questions are asked, and what is read for them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

import rcc
from rcc.evaluation.qa.questions import Question, bucket, choose
from rcc.evaluation.qa.texts import Texts

TOKENIZER: Any = rcc.load_tokenizer("rcc-smollm2-135m")


def test_choose() -> None:
    """A greater limit keeps what a smaller one chose; questions about one text stand together."""
    questions = [Question(f"{s}/{i}", s, f"text {i % 5}", "q?", ("a",)) for s in ("x", "y") for i in range(20)]
    few, more = choose(questions, 6, 1), choose(questions, 12, 1)
    assert {q.id for q in few} < {q.id for q in more}
    assert [sum(q.set == s for q in more) for s in ("x", "y")] == [12, 12]
    texts = [(q.set, q.context) for q in more]
    assert sum(a != b for a, b in pairwise(texts)) == len(set(texts)) - 1
    assert choose(questions, None, 1) != choose(questions, None, 2)
    assert [bucket(n) for n in (0, 2047, 2048, 8191, 8192)] == ["0-2k", "0-2k", "2-4k", "4-8k", "8k+"]


def test_padding() -> None:
    """A text among others, each whole but the last, in the same way for all questions about it."""
    questions = [Question(f"s/{i}", "s", f"Text number {i} is about {'sheep ' * 10}.", "q?", ("a",)) for i in range(30)]
    alone, among = Texts(questions, TOKENIZER), Texts(questions, TOKENIZER, pad_to=200, seed=3)
    own, whole = alone(questions[4]), among(questions[4])
    assert TOKENIZER.decode(own) == questions[4].context
    assert 190 < len(whole) <= 200
    told = TOKENIZER.decode(whole)
    assert told.count(questions[4].context) == 1
    parts = told.split("\n\n")
    assert len(parts) == len(set(parts)) > 4
    assert sum(part not in {q.context for q in questions} for part in parts) <= 1
    again = Question("other", "s", questions[4].context, "another?", ("b",))
    assert torch.equal(among(again), whole)
    assert not torch.equal(Texts(questions, TOKENIZER, 200, seed=4)(questions[4]), whole)
    assert torch.equal(Texts(questions, TOKENIZER, 10)(questions[4]), own)  # longer than that by itself
