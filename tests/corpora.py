"""Small corpora, with a tokenizer of one token a word; shared by the tests of `rcc.data`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rcc.data.corpus import Corpus, open_questions, open_text
from rcc.data.sources import Source

WORDS = 1000


def make_tokenizer(words: int = WORDS, first: str = "w") -> PreTrainedTokenizerFast:
    """Word `w7` is token 7."""
    inner = Tokenizer(models.WordLevel({f"{first}{i}": i for i in range(words)}, unk_token=f"{first}0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=f"{first}0")


tokenizer = make_tokenizer()


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def lines(rows: Iterable[Any]) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def write(path: Path, rows: Iterable[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lines(rows))
    return str(path)


def text_corpus(path: Path, documents: Iterable[str], **options: Any) -> Corpus:
    return open_text(Source(write(path, ({"text": d} for d in documents)), **options), tokenizer)


def question(context: str, asked: str = "w1", answers: Any = ("w2",), **more: Any) -> dict[str, Any]:
    return {"context": context, "question": asked, "answers": answers, **more}


def question_corpus(path: Path, rows: Iterable[Any], **options: Any) -> Corpus:
    return open_questions(Source(write(path, rows), **options), tokenizer)


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.document(i).tolist() for i in range(len(corpus))]


def everything(corpora: Sequence[Corpus]) -> list[np.ndarray]:
    return [np.arange(len(corpus)) for corpus in corpora]


def caches(home: Path) -> list[Path]:
    return [p for p in (home / "tokens").iterdir() if p.is_dir()]
