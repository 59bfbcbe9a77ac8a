"""Sources of text and questions: the files or datasets that a path stands for, and their rows, read and checked."""

from __future__ import annotations

import glob
import gzip
import importlib
import json
import lzma
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import FileError, InputError, brief

JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN = (".txt", ".text", ".md", ".rst")
PACKED = (".xz", ".gz")
TABLES = (".parquet", ".arrow", ".csv")  # only `datasets` reads these


@dataclass
class Source:
    """Say where text or questions come from.

    Args:
        path: a JSON-lines file, any other file as one document of plain text (both may be packed as .xz or .gz), a
            folder or glob of such files, or what `datasets` opens: a folder of its own, or a hub id.
        weight: this source's share of the samples, relative to the other sources' weights.
        text: of a source of text, the field that holds a document.
        context, question, answers: of a source of questions, the fields of a row. `answers` is a string
            or a list of strings, whose first one that is not empty is used.
        include, exclude: only rows, or no rows, whose field `id` begins with one of these. A plain text file's id
            is its name.
        extractive: of a source of questions, only rows whose answer stands in the context word for word, but for a full
            stop at its end, and has at most this many words. 0: all rows.
        split: for `datasets`.
        allow_special: whether chat marks such as `<|im_end|>` in its texts are the special tokens that they name;
            otherwise they are read as characters, as `rcc compress` and `rcc ask` read them.

    Raises:
        InputError: naming the key that cannot be used.
    """

    path: str
    weight: float = 1.0
    text: str = "text"
    context: str = "context"
    question: str = "question"
    answers: str = "answers"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    extractive: int = 0
    split: str = "train"
    allow_special: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):
            self.path = os.fspath(self.path)
        for key in ("path", "text", "context", "question", "answers", "split"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{key} of a source must be text that is not empty, not {value!r}.")
        if not isinstance(self.allow_special, bool):
            raise InputError(f"allow_special of the source {self.path} must be true or false.")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise InputError(f"weight of the source {self.path} must be a number above 0, not {weight!r}.")
        for key in ("include", "exclude"):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v for v in value):
                raise InputError(f"{key} of the source {self.path} must be a list of id beginnings, not {value!r}.")
            setattr(self, key, list(value))
        if isinstance(self.extractive, bool) or not isinstance(self.extractive, int) or self.extractive < 0:
            raise InputError(
                f"extractive of the source {self.path} must be a number of words, or 0, not {self.extractive!r}."
            )

    def keeps(self, row_id: str) -> bool:
        """Return whether `include` and `exclude` keep a row."""
        included = not self.include or row_id.startswith(tuple(self.include))
        return included and not row_id.startswith(tuple(self.exclude))

    def keeps_answer(self, context: str, answer: str) -> bool:
        """Return whether `extractive` keeps a row."""
        return not self.extractive or (len(answer.split()) <= self.extractive and answer.removesuffix(".") in context)

    def fields(self, kind: str) -> tuple[str, ...]:
        """Return the names of the fields that a row needs, for text or for questions."""
        return (self.text,) if kind == "text" else (self.context, self.question, self.answers)


def ending(file: Path) -> str:
    """Return a file's ending in lower case; that of its content where it is packed."""
    packed = file.suffix.lower() in PACKED
    return Path(file.stem if packed else file.name).suffix.lower()


