"""The method of arXiv 2406.06110 once more, as plainly as possible: what the tests compare rcc with.

Written from the paper's definition and from nothing in `src/rcc`: no cache, no hooks, no batch,
one segment after another, and the decoder's blocks called one by one with a causal mask and rotary embeddings made
here. Weights come in as modules: the encoder's base model, the decoder's causal language model, the matrices P_i.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor


def padded(ids: list[int], segment: int, padding: str) -> list[int]:
    """The published repeat-to-fill rule, without its two faults; or nothing at all."""
    if padding == "none":
        return list(ids)
    if len(ids) < segment:  # shorter than a segment: repeated until it fills it
        return [ids[i % len(ids)] for i in range(segment)]
    filled = list(ids)
    missing = 0
    while (len(ids) + missing) % segment:
        missing += 1
    # longer: filled up on the left with its own last tokens; an exact multiple stays as it is
    return filled[len(filled) - missing :] + filled


def all_states(encoder: Any, inputs: Tensor) -> list[Tensor]:
    """[T, H] each: the embeddings [T, H] that are given, each block's output, the last one after the final norm."""
    states = encoder(inputs_embeds=inputs[None], output_hidden_states=True).hidden_states
    if encoder.config.model_type in (
        "mamba",
        "mamba2",
    ):  # its list has no embeddings, and the last block's output with and without
        states = [inputs[None], *states[:-2], states[-1]]
    return [state[0] for state in states]


