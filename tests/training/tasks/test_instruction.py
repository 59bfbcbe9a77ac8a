"""The task `instruction`: questions about passages, asked as at inference."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rcc.data.corpus import Row
from rcc.text import prompting
from rcc.training.tasks import Instruction
from rcc.training.tasks.instruction import QUOTE, UNANSWERABLE
from task_samples import (
    HIGH,
    LOW,
    MARKS,
    PROSE,
    ROWS,
    TOKENIZER,
    GivenDraw,
    check_sizes,
    ids,
    only,
    quick,
    read,
    read_once,
    row_of,
    same,
    sampled,
    within,
)


@pytest.mark.parametrize("row", ROWS)
def test_samples_are_asked_as_rcc_ask_asks(row: tuple[str, str, str]) -> None:
    context, question, answer = row
    given = row_of(*row)
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
def test_the_question_stands_before_or_after(row: tuple[str, str, str]) -> None:
    context, question, _ = row
    for mode in ("reconstruct", "compress"):
        texts = {
            (0, 0): [context + prompting.SEPARATOR + question],
            (1, 0): [question + prompting.SEPARATOR + context],
            (0, 1): [context, prompting.SEPARATOR + question],
            (1, 1): [question + prompting.SEPARATOR, context],
        }
        for (before, own), pieces in texts.items():
            sample = sampled(only(mode, before=before, own_segment=own), row_of(*row))
            assert [p.tolist() for p in sample.pieces] == [ids(text) for text in pieces]


def test_a_teacher_is_asked_in_chat_form() -> None:
    context, question, _ = ROWS[0]
    chat = f"{prompting.HEADER}{context}{prompting.SEPARATOR}{question}{prompting.TURN}"
    for mode in ("human", "compress"):
        sample = sampled(only(mode), row_of(*ROWS[0]))
        assert sample.plain is not None
        assert sample.plain.tolist() == ids(chat)
    assert sampled(only("reconstruct"), row_of(*ROWS[0])).plain is None


def test_modes_and_places_are_as_frequent_as_asked() -> None:
    row = row_of(*ROWS[0])
    question, modes, sides = row.question, Counter[str](), Counter[str]()
    task = Instruction(modes={"human": 2, "reconstruct": 1, "compress": 1}, before=0.3, own_segment=0.6, distractors=0)
    n = 1200
    for seed in range(n):
        sample = sampled(task, row, seed=seed)
        if len(sample.prompt) == len(MARKS.header):
            modes["reconstruct"] += 1
        else:
            modes["human" if within(question, sample.prompt) else "compress"] += 1
        if not within(question, sample.prompt):
            sides["own" if len(sample.pieces) == 2 else "joined"] += 1
            sides["before" if (sample.pieces[0][: len(question)] == question).all() else "after"] += 1
    asked = n - modes["human"]
    assert modes["human"] / n == pytest.approx(0.5, abs=0.06)
    assert modes["reconstruct"] / n == pytest.approx(0.25, abs=0.05)
    assert sides["before"] / asked == pytest.approx(0.3, abs=0.07)
    assert sides["own"] / asked == pytest.approx(0.6, abs=0.07)


def test_distractors_fill_the_context_around_the_whole_passage() -> None:
    row = row_of(*ROWS[1])
    offsets = []
    for seed in range(300):
        draw = GivenDraw(row)
        (context,) = only("human", distractors=1.0).sample(draw, np.random.default_rng(seed), 512, 64, MARKS).pieces
        assert 512 - len(MARKS.separator) <= len(context) <= 512
        assert within(row.context, context) == 1
        assert "passage" in draw.asked or "prose" in draw.asked
        offsets.append(next(i for i in range(len(context)) if (context[i : i + len(row.context)] == row.context).all()))
    offsets.sort()
    assert offsets[0] == 0
    assert offsets[-1] > 400
    assert 130 < offsets[150] < 330  # a passage is as likely early as late


def test_half_of_the_distractors_are_prose_where_there_is_any() -> None:
    row, task = row_of(*ROWS[0]), only("human", distractors=1.0)
    tokens = np.concatenate([sampled(task, row, 2048, seed=seed).pieces[0] for seed in range(60)])
    prose, passages = (tokens >= HIGH).sum() / 160, ((tokens >= LOW) & (tokens < HIGH)).sum() / 60
    assert prose / (prose + passages) == pytest.approx(0.5, abs=0.1)  # counted in texts of their mean length
    assert (sampled(task, row, 2048, has_prose=False).pieces[0] >= HIGH).sum() < 30
    assert len(sampled(only("human", distractors=0.0), row).pieces[0]) == len(row.context)


@pytest.mark.parametrize("distractors", [0.0, 1.0])
def test_unanswerable(distractors: float) -> None:
    row = row_of(*ROWS[0])
    for seed in range(20):
        sample = sampled(only("human", unanswerable=1.0, distractors=distractors), row, seed=seed)
        assert not within(row.context, sample.pieces[0])
        assert TOKENIZER.decode(sample.target) == UNANSWERABLE + prompting.END


def test_a_passage_is_joined_with_its_question_where_a_segment_for_it_would_cut_it() -> None:
    row = replace(row_of(*ROWS[0]), context=PROSE[:150])
    for length, pieces in ((170, 1), (192, 1), (256, 2)):  # segments of 64: 192 leave 128 beside the question's
        sample = sampled(only("compress", own_segment=1.0), row, length)
        assert len(sample.pieces) == pieces
        assert sum(within(row.context, piece) for piece in sample.pieces) == 1


def test_a_conversation_asks_about_the_passages_that_are_whole() -> None:
    row, sizes = row_of(*ROWS[0]), []
    for seed in range(60):
        draw = GivenDraw(row)
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
        short = task.sample(GivenDraw(row), np.random.default_rng(seed), 400, 64, MARKS)
        assert len(short.prompt) + len(short.target) <= 64
        assert read(short)[0] == first
    assert max(sizes) == 6
    assert np.mean(sizes) > 4


def test_a_conversation_asks_what_its_context_does_not_say() -> None:
    answers: Counter[bool] = Counter()
    for seed in range(40):
        draw = GivenDraw(row_of(*ROWS[0]), has_prose=False)
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


def test_a_conversation_does_not_ask_what_it_has_said() -> None:
    class Talk(GivenDraw):
        def same(self, rng: np.random.Generator, context_hash: int) -> Row:
            told = [("Who went to Paris in 1843?", "Ada"), ("When did she go?", "1843"), ("What fell?", "rain")]
            return row_of("", *told[rng.integers(3)])

    for seed in range(20):
        draw = Talk(row_of(*ROWS[0]))
        sample = only("human", turns=6).sample(draw, np.random.default_rng(seed), 400, 256, MARKS)
        said = ""
        for question, answer in read(sample):
            assert answer not in said
            said += question + answer
        assert "rain" in said


def test_a_quotation_is_the_sentence_with_the_answer() -> None:
    task = only("human", quoted=1.0)
    asked = QUOTE.format(question="Where did Ada go?")
    assert read_once(sampled(task, row_of(*ROWS[0]))) == (asked, "Ada went to Paris in 1843.")
    plain = [
        ("It rained. It snowed.", "Where did Ada go?", "Paris"),  # said nowhere
        ("Ada went to Paris today. Then she left Paris by train.", "Where did Ada go?", "Paris"),  # twice
        ("To Paris, yes! She went.", "Where did Ada go?", "Paris"),  # hardly a sentence
        ("Ada " + "very " * 60 + "much likes Paris.", "What does Ada like?", "Paris"),  # hardly to be asked for
    ]
    for row in plain:
        assert read_once(sampled(task, row_of(*row))) == row[1:]
    unanswerable = sampled(only("human", quoted=1.0, unanswerable=1.0), row_of(*ROWS[0]))
    assert read_once(unanswerable) == ("Where did Ada go?", UNANSWERABLE)
    quotes = Counter(read_once(sampled(only("human", quoted=0.3), row_of(*ROWS[0]), seed=s)) for s in range(400))
    assert quotes[asked, "Ada went to Paris in 1843."] / 400 == pytest.approx(0.3, abs=0.07)


options = st.fixed_dictionaries(
    {k: st.sampled_from([0.0, 0.5, 1.0]) for k in ("before", "own_segment", "distractors", "unanswerable", "quoted")}
    | {"turns": st.sampled_from([1, 3])}
)


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
def test_instruction_sizes(
    mode: str, options: dict[str, Any], sizes: tuple[int, int, int], length: int, targets: int, segment: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    start = rng.integers(len(PROSE) - 700)
    text = TOKENIZER.decode(PROSE[start + 400 : start + 400 + sizes[1]]).strip() or "Who?"
    row = Row(PROSE[start : start + sizes[0]], MARKS.encode(text), PROSE[start + 600 : start + 600 + sizes[2]], "", 7)
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