def source_files(source: Source, kind: str) -> list[Path] | None:
    """Return the files that a source's path stands for, sorted; None where it is for `datasets`.

    Raises:
        FileError: there is no such file, or a glob matches none.
    """
    text = source.path
    path = Path(text).expanduser()
    if os.path.isfile(path):  # unlike Path.is_file, never raises: any text may be given
        return [path.absolute()]
    if os.path.isdir(path):
        if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            return None
        below = sorted(p for p in path.absolute().rglob("*") if p.is_file())
        below = [p for p in below if not any(part[0] == "." for part in p.relative_to(path.absolute()).parts)]
        if any(p.suffix.lower() in TABLES for p in below):
            return None
        # text that describes the rows may stand beside them, but holds no questions itself
        wanted = JSON_LINES + PLAIN if kind == "text" else JSON_LINES
        return [p for p in below if ending(p) in wanted] or None
    if glob.has_magic(text):
        matches = sorted(Path(p).absolute() for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not matches:
            raise FileError(f"{text} matches no file: check the source's path.")
        return matches
    looks_like_file = text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or text.endswith(os.sep)
    if looks_like_file or path.suffix.lower() in PACKED + TABLES or ending(path) in JSON_LINES + PLAIN:
        raise FileError(f"{text} does not exist: check the source's path.")
    return None


def open_dataset(source: Source) -> Any:
    """Open a source's path with `datasets`, and return its split.

    Raises:
        FileError: `datasets` cannot open it. InputError: `datasets` is not installed, or there is no such split.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            f"{source.path} is not a JSON-lines or text file, nor a folder or glob of such: to open it as a dataset,"
            " pip install datasets."
        ) from None
    folder = Path(source.path).expanduser()
    try:
        if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(str(folder) if folder.is_dir() else source.path)
    except Exception as error:  # datasets raises its own errors, the hub's, OSError, ValueError and more
        why = brief(error)
        raise FileError(f"datasets cannot open {source.path} ({why}): check the source's path.") from error
    if isinstance(loaded, dict):
        if source.split not in loaded:
            raise InputError(f"{source.path} has no split {source.split!r}: use one of {', '.join(loaded)}.")
        loaded = loaded[source.split]
    return loaded


NumberedRow = tuple[int, dict[str, Any] | str]
"""A line's number, and its object or why there is none."""


def _open(file: Path) -> IO[bytes] | gzip.GzipFile:
    if file.suffix.lower() == ".xz":
        return lzma.open(file, "rb")
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    return file.open("rb")


def file_rows(file: Path, source: Source) -> Iterator[NumberedRow]:
    """Yield the rows of one file, with their line numbers; blank lines are not rows.

    Raises:
        FileError: the file is missing or damaged.
    """
    try:
        with _open(file) as stream:
            if ending(file) in JSON_LINES:
                for number, line in enumerate(stream, 1):
                    if not line.isspace():
                        yield number, _parse(line)
            else:
                try:
                    yield 1, {"id": file.name, source.text: stream.read().decode("utf-8-sig")}
                except UnicodeDecodeError:
                    yield 1, "not UTF-8 text"
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise FileError(f"{file} cannot be read ({brief(error)}): get it again.") from error


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON"
    return row if isinstance(row, dict) else "not a JSON object"


def row_texts(row: dict[str, Any], source: Source, kind: str) -> list[str] | str:
    """Return the texts of a row, in the order of :meth:`Source.fields`; or why it cannot be used."""
    texts = []
    for name in source.fields(kind):
        value = row.get(name)
        if kind == "questions" and name == source.answers and isinstance(value, (list, tuple)):
            if not all(isinstance(v, str) for v in value):
                return f"{name!r} is not a list of strings"
            value = next((v for v in value if v.strip()), "")
        if not isinstance(value, str):
            return f"{name!r} is not a string" if name in row else f"no field {name!r}"
        if not value.strip():
            return f"{name!r} is empty"
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half a character
            return f"{name!r} is not Unicode"
        texts.append(value if kind == "text" else value.strip())
    return texts


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Yield the rows of a source of questions as they are: `file:line`, and the object or why there is none.

    Raises:
        FileError: a file is missing or damaged. InputError: a file is not of JSON lines, or `datasets` is needed.
    """
    files = source_files(source, "questions")
    if files is None:
        yield from ((f"{source.path}:{number}", row) for number, row in enumerate(open_dataset(source), 1))
        return
    for file in files:
        check_json_lines(file)
        yield from ((f"{file}:{number}", row) for number, row in file_rows(file, source))


def check_json_lines(file: Path) -> None:
    """Raise InputError for a file that is not of JSON lines."""
    if ending(file) not in JSON_LINES:
        raise InputError(f"{file} is not a JSON-lines file: questions need rows with fields.")
