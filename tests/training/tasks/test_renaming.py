"""Names and numbers are exchanged alike in passage, question and answer."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from rcc.data.corpus import Row
from rcc.training.tasks.renaming import exchange, new_words
from task_samples import (
    MARKS,
    TOKENIZER,
    only,
    read,
    row_of,
)


class Town:
    """Two passages, one with two questions, as the data has them."""

    segment = 64
    passage = "Then Ada Byron went to Paris in 1843. She saw Byron\u2019s 25 cats."
    rows = (
        row_of(passage, "When did Ada go?", "in 1843"),
        row_of(passage, "Who had 25 cats in Paris?", "Byron"),
    )
    stranger = row_of("We met Karl Marx in Bonn, not Wilhelm or Otto.", "Who was met?", "Karl Marx", hash=8)

    def row(self) -> Row:
        return self.rows[0]

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        return self.rows[int(rng.integers(2))] if context_hash == 7 else self.stranger

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        return self.stranger if not_hash == 7 else self.rows[0]

    def text(self) -> np.ndarray:
        raise AssertionError("questions are asked of passages")

    def prose(self, rng: np.random.Generator) -> None:
        return None


def test_names_and_numbers_are_exchanged_alike_in_passage_question_and_answer() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for seed in range(60):
        task = only("human", renamed=1.0, turns=4)
        sample = task.sample(Town(), np.random.default_rng(seed), 128, 128, MARKS)
        (passage,) = (TOKENIZER.decode(piece) for piece in sample.pieces)
        match = re.fullmatch(r"Then (\w+) (\w+) went to (\w+) in (\d{4})\. She saw (\w+)\u2019s (\d\d) cats\.", passage)
        assert match, passage
        ada, byron, paris, year, again, cats = match.groups()
        assert again == byron
        assert len({ada, byron, paris}) == 3
        assert {ada, byron, paris} < {"Karl", "Marx", "Bonn", "Wilhelm", "Otto"}
        asked = dict(read(sample))
        assert asked.pop(f"When did {ada} go?") == f"in {year}"
        assert set(asked.items()) <= {(f"Who had {cats} cats in {paris}?", byron)}
        seen[year, cats] += 1
    assert len(seen) > 50
    plain = only("human", turns=4).sample(Town(), np.random.default_rng(0), 128, 128, MARKS)
    assert TOKENIZER.decode(plain.pieces[0]) == TOKENIZER.decode(Town.rows[0].context)


def test_names_are_exchanged_in_distracting_passages_too() -> None:
    sample = only("human", renamed=1.0, distractors=1.0).sample(Town(), np.random.default_rng(0), 64, 64, MARKS)
    text = TOKENIZER.decode(sample.pieces[0])
    assert re.search(r"We met (Ada|Byron|Paris) (Ada|Byron|Paris) in (Ada|Byron|Paris), not", text), text


def test_what_is_exchanged_keeps_its_form() -> None:
    rng = np.random.default_rng(0)
    text = "In May the Smiths paid 1,250.75 to John. The other ones, and Other people, paid 7 in 1999."
    new = new_words(text, "He met Olga and Piet, not Jan or the Major.", rng)
    assert set(new) <= {"May", "Smiths", "John", "1,250.75", "7", "1999"}
    assert {"1,250.75", "7", "1999"} <= set(new)
    assert {new[name] for name in ("Smiths", "John") if name in new} < {"Olga", "Piet", "Jan"}
    assert re.fullmatch(r"[1-9],\d{3}\.\d\d", new["1,250.75"])
    assert re.fullmatch(r"1[5-9]\d\d|20[01]\d", new["1999"])
    swapped = exchange("John’s 1999, not 19990 or Johnson", {"John": "Piet", "1999": "1600"})
    assert swapped == "Piet’s 1600, not 19990 or Johnson"
    assert new_words("We know John.", "nobody", rng) == {}  # no other names: he keeps his
    assert new_words("We saw the Other man, an other one.", "We saw Karl.", rng) == {}  # also a plain word
