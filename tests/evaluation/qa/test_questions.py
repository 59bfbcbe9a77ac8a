"""Which questions are asked, and what is read for them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

import rcc
from rcc.evaluation.qa.questions import Question, bucket, choose
from rcc.evaluation.qa.texts import Texts
from rcc.text import prompting

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


def test_packs() -> None:
    """Texts side by side, each whole in one pack, in the same packs whatever the limit."""
    questions = [
        Question(f"{name}/{i}", name, f"Text {name}{i} is about {'sheep ' * 10}.", "q?", ("a",))
        for name in ("x", "y")
        for i in range(30)
    ]
    alone, packs = Texts(questions, TOKENIZER), Texts(questions, TOKENIZER, pad_to=200, seed=3)
    assert TOKENIZER.decode(alone(questions[4])) == questions[4].context
    whole: dict[int, list[str]] = {}
    lengths: dict[int, int] = {}
    for question in questions:
        ids, number = packs(question), packs.pack(question)
        assert TOKENIZER.decode(ids).split(prompting.SEPARATOR).count(question.context) == 1
        whole.setdefault(number, []).append(question.context)
        lengths[number] = len(ids)
    assert sorted(text for texts in whole.values() for text in texts) == sorted(q.context for q in questions)
    last = max(whole)
    # filled with the beginning of the next text; the last pack has none to fill it
    assert all(198 < length <= 200 for number, length in lengths.items() if number < last)
    assert lengths[last] <= 200
    assert min(len(texts) for number, texts in whole.items() if number < last) > 4
    # the first of each set: a limit leaves few contexts to be made
    assert {packs.pack(question) for question in choose(questions, 4, 3)} == {0}
    again = Question("other", "x", questions[4].context, "another?", ("b",))
    assert torch.equal(packs(again), packs(questions[4]))
    other = Texts(questions, TOKENIZER, 200, seed=4)
    assert any(not torch.equal(other(question), packs(question)) for question in questions)


def test_a_text_longer_than_a_pack() -> None:
    """It is read alone and whole."""
    questions = [Question(f"s/{i}", "s", f"Text {i}: {'sheep ' * 20}.", "q?", ("a",)) for i in range(3)]
    alone, packs = Texts(questions, TOKENIZER), Texts(questions, TOKENIZER, pad_to=10)
    for question in questions:
        assert torch.equal(packs(question), alone(question))
