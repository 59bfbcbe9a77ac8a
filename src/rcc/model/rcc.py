"""RCCForCausalLM: an encoder, the projections and a decoder; compress texts, and ask what was compressed.

How a model is made, loaded and saved is in `loading.py`, how it is trained in `training_pass.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..context.cache import SPARE, KVBlocks, new_cache
from ..context.context import CompressedContext
from ..context.pieces import Piece
from ..context.vectors import CompressedVectors
from ..errors import ContextError, InputError
from ..runtime.provenance import libraries
from ..text.prompting import MODES
from . import backbones, generating, positions, segments
from . import encoder as encoding
from .arguments import check_is_context, rows_of, to_device
from .compressor import ReadProgress
from .encoder import BATCH_TOKENS, batch_tokens_on
from .prefix import States, as_cache, read_with_decoder, sink_layers
from .prefix_pass import Chunks, prefix_pass
from .pretrained import RCCPreTrainedModel

logger = logging.getLogger(__name__)


class RCCForCausalLM(RCCPreTrainedModel):
    """A causal language model that reads compressed contexts as a prefix (arXiv 2406.06110).

    Make one with :meth:`from_pretrained` or :meth:`from_base`. `encoder` is a transformers base model, `decoder`
    a causal language model, `projections` the linear maps between them.
    """

    compressor, trained = "", True
    modes = MODES

    # ---------------------------------------------------------------- text → context
    @torch.no_grad()
    def compress(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rate: int | None = None,
        context: CompressedContext | None = None,
        *,
        batch_tokens: int | None = None,
        progress: ReadProgress | None = None,
    ) -> CompressedContext:
        """Compress texts (section 3 of the paper), holding one batch of segments and the KV prefix in memory.

        A residual prefix's states are gathered for passes of the decoder that are worth their call: those of fewer
        than 512 positions, all texts together, are held beside the batch (18 MB of the small model).

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 0 at padding, on either side; texts may differ in length.
            rate: tokens a position; the model's default for None.
            context: append to this one: a new segment starts, nothing before it is computed again.
            batch_tokens: about how many tokens the encoder reads at once; None: :func:`batch_tokens_on` the device.
            progress: called with tokens read so far and tokens in all.

        Returns:
            A context of B texts with ceil(T / rate) positions each, after those of `context`.

        Raises:
            InputError: an unusable argument. WindowError: more positions than the decoder has.
            ContextError: `context` was made by another model.
        """
        rate = self.check_rate(rate)
        if context is not None:
            check_is_context(context)
        rows = rows_of(to_device(input_ids, self.device), to_device(attention_mask, self.device), self.vocabulary)
        pieces = [segments.piece_of(row, rate, self.config) for row in rows]
        total = sum(piece.tokens for piece in pieces)
        step = batch_tokens_on(self.device) if batch_tokens is None else batch_tokens

        def chunks() -> Chunks:
            reading: Iterable[tuple[States, Tensor | None, int]]
            if self.config.decoder_reads(rate):
                assert self.sink is not None
                reading = read_with_decoder(backbones.body(self.decoder), self.sink, rows, step)
            else:
                reading = self._encode(rows, rate, self.projections.states, step)
            for states, valid, done in reading:
                yield states, valid
                del states, valid  # before the next batch is read
                if progress is not None and done < total:
                    progress(done, total)

        context = self._extend(context, pieces, chunks())
        if progress is not None:  # not before: what was gathered last becomes keys and values after the last batch
            progress(total, total)
        return context

    def _encode(
        self, rows: list[Tensor], rate: int, wanted: list[int], batch_tokens: int
    ) -> Iterable[tuple[dict[int, Tensor], Tensor | None, int]]:
        """Yield the encoder's states of texts, a batch of segments at a time; see :func:`rcc.model.encoder.encode`."""
        texts = segments.texts_of(rows, None)
        return encoding.encode(self.encoder, texts, rate, self.config, wanted, batch_tokens, self.additions(rate))

    @torch.no_grad()
    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rate: int | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> CompressedVectors:
        """Compute the encoder's half of :meth:`compress` alone.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 0 at padding, on either side.
            rate: tokens a position; the model's default for None.
            batch_tokens: about how many tokens the encoder reads at once.

        Returns:
            Vectors [B, n, L + 1, H].

        Raises:
            InputError: an unusable argument.
        """
        rate = self.check_rate(rate)
        if self.config.decoder_reads(rate):
            raise InputError("rate=1 is read by the decoder itself, and there are no vectors of it: use compress.")
        rows = rows_of(to_device(input_ids, self.device), to_device(attention_mask, self.device), self.vocabulary)
        every = list(range(self.encoder_config.num_hidden_layers + 1))
        wanted = every if self.config.states == "all" else self.projections.states
        chunks = []
        for states, valid, _ in self._encode(rows, rate, wanted, batch_tokens):
            block = torch.stack([states[k] for k in wanted], 2)
            chunks.append(block if valid is None else block.masked_fill(~valid[:, :, None, None], 0))
        pieces = tuple(segments.piece_of(row, rate, self.config) for row in rows)
        lengths = torch.tensor([piece.positions for piece in pieces], device=self.device)
        return CompressedVectors(
            torch.cat(chunks, 1), lengths, rate, self.config.segment_length, pieces, self.fingerprint
        )

    @torch.no_grad()
    def prefix(self, vectors: CompressedVectors, context: CompressedContext | None = None) -> CompressedContext:
        """Compute the decoder's half of :meth:`compress` alone: vectors, on any device, → a context.

        Raises:
            ContextError: another model made the vectors, or they are damaged.
            WindowError: more positions than the decoder has.
        """
        self.check_fingerprint(vectors.fingerprint, "unknown", "the vectors")
        step = batch_tokens_on(self.device)  # a position costs the decoder what a token costs the encoder
        wanted = self.projections.states
        depths = {self.encoder_config.num_hidden_layers + 1} | ({1} if len(wanted) == 1 else set())
        if vectors.states.shape[2] not in depths or vectors.states.shape[3] != self.encoder_config.hidden_size:
            raise ContextError("the vectors do not have the shape that this model's encoder gives: encode again.")
        chunks = vectors.chunks(step, wanted, self.device)
        return self._extend(context, list(vectors.pieces), chunks)

    def _extend(self, context: CompressedContext | None, pieces: list[Piece], chunks: Chunks) -> CompressedContext:
        """Return the context that chunks of prefix states make, after `context` or from nothing."""
        new = max(piece.positions for piece in pieces)
        if context is not None:
            context = generating.check_context(self, context, len(pieces))
        self.check_window([piece.positions for piece in pieces], [0] * len(pieces), context)
        if context is None:
            layers = len(backbones.blocks(backbones.body(self.decoder)))
            cache = new_cache(layers, min(new + SPARE, max(new, self.window)))
            mask = prefix_pass(self.prefix_maker, cache, None, chunks)
            return CompressedContext(
                KVBlocks.of(cache),
                cache.get_seq_length(),
                tuple((piece,) for piece in pieces),
                self.fingerprint,
                self.config.name,
                self.config.segment_length,
                libraries(),
                mask,
                rotated=self.prefix_maker.rotated,
            )
        with context.borrow(new, SPARE) as cache:
            mask = prefix_pass(self.prefix_maker, cache, context.mask, chunks)
            rows = tuple((*row, piece) for row, piece in zip(context.pieces, pieces, strict=True))
            return context.grown(cache, rows, mask)

    def as_cache(self, context: CompressedContext) -> CompressedContext:
        """Return a context as the decoder's KV cache: the sink, then a direct prefix's keys rotated to their positions.

        A context that is a cache already, as with a residual prefix, is returned as it is. The result is kept with the
        context, so that further questions have it.
        """
        if context.rotated:
            return context
        assert self.sink is not None
        body = backbones.body(self.decoder)
        return as_cache(body, partial(sink_layers, body, self.sink), context)

    # ---------------------------------------------------------------- context and prompt → logits, tokens
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: CompressedContext | None = None,
        labels: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of prompts after a context, or of the decoder alone.

        After a `context` there are no gradients: for training, see :mod:`rcc.model.training_pass`.

        Args:
            input_ids: [B, Q] the prompts.
            attention_mask: [B, Q], 0 at padding, on either side.
            context: B texts; None: the prompts alone.
            labels: [B, Q] as `input_ids`, -100 where there is no loss.
            logits_to_keep: [U] the positions of the prompt to compute logits at, ascending; None: all. With
                labels, all those before a label.
            **kwargs: go to the decoder. `output_hidden_states` and `output_attentions` are those of a prompt's
                positions, in attentions beside the context's.

        Returns:
            logits [B, Q or U, vocabulary] and, with labels, the mean loss.

        Raises:
            InputError, WindowError, ContextError: as :meth:`compress`.
        """
        return generating.forward(self, input_ids, attention_mask, context, labels, logits_to_keep, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: CompressedContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts after a context, by transformers' `generate`: greedy, sampling, beams, streamers.

        Args:
            input_ids: [B, Q] prompts; B is the context's (`context.expand(n)` for n prompts on one text).
            attention_mask: [B, Q], 0 at padding, which must stand on the left.
            context: B texts; None: the prompts alone.
            **kwargs: everything that transformers' `generate` takes (`max_new_tokens`, `do_sample`, `num_beams`,
                `num_return_sequences`, `streamer`, `generation_config`, …).

        Returns:
            [B · sequences, Q + new] token ids, the prompts included, as `generate` gives them.

        Raises:
            InputError, WindowError, ContextError: as :meth:`compress`.
        """
        return generating.generate(self, input_ids, attention_mask, context, **kwargs)

    # ---------------------------------------------------------------- segments, rates and room
    @property
    def rates(self) -> list[int]:
        """The trained rates, the default one first."""
        return self.config.rates

    @property
    def segment_length(self) -> int:
        """Tokens of a segment."""
        return self.config.segment_length

    @property
    def has_base(self) -> bool:
        """Whether the decoder without LoRA is at hand: not where it is merged."""
        return not (self.merged and self.config.decoder.lora_rank)

    @property
    def header(self) -> Tensor:
        """No tokens, [0]: a text that is read as it is stands after nothing, as in training."""
        return torch.empty(0, dtype=torch.long)

    def split(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the segments of a text of token ids [T], with their padding."""
        return segments.split(ids, self.config)

    def positions(self, tokens: int, rate: int) -> int:
        """Return how many positions a text takes."""
        return segments.positions(tokens, rate, self.config)

    def check_rate(self, rate: int | None) -> int:
        """Return the rate to use, the default one for None; warn, once, of one that was not trained.

        Raises:
            InputError: it cannot be used.
        """
        rate = self.config.check_rate(rate)
        if rate not in {*self.config.rates, *self._warned}:
            self._warned.add(rate)
            logger.warning(
                "%s was not trained at rate %d, only at %s: expect little of it.",
                self.config.name,
                rate,
                ", ".join(map(str, self.config.rates)),
            )
        return rate

    def room(self, reserve: int = SPARE) -> int:
        """Return the window's positions for a prefix, beside `reserve` for a question and its answer (at most half)."""
        return positions.room(self.window, self.sink_positions, reserve)

    def fitting_rate(
        self,
        tokens: list[int],
        context: CompressedContext | None = None,
        reserve: int = SPARE,
        budget: int | None = None,
    ) -> int:
        """Return the lowest trained rate at which texts stay within a budget of positions.

        Where there is none, the lowest at which they leave room in the window.

        Args:
            tokens: lengths of the texts, which follow one another.
            context: to append to.
            reserve: positions to leave for a question and its answer (at most half the window).
            budget: positions that all of the context may take; None: the window alone decides.

        Raises:
            WindowError: they fit at no trained rate.
        """
        held = max(context.lengths) if context is not None else 0
        left = None if budget is None else budget - held
        return positions.fitting_rate(tokens, self.config, self.window, self.room(reserve) - held, left)

    def check_window(self, new: list[int], prompts: list[int], context: CompressedContext | None) -> None:
        """Check that each row's context, new prefix positions and tokens fit in the window.

        Raises:
            WindowError: they do not.
        """
        held = [0] * len(new) if context is None else context.lengths
        sink = self.sink_positions if context is not None or max(new) > 0 else 0
        positions.check_window(self.window, sink, held, new, prompts)
