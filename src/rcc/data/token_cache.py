"""The tokens of a source on disk: made once, under a lock, in a folder that appears complete.

A source is tokenised into memory-mapped files under :func:`rcc.runtime.home.home`: `tokens.bin` (all runs of tokens,
one after another), `offsets.npy`, `hashes.npy`, `sets.npy`, for questions `spans.npy`, and `info.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FileError, InputError, brief
from ..runtime import atomic
from ..runtime.home import home
from ..runtime.locks import make_once
from ..text.tokens import holds_special
from .sources import (
    JSON_LINES,
    NumberedRow,
    Source,
    check_json_lines,
    ending,
    file_rows,
    open_dataset,
    row_texts,
    source_files,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSIONS = {"text": 2, "questions": 3}
"""Version of the cache's files; part of the cache's key, so another version makes another cache."""
BATCH_ROWS, BATCH_CHARACTERS = 64, 2_000_000  # tokenised at once, whichever is reached first


def token_folder(
    source: Source, tokenizer: PreTrainedTokenizerBase, kind: str, progress: Callable[[str], None] | None = None
) -> Path:
    """Return the folder that holds a source's tokens; they are made at the first call.

    Args:
        source: files, or what `datasets` opens.
        tokenizer: part of the cache's key, with all its settings.
        kind: `text` or `questions`.
        progress: gets a short phrase a batch.

    Raises:
        InputError: no row of a file has the fields, there is no usable row, or `datasets` is needed.
        FileError: a file is missing or damaged, or the cache cannot be written.
    """
    files = source_files(source, kind)
    dataset = open_dataset(source) if files is None else None
    caches = home() / "tokens"
    folder = caches / _key(source, tokenizer, kind, files, dataset)
    if _is_made(folder):
        return folder
    say = progress or (lambda phrase: None)
    try:
        atomic.private_folder(caches)  # tokens are as readable as their texts
        make_once(
            folder,
            lambda: _is_made(folder),
            lambda work: _tokenize(work, source, tokenizer, kind, files, dataset, say),
            lock=Path(f"{folder}.lock"),
        )
    except FileError:
        raise
    except OSError as error:
        raise FileError(
            f"the tokens of {source.path} cannot be written to {caches} ({brief(error)}):"
            " RCC_HOME can name another folder."
        ) from error
    return folder


def _key(source: Source, tokenizer: PreTrainedTokenizerBase, kind: str, files: list[Path] | None, dataset: Any) -> str:
    """Return the SHA-256 of everything that the cache's content depends on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # settings of whichever call came last, which the next one replaces
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
    if source.allow_special:
        parts.append("special tokens")
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_made(folder: Path) -> bool:
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if info["kind"] not in FORMAT_VERSIONS or not isinstance(info["broken"]["first"], list):
            return False
        if any(type(n) is not int or n < 0 for n in (info["rows"], info["broken"]["count"])):
            return False
        size = info["tokens"] * np.dtype(info["dtype"]).itemsize
        return bool((folder / "tokens.bin").stat().st_size == size)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _tokenize(
    work: Path,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    files: list[Path] | None,
    dataset: Any,
    say: Callable[[str], None],
) -> None:
    """Read and tokenise a source into an empty folder."""
    work.chmod(0o700)
    with _Writer(work, source, tokenizer, kind, say) as writer:
        if files is None:
            writer.add(source.path, enumerate(dataset, 1))
        else:
            for file in files:
                if kind == "questions":
                    check_json_lines(file)
                writer.add(str(file), file_rows(file, source), must_have_objects=ending(file) in JSON_LINES)
        writer.finish([source.path] if files is None else [str(file) for file in files])
    for file in work.iterdir():
        file.chmod(0o600)


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
        self.batch: list[tuple[str, str, list[str]]] = []  # a row's file and line, its set, its texts
        self.characters = self.rows = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.tokens.close()

    def add(self, name: str, records: Iterable[NumberedRow], must_have_objects: bool = False) -> None:
        """Take the rows of one file or dataset."""
        present, empty = dict[str, None](), True
        for number, row in records:
            location, empty = f"{name}:{number}", False
            self.rows += 1
            if isinstance(row, str):
                self.broken(location, row)
                continue
            present.update(dict.fromkeys(row))
            row_id = str(row.get("id", ""))
            if not self.source.keeps(row_id):
                continue
            texts = row_texts(row, self.source, self.kind)
            if isinstance(texts, str):
                self.broken(location, texts)
                continue
            if self.kind == "questions" and not self.source.keeps_answer(texts[0], texts[2]):
                continue
            self.batch.append((location, row_id.partition("/")[0] if "/" in row_id else "", texts))
            self.characters += sum(map(len, texts))
            if len(self.batch) >= BATCH_ROWS or self.characters >= BATCH_CHARACTERS:
                self.flush()
        if must_have_objects and not present and not empty:
            raise InputError(f"{name} has no row with a field {self.missing({})}: it must hold a JSON object a line.")
        if present and (missing := self.missing(present)):
            has = ", ".join(list(present)[:20])
            raise InputError(f"{name} has no row with a field {missing}: name one of those that it has ({has}).")

    def missing(self, present: dict[str, None]) -> str:
        """Return the names of the fields that no row has."""
        return " or ".join(repr(name) for name in self.source.fields(self.kind) if name not in present)

    def broken(self, location: str, why: str) -> None:
        """Count a row that cannot be used."""
        self.broken_count += 1
        if len(self.broken_first) < 10:
            self.broken_first.append(f"{location}: {why}")

    def flush(self) -> None:
        """Tokenise and write what has been collected."""
        if not self.batch:
            return
        # rows that share a context stand together as a rule
        unique = list(dict.fromkeys(text for _, _, texts in self.batch for text in texts))
        with_offsets = self.kind == "questions" and self.tokenizer.is_fast
        runs: dict[str, np.ndarray] = {}
        offsets: dict[str, list[tuple[int, int]]] = {}
        marked = set() if self.source.allow_special else {t for t in unique if holds_special(self.tokenizer, t)}
        for split in (False, True):  # chat marks in a text are characters, unless its source allows them
            group = [text for text in unique if (text in marked) is split]
            if not group:
                continue
            encoding = self.tokenizer(
                group,
                add_special_tokens=False,
                verbose=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=with_offsets,
                **({"split_special_tokens": True} if split else {}),
            )
            runs |= {text: np.asarray(run, self.dtype) for text, run in zip(group, encoding["input_ids"], strict=True)}
            if with_offsets:
                offsets |= zip(group, encoding["offset_mapping"], strict=True)
        for location, name, texts in self.batch:
            if not all(len(runs[text]) for text in texts):
                self.broken(location, "a text without tokens")
                continue
            for text in texts:
                self.tokens.write(runs[text].tobytes())
                self.offsets.append(self.offsets[-1] + len(runs[text]))
            if self.kind == "questions":
                context, _, answer = texts
                self.spans.extend(_span(context, answer, offsets[context]) if with_offsets else (0, 0))
            # blanks at the ends do not make another document
            digest = hashlib.sha256(texts[0].strip().encode()).digest()
            self.hashes.append(int.from_bytes(digest[:8], "big"))
            self.sets.append(self.names.setdefault(name, len(self.names)))
        self.batch, self.characters = [], 0
        self.say(f"tokenising {self.source.path}: {len(self.hashes)} rows, {self.offsets[-1] / 1e6:.1f}M tokens")

    def no_rows(self) -> str:
        """Return why there is no row, by what was met and what is set."""
        if self.broken_first:
            return f"{self.source.path} has no row that can be used (the first is broken: {self.broken_first[0]})."
        if not self.rows:
            return f"{self.source.path} is empty: give a file with at least one row."
        filters = " and ".join(name for name in ("include", "exclude", "extractive") if getattr(self.source, name))
        return f"{self.source.path} has no row that can be used: its {filters or 'settings'} leave none of {self.rows}."

    def finish(self, files: list[str]) -> None:
        """Write what is left, and the description of it all."""
        self.flush()
        if not self.hashes:
            raise InputError(self.no_rows())
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
    """Return the tokens [start, end) of a context from the first to the last occurrence of an answer.

    (0, 0) where it does not occur, or its words say nothing about where it is from (yes, no).
    """
    answer = answer.strip().rstrip(".")
    if answer.lower() in ("", "yes", "no"):
        return 0, 0
    matches = list(re.finditer(rf"(?<!\w){re.escape(answer)}(?!\w)", context, re.IGNORECASE))
    if not matches:
        return 0, 0
    starts, ends = np.asarray(offsets).T
    first, last = ends.searchsorted(matches[0].start(), "right"), starts.searchsorted(matches[-1].end(), "left")
    return int(first), int(last)