def compressed_vectors(
    encoder: Any,
    ids: list[int],
    segment: int,
    rate: int,
    padding: str = "none",
    memory: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """[n, L + 1, H]: all states at the last token of every group of `rate` tokens of every segment; with `memory`,
    at as many memory tokens after the segment instead. `offset` [H] is added to every token's embedding."""
    ids = padded(ids, segment, padding)
    groups = []
    for start in range(0, len(ids), segment):
        part = ids[start : start + segment]
        inputs = encoder.get_input_embeddings()(torch.tensor(part))
        if offset is not None:
            inputs = torch.stack([row + offset for row in inputs])
        if memory is not None:
            inputs = torch.cat([inputs, memory[: ceil(len(part) / rate)]])
        states = all_states(encoder, inputs)
        if memory is not None:
            groups += [torch.stack([layer[i] for layer in states]) for i in range(len(part), len(inputs))]
            continue
        for first in range(0, len(part), rate):
            last = min(first + rate, len(part)) - 1  # a partial group keeps its last token's state
            groups.append(torch.stack([layer[last] for layer in states]))
    return torch.stack(groups)


def decoder_inputs(vectors: Tensor, depth: int, layer_map: str = "duplicate", states: str = "all") -> list[Tensor]:
    """What P_0, P_1, … P_depth read, [n, H] each, where the encoder may have another depth than the decoder."""
    if states == "last":
        return [vectors[:, -1]]
    ratio = Fraction(vectors.shape[1] - 1, depth)
    reads = [vectors[:, 0]]
    for i in range(1, depth + 1):
        high = ceil(i * ratio)
        low = floor((i - 1) * ratio) + 1
        if layer_map == "duplicate":
            reads.append(vectors[:, high])
        else:
            total: Any = sum(vectors[:, k] for k in range(low, high + 1))
            reads.append(total / (high - low + 1))
    return reads


def rotary(config: Any, kind: str, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [1, length, rotary dimensions], of positions 0 … length - 1, in layers of a kind."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = config.rope_parameters.get(kind, config.rope_parameters)
    dims = int(head * settings.get("partial_rotary_factor", 1.0))
    theta = settings["rope_theta"]
    rows = []
    frequencies = torch.tensor([1.0 / theta ** (2 * k / dims) for k in range(dims // 2)])
    for position in range(length):
        angles = position * frequencies
        rows.append(torch.cat([angles, angles]))
    table = torch.stack(rows)[None]
    return table.cos().to(dtype), table.sin().to(dtype)


def direct_terms(model: Any, ids: list[int], rate: int) -> list[Tensor]:
    """What enters each decoder block at the prefix positions of one text of a direct prefix, [n, H] each.

    Every segment is read after the sink token, whose own states are dropped; at rate 1 the decoder reads the whole text
    after the learnt sink.
    """
    config, depth = model.config, model.decoder.config.num_hidden_layers
    embed = model.encoder.get_input_embeddings()
    if rate == 1:
        own = model.decoder.get_input_embeddings()(torch.tensor(ids))
        return [states[1:] for states in run_blocks(model.decoder, [row[None] for row in model.sink], own)[0]]
    groups = []
    for start in range(0, len(ids), config.segment_length):
        part = ids[start : start + config.segment_length]
        inputs = embed(torch.tensor(part))
        if model.rate_embeddings is not None:
            inputs = inputs + model.rate_embeddings[config.rates.index(rate)]
        states = all_states(model.encoder, torch.cat([embed(torch.tensor([config.sink_token])), inputs]))
        for first in range(0, len(part), rate):
            last = 1 + min(first + rate, len(part)) - 1
            groups.append(torch.stack([layer[last] for layer in states]))
    reads = decoder_inputs(torch.stack(groups), depth, config.layer_map)
    # the file holds differences from the identity where both sides have one width
    wide = model.encoder.config.hidden_size == model.decoder.config.hidden_size
    maps = [p.weight + torch.eye(len(p.weight)) if wide else p.weight for p in model.projections]
    return [read @ matrix.T for read, matrix in zip(reads, maps, strict=False)]


def run_blocks(decoder: Any, fixed: list[Tensor], rest: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run a decoder's blocks over [fixed; rest], where the first positions enter each block as `fixed` says.

    Args:
        fixed: [n, H] for each block.
        rest: [T, H] what enters the first block after them.

    Returns:
        What entered each block, [n + T, H], and the output of the last one, [T, H].
    """
    family = decoder.config.model_type
    body = decoder.gpt_neox if family == "gpt_neox" else decoder.model
    n = len(fixed[0])
    total = n + len(rest)
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(body.layers)
    entered = []
    for i, (block, kind) in enumerate(zip(body.layers, kinds, strict=True)):
        x = torch.cat([fixed[i].to(rest.dtype), rest])
        entered.append(x)
        sees = decoder.config.sliding_window if kind == "sliding_attention" else total
        past = torch.arange(total)[:, None] - torch.arange(total)[None]
        hidden = (past < 0) | (past >= sees)
        mask = torch.zeros(total, total, dtype=x.dtype).masked_fill(hidden, torch.finfo(x.dtype).min)
        out = block(
            x[None],
            attention_mask=mask[None, None],
            position_ids=torch.arange(total)[None],
            position_embeddings=rotary(decoder.config, kind, total, x.dtype),
        )
        rest = out[0, n:]
    return entered, rest


def direct(model: Any, texts: list[list[int]], rates: list[int], prompt: list[int]) -> Tensor:
    """Logits [Q, V] of a prompt after the direct prefix of some texts, one after the other, each read on its own."""
    terms = [direct_terms(model, ids, rate) for ids, rate in zip(texts, rates, strict=True)]
    fixed = [torch.cat([model.sink[i][None], *(term[i] for term in terms)]) for i in range(len(model.sink))]
    family = model.decoder.config.model_type
    norm = model.decoder.gpt_neox.final_layer_norm if family == "gpt_neox" else model.decoder.model.norm
    embeds = model.decoder.get_input_embeddings()(torch.tensor(prompt))
    return model.decoder.lm_head(norm(run_blocks(model.decoder, fixed, embeds)[1]))


def decode(decoder: Any, projections: list[Tensor], reads: list[Tensor], prompt: list[int]) -> Tensor:
    """Logits [Q, V] of a prompt after the prefix that `reads` make; [1, n + Q] in one go."""
    family = decoder.config.model_type
    body = decoder.gpt_neox if family == "gpt_neox" else decoder.model
    embed = body.embed_in if family == "gpt_neox" else body.embed_tokens
    norm = body.final_layer_norm if family == "gpt_neox" else body.norm
    terms = [read @ matrix.T for read, matrix in zip(reads, projections, strict=False)]
    x = embed(torch.tensor([prompt]))
    n = 0
    if terms:
        n = len(terms[0])
        x = torch.cat([terms[0][None].to(x.dtype), x], 1)
    total = x.shape[1]
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(body.layers)
    for i, (block, kind) in enumerate(zip(body.layers, kinds, strict=True)):
        sees = decoder.config.sliding_window if kind == "sliding_attention" else total
        mask = torch.zeros(1, 1, total, total, dtype=x.dtype)
        for query in range(total):
            for key in range(total):
                if key > query or query - key >= sees:
                    mask[0, 0, query, key] = torch.finfo(x.dtype).min
        x = block(
            x,
            attention_mask=mask,
            position_ids=torch.arange(total)[None],
            position_embeddings=rotary(decoder.config, kind, total, x.dtype),
        )
        if i + 1 < len(terms):
            x = x.clone()
            for j in range(n):
                x[0, j] = x[0, j] + terms[i + 1][j]
    return decoder.lm_head(norm(x))[0, n:]


@torch.no_grad()
def reference(
    encoder: Any,
    decoder: Any,
    projections: list[Tensor],
    texts: list[list[int]],
    prompt: list[int],
    *,
    segment: int,
    rate: int | list[int],
    layer_map: str = "duplicate",
    states: str = "all",
    padding: str = "none",
    memory: Tensor | None = None,
    offsets: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits [Q, V] of a prompt after one or several texts, the later ones appended; and the vectors.

    Args:
        texts: token ids of each text; every one of them starts a new segment.
        rate: of all texts, or one of each.
        memory: the memory embeddings [M, H_encoder] of an encoder that is read out at memory tokens.
        offsets: what is added to the embedding of every token that is read at a rate, [H_encoder].
    """
    rates = rate if isinstance(rate, list) else [rate] * len(texts)
    parts = []
    for ids, r in zip(texts, rates, strict=True):
        offset = None if offsets is None else offsets[r]
        parts.append(compressed_vectors(encoder, ids, segment, r, padding, memory, offset))
    vectors = torch.cat(parts)
    reads = decoder_inputs(vectors, decoder.config.num_hidden_layers, layer_map, states)
    return decode(decoder, projections, reads, prompt), vectors


def greedy(new: int, *args: Any, **kwargs: Any) -> list[int]:
    """`new` tokens after the prompt, everything computed anew for each."""
    encoder, decoder, projections, texts, prompt = args
    out: list[int] = []
    for _ in range(new):
        logits, _ = reference(encoder, decoder, projections, texts, [*prompt, *out], **kwargs)
        out.append(int(logits[-1].argmax()))
    return out


def beam_search(new: int, beams: int, *args: Any, **kwargs: Any) -> list[list[int]]:
    """The `beams` most likely continuations that beam search finds, best first, without an end token."""
    encoder, decoder, projections, texts, prompt = args
    beams_now: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(new):
        candidates = []
        for score, tokens in beams_now:
            logits, _ = reference(encoder, decoder, projections, texts, [*prompt, *tokens], **kwargs)
            for token, more in enumerate(logits[-1].log_softmax(-1).tolist()):
                candidates.append((score + more, [*tokens, token]))
        beams_now = sorted(candidates, key=lambda pair: -pair[0])[:beams]
    return [tokens for _, tokens in beams_now]
