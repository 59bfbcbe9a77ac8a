"""The authors' published layout, and what it computes: what the tests compare a converted checkpoint with.

Written from the definition alone, with neither rcc nor transformers: the tensors by the authors' names, in float64,
one text, no cache, one segment after another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reference import padded

CONFIG: dict[str, Any] = {  # as transformers 4 wrote it in 2024
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "classifier_dropout": 0.1,
    "eos_token_id": None,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 512,
    "model_type": "gpt_neox",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "rope_scaling": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.2",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 97,
}


# ---------------------------------------------------------------- a folder of theirs
def shapes(config: dict[str, Any], encoder: str = "rcc_encoder") -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a checkpoint."""
    size, inner, depth = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    made: dict[str, tuple[int, ...]] = {}
    for top in ("", f"gpt_neox.{encoder}."):
        made[f"{top}embed_out.weight"] = (config["vocab_size"], size)
        made[f"{top}gpt_neox.embed_in.weight"] = (config["vocab_size"], size)
        for i in range(depth):
            layer = f"{top}gpt_neox.layers.{i}"
            linear = {
                "attention.query_key_value": (3 * size, size),
                "attention.dense": (size, size),
                "mlp.dense_h_to_4h": (inner, size),
                "mlp.dense_4h_to_h": (size, inner),
            }
            for name, shape in linear.items():
                made[f"{layer}.{name}.weight"] = shape
                if config.get("attention_bias", True) or not name.startswith("attention"):
                    made[f"{layer}.{name}.bias"] = shape[:1]
            for name in ("input_layernorm", "post_attention_layernorm"):
                made[f"{layer}.{name}.weight"] = made[f"{layer}.{name}.bias"] = (size,)
        norm = f"{top}gpt_neox.final_layer_norm"
        made[f"{norm}.weight"] = made[f"{norm}.bias"] = (size,)
    made["gpt_neox.embed_out.weight"] = (config["vocab_size"], size)
    made[f"gpt_neox.{encoder}2gpt_embed.weight"] = (size, size)
    for i in range(depth):
        made[f"gpt_neox.{encoder}2gpt_A_matrix.{i}.weight"] = (size, size)
    return made


