"""A decoder that reads a text as it is: the reference for what compression loses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..context.cache import BlockLayer, KVBlocks, block_layers
from ..context.context import CompressedContext
from ..context.pieces import Piece
from ..errors import InputError
from ..model import backbones
from ..model.compressor import Compressor
from ..runtime.provenance import libraries


@contextlib.contextmanager
def base_decoder(model: Compressor) -> Iterator[None]:
    """Take LoRA out of a model's decoder within this context; one whose own weights were trained stays as it is.

    Raises:
        InputError: LoRA is merged into the decoder's weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not model.has_base:
        raise InputError(
            'the decoder\'s adapters are merged: load the model with adapters="separate" to have its base.'
        )
    layers = [module for module in model.decoder.modules() if isinstance(module, BaseTunerLayer)]
    learning = {parameter: parameter.requires_grad for parameter in model.decoder.parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, before in learning.items():  # which enable_adapters decides anew
            parameter.requires_grad_(before)


@torch.no_grad()
def read_plain(model: Compressor, ids: Tensor) -> CompressedContext:
    """Return a context that is not compressed: keys and values of a text's own tokens, one position each.

    Args:
        model: whose decoder reads.
        ids: [T] token ids, at most the decoder's window.
    """
    ids = ids.to(model.device)
    depth = len(backbones.blocks(backbones.body(model.decoder)))
    cache = Cache(layers=[BlockLayer(len(ids)) for _ in range(depth)])
    model.decoder.base_model(
        input_ids=ids[None],
        position_ids=torch.arange(len(ids), device=model.device)[None],
        **{backbones.CACHE: cache},
        use_cache=True,
    )
    return CompressedContext(
        KVBlocks([layer.block for layer in block_layers(cache)], len(ids), writable=False),
        len(ids),
        ((Piece(len(ids), len(ids), 1, ""),),),
        model.fingerprint,
        model.name,
        model.segment_length,
        libraries(),
    )
