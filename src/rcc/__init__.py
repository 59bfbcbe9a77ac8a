"""Recurrent Context Compression: compress a long text once, keep it, ask it anything."""

from typing import TYPE_CHECKING

from .errors import ContextError, FileError, InputError, ModelError, RCCError, WindowError

__version__ = "0.1.0"

__all__ = [
    "CompressedContext",
    "CompressedVectors",
    "ContextError",
    "ContextStore",
    "Engine",
    "FileError",
    "InputError",
    "ModelError",
    "RCCConfig",
    "RCCError",
    "RCCForCausalLM",
    "SideConfig",
    "WindowError",
    "__version__",
    "load_tokenizer",
]

if TYPE_CHECKING:
    from .checkpoints import load_tokenizer
    from .config import RCCConfig, SideConfig
    from .context.context import CompressedContext
    from .context.store import ContextStore
    from .context.vectors import CompressedVectors
    from .engine import Engine
    from .model.rcc import RCCForCausalLM

_HOMES = {
    "ContextStore": "context.store",
    "Engine": "engine",
    "RCCConfig": "config",
    "SideConfig": "config",
    "RCCForCausalLM": "model.rcc",
    "CompressedContext": "context.context",
    "CompressedVectors": "context.vectors",
    "load_tokenizer": "checkpoints",
}


def __getattr__(name: str) -> object:
    """Load the heavy parts when they are first used: `rcc --version` need not wait for torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(name)
