"""What a context is, for people and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import CompressedContext


def as_json(context: CompressedContext) -> dict[str, Any]:
    """Return what `rcc inspect --json` prints of a context of one text."""
    return {
        "model": context.model_name,
        "fingerprint": context.fingerprint,
        **({"compressor": context.compressor} if context.compressor else {}),
        "source_tokens": context.source_tokens,
        "source_sha256": context.source_sha256[0],
        "rate": context.rate,
        "segment_length": context.segment_length,
        "positions": len(context),
        "bytes": context.nbytes,
        "bytes_per_position": context.nbytes // len(context),
        "dtype": str(context.dtype).removeprefix("torch."),
        "layers": len(context.blocks.layers),
        "pieces": [{k: v for k, v in piece.as_dict().items() if k != "opening"} for piece in context.pieces[0]],
        "versions": context.versions,
    }


def in_one_line(context: CompressedContext) -> str:
    """Return tokens, rate, positions and megabytes of a context."""
    rate = context.rate if isinstance(context.rate, int) else "/".join(map(str, context.rate))
    return f"{context.source_tokens:,} tokens at {rate}× in {len(context):,} positions, {context.nbytes / 1e6:.1f} MB"
