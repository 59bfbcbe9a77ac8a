"""Samples have the form in which `rcc ask` asks, token by token, keep to their sizes, and depend on nothing else."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rcc
from rcc import InputError
from rcc.text import prompting
from rcc.text.tokens import token_ids
from rcc.training.tasks import (
    FILLER,
    OPENING,
    QUESTION,
    QUOTE,
    REPEATED,
    TASKS,
    UNANSWERABLE,
    Cloze,
    Continuation,
    Instruction,
    Marks,
    Passkey,
    Reconstruction,
    Sample,
    Task,
    cloze,
    collate,
    describe,
    exchange,
    others,
    passkey_ids,
    passkey_text,
)

TEXT = (Path(__file__).resolve().parents[2] / "examples/simple-susan.txt").read_text(encoding="utf-8")
TOKENIZER = rcc.load_tokenizer("rcc-smollm2-135m")
MARKS = Marks.of(TOKENIZER)
PROSE = MARKS.encode(TEXT)
LOW, HIGH = 17, 3000  # ids of ordinary tokens
ROWS = [
    ("Ada went to Paris in 1843. It rained all day.", "Where did Ada go?", "Paris"),
    ("“Come in!” said the wolf – the door was open.", "“Who” spoke? (One word.)", "the wolf"),
    ("Œuvre: 12 volumes, naïve style; price 3.50 €.", "12 volumes of what… and at 3.50 €?", "an œuvre"),
    ("def f(x):\n    return x + 1\n\nprint(f(2))", "'s what does `print(f(2))` show?", "3"),
]


def ids(text: str) -> list[int]:
    """The token ids that `rcc ask` makes of a text."""
    return token_ids(TOKENIZER, text)[0].tolist()


def within(part: np.ndarray, whole: np.ndarray) -> int:
    """How often a run of tokens stands in another."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(part)) if len(whole) >= len(part) else []
    return sum(bool((window == part).all()) for window in windows)


@dataclass
class Row:
    context: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    set: str = ""
    hash: int = 7

    @classmethod
    def of(cls, context: str, question: str, answer: str) -> Row:
        return cls(*(MARKS.encode(text) for text in (context, question, answer)))


