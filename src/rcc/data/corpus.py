"""Corpora: sources as tokens. A source is tokenised at its first use, and memory-mapped from then on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .sources import Source
from .token_cache import token_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

RUNS = {"text": 1, "questions": 3}  # kind → runs of tokens a row: the document; context, question, answer


def open_text(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, progress: Callable[[str], None] | None = None
) -> Corpus:
    """Return a source's documents as tokens; they are tokenised at the first call.

    Rows that cannot be used are counted, and named in one warning.

    Args:
        source: files or a dataset, and the field of a row that holds a document.
        tokenizer: whose token ids the corpus has; another one has a cache of its own.
        progress: gets a short phrase a batch.

    Raises:
        InputError: no row of a file has the field `source.text`, there is no usable row, or `datasets` is needed.
        FileError: a file is missing or damaged, or the cache cannot be written.
    """
    return _open(source, tokenizer, "text", progress)


def open_questions(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, progress: Callable[[str], None] | None = None
) -> Corpus:
    """Return a source's rows of context, question and first answer as tokens; otherwise like :func:`open_text`."""
    return _open(source, tokenizer, "questions", progress)


def _open(
    source: Source, tokenizer: PreTrainedTokenizerBase, kind: str, progress: Callable[[str], None] | None
) -> Corpus:
    corpus = Corpus(source, token_folder(source, tokenizer, kind, progress))
    if corpus.broken:
        first = "; ".join(corpus.info["broken"]["first"][:3])
        logger.warning("%s: %d broken rows are left out (%s).", source.path, corpus.broken, first)
    return corpus


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
        return int(self.info["rows"])

    @property
    def tokens_total(self) -> int:
        """Tokens of all rows together."""
        return int(self.info["tokens"])

    @property
    def broken(self) -> int:
        """How many rows were left out because they cannot be used."""
        return int(self.info["broken"]["count"])

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
        """uint32 [rows, 2]: of each row of questions, the tokens [start, end) of its context that hold its answer.

        From the first occurrence to the last one; 0, 0 if there is none.
        """
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
        """Return the tokens [T] of a document, or of a row's context: a read-only view of the file, in its type."""
        return self._run(i, 0)

    def row(self, i: int) -> Row:
        """Return a row of a corpus of questions.

        Raises:
            InputError: this is a corpus of text.
        """
        self._check_questions()
        context, question, answer = (self._run(i, run).astype(np.int64) for run in range(3))
        return Row(context, question, answer, self.info["sets"][self._sets[i]], int(self.hashes[i]))
