"""Contexts that were made before, by what they were made of: a folder of context files.

A file's name is its content address, and its time of change is when it was last used. Nothing else is recorded: there
is no index that could disagree with the files, and every process that shares the folder sees the same. A file appears
whole (`runtime/atomic.py`), and one that is removed while somebody reads it stays readable there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, RCCError
from ..runtime import atomic
from ..runtime.home import home
from . import container

if TYPE_CHECKING:
    import torch

    from ..model.compressor import Compressor
    from .context import CompressedContext

SUFFIX = ".rcc"
MAX_BYTES = 10 * 10**9
"""What the command line's store holds at most: two hundred contexts of the default model at its budget."""


@dataclass(frozen=True)
class StoredContext:
    """A file in a store.

    Attributes:
        address: its content address.
        path: the file.
        bytes: its size.
        last_used: when it was made or last asked.
        model: the model that made it; empty where the file is damaged.
        tokens, positions: of the text and of the context.
    """

    address: str
    path: Path
    bytes: int
    last_used: datetime
    model: str
    tokens: int
    positions: int


def default_store() -> ContextStore:
    """Return the user's store, `contexts/` in $RCC_HOME."""
    return ContextStore(home() / "contexts", MAX_BYTES)


class ContextStore:
    """A folder of contexts, found again by what they were made of.

    Args:
        folder: is made, for its owner alone, when the first context is put.
        max_bytes: what it may hold; :meth:`put` removes the least recently used beyond it. None: no limit.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None):
        self.folder, self.max_bytes = Path(folder), max_bytes

    @staticmethod
    def address(fingerprint: str, rate: int, token_digests: Iterable[str], dtype: torch.dtype) -> str:
        """Return the content address of a context.

        Args:
            fingerprint: of the model.
            rate: tokens a position.
            token_digests: SHA-256 of each text's token ids, in order.
            dtype: the precision that it is computed in.
        """
        parts = "\n".join([fingerprint, str(rate), str(dtype), *token_digests])
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    def path(self, address: str) -> Path:
        """Return where the context of an address is, or would be."""
        return self.folder / f"{address}{SUFFIX}"

    def get(self, address: str, model: Compressor | None = None) -> CompressedContext | None:
        """Return a context, and mark it as used; None where it is missing, damaged or cannot be read.

        Args:
            address: as :meth:`address` returns it.
            model: the one that made it: the context is put on its device and in its precision.
        """
        from .context import CompressedContext  # and with it torch

        path = self.path(address)
        try:
            context = CompressedContext.load(path, model=model)
        except (RCCError, OSError):  # a damaged one is made again
            return None
        with contextlib.suppress(OSError):  # the folder may be somebody else's
            os.utime(path)
        return context

    def put(self, address: str, context: CompressedContext) -> Path:
        """Keep a context, and remove the least recently used ones beyond the store's limit.

        Returns:
            Its file, for its owner alone: a context is as readable as its text.

        Raises:
            FileError, OSError: the folder or the file cannot be written.
        """
        atomic.private_folder(self.folder)
        path = self.path(address)
        context.save(path, private=True)
        if self.max_bytes is not None:
            self._evict(self.max_bytes, keep=path)
        return path

    def list(self) -> Sequence[StoredContext]:
        """Return what the store holds, the most recently used first."""
        contexts = []
        for path, status in self._files():
            try:
                manifest: dict[str, Any] = container.read(path, "context", "header").manifest
                pieces = manifest["pieces"]
                model, tokens = str(manifest["model"]), sum(int(piece["tokens"]) for piece in pieces)
                positions = sum(int(piece["positions"]) for piece in pieces)
            except FileNotFoundError:
                continue  # somebody else has just removed it
            except (RCCError, OSError, KeyError, TypeError, ValueError):
                model, tokens, positions = "", 0, 0
            used = datetime.fromtimestamp(status.st_mtime, UTC)
            contexts.append(StoredContext(path.stem, path, status.st_size, used, model, tokens, positions))
        return sorted(contexts, key=lambda context: context.last_used, reverse=True)

    def remove(self, address: str) -> StoredContext:
        """Remove the context of an address, or of the beginning of one.

        Raises:
            InputError: none or several begin so.
            OSError: its file cannot be removed.
        """
        matching = [context for context in self.list() if context.address.startswith(address)]
        if len(matching) != 1 or not address:
            count = "no stored context begins" if not matching else f"{len(matching)} stored contexts begin"
            raise InputError(f"{count} with address {address!r}: give one as listed.")
        matching[0].path.unlink(missing_ok=True)
        return matching[0]

    def prune(self, max_bytes: int) -> Sequence[Path]:
        """Remove the least recently used contexts until the rest takes at most so many bytes.

        Returns:
            The files that were removed.
        """
        atomic.remove_left_overs(self.folder)
        return self._evict(max_bytes)

    def _files(self) -> Sequence[tuple[Path, os.stat_result]]:
        """Return the store's files that there are now, the least recently used first."""
        files = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.folder.glob(f"*{SUFFIX}"):
                with contextlib.suppress(FileNotFoundError):
                    files.append((path, path.stat()))
        return sorted(files, key=lambda file: file[1].st_mtime_ns)

    def _evict(self, max_bytes: int, keep: Path | None = None) -> Sequence[Path]:
        files, removed = self._files(), []
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            if total <= max_bytes:
                break
            if path != keep:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                    removed.append(path)
                total -= status.st_size
        return removed
