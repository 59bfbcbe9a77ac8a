"""What an RCC model learns beside its projections: LoRA, memory embeddings and rate embeddings; and what is frozen."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import RCCConfig
from ..errors import ModelError
from . import backbones


def new_memory(embeddings: Tensor, length: int) -> nn.Parameter:
    """Return new memory embeddings [length, H], the same every time.

    They are the mean of the encoder's token embeddings, and a tenth of their spread around it, so that they differ.

    Args:
        embeddings: [vocabulary, H], the encoder's.
        length: memory tokens of a segment at the lowest rate.
    """
    table = embeddings.detach()
    spread, mean = torch.std_mean(table.float(), 0)
    noise = torch.randn(length, len(mean), generator=torch.Generator().manual_seed(0))
    return nn.Parameter((mean + 0.1 * spread * noise.to(table.device)).to(table.dtype))


def new_rate_embeddings(embeddings: Tensor, rates: int) -> nn.Parameter:
    """Return new rate embeddings [rates, H]: 0, as before anything is learned no rate differs from any other.

    Args:
        embeddings: [vocabulary, H] the encoder's, for width, precision and device.
        rates: how many there are.
    """
    return nn.Parameter(embeddings.new_zeros(rates, embeddings.shape[1]))


def rate_offset(table: Tensor | None, rates: Sequence[int], rate: int) -> Tensor | None:
    """Return what the encoder's token embeddings are shifted by at a rate, [H]; None: by nothing.

    Between two rates the logarithms interpolate, beyond all of them the nearest counts.

    Args:
        table: [rates, H] the embeddings of the trained rates; None: the model has none.
        rates: the trained rates, in the table's order.
        rate: the one asked for, trained or not.
    """
    if table is None:
        return None
    order = sorted(range(len(rates)), key=lambda i: rates[i])
    ascending = [rates[i] for i in order]
    above = min(bisect.bisect_left(ascending, rate), len(ascending) - 1)
    below = above if ascending[above] <= rate else max(above - 1, 0)
    low, high = ascending[below], ascending[above]
    share = math.log(rate / low) / math.log(high / low) if low < rate < high else 0.0
    lower_row, higher_row = table[order[below]], table[order[above]]
    return lower_row if share == 0 else torch.lerp(lower_row, higher_row, share)


@torch.no_grad()
def rate_embeddings_for(rates: Sequence[int], embeddings: Tensor, table: Tensor | None, old: Sequence[int]) -> Tensor:
    """Return embeddings [rates, H] that serve new rates as a table of old ones does; zeros without one.

    Args:
        rates: the new ones, in the order of the result.
        embeddings: [vocabulary, H] the encoder's.
        table: [old rates, H]; None: there are none yet.
        old: the rates of `table`, in its order.
    """
    rows = [rate_offset(table, old, rate) for rate in rates]
    return torch.stack([embeddings.new_zeros(embeddings.shape[1]) if row is None else row for row in rows])


def add_lora(encoder: PreTrainedModel, decoder: PreTrainedModel, config: RCCConfig, last_state: int) -> None:
    """Put LoRA on the linear layers of both sides' blocks, in place, where the configuration gives it a rank.

    Args:
        encoder: a base model without head.
        decoder: likewise.
        config: gives each side's rank, and the scale.
        last_state: the last encoder state that feeds the decoder.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for body, rank, names in (
        (encoder, config.encoder.lora_rank, encoder_lora_layers(encoder, config, last_state)),
        (decoder, config.decoder.lora_rank, backbones.linear_names(decoder)),
    ):
        if rank:
            alpha = config.lora_alpha or rank
            settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)  # type: ignore[arg-type]  # 1.5 will do, too
            inject_adapter_in_model(settings, body)


def encoder_lora_layers(encoder: PreTrainedModel, config: RCCConfig, last_state: int) -> list[str]:
    """Return the names of the encoder's layers that have LoRA.

    A direct prefix is made of the inputs of blocks: an encoder's blocks after `last_state` feed nothing, and have none.
    """
    return backbones.linear_names(encoder, last_state if config.direct else None)


def check_names(wanted: Collection[str], state: Collection[str]) -> None:
    """Raise ModelError unless a state has the wanted tensors, by name, and no others."""
    if difference := sorted(set(wanted) ^ set(state)):
        word = "lack" if difference[0] in wanted else "have the unknown tensor"
        raise ModelError(f"the model's weights {word} {difference[0]} ({len(difference)} differences in all).")


def lora_scale(config: RCCConfig, rank: int) -> float:
    """Return what the product of LoRA's matrices is multiplied by: alpha / rank."""
    return (config.lora_alpha or rank) / rank


def freeze(encoder: PreTrainedModel, decoder: PreTrainedModel, config: RCCConfig, last_state: int) -> None:
    """Freeze the bases under LoRA, and what reaches no loss: distributed training would wait for it.

    Args:
        encoder: a base model without head.
        decoder: with its head.
        config: says which side has LoRA, and whether the base is shared.
        last_state: the last encoder state that feeds the decoder.
    """
    for side, rank in ((encoder, config.encoder.lora_rank), (decoder, config.decoder.lora_rank)):
        for name, parameter in side.named_parameters():
            parameter.requires_grad_(".lora_" in name or not (rank or config.share_base))
    blocks = backbones.blocks(encoder)
    if last_state < len(blocks):
        used = {id(p) for block in blocks[:last_state] for p in block.parameters()}
        used |= {id(p) for p in encoder.get_input_embeddings().parameters()}
        shared = {id(p) for p in decoder.parameters()}
        for parameter in encoder.parameters():
            if id(parameter) not in used | shared:
                parameter.requires_grad_(False)