def weights(config: dict[str, Any], encoder: str = "rcc_encoder", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random weights of which every part matters."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes(config, encoder).items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensor = 0.1 * tensor + ("norm.weight" in name)
        elif "embed_in" in name or "embed_out" in name:
            tensor *= 0.5
        else:
            tensor *= (0.7 if "2gpt_" in name else 1.2) / shape[1] ** 0.5
        made[name] = tensor.to(dtype)
    if config["tie_word_embeddings"]:
        del made["embed_out.weight"]
    return made


def buffers(config: dict[str, Any]) -> dict[str, Tensor]:
    """What checkpoints of the time hold beside parameters."""
    made: dict[str, Tensor] = {}
    for i in range(config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}.attention"
        made[f"{layer}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
        made[f"{layer}.masked_bias"] = torch.tensor(-1e9)
        made[f"{layer}.rotary_emb.inv_freq"] = torch.ones(2)
    return made


def save(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: int = 1, index: bool = True) -> Path:
    """Write a folder in the authors' layout; with several files, tensors by turns, and an index if asked for."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    file_of = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if file_of[n] == file}, folder / file, metadata={"format": "pt"})
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return folder


# ---------------------------------------------------------------- what it computes
class Published:
    """A checkpoint's computation.

    Args:
        tensors: by the authors' names, in any precision.
    """

    def __init__(
        self, config: dict[str, Any], tensors: dict[str, Tensor], segment: int, rate: int, padding: str = "repeat"
    ) -> None:
        self.config, self.segment, self.rate, self.padding = config, segment, rate, padding
        self.t = {name: tensor.double() for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.encoder = "mamba" if any(".mamba." in name for name in tensors) else "rcc_encoder"

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.t[f"{name}.weight"].T
        return y + self.t[f"{name}.bias"] if f"{name}.bias" in self.t else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred**2).mean(-1, keepdim=True) + self.config["layer_norm_eps"]
        return centred / spread.sqrt() * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions 0, 1, … on the first dimensions of every head, x [T, heads, d]."""
        dims = int(x.shape[-1] * self.config.get("rotary_pct", 0.25))
        half = dims // 2
        out = x.clone()
        for k in range(half):
            angle = torch.arange(len(x)).double() / self.config.get("rotary_emb_base", 10000) ** (2 * k / dims)
            cos, sin = angle.cos()[:, None], angle.sin()[:, None]
            out[..., k] = x[..., k] * cos - x[..., k + half] * sin
            out[..., k + half] = x[..., k + half] * cos + x[..., k] * sin
        return out

    def attention(self, name: str, x: Tensor) -> Tensor:
        heads = self.config["num_attention_heads"]
        # one head's query, key and value stand beside each other
        query, key, value = self.linear(f"{name}.query_key_value", x).view(len(x), heads, 3, -1).unbind(2)
        query, key = self.rotate(query), self.rotate(key)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
        later = torch.ones(len(x), len(x)).triu(1).bool()
        share = scores.masked_fill(later, -math.inf).softmax(-1)
        return self.linear(f"{name}.dense", torch.einsum("hqk,khd->qhd", share, value).flatten(1))

    def block(self, name: str, x: Tensor) -> Tensor:
        def mlp(y: Tensor) -> Tensor:
            y = self.linear(f"{name}.mlp.dense_h_to_4h", y)
            return self.linear(f"{name}.mlp.dense_4h_to_h", y * (1 + torch.erf(y / math.sqrt(2))) / 2)

        attended = self.attention(f"{name}.attention", self.norm(f"{name}.input_layernorm", x))
        if self.config["use_parallel_residual"]:
            return x + attended + mlp(self.norm(f"{name}.post_attention_layernorm", x))
        x = x + attended
        return x + mlp(self.norm(f"{name}.post_attention_layernorm", x))

    def vectors(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[n, L + 1, H] of texts that each begin a segment, the last state after the final norm."""
        groups = []
        top = f"gpt_neox.{self.encoder}.gpt_neox"
        for ids in texts:
            ids = padded(list(ids), self.segment, self.padding)
            for start in range(0, len(ids), self.segment):
                part = ids[start : start + self.segment]
                x = self.t[f"{top}.embed_in.weight"][part]
                states = [x]
                for i in range(self.config["num_hidden_layers"]):
                    x = self.block(f"{top}.layers.{i}", x)
                    states.append(x)
                states[-1] = self.norm(f"{top}.final_layer_norm", x)
                ends = [min(first + self.rate, len(part)) - 1 for first in range(0, len(part), self.rate)]
                groups.append(torch.stack(states, 1)[ends])
        return torch.cat(groups)

    def logits(self, vectors: Tensor, prompt: Sequence[int]) -> Tensor:
        """[Q, V] of a prompt after the prefix."""
        n, maps = len(vectors), f"gpt_neox.{self.encoder}2gpt_"
        x = torch.cat(
            [vectors[:, 0] @ self.t[f"{maps}embed.weight"].T, self.t["gpt_neox.embed_in.weight"][list(prompt)]]
        )
        for i in range(self.config["num_hidden_layers"]):
            x = self.block(f"gpt_neox.layers.{i}", x)
            added = vectors[:, i + 1] @ self.t[f"{maps}A_matrix.{i}.weight"].T
            x = torch.cat([x[:n] + added, x[n:]])
        out = "gpt_neox.embed_in.weight" if self.config["tie_word_embeddings"] else "embed_out.weight"
        return (self.norm("gpt_neox.final_layer_norm", x) @ self.t[out].T)[n:]

    def greedy(self, vectors: Tensor, prompt: Sequence[int], new: int) -> list[int]:
        """`new` tokens after the prompt."""
        written: list[int] = []
        for _ in range(new):
            written.append(int(self.logits(vectors, [*prompt, *written])[-1].argmax()))
        return written
