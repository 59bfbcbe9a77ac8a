"""Attention of new tokens after a KV cache, on a CPU, without a mask: to the cache whole, and to themselves causally.

torch's flash attention has no causal form for keys that began before the queries, and with a mask it reads every key
and a row of the mask for each query. So the two parts are attended apart and joined by the sums of their exponentials,
which the kernel returns. The heads of a group, which share keys, become further queries of one head for the cache, so
that its keys are read once for all of them: also for a single new token, which sees all that there is. A short past,
such as the header of a chat, goes into one causal call, in front of the new tokens: its queries are zeros, and what
they read is dropped.

A prefix pass, a question after a context and each token of an answer are such calls. Batches with gaps keep their mask,
as do sliding windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from . import backbones

NAME = "rcc_after_cache"
"""What transformers calls this attention in a model's configuration."""
AFTER_CACHE = torch.empty(0, dtype=torch.bool)
"""Stands for the mask of new tokens that see all of a cache, and of themselves what came before."""
SHORT_PAST = 2
"""How many times longer than the past the new tokens have to be for one causal call over both."""


def attend_after_cache(decoder: PreTrainedModel) -> None:
    """Make a decoder that would use torch's attention attend in this way, in place.

    Args:
        decoder: with or without its head. One with sliding windows, or another attention, is left as it is.
    """
    if decoder.config._attn_implementation == "sdpa" and backbones.sliding_window(decoder.config) is None:
        decoder.set_attn_implementation(NAME)


def _mask(**arguments: Any) -> Tensor | None:
    """Return the mask of a forward pass, or :data:`AFTER_CACHE`; arguments as of transformers' `sdpa_mask`."""
    new, keys, padding = arguments["q_length"], arguments["kv_length"], arguments.get("attention_mask")
    plain = arguments.get("allow_is_causal_skip", True) and arguments.get("local_size") is None
    after = new < keys and arguments.get("q_offset") == keys - new
    on_cpu = torch.device(arguments.get("device", "cpu")).type == "cpu"
    if plain and after and on_cpu and (padding is None or bool(padding.all())):
        return AFTER_CACHE
    return sdpa_mask(**arguments)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa_attention_forward` does, which this calls but for :data:`AFTER_CACHE`.

    Args:
        module: the layer's attention.
        query: [B, heads, T, head dim].
        key: [B, KV heads, n + T, head dim].
        value: as the keys.
        attention_mask: as :func:`_mask` gave it.
        dropout: of weights, in training.
        scaling: of scores; None: by the head's size.
        **kwargs: of other attentions.

    Returns:
        [B, T, heads, head dim], and None for the weights.
    """
    new = query.shape[2]
    past = key.shape[2] - new
    if attention_mask is not AFTER_CACHE:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.requires_grad:  # the sums have no gradient
        mask = torch.ones(new, past + new, dtype=torch.bool, device=query.device).tril(past)[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    return attend_to_past(query, key, value, scaling)[0].transpose(1, 2).contiguous(), None


def attend_to_past(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> tuple[Tensor, Tensor]:
    """Attend to a past whole, and to the queries' own positions causally, on a CPU, without a gradient.

    Args:
        query: [B, heads, T, head dim].
        key: [B, KV heads, n + T, head dim], n > 0.
        value: as the keys.
        scaling: of scores; None: by the head's size.

    Returns:
        What is read, [B, heads, T, head dim], and the logarithm of the sum of exponentials of each query's scores,
        [B, heads, T], in float32 or finer.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    exact = torch.promote_types(query.dtype, torch.float32)
    batch, heads, new, size = query.shape
    past = key.shape[2] - new
    group = heads // key.shape[1]
    if past * SHORT_PAST <= new:
        everything = torch.cat([query.new_zeros(batch, heads, past, size), query], 2)
        out, sums = flash(everything, repeat_kv(key, group), repeat_kv(value, group), 0.0, True, scale=scaling)
        return out[:, :, past:], sums[:, :, past:].to(exact)
    folded = query.reshape(batch, key.shape[1], group * new, size)
    if new == 1:
        out, sums = flash(folded, key, value, 0.0, False, scale=scaling)
        return out.reshape(query.shape), sums.reshape(batch, heads, 1).to(exact)
    before, before_sum = flash(folded, key[:, :, :past], value[:, :, :past], 0.0, False, scale=scaling)
    own_keys, own_values = (repeat_kv(states[:, :, past:], group) for states in (key, value))
    own, own_sum = flash(query, own_keys, own_values, 0.0, True, scale=scaling)
    before_sum, own_sum = before_sum.reshape(batch, heads, new).to(exact), own_sum.to(exact)
    share = torch.sigmoid(before_sum - own_sum)[..., None]
    joined = torch.lerp(own.to(exact), before.reshape(batch, heads, new, size).to(exact), share)
    return joined.to(query.dtype), torch.logaddexp(before_sum, own_sum)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
