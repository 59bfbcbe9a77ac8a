"""The task `cloze`: what is missing in a sentence of the text."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from rcc.text import prompting
from rcc.training.collate import collate
from rcc.training.tasks import Cloze
from rcc.training.tasks.cloze import cloze
from rcc.training.tasks.instruction import QUOTE
from task_samples import (
    MARKS,
    PROSE,
    TEXT,
    GivenDraw,
    read,
    sampled,
)


def test_a_cloze_conversation_has_other_gaps() -> None:
    task = Cloze(modes={"human": 1.0}, turns=5)
    sample = task.sample(GivenDraw(PROSE[9000:9400]), np.random.default_rng(0), 512, 512, MARKS)
    pairs = read(sample)
    plain = " ".join(MARKS.decode(PROSE[9000:9400]).split())
    assert len(set(pairs)) == len(pairs) == 5
    for question, answer in pairs:
        asked = question.removeprefix("What is missing here? ").replace("____", answer)
        assert " ".join(asked.split()) in plain
    batch = collate([sample], pad=0)
    learnt = batch["labels"][0] != -100
    assert learnt.sum() == sample.learnt.sum() < len(sample.target)
    assert (batch["labels"][0][learnt] == batch["input_ids"][0][learnt]).all()
    assert batch["logits_to_keep"].tolist() == (learnt.nonzero()[:, 0] - 1).tolist()


def test_cloze_quotes() -> None:
    """A whole sentence of the text, asked for by some of its words."""
    quoted = 0
    for seed in range(60):
        text = TEXT[3000 * (seed % 20) :][:2500]
        question, answer = cloze(text, np.random.default_rng(seed), quoted=True)
        assert answer in text
        if question.startswith(QUOTE.partition("{")[0]):
            _, *words = question.removeprefix(QUOTE.partition("{")[0])[:-1].split()
            assert 4 <= len(answer.split()) <= 50
            assert sum(word in answer for word in words) >= len(words) - 1  # "many", of "How many"
            quoted += 1
    assert quoted > 40
    first, second = read(sampled(Cloze(modes={"human": 1}, turns=2, quoted=1.0), PROSE[2000:2400], targets=256))
    assert first[0].startswith(QUOTE.partition("{")[0])
    assert second[1] not in first[1]


def test_cloze_asks_for_what_stands_in_the_text() -> None:
    """Names within sentences and numbers; with the gap filled, the question is a part of the text."""
    plain = " ".join(TEXT.split())
    answers = []
    for seed in range(60):
        start = 3000 * (seed % 20)
        question, answer = cloze(TEXT[start : start + 2500], np.random.default_rng(seed))
        asked = question.removeprefix("What is missing here? ")
        assert asked.count("____") == 1
        assert " ".join(asked.replace("____", answer).split()) in plain
        answers.append(answer)
    assert sum(answer[0].isupper() or answer[0].isdigit() for answer in answers) == len(answers)
    assert len(set(answers)) > 10
    # what has neither: a word; and what has not even sentences
    assert cloze("the old cat sat on the wooden bench in the garden.", np.random.default_rng(0))[1] in {
        "wooden",
        "bench",
        "garden",
    }
    assert cloze("?!", np.random.default_rng(0)) == ("What is missing here? ____", "!")


def test_cloze_in_words() -> None:
    """A word that asks, and words of the sentence without the answer: some missing, some in another order."""
    asked, verbatim = Counter[str](), 0
    for seed in range(80):
        text = TEXT[3000 * (seed % 20) :][:2500]
        question, answer = cloze(text, np.random.default_rng(seed), worded=True)
        first, *words = re.sub(r"^(How many|In what year|What number) ", "Number ", question[:-1]).split()
        asked[first] += 1
        assert question[-1] == "?"
        assert "____" not in question
        assert first in {"Who", "What", "Which", "Where", "When", "Number"}
        assert answer[0].isdigit() == (first in {"When", "Number"})
        around = [" ".join(s.split()) for s in re.split(r"(?<=[.!?\n])", text) if answer in s]
        assert any(all(word in sentence for word in words) for sentence in around), question
        verbatim += any(" ".join(words) in sentence for sentence in around)
    assert asked["Who"] > 5
    assert asked["What"] + asked["Which"] > 20
    assert verbatim < 40
    assert cloze("?!", np.random.default_rng(0), worded=True)[1] == "!"


@pytest.mark.parametrize("mode", prompting.MODES)
def test_cloze_samples(mode: str) -> None:
    """Asked as any other question, of the text alone, which is whole."""
    task = Cloze(modes={mode: 1.0}, own_segment=0.0, before=0.0)
    given = PROSE[: task.window(512, 256)]
    sample = task.sample(GivenDraw(given), np.random.default_rng(3), 512, 256, MARKS)
    context = sample.pieces[0]
    assert np.array_equal(context[: len(given)], given)
    assert len(context) <= 512
    question, answer = cloze(MARKS.decode(given), np.random.default_rng(3))
    asked = prompting.build(question, mode)
    assert MARKS.decode(sample.prompt) == asked.decoder_text
    assert MARKS.decode(context[len(given) :]) == asked.encoder_text
    assert MARKS.decode(sample.target).removeprefix(question + prompting.TURN) == answer + prompting.END
