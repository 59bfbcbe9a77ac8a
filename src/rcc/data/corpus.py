"""Sources of text and questions → token caches on disk → streams that training samples are drawn from.

A source is tokenised once, into memory-mapped files under :func:`rcc.checkpoints.home`. A stream is a pure function:
draw `k` is the same whatever was drawn before, so a run resumes at the exact sample by its number alone.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib
import json
import logging
import lzma
import math
import os
import re
import shutil
import uuid
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from .. import checkpoints
from ..errors import FileError, InputError, brief
from ..runtime import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT_VERSIONS = {"text": 1, "questions": 2}
"""Version of the cache's files; part of the cache's key, so another version makes another cache."""

RUNS = {"text": 1, "questions": 3}  # kind → runs of tokens a row: the document; context, question, answer
JSON_LINES = (".jsonl", ".json", ".ndjson")
PLAIN = (".txt", ".text", ".md", ".rst")
PACKED = (".xz", ".gz")
TABLES = (".parquet", ".arrow", ".csv")  # only `datasets` reads these
BATCH_ROWS, BATCH_CHARACTERS = 64, 2_000_000  # tokenised at once, whichever is reached first


# ---------------------------------------------------------------- sources
@dataclass
class Source:
    """Where text or questions come from.

    Args:
        path: a JSON-lines file, any other file as one document of plain text (both may be packed as .xz or .gz), a
            folder or glob of such files, or what `datasets` opens: a folder of its own, or a hub id.
        weight: this source's share of the samples, relative to the other sources' weights.
        text: the field that holds a document, where this is a source of text.
        context, question, answers: the fields of a row, where this is a source of questions. `answers` is a string
            or a list of strings, whose first one that is not empty is used.
        include, exclude: only rows, or no rows, whose field `id` begins with one of these. A plain text file's id
            is its name.
        extractive: of a source of questions, only rows whose answer stands in the context word for word, but for a full
            stop at its end, and has at most this many words. 0: all rows.
        split: for `datasets`.

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

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):
            self.path = os.fspath(self.path)
        for key in ("path", "text", "context", "question", "answers", "split"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{key} of a source must be text that is not empty, not {value!r}.")
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
        """Whether `include` and `exclude` keep a row."""
        included = not self.include or row_id.startswith(tuple(self.include))
        return included and not row_id.startswith(tuple(self.exclude))

    def keeps_answer(self, context: str, answer: str) -> bool:
        """Whether `extractive` keeps a row."""
        return not self.extractive or (len(answer.split()) <= self.extractive and answer.removesuffix(".") in context)

    def fields(self, kind: str) -> tuple[str, ...]:
        """The fields that a row needs."""
        return (self.text,) if kind == "text" else (self.context, self.question, self.answers)


def _kind_of(file: Path) -> str:
    """A file's ending, that of its content where it is packed."""
    packed = file.suffix.lower() in PACKED
    return Path(file.stem if packed else file.name).suffix.lower()


def _files(source: Source, kind: str) -> list[Path] | None:
    """The files that a source's path stands for, sorted; None: it is for `datasets`.

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
        return [p for p in below if _kind_of(p) in wanted] or None
    if glob.has_magic(text):
        found = sorted(Path(p).absolute() for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        if not found:
            raise FileError(f"{text} matches no file: check the source's path.")
        return found
    looks_like_file = text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or text.endswith(os.sep)
    if looks_like_file or path.suffix.lower() in PACKED + TABLES or _kind_of(path) in JSON_LINES + PLAIN:
        raise FileError(f"{text} does not exist: check the source's path.")
    return None


def _dataset(source: Source) -> Any:
    """What `datasets` opens under a source's path: its split."""
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


# ---------------------------------------------------------------- reading rows
_Record = tuple[int, dict[str, Any] | str]  # the line, and its object or why there is none


def _open(file: Path) -> IO[bytes] | gzip.GzipFile:
    if file.suffix.lower() == ".xz":
        return lzma.open(file, "rb")
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")
    return file.open("rb")


def _read(file: Path, source: Source) -> Iterator[_Record]:
    """The rows of one file, one at a time; blank lines are no rows."""
    try:
        with _open(file) as stream:
            if _kind_of(file) in JSON_LINES:
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


def _texts(row: dict[str, Any], source: Source, kind: str) -> list[str] | str:
    """The texts of a row's runs, or why it has none."""
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
    """Rows of a source of questions as they are: where each stands (`file:line`), and its object or why there is none.

    Raises:
        FileError: a file is missing or damaged. InputError: a file is not of JSON lines, or `datasets` is needed.
    """
    files = _files(source, "questions")
    if files is None:
        yield from ((f"{source.path}:{number}", row) for number, row in enumerate(_dataset(source), 1))
        return
    for file in files:
        _check_lines(file)
        yield from ((f"{file}:{number}", row) for number, row in _read(file, source))


def _check_lines(file: Path) -> None:
    if _kind_of(file) not in JSON_LINES:
        raise InputError(f"{file} is not a JSON-lines file: questions need rows with fields.")


# ---------------------------------------------------------------- the cache
def open_text(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, progress: Callable[[str], None] | None = None
) -> Corpus:
    """A source's documents as tokens, tokenised at the first call.

    Rows that cannot be used are counted, and named in one warning.

    Args:
        progress: gets a short phrase a batch.

    Raises:
        InputError: no row of a file has the field `source.text`, there is no usable row, or `datasets` is needed.
        FileError: a file is missing or damaged, or the cache cannot be written.
    """
    return _corpus(source, tokenizer, "text", progress)


def open_questions(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, progress: Callable[[str], None] | None = None
) -> Corpus:
    """A source's rows of context, question and first answer as tokens; otherwise like :func:`open_text`."""
    return _corpus(source, tokenizer, "questions", progress)


def _corpus(
    source: Source, tokenizer: PreTrainedTokenizerBase, kind: str, progress: Callable[[str], None] | None
) -> Corpus:
    files = _files(source, kind)
    dataset = _dataset(source) if files is None else None
    caches = checkpoints.home() / "tokens"
    folder = caches / _key(source, tokenizer, kind, files, dataset)
    if not _is_made(folder):
        try:
            atomic.private_folder(caches)  # tokens are as readable as their texts
            with FileLock(f"{folder}.lock"):  # the system releases it when its holder is killed
                if not _is_made(folder):
                    _make(folder, source, tokenizer, kind, files, dataset, progress or (lambda phrase: None))
        except FileError:
            raise
        except OSError as error:
            raise FileError(
                f"the tokens of {source.path} cannot be written to {caches} ({brief(error)}):"
                " RCC_HOME can name another folder."
            ) from error
    corpus = Corpus(source, folder)
    if corpus.broken:
        first = "; ".join(corpus.info["broken"]["first"][:3])
        logger.warning("%s: %d broken rows are left out (%s).", source.path, corpus.broken, first)
    return corpus


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, kind: str, files: list[Path] | None, dataset: Any) -> str:
    """SHA-256 over everything that the cache's content depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # left behind by whichever call came last, and set anew by the next one
        content |= {"truncation": None, "padding": None}
    else:
        content = [type(tokenizer).__name__, tokenizer.get_vocab()]
    if files is None:
        origin: Any = dataset._fingerprint
    else:
        try:
            origin = [(os.fspath(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        except OSError as error:
            raise FileError(f"{source.path} cannot be read ({brief(error)}).") from error
    parts = [FORMAT_VERSIONS[kind], content, kind, source.fields(kind), source.include, source.exclude, origin]
    if kind == "questions" and source.extractive:
        parts.append(source.extractive)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_made(folder: Path) -> bool:
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if info["kind"] not in RUNS or not isinstance(info["broken"]["first"], list):
            return False
        if any(type(n) is not int or n < 0 for n in (info["rows"], info["broken"]["count"])):
            return False
        return (folder / "tokens.bin").stat().st_size == info["tokens"] * np.dtype(info["dtype"]).itemsize
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _make(
    folder: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    files: list[Path] | None,
    dataset: Any,
    say: Callable[[str], None],
) -> None:
    """Read and tokenise a source into a folder, which appears by one rename, complete."""
    for left_over in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    work = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
    work.mkdir(mode=0o700)
    try:
        with _Writer(work, source, tokenizer, kind, say) as writer:
            if files is None:
                writer.add(source.path, enumerate(dataset, 1))
            else:
                for file in files:
                    if kind == "questions":
                        _check_lines(file)
                    writer.add(str(file), _read(file, source), must_have_objects=_kind_of(file) in JSON_LINES)
            writer.finish([source.path] if files is None else [str(file) for file in files])
        for file in work.iterdir():
            file.chmod(0o600)
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Writer:
    """Writes a cache row by row; what it holds a row is one hash, one set and the ends of the runs."""

    def __init__(
        self, work: Path, source: Source, tokenizer: PreTrainedTokenizerBase, kind: str, say: Callable[[str], None]
    ):
        self.work, self.source, self.tokenizer, self.kind, self.say = work, source, tokenizer, kind, say
        # ids need not be without gaps
        ids = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
        self.dtype = np.dtype(np.uint16 if ids <= 1 << 16 else np.uint32)
        self.tokens = (work / "tokens.bin").open("wb")
        self.offsets, self.hashes, self.sets = array("Q", [0]), array("Q"), array("L")
        self.spans = array("L")  # of questions, two a row
        self.names: dict[str, int] = {}
        self.broken_count, self.broken_first = 0, list[str]()
        self.batch: list[tuple[str, str, list[str]]] = []  # where a row stands, its set, its texts
        self.characters = self.rows = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.tokens.close()

    def add(self, name: str, records: Iterable[_Record], must_have_objects: bool = False) -> None:
        """Take the rows of one file or dataset."""
        present, empty = dict[str, None](), True
        for number, row in records:
            where, empty = f"{name}:{number}", False
            self.rows += 1
            if isinstance(row, str):
                self.broken(where, row)
                continue
            present.update(dict.fromkeys(row))
            row_id = str(row.get("id", ""))
            if not self.source.keeps(row_id):
                continue
            texts = _texts(row, self.source, self.kind)
            if isinstance(texts, str):
                self.broken(where, texts)
                continue
            if self.kind == "questions" and not self.source.keeps_answer(texts[0], texts[2]):
                continue
            self.batch.append((where, row_id.partition("/")[0] if "/" in row_id else "", texts))
            self.characters += sum(map(len, texts))
            if len(self.batch) >= BATCH_ROWS or self.characters >= BATCH_CHARACTERS:
                self.flush()
        if must_have_objects and not present and not empty:
            raise InputError(f"{name} has no row with a field {self.missing({})}: it must hold a JSON object a line.")
        if present and (missing := self.missing(present)):
            has = ", ".join(list(present)[:20])
            raise InputError(f"{name} has no row with a field {missing}: name one of those that it has ({has}).")

    def missing(self, present: dict[str, None]) -> str:
        return " or ".join(repr(name) for name in self.source.fields(self.kind) if name not in present)

    def broken(self, where: str, why: str) -> None:
        self.broken_count += 1
        if len(self.broken_first) < 10:
            self.broken_first.append(f"{where}: {why}")

    def flush(self) -> None:
        """Tokenise and write what has been collected."""
        if not self.batch:
            return
        # rows that share a context stand together as a rule
        unique = list(dict.fromkeys(text for _, _, texts in self.batch for text in texts))
        places = self.kind == "questions" and self.tokenizer.is_fast
        found = self.tokenizer(
            unique,
            add_special_tokens=False,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=places,
        )
        runs = {text: np.asarray(run, self.dtype) for text, run in zip(unique, found["input_ids"], strict=True)}
        offsets = dict(zip(unique, found["offset_mapping"], strict=True)) if places else {}
        for where, name, texts in self.batch:
            if not all(len(runs[text]) for text in texts):
                self.broken(where, "a text without tokens")
                continue
            for text in texts:
                self.tokens.write(runs[text].tobytes())
                self.offsets.append(self.offsets[-1] + len(runs[text]))
            if self.kind == "questions":
                context, _, answer = texts
                self.spans.extend(_span(context, answer, offsets[context]) if places else (0, 0))
            # blanks at the ends do not make another document
            digest = hashlib.sha256(texts[0].strip().encode()).digest()
            self.hashes.append(int.from_bytes(digest[:8], "big"))
            self.sets.append(self.names.setdefault(name, len(self.names)))
        self.batch, self.characters = [], 0
        self.say(f"tokenising {self.source.path}: {len(self.hashes)} rows, {self.offsets[-1] / 1e6:.1f}M tokens")

    def _nothing(self) -> str:
        """Why there is no row, by what was met and what is set."""
        if self.broken_first:
            return f"{self.source.path} has no row that can be used (the first is broken: {self.broken_first[0]})."
        if not self.rows:
            return f"{self.source.path} is empty: give a file with at least one row."
        filters = " and ".join(name for name in ("include", "exclude", "extractive") if getattr(self.source, name))
        return f"{self.source.path} has no row that can be used: its {filters or 'settings'} leave none of {self.rows}."

    def finish(self, files: list[str]) -> None:
        self.flush()
        if not self.hashes:
            raise InputError(self._nothing())
        np.save(self.work / "offsets.npy", np.asarray(self.offsets, np.uint64))
        np.save(self.work / "hashes.npy", np.asarray(self.hashes, np.uint64))
        np.save(self.work / "sets.npy", np.asarray(self.sets, np.uint32))
        if self.kind == "questions":
            np.save(self.work / "spans.npy", np.asarray(self.spans, np.uint32).reshape(-1, 2))
        info = {
            "format_version": FORMAT_VERSIONS[self.kind],
            "kind": self.kind,
            "dtype": self.dtype.name,
            "rows": len(self.hashes),
            "tokens": self.offsets[-1],
            "broken": {"count": self.broken_count, "first": self.broken_first},
            "files": files,
            "sets": list(self.names),
        }
        self.tokens.flush()  # a full disk shows itself here at the latest
        (self.work / "info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def _span(context: str, answer: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The tokens of a context from the first to the last place where an answer stands: the first of them and the one
    after the last; (0, 0) where it does not stand, or says nothing of where it is from (yes, no)."""
    answer = answer.strip().rstrip(".")
    if answer.lower() in ("", "yes", "no"):
        return 0, 0
    found = list(re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", context, re.IGNORECASE))
    if not found:
        return 0, 0
    starts, ends = np.asarray(offsets).T
    first, last = ends.searchsorted(found[0].start(), "right"), starts.searchsorted(found[-1].end(), "left")
    return int(first), int(last)


# ---------------------------------------------------------------- a corpus
@dataclass(frozen=True, eq=False)
class Row:
    """A question: token ids (int64) of context, question and first answer.

    Attributes:
        set: the part of the row's id before the first "/", empty where there is none.
        hash: of the context's text, or of the part of it that was cut out; rows that share a context share it.
    """

    context: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    set: str
    hash: int


class Corpus:
    """A tokenised source, memory-mapped when first used: cheap to send to another process.

    Attributes:
        source: what it was made from.
        kind: `"text"` or `"questions"`.
        info: what its `info.json` says.
    """

    def __init__(self, source: Source, folder: Path):
        self.source, self.folder = source, folder
        self.info: dict[str, Any] = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        self.kind: str = self.info["kind"]
        self._runs = RUNS[self.kind]

    def __getstate__(self) -> dict[str, Any]:
        # maps are opened anew on the other side
        return {k: self.__dict__[k] for k in ("source", "folder", "info", "kind", "_runs")}

    def __len__(self) -> int:
        return self.info["rows"]

    @property
    def tokens_total(self) -> int:
        return self.info["tokens"]

    @property
    def broken(self) -> int:
        """How many rows were left out because they cannot be used."""
        return self.info["broken"]["count"]

    # plain views of the maps: indexing np.memmap itself is several times slower
    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.asarray(np.memmap(self.folder / "tokens.bin", self.info["dtype"], "r"))

    @cached_property
    def _offsets(self) -> np.ndarray:
        return np.asarray(np.load(self.folder / "offsets.npy", mmap_mode="r"))

    @cached_property
    def _sets(self) -> np.ndarray:
        return np.asarray(np.load(self.folder / "sets.npy", mmap_mode="r"))

    @cached_property
    def hashes(self) -> np.ndarray:
        """uint64 [rows]: of each document's text or row's context, without the blanks around it."""
        return np.asarray(np.load(self.folder / "hashes.npy", mmap_mode="r"))

    @cached_property
    def spans(self) -> np.ndarray:
        """uint32 [rows, 2]: of each row of questions, the tokens of its context from the first to the last place where
        its answer stands; 0, 0 where it does not."""
        self._check_questions()
        return np.asarray(np.load(self.folder / "spans.npy", mmap_mode="r"))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each document or context."""
        return self._lengths(0)

    @property
    def question_lengths(self) -> np.ndarray:
        """int64 [rows]: tokens of each question."""
        self._check_questions()
        return self._lengths(1)

    def token_ids(self) -> np.ndarray:
        """Return the token ids that occur in it, ascending."""
        seen = np.zeros(1 + int(self._tokens.max(initial=0)), dtype=bool)
        for start in range(0, len(self._tokens), 2**24):  # an index array is eight bytes a token
            seen[self._tokens[start : start + 2**24]] = True
        return np.flatnonzero(seen)

    def _lengths(self, run: int) -> np.ndarray:
        return np.diff(self._offsets.astype(np.int64))[run :: self._runs]

    def _check_questions(self) -> None:
        if self.kind != "questions":
            raise InputError(f"{self.source.path} was opened as text: open it with open_questions.")

    def _run(self, i: int, run: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.source.path} has no row {i}: it has {len(self)}.")
        at = i * self._runs + run
        return self._tokens[int(self._offsets[at]) : int(self._offsets[at + 1])]

    def document(self, i: int) -> np.ndarray:
        """Tokens [T] of a document, or of a row's context: a read-only view of the file, of its unsigned type."""
        return self._run(i, 0)

    def row(self, i: int) -> Row:
        """A row of a corpus of questions.

        Raises:
            InputError: this is a corpus of text.
        """
        self._check_questions()
        context, question, answer = (self._run(i, run).astype(np.int64) for run in range(3))
        return Row(context, question, answer, self.info["sets"][self._sets[i]], int(self.hashes[i]))


# ---------------------------------------------------------------- held-out rows
def split(
    corpora: Sequence[Corpus], held_out: float, other: Sequence[Corpus] = ()
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows to train on and rows held out, an array of row numbers a corpus each.

    The content decides: equal documents and rows that share a context are on the same side, in whichever corpora
    they stand.

    Args:
        held_out: the share of contents that is held out, at least 0 and below 1.
        other: corpora whose contents are on neither side, such as separate evaluation data.

    Raises:
        InputError: a share that cannot be used.
    """
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 <= held_out < 1:
        raise InputError(f"held_out must be a number from 0 to below 1, not {held_out!r}.")
    bound = np.uint64(int(held_out * 2**64))
    elsewhere = np.unique(np.concatenate([np.zeros(0, np.uint64), *(corpus.hashes for corpus in other)]))
    train, kept = [], []
    for corpus in corpora:
        free = ~np.isin(corpus.hashes, elsewhere)
        below = corpus.hashes < bound
        train.append(np.flatnonzero(free & ~below))
        kept.append(np.flatnonzero(free & below))
    return train, kept


# ---------------------------------------------------------------- streams
_BLOCK, _ORDER, _START = range(3)  # what randomness is for: no two uses share a sequence


def _rng(seed: int, *words: int) -> np.random.Generator:
    return np.random.default_rng([seed, *words])


class Interleave:
    """Which of several things each draw takes, by their shares; a pure function of the draw's number.

    Every block of 1024 draws holds each thing in proportion to its share, rounded to a whole number up or down;
    every 1024 blocks exactly so (the shares themselves being rounded to 2⁻²⁰ of their sum, but not to nothing).

    Args:
        shares: one a thing; only their proportions matter, and one of 0 is never drawn.

    Raises:
        InputError: a share or the seed is negative, or no share is above 0.
    """

    SIZE = 1024  # of a block in draws, and of a period in blocks

    def __init__(self, shares: Sequence[float], seed: int):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed must be a whole number that is not negative, not {seed!r}.")
        exact, size = np.asarray(shares, float), self.SIZE
        if not len(exact) or exact.min() < 0 or not 0 < exact.sum() < math.inf:
            raise InputError(f"shares must be numbers that are not negative, one of them above 0, not {shares!r}.")
        self.shares, self.seed = list(shares), seed
        self._draws = np.maximum(np.rint(exact / exact.sum() * size**2), exact > 0).astype(np.int64)  # a period
        self._draws[self._draws.argmax()] += size**2 - self._draws.sum()
        # A period's draws are the numbers below size², each thing having a stretch of them. Block b takes every
        # size-th one from phase b on: it cuts each stretch evenly, and together the blocks take each number once.
        edges = np.concatenate([[0], self._draws.cumsum()])
        phases = np.arange(size) * 633 % size  # 633 ≈ size / golden ratio, odd: neighbours are far apart
        per_block = np.diff(-((phases[:, None] - edges) // size), axis=1)
        self._before = np.concatenate([np.zeros((1, len(exact)), np.int64), per_block.cumsum(0)])
        self._block = lru_cache(4)(self._make_block)

    def __reduce__(self) -> tuple:
        return Interleave, (self.shares, self.seed)

    def at(self, k: int) -> tuple[int, int]:
        """Draw `k`, from 0 on → the thing's number, and how many draws before this one took it."""
        block, place = divmod(k, self.SIZE)
        which, number = self._block(block)
        return int(which[place]), int(number[place])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`at` answers for a block's draws, [1024] each."""
        period, b = divmod(block, self.SIZE)
        here = self._before[b + 1] - self._before[b]
        which = np.repeat(np.arange(len(here)), here)
        _rng(self.seed, _BLOCK, block).shuffle(which)
        number = np.empty(self.SIZE, np.int64)
        for i in np.flatnonzero(here):
            number[which == i] = period * self._draws[i] + self._before[b, i] + np.arange(here[i])
        return which, number


class Mixture:
    """Which corpus, and which of its items, each draw takes; a pure function of the draw's number.

    The corpora are interleaved by weight. Each goes through all its items, in an order of that epoch's own, before
    it takes one again.

    Args:
        counts: how many items each corpus has; one without any is left out.
        weights: one a corpus; only their proportions matter.

    Raises:
        InputError: no corpus has both items and a weight, or a number is negative.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int):
        if len(counts) != len(weights) or not any(c > 0 and w > 0 for c, w in zip(counts, weights, strict=True)):
            raise InputError("a mixture needs a corpus with items and a weight above 0.")
        self.counts, self.weights, self.seed = [int(c) for c in counts], list(weights), seed
        self._interleave = Interleave([w if c else 0.0 for c, w in zip(counts, weights, strict=True)], seed)
        self._order = [lru_cache(2)(partial(self._make_order, c)) for c in range(len(counts))]

    def __reduce__(self) -> tuple:
        return Mixture, (self.counts, self.weights, self.seed)

    def __len__(self) -> int:
        return sum(self.counts)

    def at(self, k: int) -> tuple[int, int]:
        """Draw `k`, from 0 on → corpus number, item number.

        Draws near each other are fast; one far away has to make its epoch's order anew.
        """
        corpus, number = self._interleave.at(k)
        epoch, n = divmod(number, self.counts[corpus])
        return corpus, int(self._order[corpus](epoch)[n])

    def _make_order(self, corpus: int, epoch: int) -> np.ndarray:
        return _rng(self.seed, _ORDER, corpus, epoch).permutation(self.counts[corpus])


def _mixture(
    corpora: Sequence[Corpus], counts: Sequence[int], seed: int, weights: Sequence[float] | None, why: str
) -> Mixture:
    for corpus, count in zip(corpora, counts, strict=True):
        if not count:
            logger.warning("%s is left out: %s.", corpus.source.path, why)
    return Mixture(counts, [corpus.source.weight for corpus in corpora] if weights is None else weights, seed)


def _place(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Number `i` of things that stand in groups, which end at `ends` → its group, and its number there."""
    group = int(ends.searchsorted(i, "right"))
    return group, i - (int(ends[group - 1]) if group else 0)


class TextStream:
    """Stretches of text: at most `window` consecutive tokens of one document.

    An item is a window's worth of a document: one of T ≥ window tokens has T // window, a shorter one of at least
    `minimum` tokens one, a still shorter one none.

    Args:
        corpora: of text.
        rows: which documents of each, as from :func:`split`.
        weights: one a corpus. None: their sources'.

    Raises:
        InputError: no document is long enough, or an argument cannot be used.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        rows: Sequence[np.ndarray],
        seed: int,
        window: int,
        minimum: int,
        weights: Sequence[float] | None = None,
    ):
        if not 1 <= minimum <= window:
            raise InputError(f"minimum must be from 1 to window={window}, not {minimum!r}.")
        self.corpora, self.seed, self.window = list(corpora), seed, window
        self._items: list[tuple[np.ndarray, np.ndarray]] = []  # documents; items up to and with each
        longest, where = 0, ""
        for corpus, numbers in zip(corpora, rows, strict=True):
            lengths = corpus.lengths[numbers]
            if len(lengths) and lengths.max() > longest:
                longest, where = int(lengths.max()), corpus.source.path
            enough = lengths >= minimum
            self._items.append((numbers[enough], np.maximum(lengths[enough] // window, 1).cumsum()))
        counts = [int(ends[-1]) if len(ends) else 0 for _, ends in self._items]
        if not longest:
            raise InputError("there is no document.")
        if not any(counts):
            raise InputError(
                f"no document has {minimum} tokens, the longest ({where}) has {longest}:"
                " use longer texts or a lower minimum."
            )
        self.mixture = _mixture(corpora, counts, seed, weights, f"none of its documents has {minimum} tokens")
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.mixture)

    def draw(self, k: int) -> np.ndarray:
        """Draw `k` → token ids int64 [at most window]."""
        corpus, item = self.mixture.at(k)
        return self._cut(corpus, item, _rng(self.seed, _START, k))

    def stretch(self, rng: np.random.Generator) -> np.ndarray:
        """A random item of a random document → token ids int64 [at most window]; for text beside a sample's own."""
        return self._cut(*_place(self._ends, int(rng.integers(len(self)))), rng)

    def _cut(self, corpus: int, item: int, rng: np.random.Generator) -> np.ndarray:
        documents, ends = self._items[corpus]
        at, slot = _place(ends, item)
        tokens = self.corpora[corpus].document(int(documents[at]))
        start, last = 0, len(tokens) - self.window
        if last > 0:
            # another start each time, so that an epoch does not repeat the one before
            start = min(slot * self.window + int(rng.integers(self.window)), last)
        return tokens[start : start + self.window].astype(np.int64)


class QuestionStream:
    """Rows of questions whose context and question have at most `room` tokens together.

    A longer context is cut into passages of `room` less the 64 tokens (at most a quarter) that a question may take. A
    row becomes one about the passage in which its answer stands; where that stands in none, or in several, so that it
    is not known which of them the question is about, the row is left out.

    Args:
        corpora: of questions.
        rows: which rows of each, as from :func:`split`.
        weights: one a corpus. None: their sources'.

    Raises:
        InputError: no row fits.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        rows: Sequence[np.ndarray],
        seed: int,
        room: int,
        weights: Sequence[float] | None = None,
    ):
        self.corpora = list(corpora)
        self.passage = room - min(64, room // 4)
        self._items: list[np.ndarray] = []
        self._cuts: list[np.ndarray] = []  # which passage of its context an item is about, -1: it is whole
        shortest: int | None = None
        for corpus, numbers in zip(corpora, rows, strict=True):
            lengths = (corpus.lengths + corpus.question_lengths)[numbers]
            if len(lengths):
                shortest = min(int(lengths.min()), shortest or int(lengths.min()))
            first, last = corpus.spans[numbers].astype(np.int64).T
            cuts = np.where(lengths <= room, -1, first // self.passage)
            inside = (last > first) & ((last - 1) // self.passage == first // self.passage)
            fits = (lengths <= room) | inside & (corpus.question_lengths[numbers] <= room - self.passage)
            self._items.append(numbers[fits])
            self._cuts.append(cuts[fits])
        counts = [len(items) for items in self._items]
        if not any(counts):
            has = "there are no rows" if shortest is None else f"the shortest row has {shortest}"
            raise InputError(f"no context and question fit in room={room} tokens ({has}): give more room or rows.")
        self.mixture = _mixture(corpora, counts, seed, weights, f"none of its rows fits in {room} tokens")
        self._ends = np.cumsum(counts)
        cuts = np.concatenate(self._cuts)
        whole = np.concatenate([c.hashes[items] for c, items in zip(corpora, self._items, strict=True)])
        self._hashes = whole ^ ((cuts + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))  # wraps around
        self._by_hash = self._hashes.argsort()

    def __len__(self) -> int:
        return len(self.mixture)

    def draw(self, k: int) -> Row:
        """Draw `k` → a row."""
        corpus, item = self.mixture.at(k)
        return self._row(int(self._ends[corpus]) - len(self._items[corpus]) + item)

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        """A random row whose context is another than that of hash `not_hash`.

        Raises:
            InputError: all rows share that one context.
        """
        for _ in range(16):
            i = int(rng.integers(len(self._hashes)))
            if int(self._hashes[i]) != not_hash:
                break
        else:  # that context is most of what there is
            others = np.flatnonzero(self._hashes != np.uint64(not_hash))
            if not len(others):
                raise InputError("all rows share one context, so there is none to distract with: use more sources.")
            i = int(others[rng.integers(len(others))])
        return self._row(i)

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        """A random row whose context is that of hash `context_hash`; there must be one."""
        low, high = (
            self._hashes.searchsorted(np.uint64(context_hash), side, self._by_hash) for side in ("left", "right")
        )
        return self._row(int(self._by_hash[rng.integers(low, high)]))

    def _row(self, i: int) -> Row:
        corpus, item = _place(self._ends, i)
        row, cut = self.corpora[corpus].row(int(self._items[corpus][item])), int(self._cuts[corpus][item])
        if cut < 0:
            return row
        passage = row.context[cut * self.passage : (cut + 1) * self.passage]
        return replace(row, context=passage, hash=int(self._hashes[i]))
