"""A decoder made ready for prompts after a context, in place: right in batches with gaps, and fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import backbones
from .attention import attend_after_cache
from .decoder import Args, Kwargs


def prepare_asking(decoder: PreTrainedModel) -> None:
    """Make a decoder ready for prompts after a context, in place: right in batches with gaps, and fast."""
    window_by_position(backbones.body(decoder))
    attend_after_cache(decoder)
    contiguous_head(decoder)
    multiply_rows_as_vectors(decoder)


def window_by_position(body: PreTrainedModel) -> None:
    """Make the sliding layers of a decoder's base model count positions, not gaps.

    transformers measures a window in cache entries, so what stands between a text and its prompt in a batch of
    different lengths would push the text's end out of it. Flash attention drops gaps by itself.
    """
    sliding = backbones.sliding_window(body.config)
    if sliding is None or not backbones.has_full_attention(body.config):
        return

    def masks(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        mask = kwargs.get("attention_mask")
        attention = body.config._attn_implementation
        if not isinstance(mask, Tensor) or mask.ndim != 2 or attention not in ("eager", "sdpa") or bool(mask.all()):
            return None
        new = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        entries = torch.arange(mask.shape[1], device=mask.device)
        order = mask.cumsum(1)
        asking = slice(mask.shape[1] - new.shape[1], None)
        visible = mask.bool()[:, None] & (entries <= entries[asking, None])
        near = visible & (order[:, asking, None] - order[:, None] < sliding)
        both = {"full_attention": visible[:, None], "sliding_attention": near[:, None]}
        if attention == "eager":  # which adds its mask to the scores
            low = torch.finfo(body.dtype).min
            both = {k: torch.zeros_like(v, dtype=body.dtype).masked_fill(~v, low) for k, v in both.items()}
        return args, {**kwargs, "attention_mask": both}

    body.register_forward_pre_hook(masks, with_kwargs=True)


def contiguous_head(decoder: PreTrainedModel) -> None:
    """Make a decoder's output head read states that lie one after the other in memory.

    Generating hands it a view of the last position, which has the strides of the whole prompt. With frozen weights
    torch (2.13) takes such a product on a CPU for a batch of matrices instead of one, which in bfloat16 takes some
    fifty times as long.
    """

    def straighten(module: nn.Module, args: Args) -> Args:
        # the view is for what is contiguous but for the strides of dimensions of size 1
        return (args[0].contiguous().view(args[0].shape), *args[1:])

    decoder.get_output_embeddings().register_forward_pre_hook(straighten)


class RowLinear(nn.Linear):
    """A linear layer that multiplies a single row, the input of each further token of an answer, as a vector.

    On a CPU torch (2.13) computes a bfloat16 product with one row by its matrix library. The product of a matrix and a
    vector has the same bits, and reads the weights 1.3 to 1.7 times as fast.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output; see :class:`torch.nn.Linear`."""
        weight, bias = self.weight, self.bias
        if (
            input.numel() != self.in_features
            or not input.dtype == weight.dtype == torch.bfloat16
            or weight.device.type != "cpu"
            or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        ):
            return super().forward(input)
        row = input.reshape(-1)
        out = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return out.view(*input.shape[:-1], -1)


def multiply_rows_as_vectors(decoder: PreTrainedModel) -> None:
    """Make a decoder's linear layers :class:`RowLinear`, around the very same weights."""
    for module in decoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
