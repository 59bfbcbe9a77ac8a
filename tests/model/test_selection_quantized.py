"""Selections of quantized models: a GGUF file, a folder in 8-bit floats, and those whose library is not here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from command_line import Result
from gguf_file import TOKENS, write_gguf
from rcc import CompressedContext, Engine, ModelError
from rcc.model.selection.selection import Selection
from word_tokens import word_tokenizer

TEXT = "the cat sat on the mat, and then 1 dog came. "
BLOCK = 8
"""Rows, and columns, of a weight that share a scale."""


# ---------------------------------------------------------------- GGUF
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_gguf_file_is_the_model_that_it_was_made_of(backbone: Any, tmp_path: Path, family: str) -> None:
    model = backbone(family, vocab_size=len(TOKENS))
    write_gguf(tmp_path / "tiny.gguf", model)
    engine = Engine.load(tmp_path / "tiny.gguf", dtype="float32")
    selection = engine.compressor
    assert isinstance(selection, Selection)
    assert selection.chat.header.startswith("<|im_start|>system")
    ids = torch.arange(5, 40)[None]
    torch.testing.assert_close(selection.decoder(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert engine.tokenizer.decode(engine.tokenizer(TEXT).input_ids) == TEXT
    context = engine.compress(TEXT, 4)
    assert (context.dtype, context.model_name) == (torch.bfloat16, "tiny.gguf")
    assert len(engine.ask(context, "who?", max_new_tokens=4).text) > 0


def test_a_gguf_file_on_the_command_line(call: Callable[..., Result], backbone: Any, tmp_path: Path) -> None:
    """What lies beside it changes nothing, and another file is another model."""
    file, text, out = tmp_path / "tiny.gguf", tmp_path / "text.txt", tmp_path / "text.rcc"
    write_gguf(file, backbone("llama", vocab_size=len(TOKENS)))
    text.write_text(TEXT)
    call("compress", text, "-o", out, "--model", file, "--rate", 4).ok()
    said = call("ask", out, "who?", "--model", file, "--max-new-tokens", 4).ok().out
    word_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert call("ask", out, "who?", "--model", file, "--max-new-tokens", 4).ok().out == said
    other = tmp_path / "other.gguf"
    write_gguf(other, backbone("llama", vocab_size=len(TOKENS), seed=1))
    call("ask", out, "who?", "--model", other).refused("was made by another model")
    call("ask", text, "who?", "--model", file, "--compressor", "rcc").refused("was not trained for rcc")


def test_a_damaged_gguf_file_is_refused(backbone: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "tiny.gguf", tmp_path / "cut.gguf"
    write_gguf(whole, backbone("llama", vocab_size=len(TOKENS)))
    content = whole.read_bytes()
    for damaged in (b"", b"GGUF", content[:200], content[: len(content) // 2], b"no" + content[2:]):
        cut.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            Engine.load(cut)


# ---------------------------------------------------------------- folders
def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in 8-bit floats, a scale for each block of it, and what both are together."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.reshape(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax((1, 3)) / 448
    small = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    together = small.float() * scales[:, None, :, None]
    return small.reshape(weight.shape), scales, together.reshape(weight.shape)


@pytest.fixture
def folder(backbone: Any, tmp_path: Path) -> Path:
    backbone("llama").save_pretrained(tmp_path / "tiny")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w90 {{ m['role'] }} w91 {{ m['content'] }} w92 {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def say(folder: Path, **quantization: Any) -> None:
    """Say in a folder's configuration that its weights are quantized."""
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantization}))


def test_a_folder_in_8_bit_floats(folder: Path, tmp_path: Path) -> None:
    """Its contexts are those of the model with its weights rounded so."""
    rounded = tmp_path / "rounded"
    shutil.copytree(folder, rounded)
    small, plain = load_file(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in [name for name in plain if "proj" in name]:
        small[name], small[f"{name}_scale_inv"], plain[name] = in_fp8(plain[name])
    save_file(small, folder / "model.safetensors", {"format": "pt"})
    save_file(plain, rounded / "model.safetensors", {"format": "pt"})
    say(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
    quantized, want = Engine.load(folder), Engine.load(rounded)
    assert quantized.fingerprint != want.fingerprint
    ids = torch.arange(5, 40)[None]
    context, other = quantized.compressor.compress(ids, rate=4), want.compressor.compress(ids, rate=4)
    for i in range(3):
        for got, expected in zip(context.layer(i), other.layer(i), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    context.save(tmp_path / "context.rcc")
    loaded = CompressedContext.load(tmp_path / "context.rcc", model=quantized.compressor)
    assert quantized.ask(loaded, "w7", max_new_tokens=4).text == want.ask(other, "w7", max_new_tokens=4).text


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "library that is not installed .*bitsandbytes"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
            "library that is not installed .*torchao",
        ),
        ({"quant_method": "ours"}, "in a way that transformers does not know"),
    ],
)
def test_what_cannot_be_loaded_is_refused(folder: Path, quantization: dict[str, Any], words: str) -> None:
    say(folder, **quantization)
    with pytest.raises(ModelError, match=words):
        Engine.load(folder)


def test_the_copy_that_reads_shares_quantized_weights(backbone: Callable[..., PreTrainedModel]) -> None:
    """Some methods hold weights in buffers: they, too, are in memory once."""
    base = backbone("llama")
    mlp = base.get_submodule("model.layers.0.mlp")
    mlp.register_buffer("packed", torch.zeros(3, dtype=torch.uint8))
    model = Selection(base, word_tokenizer(), "tiny")
    assert model.reader.body.get_submodule("layers.0.mlp").packed is mlp.packed
