"""Selection: contexts of any causal language model, made of the KV pairs of its own that matter most."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from ... import checkpoints
from ...context.cache import SPARE, KVBlocks, block_layers, new_cache
from ...context.context import CompressedContext
from ...context.pieces import Piece, longest_head
from ...errors import InputError, ModelError
from ...runtime.provenance import libraries
from ...text.chat import chat_form
from ...text.parts import PromptPart
from ...text.prompting import MODES, SEPARATOR, Prompt
from ...text.tokens import prompt_ids, token_ids
from .. import backbones, positions, segments
from ..arguments import check_is_context, rows_of, to_device
from ..asking import prepare_asking
from ..compressor import ReadProgress
from ..generating import check_context, check_maker, generate
from ..prefix import Layers, as_cache
from .families import check_family, hash_weights, load_decoder
from .heads import SharedHeads, as_cache_with_gaps, check_heads, hide_gaps, kv_heads
from .keeping import EvenHeads, Heads, append
from .names import made_by
from .reading import Reader, beside
from .rules import RULES, Seen

CHUNK_LENGTH = 2048
"""Tokens that are read at once."""
SHORTEST_CHUNK = 16
DEFAULT_RATE = 2
AUTO_RATES = (1, 2, 4, 8)
"""What `auto` chooses from: higher rates leave too little of most texts."""
REPEAT = "Write the text above once more, word for word."
"""What the model is asked so that it looks at all of a chunk that it will need."""
FORMAT = 1
"""Number of the way in which contexts are made: a change of it makes other contexts."""


class Selection:
    """A causal language model and a rule by which KV pairs of its own are kept.

    A text is read chunk by chunk, each chunk after what has been kept of those before. Then the rule gives each of the
    chunk's pairs a score, and of every layer and KV head the best ceil(chunk / rate) stay, in order; at rate 1, all.
    By a shared rule as many stay of a layer, whichever heads they are of (:mod:`.heads`).
    A layer with a sliding window keeps the latest instead, which are those that its window will show. Each text of a
    context is read on its own, after the header of the chat alone: so texts can be joined, dropped and reordered.

    Args:
        decoder: of a family that :func:`rcc.model.selection.families.check_family` accepts.
        tokenizer: its own.
        name: what contexts and messages call the model.
        rule: a name in :data:`RULES`.
        chunk_length: tokens to read at once; at most what the window has room for twice, as the model repeats them.
        weights_sha256: of the weights, see :func:`rcc.checkpoints.weights_sha256`; None: it is computed.
        stored_dtype: precision that the weights are stored in; None: the one that they are in.

    Raises:
        InputError: an unknown rule or a chunk that cannot be.
        ModelError: a model that cannot be read so.
    """

    trained, has_base = False, True
    modes, rates = ("human",), AUTO_RATES
    reads_special = False

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        rule: str = "repeat",
        chunk_length: int = CHUNK_LENGTH,
        *,
        weights_sha256: str | None = None,
        stored_dtype: torch.dtype | None = None,
    ):
        if rule not in RULES:
            raise InputError(f"rule {rule!r} is unknown: use one of {', '.join(RULES)}.")
        if not isinstance(chunk_length, int) or chunk_length < 1:
            raise InputError(f"chunk_length must be a positive whole number, not {chunk_length!r}.")
        check_family(decoder.config)
        self.shared = RULES[rule].shared
        if self.shared:
            check_heads(decoder.config)
            hide_gaps(backbones.body(decoder))
        self.decoder, self.tokenizer, self.name, self.rule = decoder.eval(), tokenizer, name, rule
        self.reader = Reader(backbones.body(decoder))
        prepare_asking(decoder)
        self.stored_dtype = stored_dtype or decoder.dtype
        self.chat = chat_form(tokenizer)
        self.header = token_ids(tokenizer, self.chat.header, allow_special=True)[0]
        asking = [PromptPart(f"{SEPARATOR}{REPEAT}"), PromptPart(self.chat.turn)]
        self.asking = prompt_ids(tokenizer, asking, allow_special=True)[0]
        readable = (self.window - len(self.header) - len(self.asking)) // 2
        if readable < SHORTEST_CHUNK:
            raise ModelError(f"the window of {name}, {self.window} positions, is too small to read a text in chunks.")
        self.chunk_length = self.segment_length = min(chunk_length, readable)
        self._weights_sha256, self._fingerprint = weights_sha256, ""

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        name: str,
        rule: str = "repeat",
        chunk_length: int = CHUNK_LENGTH,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Selection:
        """Load a causal language model's folder, as transformers writes it, or a GGUF file.

        Args:
            folder: the model's. Quantized weights stay so where transformers has them so; those of a GGUF file do not.
            name: what contexts and messages call the model.
            rule: as in :class:`Selection`.
            chunk_length: likewise.
            device: to compute on; None: where transformers loads it.
            dtype: to compute in; None: as stored, or float32 on a CPU without bfloat16.
            **settings: go to transformers' `from_pretrained`; with a `device_map` its layers may be on several devices.

        Raises:
            ModelError: the folder cannot be loaded, its model cannot be read so, or is too large for the GPUs.
        """
        decoder, stored = load_decoder(folder, device, dtype, **settings)
        digest = checkpoints.weights_sha256(folder)
        tokenizer = checkpoints.load_tokenizer(folder)
        return cls(decoder, tokenizer, name, rule, chunk_length, weights_sha256=digest, stored_dtype=stored)

    # ---------------------------------------------------------------- what it is
    @property
    def device(self) -> torch.device:
        """Device of the weights, and of what :meth:`compress` gives."""
        return cast(torch.device, self.decoder.device)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, and of what :meth:`compress` gives."""
        return cast(torch.dtype, self.decoder.dtype)

    @property
    def window(self) -> int:
        """Positions that the model can address: header, context, prompt and answer together."""
        return backbones.window(self.decoder.config)

    @property
    def vocabulary(self) -> int:
        """Token ids that texts and prompts may have."""
        return backbones.embeddings(self.decoder).num_embeddings

    decoder_vocabulary = vocabulary

    @property
    def sink_positions(self) -> int:
        """Positions of the chat header, which stands before every context."""
        return len(self.header)

    @property
    def compressor(self) -> str:
        """What a context's file calls the way in which it was made."""
        return made_by(self.rule)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that names model and settings: what contexts hold follows from them."""
        if not self._fingerprint:
            settings = [FORMAT, self.rule, self.chunk_length, self.header.tolist()]
            if RULES[self.rule].repeats:
                settings.append(self.asking.tolist())
            weights = self._weights_sha256 or hash_weights(self.decoder)
            self._fingerprint = hashlib.sha256(f"selection {settings} {weights}".encode()).hexdigest()
        return self._fingerprint

    def check_fingerprint(self, fingerprint: str, name: str, what: str = "the context") -> None:
        """Raise ContextError unless this model made it, by this rule."""
        check_maker(self.fingerprint, f"{self.name} ({self.compressor})", fingerprint, name, what)

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
        """Compress texts, one after the other, holding one chunk's pairs and those that are kept.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 0 at padding, on either side; texts may differ in length.
            rate: tokens a position; None: :data:`DEFAULT_RATE`.
            context: append to this one: nothing of it is read again, or seen by the new texts.
            batch_tokens: of no effect: a chunk is read at once, whatever it says.
            progress: called with tokens read so far and tokens in all.

        Returns:
            A context of B texts, after those of `context`.

        Raises:
            InputError: an unusable argument. WindowError: more positions than the model has.
            ContextError: `context` was made by another model.
        """
        rate = self.check_rate(rate)
        rows = rows_of(to_device(input_ids, self.device), to_device(attention_mask, self.device), self.vocabulary)
        if context is not None:
            check_is_context(context)
            context = check_context(self, context, len(rows))
        pieces = [self.piece(row, rate) for row in rows]
        self.check_window([self._reach(piece.tokens, rate) for piece in pieces], [0] * len(rows), context)
        total, done = sum(piece.tokens for piece in pieces), 0
        header, texts = self._read_header(), []
        for row, piece in zip(rows, pieces, strict=True):
            cache = new_cache(len(header), len(self.header) + piece.positions + min(len(row), self.chunk_length))
            for layer, (keys, values) in zip(block_layers(cache), header, strict=True):
                layer.update(keys, values)
            heads = SharedHeads(header) if self.shared else EvenHeads()
            for number, chunk in enumerate(self.split(row)):
                self._read_chunk(chunk, number, rate, cache, heads)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            texts.append(self._context(cache, piece, heads))
        new = texts[0] if len(texts) == 1 else CompressedContext.stack(texts)
        return new if context is None else append(context, new)

    def _read_header(self) -> Layers:
        """Keys, before rotation, and values of the header, [1, KV heads, header, head dim] in each layer."""
        cache = new_cache(self.decoder.config.num_hidden_layers, len(self.header))
        self.reader.read(self.header.to(self.device), cache, 0)
        return [layer.entries for layer in block_layers(cache)]

    def _read_chunk(self, chunk: Tensor, number: int, rate: int, cache: Cache, heads: Heads) -> None:
        """Read a chunk [T] after what a cache holds, and leave in it what is to be kept."""
        header, start = len(self.header), cache.get_seq_length()
        keep, rule = -(-len(chunk) // rate), RULES[self.rule]
        scores: dict[int, Tensor] = {}

        def watch(seen: Seen) -> None:
            if self.reader.sliding[seen.layer] is None:
                scores[seen.layer] = rule.score(seen)

        seen: dict[str, Any] = {"watch": watch, "chunk": number, "keep": keep}
        if keep == len(chunk):
            self.reader.read(chunk, cache, header, heads.gaps())
            heads.keep_all(keep)
            return
        if rule.repeats:
            self.reader.read(chunk, cache, header, heads.gaps())
            repetition = torch.cat([self.asking.to(chunk.device), chunk])
            seen |= {"start": header, "stop": header + len(chunk)}
            self.reader.read(repetition, beside(cache, header, start), header, **seen)
        else:
            seen |= {"start": start, "stop": start + len(chunk)}
            self.reader.read(chunk, cache, header, heads.gaps(), **seen)
        heads.keep_best(cache, scores, keep, start, header)

    def _context(self, cache: Cache, piece: Piece, heads: Heads) -> CompressedContext:
        """Return the context of one text, of what a cache holds after the header; the cache is used up."""
        header, left = len(self.header), block_layers(cache)
        layers: Layers = []
        while left:
            keys, values = (heads.gather(len(layers), entries[:, :, header:]) for entries in left.pop(0).entries)
            layers.append((keys, values))
        return CompressedContext(
            KVBlocks(layers, piece.positions, writable=True),
            piece.positions,
            ((heads.record(piece),),),
            self.fingerprint,
            self.name,
            self.chunk_length,
            libraries(),
            rotated=False,
            compressor=self.compressor,
        )

    def as_cache(self, context: CompressedContext) -> CompressedContext:
        """Return a context as the model's KV cache: the header, then the kept keys rotated to their positions."""
        if context.rotated:
            return context
        apart = any(piece.heads for row in context.pieces for piece in row)
        return (as_cache_with_gaps if apart else as_cache)(backbones.body(self.decoder), self._read_header, context)

    # ---------------------------------------------------------------- context and prompt → tokens
    def prompt(self, question: str, mode: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """Return the prompt for a question in the model's own chat form.

        Raises:
            InputError: an empty question, or a mode that needs a model that was trained for it.
        """
        if mode not in MODES:
            raise InputError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}.")
        if mode != "human":
            raise InputError(
                f'mode "{mode}" needs a model that was trained for it, and {self.name} was not: use "human".'
            )
        return self.chat.prompt(question, history)

    def joins(self, prompt: Prompt) -> bool:
        """Return False: a text serves every question."""
        return False

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: CompressedContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts after a context, by transformers' `generate`; see :meth:`RCCForCausalLM.generate`.

        Raises:
            InputError, WindowError, ContextError: as :meth:`compress`.
        """
        return generate(self, input_ids, attention_mask, context, **kwargs)

    # ---------------------------------------------------------------- rates and room
    def check_rate(self, rate: int | None) -> int:
        """Return the rate to use, the default one for None.

        Raises:
            InputError: it is not from 1 to the chunk's length.
        """
        if rate is None:
            return DEFAULT_RATE
        if not isinstance(rate, int) or isinstance(rate, bool) or not 1 <= rate <= self.chunk_length:
            raise InputError(f"rate={rate!r} cannot be used: give a whole number from 1 to {self.chunk_length}.")
        return rate

    def positions(self, tokens: int, rate: int) -> int:
        """Return how many positions a text takes."""
        chunks, rest = divmod(tokens, self.chunk_length)
        return chunks * -(-self.chunk_length // rate) + -(-rest // rate)

    def split(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Return the chunks of a text of token ids [T]."""
        return tuple(ids.split(self.chunk_length))

    def _reach(self, tokens: int, rate: int) -> int:
        """Return how many positions of the window a text takes at most: one head may keep what all of them may."""
        even = self.positions(tokens, rate)
        return min(tokens, even * kv_heads(self.decoder.config)) if self.shared else even

    def piece(self, ids: Tensor, rate: int) -> Piece:
        """Return the record of a text of token ids [T]."""
        return segments.record(ids, self.positions(len(ids), rate), rate)

    def room(self, reserve: int = SPARE) -> int:
        """Return the window's positions for a context, beside `reserve` for a question and its answer."""
        return positions.room(self.window, self.sink_positions, reserve)

    def fitting_rate(
        self,
        tokens: list[int],
        context: CompressedContext | None = None,
        reserve: int = SPARE,
        budget: int | None = None,
    ) -> int:
        """Return the lowest of :data:`AUTO_RATES` at which texts stay within a budget of positions.

        Where there is none, the lowest at which they fit in the window; see :meth:`RCCForCausalLM.fitting_rate`.

        Raises:
            WindowError: they fit at none.
        """
        held = max(context.lengths) if context is not None else 0
        reach = max(map(longest_head, context.pieces)) if context is not None else 0
        left, space = None if budget is None else budget - held, self.room(reserve) - reach
        least = positions.lowest_fitting(tokens, AUTO_RATES, self._reach, self.window, space)
        rates = [rate for rate in AUTO_RATES if rate >= least]
        return positions.lowest_fitting(tokens, rates, self.positions, self.window, space, left)

    def check_window(self, new: list[int], prompts: list[int], context: CompressedContext | None) -> None:
        """Check that each row's header, context, new positions and tokens fit in the window.

        Raises:
            WindowError: they do not.
        """
        held = [0] * len(new) if context is None else list(map(longest_head, context.pieces))
        first = self.sink_positions if context is not None or max(new) > 0 else 0
        positions.check_window(self.window, first, held, new, prompts, f"{first} positions of the chat header")
