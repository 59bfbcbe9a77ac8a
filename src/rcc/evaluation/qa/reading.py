"""Questions read: from files of JSON lines, from a suite, or about the example text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..example import EXAMPLE, example_text
from .questions import Question, digest
from .suites import is_unicode, read_suite


def open_questions(
    paths: Sequence[str] | None, suite: str | None, include: Sequence[str]
) -> tuple[list[Question], list[str]]:
    """Return questions of files, of a suite or, of neither, about the example text; and notes on unusable rows.

    Args:
        paths: see :func:`read`; of a suite, at most one folder.
        suite: one of :data:`rcc.evaluation.qa.suites.SUITES`; None: none.
        include: only questions whose id begins with one of these.

    Raises:
        FileError: a file is missing or damaged. InputError: there is no question; it says why.
    """
    if suite is not None:
        if paths is not None and len(paths) > 1:
            raise InputError(f"the suite {suite} has one folder: name one path.")
        questions = read_suite(suite, paths[0] if paths else None)
    elif paths:
        return read(paths, include=include)
    else:
        example = example_text()
        if example is None:
            raise InputError(f"no questions are named, and {EXAMPLE} of rcc's repository is not here: name a file.")
        questions = read_example(example)
    chosen = [question for question in questions if not include or question.id.startswith(tuple(include))]
    if not chosen:
        raise InputError(f"include {','.join(include)} leaves no question: use the beginning of an id.")
    return chosen, []


def reopen(settings: Mapping[str, Any]) -> tuple[list[Question], list[str]]:
    """Return the questions that an evaluation asked, and notes on them.

    Args:
        settings: of the evaluation.

    Raises:
        FileError, InputError: as :func:`open_questions`, or they are not the same any more.
    """
    questions, notes = open_questions(**settings["data"])
    if digest(questions) != settings["data_sha256"]:
        raise InputError("the questions are not those that were asked then: their files have changed.")
    return questions, notes


def read(
    paths: Sequence[str],
    *,
    context: str = "context",
    question: str = "question",
    answers: str = "answers",
    include: Sequence[str] = (),
) -> tuple[list[Question], list[str]]:
    """Return questions of JSON lines, and notes on rows that cannot be used.

    A row's `id` tells its set (what stands before the first "/"); without one it is named by its file and line.

    Args:
        paths: files, folders, globs or data sets, as :class:`rcc.data.sources.Source` has them.
        context: the field of a row that holds the text.
        question: the field that holds the question.
        answers: the field that holds the accepted answers, a string or a list of strings.
        include: only rows whose `id` begins with one of these.

    Raises:
        FileError: a file is missing or damaged. InputError: no row can be used; it says why.
    """
    from ...data.sources import Source, read_rows

    questions: dict[str, Question] = {}
    broken: list[str] = []
    for path in paths:
        source = Source(path, context=context, question=question, answers=answers, include=list(include))
        usable, left_out, first = len(questions), 0, ""
        for line, row in read_rows(source):
            made = _question(row, source, line)
            if isinstance(made, str):
                broken.append(f"{line}: {made}")
                first = first or broken[-1]
            elif made is None:
                left_out += 1
            else:
                while made.id in questions:
                    made = replace(made, id=made.id + "'")
                questions[made.id] = made
        if len(questions) == usable:
            why = (
                f": {first}"
                if first
                else f": no id begins with {' or '.join(include)}"
                if left_out
                else ": it is empty"
            )
            raise InputError(f"{path} has no question that can be used{why}.")
    notes = [f"{len(broken)} rows cannot be used; the first: {broken[0]}."] if broken else []
    return list(questions.values()), notes


def _question(row: Mapping[str, Any] | str, source: Any, line: str) -> Question | str | None:
    """Return a row's question, why there is none, or None where the source leaves it out.

    Args:
        row: or, as text, why it cannot be read.
        source: names the fields, and says which rows are wanted.
        line: "file:number".
    """
    if isinstance(row, str):
        return row
    path, _, number = line.rpartition(":")
    file = Path(path).name.split(".")[0]
    name = str(row.get("id") or f"{file}/{number}")
    if not source.keeps(name):
        return None
    values = []
    for field in (source.context, source.question, source.answers):
        value = row.get(field)
        if value is None:
            return f"no field {field!r} (it has {', '.join(list(row)[:20])})"
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            return f"{field!r} is not text"
        if any(not is_unicode(text) for text in texts):
            return f"{field!r} is not Unicode"
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            return f"{field!r} is empty"
        values.append(texts)
    own = name.partition("/")[0] if "/" in name else file
    return Question(name, own, values[0][0], values[1][0], tuple(values[2]))


def read_example(text: Path) -> list[Question]:
    """Return the questions about the example text of the repository, which stand beside it."""
    context = text.read_text(encoding="utf-8")
    lines = text.with_suffix(".questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        Question(f"{text.stem}/{number}", text.stem, context, row["question"], tuple(row["answers"]))
        for number, row in enumerate(rows, 1)
    ]
