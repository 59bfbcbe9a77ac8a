"""What a context is, for people and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .container import DTYPES, read
from .manifest import NAMES, Manifest
from .pieces import rate_of, rate_text, sha256_of

if TYPE_CHECKING:
    from .context import CompressedContext


def of_file(path: Path) -> dict[str, Any]:
    """Return what `rcc inspect --json` prints of a file, after checking every byte of it.

    Raises:
        FileError: the file cannot be read. ContextError: it is damaged, of a newer format or not a context.
    """
    container = read(path, "context", "full")
    manifest, entries = Manifest.of(container), container.entries
    dtype = DTYPES[entries[f"{NAMES[0]}.0"].dtype]
    return as_json(manifest, sum(entry.nbytes for entry in entries.values()), dtype)


def as_json(manifest: Manifest, nbytes: int, dtype: str) -> dict[str, Any]:
    """Return what there is to know of a context of one text.

    Args:
        manifest: what its file says of it.
        nbytes: of its keys and values.
        dtype: their precision.
    """
    pieces = manifest.pieces
    return {
        "model": manifest.model_name,
        "fingerprint": manifest.fingerprint,
        **({"compressor": manifest.compressor} if manifest.compressor else {}),
        "source_tokens": sum(piece.tokens for piece in pieces),
        "source_sha256": sha256_of(pieces),
        "rate": rate_of(pieces),
        "segment_length": manifest.segment_length,
        "positions": manifest.positions,
        "bytes": nbytes,
        "bytes_per_position": nbytes // manifest.positions,
        "dtype": dtype,
        "layers": manifest.layers,
        "pieces": [{k: v for k, v in piece.as_dict().items() if k != "opening"} for piece in pieces],
        "versions": manifest.versions,
    }


def in_one_line(context: CompressedContext) -> str:
    """Return tokens, rate, positions and megabytes of a context."""
    rate, size = rate_text(context.rate), context.nbytes / 1e6
    return f"{context.source_tokens:,} tokens at {rate} in {len(context):,} positions, {size:.1f} MB"
