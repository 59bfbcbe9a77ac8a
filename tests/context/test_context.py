"""A compressed context as a value: what it says of itself, batches, precisions and copies."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from appended_context import answer
from conftest import MakeBatch, MakeModel, MakeTokens
from equality import same_bits
from rcc import CompressedContext, InputError, RCCForCausalLM


def test_value(appended: CompressedContext, tiny_llama: RCCForCausalLM, tokens: MakeTokens) -> None:
    """Length, bytes, rate, tokens, digests and batch size are what they should be, by hand."""

    assert len(appended) == 10 + 5
    assert appended.lengths == [15]
    assert appended.batch_size == 1
    # 3 layers × keys and values × 2 KV heads × 15 positions × 12 × 4 bytes
    assert appended.nbytes == 3 * 2 * 2 * 15 * 12 * 4
    assert appended.rate == [2, 4]
    assert appended.source_tokens == 46
    assert (appended.dtype, appended.device.type) == (torch.float32, "cpu")
    assert appended.fingerprint == tiny_llama.fingerprint
    single = tiny_llama.compress(torch.tensor([tokens(37)]))
    assert single.rate == 4
    digest = hashlib.sha256(np.array(tokens(37), dtype="<i8").tobytes()).hexdigest()
    assert single.source_sha256 == [digest]
    assert appended.pieces[0][0].sha256 == digest
    assert appended.source_sha256 != [digest]
    assert appended.pieces[0][0].opening == tuple(tokens(37)[:10])
    for i in range(3):
        for tensor in appended.layer(i):
            assert tensor.shape == (1, 2, 15, 12)
    assert {"rcc", "torch", "transformers"} <= appended.versions.keys()
    batch = CompressedContext.stack([appended, single])
    assert batch.nbytes == 2 * appended.nbytes
    assert batch.source_tokens == 46 + 37


def test_repr_tells_a_person_something(
    appended: CompressedContext, tiny_llama: RCCForCausalLM, tokens: MakeTokens
) -> None:
    """Tokens, rates, positions, size, precision, place and model, in one line."""
    text = repr(appended)
    for part in ("46 tokens", "2×/4×", "15 positions", "MB", "float32", "cpu", "tiny-llama", appended.fingerprint[:12]):
        assert part in text
    assert "\n" not in text
    assert "2 texts" in repr(appended.expand(2))
    assert "2,000 tokens" in repr(tiny_llama.compress(torch.tensor([tokens(2000)]), rate=16))


def test_info(appended: CompressedContext) -> None:
    """What `rcc inspect --json` prints is plain JSON with the promised names."""
    info = json.loads(json.dumps(appended.info()))
    assert info["source_tokens"] == 46
    assert info["rate"] == [2, 4]
    assert info["positions"] == 15
    assert info["bytes"] == appended.nbytes
    assert info["bytes_per_position"] * 15 == appended.nbytes
    assert info["model"] == "tiny-llama"
    assert info["fingerprint"] == appended.fingerprint
    assert [piece["tokens"] for piece in info["pieces"]] == [37, 9]


def test_it_is_a_value(appended: CompressedContext) -> None:
    """Its parts cannot be replaced."""
    with pytest.raises(AttributeError):
        appended.length = 3  # type: ignore[misc]


def test_expand(appended: CompressedContext, tiny_llama: RCCForCausalLM, tokens: MakeTokens) -> None:
    """expand shares memory until it is used, refuses several texts, and equals the one context."""
    many = appended.expand(3)
    assert (many.batch_size, len(many), many.lengths) == (3, 15, [15] * 3)
    assert many.layer(0)[0].data_ptr() == appended.layer(0)[0].data_ptr()
    assert all(same_bits(many[i], appended) for i in range(3))
    out = tiny_llama.generate(torch.tensor([tokens(6, 1)] * 3), context=many, max_new_tokens=6)
    assert out.tolist() == [answer(tiny_llama, appended, tokens)] * 3
    assert same_bits(many[0], appended)
    with pytest.raises(InputError, match=r"expand.*3.*context\[i\]"):
        many.expand(2)
    for n in (0, -1):
        with pytest.raises(InputError):
            appended.expand(n)


def test_to(appended: CompressedContext) -> None:
    """to changes the precision and leaves the original; where nothing changes it is the context itself."""
    assert appended.to() is appended
    assert appended.to("cpu", torch.float32) is appended
    half = appended.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.nbytes * 2 == appended.nbytes
    assert appended.dtype == torch.float32
    for i in range(3):
        for x, y in zip(half.layer(i), appended.layer(i), strict=True):
            assert torch.equal(x, y.to(torch.bfloat16))
    assert same_bits(half.to(dtype=torch.float32).to(dtype=torch.bfloat16), half)
    assert half.pieces == appended.pieces


def test_getitem_and_iteration(appended: CompressedContext) -> None:
    """Negative indices count from the end, others are an IndexError, so a batch can be iterated over."""
    batch = CompressedContext.stack([appended, appended.to()])
    assert same_bits(batch[-1], appended)
    for i in (2, -3):
        with pytest.raises(IndexError):
            batch[i]
    assert [c.lengths for c in batch] == [[15], [15]]  # type: ignore[attr-defined]  # by __getitem__


def test_stack(appended: CompressedContext, tiny_llama: RCCForCausalLM, tokens: MakeTokens) -> None:
    """Gaps stand before shorter texts and are masked; nothing and contexts of different models are refused."""
    short = tiny_llama.compress(torch.tensor([tokens(3)]))
    batch = CompressedContext.stack([short, appended])
    assert batch.mask.tolist() == [[False] * 14 + [True], [True] * 15]
    assert batch.layer(0)[0][0, :, :14].abs().max() == 0
    assert CompressedContext.stack([appended, appended]).mask is None
    with pytest.raises(InputError, match="contexts"):
        CompressedContext.stack([])


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: _through_torch(value),
}


def _through_torch(value: Any) -> Any:
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("source", ["made", "asked", "header", "batch", "expanded"])
def test_a_copy_answers_the_same(
    tiny: MakeModel, tokens: MakeTokens, batch: MakeBatch, tmp_path: Path, how: str, source: str
) -> None:
    model = tiny()
    ids, mask = batch([tokens(40), tokens(25)] if source == "batch" else [tokens(40)])
    context = model.compress(ids, mask, rate=4)
    if source == "asked":
        model.generate(torch.tensor([tokens(3)]), context=context, max_new_tokens=2, pad_token_id=0)
    if source == "header":
        context.save(tmp_path / "c.rcc")
        context = CompressedContext.load(tmp_path / "c.rcc", verify="header")
    if source == "expanded":
        context = context.expand(2)
    copied = COPIES[how](context)
    prompt = torch.tensor([tokens(5)] * context.batch_size)
    assert torch.equal(model(prompt, context=copied).logits, model(prompt, context=context).logits)
    assert (copied.pieces, copied.fingerprint, len(copied)) == (context.pieces, context.fingerprint, len(context))
