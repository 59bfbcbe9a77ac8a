"""Long texts are tokenised piece by piece, to the very tokens of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import rcc
from rcc.text import tokens
from rcc.text.tokens import token_ids

BOOK = (Path(__file__).resolve().parents[2] / "examples/simple-susan.txt").read_text(encoding="utf-8")
OTHER = "Καλημέρα κόσμε, 春眠不覚暁。処処聞啼鳥 — naïve café 🙂🙂👩‍👩‍👧 <|im_end|> 12345.678\t\n\n   x = f(y)\r\n" * 300
BLOB = "".join(f"{i:x}" for i in range(20_000))  # not one space
ONE = "a" * 60_000  # how it is cut depends on where it begins


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that reads spaces as `▁` and does not split text into words before it merges."""
    bpe = kind == "bpe"
    inner = Tokenizer(models.BPE() if bpe else models.Unigram())
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    inner.decoder = decoders.Metaspace()
    special: dict[str, Any] = {"special_tokens": ["<unk>"], "vocab_size": 600, "show_progress": False}
    trainer = trainers.BpeTrainer(**special) if bpe else trainers.UnigramTrainer(unk_token="<unk>", **special)
    inner.train_from_iterator([BOOK[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture(scope="module", params=["shipped", "bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    if request.param == "shipped":
        return rcc.load_tokenizer("rcc-smollm2-135m")
    return sentencepiece_like(request.param)


@pytest.mark.parametrize("text", [BOOK, OTHER, BLOB, ONE, BOOK[:9000] + ONE + OTHER], ids=range(5))
@pytest.mark.parametrize(("piece", "overlap"), [(5000, 1000), (2003, 501)])
def test_pieces_make_the_whole(
    tokenizer: PreTrainedTokenizerBase, text: str, piece: int, overlap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(tokens, "PIECE", piece)
    monkeypatch.setattr(tokens, "OVERLAP", overlap)
    assert torch.equal(token_ids(tokenizer, text, allow_special=True)[0], whole)


def test_a_book_is_read_in_pieces(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what bounds memory: no piece is longer than the limit, and none is read twice."""
    monkeypatch.setattr(tokens, "PIECE", 9000)
    monkeypatch.setattr(tokens, "OVERLAP", 1000)
    read: list[int] = []

    def watched(text: str, **options: Any) -> Any:
        read.append(len(text))
        return tokenizer(text, **options)

    count: Any = watched
    count.is_fast, count.added_tokens_decoder = True, {}
    ids = token_ids(count, BOOK)
    assert max(read) == 9000
    assert len(read) == -(-(len(BOOK) - 9000) // 8000) + 1
    assert tokenizer.decode(ids[0][:20]).strip()


@pytest.mark.parametrize("text", ["", "a", "Grüße"])
def test_short_texts(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = token_ids(tokenizer, text)
    assert ids.dtype == torch.long
    assert ids.tolist() == [tokenizer(text, add_special_tokens=False)["input_ids"]]