@dataclass
class Draw:
    """What a task may draw: ids below HIGH are of distracting passages, ids from there on of prose."""

    given: Any = None
    segment: int = 64
    has_prose: bool = True
    renamed: bool = False  # then names are also drawn for the distracting passages
    asked: list[str] = field(default_factory=list)
    others: dict[int, np.ndarray] = field(default_factory=dict)

    def text(self) -> np.ndarray:
        return self.given

    def row(self) -> Any:
        return self.given

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        assert not_hash == self.given.hash or (self.renamed and not_hash in self.others)
        self.asked.append("passage")
        key = 8 + len(self.others)
        self.others[key] = rng.integers(LOW, HIGH, rng.integers(1, 120))
        return Row(self.others[key], *self._about(key, 0), hash=key)

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        return Row(np.array([]), *self._about(context_hash, int(rng.integers(1, 4))), hash=context_hash)

    @staticmethod
    def _about(key: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        return MARKS.encode(f"What is number {number} of {key}?"), MARKS.encode(f"Number {number}: {key}")

    def prose(self, rng: np.random.Generator) -> np.ndarray | None:
        self.asked.append("prose")
        return rng.integers(HIGH, 2 * HIGH, 256) if self.has_prose else None


def sampled(task: Task, given: Any, length: int = 512, targets: int = 128, seed: int = 0, **draw: Any) -> Sample:
    return task.sample(Draw(given, **draw), np.random.default_rng(seed), length, targets, MARKS)


def only(mode: str, **options: Any) -> Instruction:
    return Instruction(modes={mode: 1.0}, **{"distractors": 0.0, **options})


# ---------------------------------------------------------------- the form
@pytest.mark.parametrize("row", ROWS)
def test_samples_are_asked_as_rcc_ask_asks(row: tuple[str, str, str]) -> None:
    context, question, answer = row
    given = Row.of(*row)
    for mode in prompting.MODES:
        built = prompting.build(question, mode)
        sample = sampled(only(mode, before=0.0, own_segment=1.0), given)
        assert sample.prompt.tolist() == ids(built.decoder_text)
        texts = [context, built.encoder_text] if built.encoder_text else [context]
        assert [piece.tolist() for piece in sample.pieces] == [ids(text) for text in texts]
        # and what was learnt is over and parsed as what is written: END counts its marks
        ended = (sample.target == MARKS.end[0]).sum()
        assert ended == built.ends
        instruction = question if mode == "reconstruct" else None
        assert built.parse(TOKENIZER.decode(sample.target)) == (instruction, answer)
        written = question + prompting.TURN + answer if mode == "reconstruct" else answer
        assert sample.target.tolist() == ids(written + prompting.END)


@pytest.mark.parametrize("row", ROWS)
def test_the_question_stands_before_or_behind(row: tuple[str, str, str]) -> None:
    context, question, _ = row
    for mode in ("reconstruct", "compress"):
        texts = {
            (0, 0): [context + prompting.SEPARATOR + question],
            (1, 0): [question + prompting.SEPARATOR + context],
            (0, 1): [context, prompting.SEPARATOR + question],
            (1, 1): [question + prompting.SEPARATOR, context],
        }
        for (before, own), pieces in texts.items():
            sample = sampled(only(mode, before=before, own_segment=own), Row.of(*row))
            assert [p.tolist() for p in sample.pieces] == [ids(text) for text in pieces]


def test_a_teacher_is_asked_in_chat_form() -> None:
    context, question, _ = ROWS[0]
    chat = f"{prompting.HEADER}{context}{prompting.SEPARATOR}{question}{prompting.TURN}"
    for mode in ("human", "compress"):
        sample = sampled(only(mode), Row.of(*ROWS[0]))
        assert sample.plain is not None
        assert sample.plain.tolist() == ids(chat)
    assert sampled(only("reconstruct"), Row.of(*ROWS[0])).plain is None


def test_modes_and_places_are_as_frequent_as_asked() -> None:
    row = Row.of(*ROWS[0])
    question, modes, places = row.question, Counter(), Counter()
    task = Instruction(modes={"human": 2, "reconstruct": 1, "compress": 1}, before=0.3, own_segment=0.6, distractors=0)
    n = 1200
    for seed in range(n):
        sample = sampled(task, row, seed=seed)
        if len(sample.prompt) == len(MARKS.header):
            modes["reconstruct"] += 1
        else:
            modes["human" if within(question, sample.prompt) else "compress"] += 1
        if not within(question, sample.prompt):
            places["own" if len(sample.pieces) == 2 else "joined"] += 1
            places["before" if (sample.pieces[0][: len(question)] == question).all() else "behind"] += 1
    asked = n - modes["human"]
    assert modes["human"] / n == pytest.approx(0.5, abs=0.06)
    assert modes["reconstruct"] / n == pytest.approx(0.25, abs=0.05)
    assert places["before"] / asked == pytest.approx(0.3, abs=0.07)
    assert places["own"] / asked == pytest.approx(0.6, abs=0.07)


# ---------------------------------------------------------------- passages
def test_distractors_fill_the_context_around_the_whole_passage() -> None:
    row = Row.of(*ROWS[1])
    places = []
    for seed in range(300):
        draw = Draw(row)
        (context,) = only("human", distractors=1.0).sample(draw, np.random.default_rng(seed), 512, 64, MARKS).pieces
        assert 512 - len(MARKS.separator) <= len(context) <= 512
        assert within(row.context, context) == 1
        assert "passage" in draw.asked or "prose" in draw.asked
        places.append(next(i for i in range(len(context)) if (context[i : i + len(row.context)] == row.context).all()))
    places.sort()
    assert places[0] == 0
    assert places[-1] > 400
    assert 130 < places[150] < 330  # a passage is as likely early as late


def test_half_of_the_distractors_are_prose_where_there_is_any() -> None:
    row, task = Row.of(*ROWS[0]), only("human", distractors=1.0)
    tokens = np.concatenate([sampled(task, row, 2048, seed=seed).pieces[0] for seed in range(60)])
    prose, passages = (tokens >= HIGH).sum() / 160, ((tokens >= LOW) & (tokens < HIGH)).sum() / 60
    assert prose / (prose + passages) == pytest.approx(0.5, abs=0.1)  # counted in texts of their mean length
    assert (sampled(task, row, 2048, has_prose=False).pieces[0] >= HIGH).sum() < 30
    assert len(sampled(only("human", distractors=0.0), row).pieces[0]) == len(row.context)


@pytest.mark.parametrize("distractors", [0.0, 1.0])
def test_unanswerable(distractors: float) -> None:
    row = Row.of(*ROWS[0])
    for seed in range(20):
        sample = sampled(only("human", unanswerable=1.0, distractors=distractors), row, seed=seed)
        assert not within(row.context, sample.pieces[0])
        assert TOKENIZER.decode(sample.target) == UNANSWERABLE + prompting.END


def test_a_passage_is_joined_with_its_question_where_a_segment_for_it_would_cut_it() -> None:
    row = Row(PROSE[:150], *(Row.of(*ROWS[0]).__dict__[k] for k in ("question", "answer")))
    for length, pieces in ((170, 1), (192, 1), (256, 2)):  # segments of 64: 192 leave 128 beside the question's
        sample = sampled(only("compress", own_segment=1.0), row, length)
        assert len(sample.pieces) == pieces
        assert sum(within(row.context, piece) for piece in sample.pieces) == 1


# ---------------------------------------------------------------- conversations
def read(sample: Sample) -> list[tuple[str, str]]:
    """The questions and answers of a sample in `human` mode; its tokens are those of a chat's prompt, and what is
    learnt are the answers."""
    text = TOKENIZER.decode(np.concatenate([sample.prompt, sample.target]))
    assert text.startswith(prompting.HEADER)
    assert text.endswith(prompting.END)
    turns = text.removeprefix(prompting.HEADER).removesuffix(prompting.END).split(prompting.END + prompting.FOLLOWING)
    pairs = [(q, a) for q, a in (turn.split(prompting.TURN) for turn in turns)]
    *history, (question, answer) = pairs
    built = prompting.build(question, "human", history).decoder_text + answer + prompting.END
    assert [*sample.prompt, *sample.target] == ids(built)
    learnt = np.split(sample.target, np.flatnonzero(np.diff(sample.learnt)) + 1)[::2]
    assert [TOKENIZER.decode(part) for part in learnt] == [answer + prompting.END for _, answer in pairs]
    return pairs


def test_a_conversation_asks_about_the_passages_that_are_whole() -> None:
    row, sizes = Row.of(*ROWS[0]), []
    for seed in range(60):
        draw = Draw(row)
        task = only("human", distractors=1.0, turns=6)
        sample = task.sample(draw, np.random.default_rng(seed), 400, 256, MARKS)
        first, *following = read(sample)
        assert first == ROWS[0][1:]
        assert len(set(following)) == len(following)
        for question, answer in following:
            number, key = map(int, re.findall(r"\d+", question))
            assert answer == f"Number {number}: {key}"
            assert number > 0
            assert within(row.context if key == row.hash else draw.others[key], sample.pieces[0])
        sizes.append(1 + len(following))
        short = task.sample(Draw(row), np.random.default_rng(seed), 400, 64, MARKS)
        assert len(short.prompt) + len(short.target) <= 64
        assert read(short)[0] == first
    assert max(sizes) == 6
    assert np.mean(sizes) > 4


def test_a_conversation_asks_what_its_context_does_not_say() -> None:
    answers = Counter()
    for seed in range(40):
        draw = Draw(Row.of(*ROWS[0]), has_prose=False)
        task = only("human", distractors=1.0, turns=6, unanswerable=0.5)
        sample = task.sample(draw, np.random.default_rng(seed), 400, 256, MARKS)
        for question, answer in read(sample)[1:]:
            number, key = map(int, re.findall(r"\d+", question))
            if answer == UNANSWERABLE:
                assert number == 0
                assert not within(draw.others[key], sample.pieces[0])
            else:
                assert within(draw.others.get(key, draw.given.context), sample.pieces[0])
            answers[answer == UNANSWERABLE] += 1
    assert answers[True] / answers.total() == pytest.approx(0.5, abs=0.15)


def test_a_cloze_conversation_has_other_gaps() -> None:
    task = Cloze(modes={"human": 1.0}, turns=5)
    sample = task.sample(Draw(PROSE[9000:9400]), np.random.default_rng(0), 512, 512, MARKS)
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


def test_a_conversation_does_not_ask_what_it_has_said() -> None:
    class Talk(Draw):
        def same(self, rng: np.random.Generator, context_hash: int) -> Row:
            told = [("Who went to Paris in 1843?", "Ada"), ("When did she go?", "1843"), ("What fell?", "rain")]
            return Row.of("", *told[rng.integers(3)])

    for seed in range(20):
        draw = Talk(Row.of(*ROWS[0]))
        sample = only("human", turns=6).sample(draw, np.random.default_rng(seed), 400, 256, MARKS)
        said = ""
        for question, answer in read(sample):
            assert answer not in said
            said += question + answer
        assert "rain" in said


def test_a_quotation_is_the_sentence_with_the_answer() -> None:
    task = only("human", quoted=1.0)
    asked = QUOTE.format(question="Where did Ada go?")
    assert read_once(sampled(task, Row.of(*ROWS[0]))) == (asked, "Ada went to Paris in 1843.")
    plain = [
        ("It rained. It snowed.", "Where did Ada go?", "Paris"),  # said nowhere
        ("Ada went to Paris today. Then she left Paris by train.", "Where did Ada go?", "Paris"),  # twice
        ("To Paris, yes! She went.", "Where did Ada go?", "Paris"),  # hardly a sentence
        ("Ada " + "very " * 60 + "much likes Paris.", "What does Ada like?", "Paris"),  # hardly to be asked for
    ]
    for row in plain:
        assert read_once(sampled(task, Row.of(*row))) == row[1:]
    unanswerable = sampled(only("human", quoted=1.0, unanswerable=1.0), Row.of(*ROWS[0]))
    assert read_once(unanswerable) == ("Where did Ada go?", UNANSWERABLE)
    quotes = Counter(read_once(sampled(only("human", quoted=0.3), Row.of(*ROWS[0]), seed=s)) for s in range(400))
    assert quotes[asked, "Ada went to Paris in 1843."] / 400 == pytest.approx(0.3, abs=0.07)


class Town:
    """Two passages, one with two questions, as the data has them."""

    segment = 64
    passage = "Then Ada Byron went to Paris in 1843. She saw Byron\u2019s 25 cats."
    rows = (
        Row.of(passage, "When did Ada go?", "in 1843"),
        Row.of(passage, "Who had 25 cats in Paris?", "Byron"),
    )
    stranger = replace(Row.of("We met Karl Marx in Bonn, not Wilhelm or Otto.", "Who was met?", "Karl Marx"), hash=8)

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
    seen = Counter()
    for seed in range(60):
        task = only("human", renamed=1.0, turns=4)
        sample = task.sample(Town(), np.random.default_rng(seed), 128, 128, MARKS)
        (passage,) = (TOKENIZER.decode(piece) for piece in sample.pieces)
        found = re.fullmatch(r"Then (\w+) (\w+) went to (\w+) in (\d{4})\. She saw (\w+)\u2019s (\d\d) cats\.", passage)
        assert found, passage
        ada, byron, paris, year, again, cats = found.groups()
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
    new = others(text, "He met Olga and Piet, not Jan or the Major.", rng)
    assert set(new) <= {"May", "Smiths", "John", "1,250.75", "7", "1999"}
    assert {"1,250.75", "7", "1999"} <= set(new)
    assert {new[name] for name in ("Smiths", "John") if name in new} < {"Olga", "Piet", "Jan"}
    assert re.fullmatch(r"[1-9],\d{3}\.\d\d", new["1,250.75"])
    assert re.fullmatch(r"1[5-9]\d\d|20[01]\d", new["1999"])
    swapped = exchange("John’s 1999, not 19990 or Johnson", {"John": "Piet", "1999": "1600"})
    assert swapped == "Piet’s 1600, not 19990 or Johnson"
    assert others("We know John.", "nobody", rng) == {}  # no other names: he keeps his
    assert others("We saw the Other man, an other one.", "We saw Karl.", rng) == {}  # also a plain word


def read_once(sample: Sample) -> tuple[str, str]:
    """The question and the answer of a sample in `human` mode."""
    question, answer = TOKENIZER.decode(np.concatenate([sample.prompt, sample.target])).split(prompting.TURN)
    return question.removeprefix(prompting.HEADER), answer.removesuffix(prompting.END)


# ---------------------------------------------------------------- text
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
    asked, verbatim = Counter(), 0
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
    sample = task.sample(Draw(given), np.random.default_rng(3), 512, 256, MARKS)
    context = sample.pieces[0]
    assert np.array_equal(context[: len(given)], given)
    assert len(context) <= 512
    question, answer = cloze(MARKS.decode(given), np.random.default_rng(3))
    asked = prompting.build(question, mode)
    assert MARKS.decode(sample.prompt) == asked.decoder_text
    assert MARKS.decode(context[len(given) :]) == asked.encoder_text
    assert MARKS.decode(sample.target).removeprefix(question + prompting.TURN) == answer + prompting.END


def test_reconstruction_starts_anywhere() -> None:
    starts = Counter()
    for seed in range(400):
        sample = sampled(Reconstruction(), np.arange(100, 140), 40, 20, seed)
        assert np.concatenate([sample.prompt, sample.target]).tolist() == list(
            range(sample.prompt[0], sample.prompt[0] + 20)
        )
        assert len(sample.prompt) == 10
        starts[int(sample.prompt[0]) - 100] += 1
    assert set(starts) == set(range(21))
    assert max(starts.values()) < 45
    short = sampled(Reconstruction(), np.arange(100, 115), 40, 20)
    assert np.concatenate([short.prompt, short.target]).tolist() == list(range(100, 115))


def test_reconstruction_in_spans() -> None:
    """All of the span once, in pieces that begin anywhere, each behind tokens of its own that are given."""
    counts, firsts, given = Counter(), Counter(), Counter()
    for seed in range(600):
        sample = sampled(Reconstruction(spans=4, prompt_tokens=6), np.arange(100, 160), 60, 60, seed)
        written = np.concatenate([sample.prompt, sample.target])
        learnt = np.concatenate([np.full(len(sample.prompt), False), sample.learnt])
        assert sorted(written) == list(range(100, 160))
        starts = [0, *(np.flatnonzero(learnt[:-1] & ~learnt[1:]) + 1)]
        for i, start in enumerate(starts):
            span = learnt[start : [*starts, 60][i + 1]]
            known = int((~span).sum())
            assert 1 <= known < len(span)
            assert not span[:known].any()
            assert known in range(2, 7) or known == len(span) - 1
            assert (np.diff(written[start:][: len(span)]) == 1).all()
            given[known] += 1
        counts[len(starts)] += 1
        firsts[int(written[0])] += 1
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 100
    assert set(given) == {1, 2, 3, 4, 5, 6}
    assert len(firsts) > 40
    # some of what it has written is read as other tokens of the text; what it is given, and what it learns, stay
    for spans in (1, 4):
        shares = []
        for seed in range(50):
            sample = sampled(Reconstruction(spans=spans, wrong=0.3), np.arange(100, 160), 60, 60, seed)
            same_without = sampled(Reconstruction(spans=spans), np.arange(100, 160), 60, 60, seed)
            assert np.array_equal(sample.target, same_without.target)
            learnt = np.full(len(sample.target), True) if sample.learnt is None else sample.learnt
            assert (sample.read == sample.target)[~learnt].all()
            assert set(sample.read) <= set(range(100, 160))
            shares.append((sample.read != sample.target)[learnt].mean())
            batch = collate([sample], pad=0)
            start = len(sample.prompt)
            assert batch["input_ids"][0, start:].tolist() == sample.read.tolist()
            assert batch["labels"][0, start:][learnt].tolist() == sample.target[learnt].tolist()
        assert np.mean(shares) == pytest.approx(0.3, abs=0.04)
    # in some samples it reads its own predictions of all that it learns, but for what is read wrong anyway
    kept = []
    for seed in range(100):
        sample = sampled(Reconstruction(spans=4, wrong=0.3, predicted=0.4), np.arange(100, 160), 60, 60, seed)
        same_without = sampled(Reconstruction(spans=4, wrong=0.3), np.arange(100, 160), 60, 60, seed)
        for name in ("prompt", "target", "learnt", "read"):
            assert np.array_equal(getattr(sample, name), getattr(same_without, name))
        kept.append(sample.predicted is not None)
        if sample.predicted is not None:
            assert not sample.predicted[~sample.learnt].any()
            assert sample.predicted[(sample.read == sample.target) & sample.learnt].mean() > 0.9
            assert not sample.predicted[sample.read != sample.target].any()
    assert np.mean(kept) == pytest.approx(0.4, abs=0.12)
    own = Reconstruction(predicted=1, passes=3)
    assert {n for seed in range(30) for n in sampled(own, np.arange(60), 60, 60, seed).predicted} == {1, 2, 3}
    # in some samples stretches of the text stand in two places, in what is read and in what is written
    doubled = []
    for seed in range(100):
        sample = sampled(Reconstruction(repeated=0.4), np.arange(100, 356), 256, 300, seed)
        (text,) = sample.pieces
        assert np.array_equal(np.concatenate([sample.prompt, sample.target]), text)
        doubled.append(256 - len(set(text)))
        assert doubled[-1] <= 4 * REPEATED[1]
    assert np.mean([many > 0 for many in doubled]) == pytest.approx(0.4, abs=0.12)
    assert np.mean([many for many in doubled if many]) > 15
    short = sampled(Reconstruction(spans=9, repeated=1), np.arange(100, 105), 40, 20)
    assert sorted(np.concatenate([short.prompt, short.target])) == list(range(100, 105))


@pytest.mark.parametrize(
    ("tokens", "context"),
    [(60, 40), (59, 40), (50, 37), (41, 30), (40, 30), (8, 6), (5, 3), (3, 1), (2, 1), (1, 1)],
)
def test_continuation_goes_on_where_the_context_ends(tokens: int, context: int) -> None:
    """Windows of 40 + 20; of a shorter document a quarter, rounded up, is left, or what does not fit."""
    assert Continuation().window(40, 20) == 60
    sample = sampled(Continuation(), np.arange(100, 100 + tokens), 40, 20)
    everything = np.concatenate([*sample.pieces, sample.prompt, sample.target])
    assert everything.tolist() == [*range(100, 100 + tokens), *[MARKS.eos] * (3 - tokens)]
    assert len(sample.prompt) == 1
    assert len(sample.pieces[0]) == context


# ---------------------------------------------------------------- sizes
quick = settings(max_examples=150, deadline=None, derandomize=True)
options = st.fixed_dictionaries(
    {k: st.sampled_from([0.0, 0.5, 1.0]) for k in ("before", "own_segment", "distractors", "unanswerable", "quoted")}
    | {"turns": st.sampled_from([1, 3])}
)


def check_sizes(sample: Sample, length: int, targets: int, segment: int) -> None:
    assert all(len(piece) for piece in sample.pieces)
    assert sum(map(len, sample.pieces)) <= length
    assert sum(-(-len(piece) // segment) for piece in sample.pieces) <= -(-length // segment)
    assert len(sample.prompt) >= 1
    assert len(sample.target) >= 1
    assert len(sample.prompt) + len(sample.target) <= targets
    assert {part.dtype for part in (*sample.pieces, sample.prompt, sample.target)} == {np.dtype(np.int64)}


def same(a: Sample, b: Sample) -> bool:
    parts = [(*s.pieces, s.prompt, s.target, np.array([]) if s.plain is None else s.plain) for s in (a, b)]
    return len(parts[0]) == len(parts[1]) and all(np.array_equal(x, y) for x, y in zip(*parts, strict=True))


@quick
@given(
    mode=st.sampled_from(prompting.MODES),
    options=options,
    sizes=st.tuples(st.integers(1, 400), st.integers(1, 200), st.integers(1, 60)),
    length=st.integers(8, 700),
    targets=st.integers(17, 128),
    segment=st.sampled_from([16, 64, 128]),
    seed=st.integers(0, 2**32),
)
@example(
    "compress",
    dict.fromkeys(("before", "own_segment", "distractors", "unanswerable", "quoted"), 1.0) | {"turns": 1},
    (1, 200, 9),
    8,
    17,
    16,
    0,
)
def test_instruction_sizes(mode, options, sizes, length, targets, segment, seed):
    rng = np.random.default_rng(seed)
    start = rng.integers(len(PROSE) - 700)
    text = TOKENIZER.decode(PROSE[start + 400 : start + 400 + sizes[1]]).strip() or "Who?"
    row = Row(PROSE[start : start + sizes[0]], MARKS.encode(text), PROSE[start + 600 : start + 600 + sizes[2]])
    task = only(mode, **options)
    sample = sampled(task, row, length, targets, seed, segment=segment)
    check_sizes(sample, length, targets, segment)
    assert same(sample, sampled(task, row, length, targets, seed, segment=segment))
    prompts = {m: ids(prompting.build(text, m).decoder_text) for m in prompting.MODES}
    assert sample.prompt.tolist() == (prompts[mode] if len(prompts[mode]) < targets else prompts["compress"])
    fits = len(row.context) + len(row.question) <= task.window(length, targets)
    if fits and len(row.question) + 2 <= length // 2 and not options["unanswerable"]:
        assert sum(within(row.context, piece) for piece in sample.pieces) >= 1
    task = only(mode, renamed=1.0, **options)
    sample = sampled(task, row, length, targets, seed, segment=segment, renamed=True)
    check_sizes(sample, length, targets, segment)
    assert same(sample, sampled(task, row, length, targets, seed, segment=segment, renamed=True))


@quick
@given(
    name=st.sampled_from(["reconstruction", "continuation"]),
    tokens=st.integers(1, 300),
    length=st.integers(2, 200),
    targets=st.integers(17, 128),
    prompt_tokens=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_text_sizes(name, tokens, length, targets, prompt_tokens, seed):
    task = TASKS[name](prompt_tokens=prompt_tokens)
    text = np.arange(LOW, LOW + min(tokens, task.window(length, targets)))
    sample = sampled(task, text, length, targets, seed)
    check_sizes(sample, length, targets, 64)
    assert same(sample, sampled(task, text, length, targets, seed))


# ---------------------------------------------------------------- passkey
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
    ends = [taken_apart(TOKENIZER.decode(passkey_ids(12345, where, 2000, MARKS.encode))) for where in (0.0, 1.0)]
    assert [before for _, before, _ in ends] == [0, ends[0][2]]


def test_passkey_needs_room() -> None:
    with pytest.raises(InputError, match="give at least") as error:
        sampled(Passkey(), None, 20, 32)
    least = int(re.findall(r"\d+", str(error.value))[-1])
    assert len(sampled(Passkey(), None, least, 32).pieces[0]) == least
    with pytest.raises(InputError, match="target_tokens=17"):
        sampled(Passkey(), None, 512, 17)


# ---------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("reconstruction", {"prompt_tokens": 0}),
        ("reconstruction", {"prompt_tokens": 1.5}),
        ("continuation", {"share": 0}),
        ("passkey", {"share": float("nan")}),
        ("instruction", {"share": True}),
        ("instruction", {"modes": {"humane": 1}}),
        ("instruction", {"modes": {"human": 0}}),
        ("instruction", {"modes": {"human": -1, "compress": 2}}),
        ("instruction", {"before": 1.1}),
        ("instruction", {"own_segment": "often"}),
        ("instruction", {"distractors": -0.1}),
        ("instruction", {"unanswerable": None}),
        ("instruction", {"turns": 0}),
        ("instruction", {"quoted": 2}),
        ("instruction", {"renamed": -1}),
        ("cloze", {"renamed": 0.5}),
        ("reconstruction", {"spans": 0}),
        ("reconstruction", {"wrong": 1.1}),
        ("reconstruction", {"repeated": 2}),
        ("cloze", {"worded": 1.5}),
    ],
)
def test_options_that_cannot_be_used_are_named(task: str, options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(InputError, match=rf"^tasks\.{task}\.{key} must be .*, not .*\.$"):
        TASKS[task](**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="promt_tokens"):
        TASKS["reconstruction"](promt_tokens=3)
    assert {name: (task.name, task.reads) for name, task in TASKS.items()} == {
        "reconstruction": ("reconstruction", "text"),
        "continuation": ("continuation", "text"),
        "instruction": ("instruction", "questions"),
        "cloze": ("cloze", "text"),
        "passkey": ("passkey", None),
    }


# ---------------------------------------------------------------- batches
def sample_of(*sizes: int, prompt: int = 2, target: int = 3, plain: int | None = None) -> Sample:
    pieces = tuple(np.arange(100, 100 + n) for n in sizes)
    read = None if plain is None else np.arange(400, 400 + plain)
    return Sample(pieces, np.arange(200, 200 + prompt), np.arange(300, 300 + target), "", read)


def test_collate_pads_and_labels_targets_only() -> None:
    batch = collate([sample_of(4), sample_of(2, 1, prompt=3, target=1)], pad=9)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "context_ids": [[100, 101, 102, 103], [100, 101, 100, 9]],
        "context_mask": [[1, 1, 1, 1], [1, 1, 2, 0]],
        "input_ids": [[200, 201, 300, 301, 302], [200, 201, 202, 300, 9]],
        "labels": [[-100, -100, 300, 301, 302], [-100, -100, -100, 300, -100]],
        "logits_to_keep": [1, 2, 3],
    }
    assert "context_mask" not in collate([sample_of(4), sample_of(4)], pad=9)
    assert "context_mask" in collate([sample_of(4), sample_of(3)], pad=9)
    assert "context_mask" in collate([sample_of(2, 2), sample_of(2, 2)], pad=9)
    own = replace(sample_of(4), predicted=np.array([2, 0, 2]))
    assert collate([sample_of(4, prompt=3), own], pad=9)["predicted"].tolist() == [[0] * 6, [0, 0, 2, 0, 2, 0]]


def test_loss_falls_on_targets_only(tiny) -> None:
    """The model's loss is the mean over targets of what each row costs alone; other tokens' labels do not matter."""
    model = tiny("llama")
    samples = [
        Sample((np.arange(1, 20),), np.arange(20, 24), np.arange(30, 36), ""),
        Sample((np.arange(5, 12),), np.arange(40, 42), np.arange(50, 53), ""),
    ]
    losses = []
    for rows in (samples, samples[:1], samples[1:]):
        batch = collate(rows, pad=0)
        del batch["logits_to_keep"]
        losses.append(model(**batch, rate=4).loss.item())
    assert losses[0] == pytest.approx((6 * losses[1] + 3 * losses[2]) / 9, rel=1e-4)


def test_a_teachers_target_stands_in_the_same_columns() -> None:
    samples = [sample_of(4), sample_of(2, 1, prompt=3, target=1, plain=8), sample_of(1, plain=1)]
    batch = collate(samples, pad=9, teacher=True)
    ids_, mask = batch["teacher_ids"], batch["teacher_mask"]
    shift = ids_.shape[1] - batch["input_ids"].shape[1]
    for b, sample in enumerate(samples):
        plain = np.concatenate([*sample.pieces, sample.prompt]) if sample.plain is None else sample.plain
        assert ids_[b][mask[b].bool()].tolist() == [*plain, *sample.target]
        assert (ids_[b][~mask[b].bool()] == 9).all()
        at = batch["labels"][b] != -100
        assert ids_[b, shift:][at].tolist() == sample.target.tolist()


def test_describe() -> None:
    text = describe(
        sampled(only("compress", own_segment=1.0, before=0.0, distractors=1.0), Row.of(*ROWS[0])), TOKENIZER
    )
    assert "instruction" in text
    assert " […] " in text
    assert r"'\n\nWhere did Ada go?'" in text
    assert "prompt (2 tokens): 'Answer:'" in text
    assert f"'Paris{prompting.END}'" in text
    assert "[…]" not in describe(sampled(Reconstruction(), PROSE[:50]), TOKENIZER)
