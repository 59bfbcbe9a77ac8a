"""A tiny language model as one GGUF file, as llama.cpp's converter names and orders things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*sorted(ByteLevel.alphabet()), "Ġ1", "th", *MARKS]
"""Every byte, two merged tokens, and the marks of ChatML."""
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def file_name(parameter: str) -> str:
    """What the file calls a parameter of a Llama or Qwen2."""
    stem, _, kind = parameter.removeprefix("model.").rpartition(".")
    whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def add_tokenizer(writer: GGUFWriter) -> None:
    """Write the tokenizer of :data:`TOKENS`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - len(MARKS)) + [3] * len(MARKS))
    writer.add_token_merges(["Ġ 1", "t h"])
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_bos_token_id(TOKENS.index("<|endoftext|>"))
    writer.add_pad_token_id(TOKENS.index("<|endoftext|>"))


def write_gguf(file: Path, model: PreTrainedModel) -> None:
    """Write a tiny model of `len(TOKENS)` tokens in float32; Llama's rotated dimensions stand side by side there."""
    config = model.config
    writer = GGUFWriter(file, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    add_tokenizer(writer)
    for name, parameter in model.named_parameters():  # a tied one once
        values = parameter.detach().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            half = config.hidden_size // config.num_attention_heads // 2
            values = values.reshape(-1, 2, half, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(file_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
