"""Turn a GGUF file into an ordinary Hugging Face folder: configuration, tokenizer, and weights in bfloat16.

The tensors are dequantized by the gguf library, a few rows at a time, so that memory does not grow with the model.
Configuration and tokenizer come from the file's metadata through transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import FileError

if TYPE_CHECKING:  # torch and transformers take seconds to import: each function imports what it needs
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedModel

CHUNK = 1 << 22
"""Values that are dequantized at a time: 16 MB as float32."""


def write_folder(gguf: Path, folder: Path, family: Literal["smollm2", "qwen2"], tie_output: bool = False) -> None:
    """Write config.json, generation_config.json, the tokenizer and model.safetensors of a GGUF file.

    Args:
        gguf: the file.
        folder: a folder that exists; nothing in it is read.
        family: whose tokenizer it is.
        tie_output: the file has an `output.weight`, and it is to be the embedding, too; its `token_embd.weight` is
            not used. Without it, the file says whether embedding and output layer are tied.

    Raises:
        FileError: a tensor that the model needs is not in the file, or is of another size.
        OSError: something could not be written.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet():
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        config.eos_token_id = _write_tokenizer(gguf, folder, family)
        if tie_output:
            config.tie_word_embeddings = True
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    # save_pretrained of a model would do these two, and want its weights
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write_weights(gguf, model, folder / "model.safetensors", tie_output)


def _write_tokenizer(gguf: Path, folder: Path, family: str) -> int:
    """Write the tokenizer and return the id that ends an answer."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer, Qwen2Tokenizer

    # AutoTokenizer would read the whole metadata once more, to find this class: 20 s for 150,000 tokens
    kind = Qwen2Tokenizer if family == "qwen2" else AutoTokenizer
    tokenizer = kind.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    if family == "smollm2":
        # The converter forgets that SmolLM2 splits digits one by one before the byte-level rule: without it
        # "  3" and "\n\n1" become tokens that the model has not been trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if family == "qwen2":
        # The converter forgets that Qwen2 composes letters and their marks first. Text that comes composed, which is
        # nearly all text, has the same tokens without it.
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.eos_token = "<|im_end|>"  # all bases here are chat models of this one mark
    tokenizer.save_pretrained(folder)
    end: int = tokenizer.eos_token_id
    return end


# ---------------------------------------------------------------- weights
def _write_weights(gguf: Path, model: PreTrainedModel, file: Path, tie_output: bool) -> None:
    """Write the parameters of a model, which lies on the meta device, with the values of a GGUF file."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied one once
    sources = _sources(list(shapes), model.config)
    if tie_output:
        sources["model.embed_tokens.weight"] = "output.weight"
    for name, shape in shapes.items():
        # GGUF names the innermost dimension first
        if sources[name] not in tensors or tuple(reversed(tensors[sources[name]].shape.tolist())) != shape:
            raise FileError(f"{gguf} has no tensor {sources[name]} of the shape {shape}: get the file again.")

    def read(name: str) -> Iterator[np.ndarray]:
        return _bfloat16(tensors[sources[name]], _row_order(name, model.config))

    write_safetensors(file, shapes, read)


def _sources(names: list[str], config: PreTrainedConfig) -> dict[str, str]:
    """Return the GGUF file's name of every parameter."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (family,) = [arch for arch, name in MODEL_ARCH_NAMES.items() if name == config.model_type]
    known = get_tensor_name_map(family, config.num_hidden_layers)
    sources = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if unknown := [name for name, source in sources.items() if source is None]:
        raise FileError(f"the installed gguf has no name for {', '.join(unknown)}: install another version.")
    return {name: str(source) for name, source in sources.items()}


def _row_order(name: str, config: PreTrainedConfig) -> np.ndarray | None:
    """Return which row of the file's tensor each row of ours is, or None where they stand in order.

    For Llama the file pairs the dimensions that rotate together side by side, transformers half a head apart.
    """
    import numpy as np

    if config.model_type != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    rows = np.arange(heads * config.head_dim)
    return rows.reshape(heads, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _bfloat16(tensor: Any, order: np.ndarray | None) -> Iterator[np.ndarray]:
    """Dequantize a tensor some rows at a time; yield the bits of their bfloat16 values as int16."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    # a quantized tensor's rows are bytes; what has one dimension is one row
    rows = np.atleast_2d(tensor.data)
    height = max(1, CHUNK // int(tensor.shape[0]))
    for start in range(0, len(rows), height):
        stop = start + height
        part = rows[start:stop] if order is None else rows[order[start:stop]]
        values = torch.from_numpy(np.array(dequantize(part, tensor.tensor_type), np.float32))
        yield values.to(torch.bfloat16).view(torch.int16).numpy()


def write_safetensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Iterator[np.ndarray]]
) -> None:
    """Write bfloat16 tensors to a safetensors file, holding a piece of one at a time.

    safetensors' own writer wants every tensor in memory. The bytes are those that it would write.

    Args:
        file: where they go; a file of that name is overwritten.
        shapes: of every tensor, by name.
        read: gives the pieces of a tensor, in order: two bytes a value.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + 2 * math.prod(shapes[name])
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(shapes):
            for piece in read(name):
                out.write(piece.data)
        if out.tell() != 8 + len(text) + end:
            raise FileError(f"{file} was written with tensors of other sizes than were said: this is an error in rcc.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Let no bars and warnings of transformers through: what happens here is ours to report."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
