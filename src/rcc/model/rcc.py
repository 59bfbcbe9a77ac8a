"""RCCForCausalLM: an encoder, the projections and a decoder; compress, ask, train, save and load.

This file alone decides positions and attention masks of prefix and prompt. A context's KV cache may have gaps
(shorter texts of a batch), and so may prompts (padding): gaps are masked, and positions count real entries only.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import hashlib
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .. import checkpoints
from ..config import BaseReference, RCCConfig
from ..context import file as fileformat
from ..context.context import SPARE, BlockLayer, CompressedContext, KVBlocks
from ..errors import ContextError, FileError, InputError, ModelError, RCCError, WindowError
from ..runtime.provenance import libraries
from . import backbones, packing
from . import encoder as encoding
from .decoder import Prefix, Residuals, accept_prefix, prefix_arguments, window_by_position
from .encoder import CompressedVectors, piece_of
from .prefix import BlockInputs, DirectPrefix, ProjectedStates, RecordedStates, place, read_exactly, store
from .projection import Projections, layer_map

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CHAT_START = "<|im_start|>system"
BATCH_TOKENS = 4096
"""Tokens that the encoder reads in one forward pass, unless told otherwise."""
CPU_BATCH_TOKENS = 512
"""The same where `compress` runs on a CPU, which larger batches make hardly faster, and there is less memory."""

Progress = Callable[[int, int], None]
"""Called with tokens read so far and tokens in all."""


def batch_tokens_on(device: torch.device) -> int:
    """Tokens that `compress` reads at once on a device, unless told otherwise."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


class RCCForCausalLM(nn.Module):
    """A causal language model that reads compressed contexts as a prefix (arXiv 2406.06110).

    Make one with :meth:`from_pretrained` or :meth:`from_base`. `encoder` is a transformers base model, `decoder`
    a causal language model, `projections` the linear maps between them.
    """

    def __init__(self, config: RCCConfig, encoder: PreTrainedModel | None, decoder: PreTrainedModel):
        """Join two backbones.

        Args:
            encoder: a base model without head; None shares the decoder's weights.

        Raises:
            ModelError: a family that is not supported on that side.
            InputError: a segment that the encoder cannot address.
        """
        super().__init__()
        backbones.check_family(decoder.config, "decoder")
        if encoder is not None:
            backbones.check_family(encoder.config, "encoder")
        self.config = config
        self.decoder = decoder
        if encoder is None:
            # the copy has modules of its own, for LoRA of its own, around the very same parameters
            shared = {id(p): p for p in decoder.base_model.parameters()}
            encoder = copy.deepcopy(decoder.base_model, memo=shared)
        self.encoder = encoder
        readable = backbones.window(self.encoder.config)
        if config.direct and config.sink_token is None:
            config.sink_token = 0
        if config.segment_length + config.memory_length + config.direct > readable:
            behind = f" with its {config.memory_length} memory tokens" if config.memory_length else ""
            behind = " with the sink before it" if config.direct else behind
            raise InputError(
                f"segment_length={config.segment_length}{behind} is more than the {readable} positions that the encoder"
                " can address: use a shorter segment."
            )
        encoding.capture_states(self.encoder)
        accept_prefix(self.decoder.base_model)
        window_by_position(self.decoder.base_model)
        sizes = self.encoder.config.hidden_size, self.decoder.config.hidden_size
        sources = layer_map(self._encoder_depth, len(backbones.blocks(self.decoder.base_model)), config)
        self.projections = Projections(sources, *sizes, config.direct).to(self.decoder.device, self.decoder.dtype)
        self.memory = self._new_memory() if config.memory_length else None
        # 0: as long as nothing is learned, no rate differs from any other
        embeds = self.encoder.get_input_embeddings().weight
        rates = embeds.new_zeros(len(config.rates), embeds.shape[1])
        self.rate_embeddings = nn.Parameter(rates) if config.rate_embeddings else None
        self.sink = self._new_sink() if config.direct else None
        self._add_lora()
        self._freeze()
        self._recorded: tuple[str, tuple[int, ...]] | None = None
        self._warned: set[int] = set()  # of which untrained rates
        self.token_loss = token_loss  # training may compile it
        self.loss_head: LossHead | None = None  # training may put one in: then a pass gives no logits
        self.eval()

    # ---------------------------------------------------------------- making one
    @classmethod
    def from_base(
        cls,
        encoder: str | Path | PreTrainedModel,
        decoder: str | Path | PreTrainedModel | None = None,
        config: RCCConfig | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> RCCForCausalLM:
        """An untrained RCC model from pretrained backbones (folders, hub ids, names of bases, or models).

        Args:
            decoder: None: the encoder's own base.
            config: see :class:`RCCConfig`. Left open there: the base is shared where no decoder is given, and
                :meth:`RCCConfig.decide` says which weights are trained.
            dtype: of the backbones; as stored by default.
            kwargs: go to transformers' `from_pretrained`.

        Raises:
            ModelError: a backbone that cannot be loaded or is of an unsupported family.
            InputError: settings that contradict each other.
        """
        config = copy.deepcopy(config) if config is not None else RCCConfig()
        config.decide(one_base=decoder is None)
        if config.share_base and decoder is not None:
            raise InputError("share_base needs one base for both sides: leave out the decoder, or set it to False.")
        load = {"dtype": dtype or "auto", "attn_implementation": attn_implementation, **kwargs}
        config.base = {}
        if config.direct and config.sink_token is None:
            config.sink_token = _first_token(decoder if decoder is not None else encoder)
        lower = _load_base(decoder if decoder is not None else encoder, "decoder", config, load)
        upper = None if config.share_base else _load_base(encoder, "encoder", config, load)
        model = cls(config, upper, lower)
        if dtype not in (None, "auto"):  # backbones that were handed over are not loaded in it
            model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model.to(device) if device is not None else model

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        progress: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> RCCForCausalLM:
        """Load a trained model: a shipped name (`rcc models`), a folder, or a hub id.

        Args:
            dtype: a torch dtype or its name; as the base is stored by default.
            progress: told in a few words what is being done where that takes long (fetching a base).
            kwargs: go to transformers' `from_pretrained`, for the bases.

        Raises:
            ModelError: nothing there, no weights, damaged, or a base other than the one it was trained on.
            FileError: the base cannot be fetched.
        """
        folder = checkpoints.resolve_model(name)
        config = RCCConfig.load(folder)
        load = {"dtype": dtype or "auto", "attn_implementation": attn_implementation, **kwargs}
        sides = {}
        for side, base in config.base.items():
            path = checkpoints.resolve_base(base.source, relative_to=folder, progress=progress)
            if checkpoints.weights_sha256(path) != base.sha256:
                raise ModelError(
                    f"{path} is not the base that {config.name} was trained on (its weights have another SHA-256):"
                    " get the original one."
                )
            sides[side] = _load_backbone(path, side, load)
            if path.is_relative_to(folder):  # saved elsewhere, the reference must still lead here
                base.source = str(path.absolute())
        if "decoder" not in sides:
            raise ModelError(f"{folder / 'config.json'} names no base for the decoder: save the model again.")
        model = cls(config, sides.get("encoder"), sides["decoder"])
        model._load_weights(folder)
        if device is not None:
            model.to(device)
        model._record(config.fingerprint)
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        full: bool = False,
        dtype: torch.dtype | None = None,
        eight_bits: Collection[str] = (),
    ) -> None:
        """Write the model: config.json and the weights that are its own (LoRA, projections, embeddings).

        A side whose base is frozen is written as a reference to it with its SHA-256; with `full=True`, or where
        there is nothing to refer to, the base is written too, once, as an ordinary transformers folder.

        Args:
            dtype: of the weights that are written; None: as they are.
            eight_bits: parts of the model whose matrices are written in 8 bits, `"projections"` or `"lora"` (see
                :mod:`rcc.model.packing`); the model takes on what is written.

        Raises:
            InputError: an unknown part. FileError: the folder cannot be written.
        """
        folder = Path(folder)
        packed = packing.pack(self.own_state_dict(), eight_bits)
        if eight_bits:
            self.load_own_state_dict(packing.unpack(packed))
        config = copy.deepcopy(self.config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for side in ("decoder",) if config.share_base else ("decoder", "encoder"):
                frozen = config.share_base or getattr(config, f"{side}_lora_rank") > 0
                if full or not frozen or side not in config.base:
                    self._save_base(side, folder / side, dtype)
                    config.base[side] = BaseReference(side, checkpoints.weights_sha256(folder / side))
            _write_weights({k: t if packing.is_packed(k) else t.to(dtype=dtype) for k, t in packed.items()}, folder)
            config.weights_sha256 = checkpoints.weights_sha256(folder)
            config.fingerprint = self.fingerprint if dtype is None else self._compute_fingerprint(dtype)
            config.save(folder)
        except OSError as error:
            raise FileError(f"{folder} cannot be written: {error.strerror or error}.") from error

    def _save_base(self, side: str, folder: Path, dtype: torch.dtype | None) -> None:
        module = getattr(self, side)
        state = {}
        for name, tensor in module.state_dict().items():
            if ".lora_" not in name:
                state[name.replace(".base_layer.", ".")] = tensor
        if side == "decoder" and module.config.tie_word_embeddings:
            tied = id(module.get_input_embeddings().weight)
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if id(parameter) == tied and name.startswith("lm_head"):
                    state.pop(name, None)
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights({k: v.to(dtype=dtype).contiguous() for k, v in state.items()}, folder)
        settings = copy.deepcopy(module.config)
        settings.dtype = dtype or module.dtype  # which `to` does not tell it
        settings.save_pretrained(folder)
        if side == "decoder":
            module.generation_config.save_pretrained(folder)
        if side in self.config.base:
            with contextlib.suppress(ModelError):  # a base without a tokenizer stays one
                source = checkpoints.resolve_base(self.config.base[side].source)
                try:
                    checkpoints.load_tokenizer(source).save_pretrained(folder)
                except RCCError:
                    raise
                except Exception as error:  # how a full disk shows itself on the Rust side
                    raise OSError(str(error)) from error

    def own_state_dict(self) -> dict[str, Tensor]:
        """The weights that are not a base's (projections, LoRA, embeddings), by their names in a file."""
        return {
            name.replace(".default.", "."): tensor.contiguous()  # "default" is what peft calls our only adapter
            for name, tensor in self.state_dict().items()
            if name.startswith("projections.") or ".lora_" in name or name in ("memory", "rate_embeddings", "sink")
        }

    def load_own_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put in what :meth:`own_state_dict` gave.

        Raises:
            ModelError: a tensor is missing, left over or has another shape.
        """
        targets = self.own_state_dict()  # parameters are contiguous, so these are they and not copies
        if difference := sorted(set(targets) ^ set(state)):
            word = "lack" if difference[0] in targets else "have the unknown tensor"
            raise ModelError(f"the model's weights {word} {difference[0]} ({len(difference)} differences in all).")
        with torch.no_grad():
            for name, target in targets.items():
                if target.shape != state[name].shape:
                    raise ModelError(
                        f"{name} has shape {list(state[name].shape)} instead of {list(target.shape)}:"
                        " the model's configuration does not fit its weights."
                    )
                target.copy_(state[name])

    def _load_weights(self, folder: Path) -> None:
        if checkpoints.weights_sha256(folder) != self.config.weights_sha256:
            raise ModelError(f"{folder / WEIGHTS} was changed: its SHA-256 is not the one in config.json.")
        self.load_own_state_dict(packing.unpack(checkpoints.read_weights(folder)))

    def _new_memory(self) -> nn.Parameter:
        """Memory embeddings [M, H_encoder]: the mean of the encoder's embeddings, and a tenth of their spread around
        it, so that they differ; the same every time."""
        table = self.encoder.get_input_embeddings().weight.detach()
        spread, mean = torch.std_mean(table.float(), 0)
        noise = torch.randn(self.config.memory_length, len(mean), generator=torch.Generator().manual_seed(0))
        return nn.Parameter((mean + 0.1 * spread * noise.to(table.device)).to(table.dtype))

    @torch.no_grad()
    def _new_sink(self) -> nn.Parameter:
        """What enters each of the decoder's blocks at the first token of a text, [L, H]: attention rests there."""
        if self.decoder.device.type == "meta":  # a plan: shapes alone, and transformers' masks look at values
            size = len(backbones.blocks(self.decoder.base_model)), self.decoder.config.hidden_size
            return nn.Parameter(torch.empty(size, dtype=self.dtype))
        recorded = RecordedStates()
        ids = torch.tensor([[self.config.sink_token]], device=self.decoder.device)
        self.decoder.base_model(input_ids=ids, use_cache=False, **prefix_arguments(recorded))
        return nn.Parameter(torch.cat([recorded.states[i][0] for i in range(len(recorded.states))]).clone())

    def _offset(self, rate: int) -> Tensor | None:
        """What the encoder's token embeddings are shifted by at a rate, [H_encoder]; None: by nothing."""
        if self.rate_embeddings is None:
            return None
        order = sorted(range(len(self.config.rates)), key=lambda i: self.config.rates[i])
        rates = [self.config.rates[i] for i in order]
        above = min(bisect.bisect_left(rates, rate), len(rates) - 1)
        below = above if rates[above] <= rate else max(above - 1, 0)
        low, high = rates[below], rates[above]
        part = math.log(rate / low) / math.log(high / low) if low < rate < high else 0.0
        lower, upper = self.rate_embeddings[order[below]], self.rate_embeddings[order[above]]
        return lower if part == 0 else torch.lerp(lower, upper, part)

    def set_rates(self, rates: Sequence[int], embeddings: bool) -> None:
        """Go over to other trained rates, with or without embeddings; those there are serve the new rates as they did.

        Raises:
            InputError: a rate that cannot be, or embeddings that would be lost.
        """
        if self.rate_embeddings is not None and not embeddings:
            raise InputError("the model has rate_embeddings, which it cannot do without: set rate_embeddings to true.")
        for rate in rates:
            self.config.check_rate(rate)
        if embeddings:
            embeds = self.encoder.get_input_embeddings().weight
            with torch.no_grad():
                rows = [self._offset(rate) for rate in rates]
                table = torch.stack([embeds.new_zeros(embeds.shape[1]) if row is None else row for row in rows])
            self.rate_embeddings = nn.Parameter(table)
        self.config.rates, self.config.rate_embeddings = list(rates), embeddings

    def _add_lora(self) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        for side, body in (("encoder", self.encoder), ("decoder", self.decoder.base_model)):
            rank = getattr(self.config, f"{side}_lora_rank") or 0
            if rank:
                alpha = self.config.lora_alpha or rank
                # a direct prefix is made of the inputs of blocks: the last of an encoder's feed nothing
                used = max(self.projections.states) if side == "encoder" and self.config.direct else None
                names = backbones.linear_names(body, used)
                settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names)
                inject_adapter_in_model(settings, body)

    def _freeze(self) -> None:
        """Freeze the bases under LoRA, and what reaches no loss: distributed training would wait for it."""
        for side in (self.encoder, self.decoder):
            rank = self.config.encoder_lora_rank if side is self.encoder else self.config.decoder_lora_rank
            for name, parameter in side.named_parameters():
                parameter.requires_grad_(".lora_" in name or not (rank or self.config.share_base))
        last = max(self.projections.states)
        if last < self._encoder_depth:
            used = {id(p) for block in backbones.blocks(self.encoder)[:last] for p in block.parameters()}
            used |= {id(p) for p in self.encoder.get_input_embeddings().parameters()}
            shared = {id(p) for p in self.decoder.parameters()}
            for parameter in self.encoder.parameters():
                if id(parameter) not in used | shared:
                    parameter.requires_grad_(False)

    @property
    def _encoder_depth(self) -> int:
        return len(backbones.blocks(self.encoder))

    @property
    def device(self) -> torch.device:
        return self.projections.weight(0).device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def window(self) -> int:
        """Positions that the decoder can address: prefix, prompt and answer together."""
        return backbones.window(self.decoder.config)

    def _apply(self, fn: Any, recurse: bool = True) -> RCCForCausalLM:
        """Move and cast as any module, but keep rotary frequencies and embedding scales exact, as transformers does."""
        names = ("inv_freq", "embed_scale")
        exact = [(m, name, b) for m in self.modules() for name, b in m._buffers.items() if name.endswith(names)]
        super()._apply(fn, recurse)
        for module, name, buffer in exact:
            if buffer is not None:
                setattr(module, name, buffer.to(module.get_buffer(name).device))
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass, on both sides."""
        for side in (self.encoder, self.decoder):
            # transformers renamed it in version 5; the old name warns where the new one is there
            enable = getattr(side, "activation_checkpointing_enable", None) or side.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs)

    # ---------------------------------------------------------------- who made a context
    @property
    def fingerprint(self) -> str:
        """SHA-256 that names this model: its settings and all its weights.

        A saved model carries its own, so that it is the same in any precision it is loaded in. It is computed
        anew when weights have been changed in place (by an optimiser, say; not through `.data`).
        """
        versions = self._versions()
        if self._recorded is None or self._recorded[1] != versions:
            self._recorded = self._compute_fingerprint(), versions
        return self._recorded[0]

    def _compute_fingerprint(self, dtype: torch.dtype | None = None) -> str:
        return fingerprint_of(self.config, sorted(self.state_dict().items()), dtype)

    def _record(self, fingerprint: str) -> None:
        self._recorded = fingerprint, self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters())

    def check_fingerprint(self, fingerprint: str, name: str, what: str = "the context") -> None:
        """Raise ContextError unless this model made it."""
        if fingerprint != self.fingerprint:
            raise ContextError(
                f"{what} was made by another model ({name}, {fingerprint[:12]}) than {self.config.name}"
                f" ({self.fingerprint[:12]}): load that model, or compress the text again."
            )

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
        progress: Progress | None = None,
    ) -> CompressedContext:
        """Compress texts (section 3 of the paper), holding one batch of segments and the KV prefix in memory.

        Args:
            input_ids: [B, T] token ids.
            attention_mask: [B, T], 0 at padding, on either side; texts may differ in length.
            rate: tokens a position; the model's default for None.
            context: append to this one: a new segment starts, nothing before it is computed again.
            batch_tokens: about how many tokens the encoder reads at once; None: :func:`batch_tokens_on` the device.

        Returns:
            A context of B texts with ceil(T / rate) positions each, after those of `context`.

        Raises:
            InputError: an unusable argument. WindowError: more positions than the decoder has.
            ContextError: `context` was made by another model.
        """
        rate = self._check_rate(rate)
        if context is not None:
            _check_is_context(context)
        rows = encoding.rows_of(_to(input_ids, self.device), _to(attention_mask, self.device), self._vocabulary)
        pieces = [piece_of(row, rate, self.config) for row in rows]
        total = sum(piece.tokens for piece in pieces)
        step = batch_tokens_on(self.device) if batch_tokens is None else batch_tokens

        def chunks() -> Any:
            wanted = self.projections.states
            if self._reads_exactly(rate):
                assert self.sink is not None
                read: Iterator[tuple[Any, Tensor | None, int]] = read_exactly(
                    self.decoder.base_model, self.sink, rows, step
                )
            else:
                texts = encoding.texts_of(rows, None)
                learned = self.memory, self._offset(rate), None, self._sink_token
                read = encoding.encode(self.encoder, texts, rate, self.config, wanted, step, *learned)
            for states, valid, done in read:
                yield states, valid
                del states, valid  # before the next batch is read
                if progress is not None:
                    progress(min(done, total), total)

        return self._extend(context, pieces, chunks())

    def _reads_exactly(self, rate: int) -> bool:
        """Whether a text is read by the decoder itself, as it is: a direct prefix at rate 1."""
        return self.config.direct and rate == 1

    @property
    def _sink_token(self) -> int | None:
        return self.config.sink_token if self.config.direct else None

    @torch.no_grad()
    def place(self, context: CompressedContext) -> CompressedContext:
        """A context as the decoder's KV cache: the sink, then the keys of a direct prefix rotated to their positions.

        A context of this model that is a cache already, as with a residual prefix, is returned as it is. The result is
        kept with the context, so that further questions find it.
        """
        if context.rotated:
            return context
        if context.repeats is not None:
            return self.place(context.repeats).expand(context.batch_size)
        if context.placed is None:
            assert self.sink is not None
            mask = None if context.mask is None else nn.functional.pad(context.mask, (1, 0), value=True)
            placed = place(self.decoder.base_model, self.sink, context, mask, SPARE)
            context.keep_placed(KVBlocks(placed, 1 + len(context), writable=True), 1 + len(context), mask)
        assert context.placed is not None
        return context.placed

    def _new_cache(self, capacity: int) -> Cache:
        return Cache(layers=[BlockLayer(capacity) for _ in backbones.blocks(self.decoder.base_model)])

    @torch.no_grad()
    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rate: int | None = None,
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> CompressedVectors:
        """The encoder's half of :meth:`compress` alone: [B, T] tokens → vectors [B, n, L + 1, H].

        Raises:
            InputError: an unusable argument.
        """
        rate = self._check_rate(rate)
        if self._reads_exactly(rate):
            raise InputError("rate=1 is read by the decoder itself, and there are no vectors of it: use compress.")
        rows = encoding.rows_of(_to(input_ids, self.device), _to(attention_mask, self.device), self._vocabulary)
        wanted = list(range(self._encoder_depth + 1)) if self.config.states == "all" else self.projections.states
        chunks = []
        texts = encoding.texts_of(rows, None)
        learned = self.memory, self._offset(rate), None, self._sink_token
        for states, valid, _ in encoding.encode(self.encoder, texts, rate, self.config, wanted, batch_tokens, *learned):
            block = torch.stack([states[k] for k in wanted], 2)
            chunks.append(block if valid is None else block.masked_fill(~valid[:, :, None, None], 0))
        pieces = tuple(piece_of(row, rate, self.config) for row in rows)
        lengths = torch.tensor([piece.positions for piece in pieces], device=self.device)
        return CompressedVectors(
            torch.cat(chunks, 1), lengths, rate, self.config.segment_length, pieces, self.fingerprint
        )

    @torch.no_grad()
    def prefix(self, vectors: CompressedVectors, context: CompressedContext | None = None) -> CompressedContext:
        """The decoder's half of :meth:`compress` alone: vectors, on any device, → a context.

        Raises:
            ContextError: another model made the vectors, or they are damaged.
            WindowError: more positions than the decoder has.
        """
        self.check_fingerprint(vectors.fingerprint, "unknown", "the vectors")
        step = batch_tokens_on(self.device)  # a position costs the decoder what a token costs the encoder
        wanted = self.projections.states
        depths = {self._encoder_depth + 1} | ({1} if len(wanted) == 1 else set())
        if vectors.states.shape[2] not in depths or vectors.states.shape[3] != self.encoder.config.hidden_size:
            raise ContextError("the vectors do not have the shape that this model's encoder gives: encode again.")

        def chunks() -> Any:
            for start in range(0, vectors.states.shape[1], step):
                block = vectors.states[:, start : start + step].to(self.device)
                number = {k: i for i, k in enumerate(wanted if block.shape[2] == 1 else range(block.shape[2]))}
                places = torch.arange(start, start + block.shape[1], device=self.device)[None]
                valid = places < vectors.lengths.to(self.device)[:, None]
                yield {k: block[:, :, number[k]] for k in wanted}, None if bool(valid.all()) else valid

        return self._extend(context, list(vectors.pieces), chunks())

    def _extend(
        self, context: CompressedContext | None, pieces: list[encoding.Piece], chunks: Any
    ) -> CompressedContext:
        """Run the decoder over chunks of prefix vectors, behind `context` or from nothing."""
        new = max(piece.positions for piece in pieces)
        if context is not None:
            context = self._check_context(context, len(pieces))
        self._check_window([piece.positions for piece in pieces], [0] * len(pieces), context)
        if context is None:
            cache = self._new_cache(min(new + SPARE, max(new, self.window)))
            mask = self._prefix_pass(cache, None, chunks)
            return CompressedContext(
                KVBlocks([layer.block for layer in cache.layers], cache.get_seq_length(), writable=True),
                cache.get_seq_length(),
                tuple((piece,) for piece in pieces),
                self.fingerprint,
                self.config.name,
                self.config.segment_length,
                libraries(),
                mask,
                rotated=not self.config.direct,
            )
        with context.borrow(new, SPARE) as cache:
            mask = self._prefix_pass(cache, context, chunks)
            rows = tuple((*row, piece) for row, piece in zip(context.pieces, pieces, strict=True))
            return context.grown(cache, rows, mask)

    def _prefix_pass(self, cache: Cache, context: CompressedContext | None, chunks: Any) -> Tensor | None:
        """Feed prefix vectors to the decoder, chunk by chunk → the mask [B, n] of all entries (None: no gaps)."""
        seen = None if context is None else context.mask
        feed = self._store_direct if self.config.direct else self._pass_residuals
        for states, valid in chunks:
            mask = feed(cache, seen, states, valid)
            seen = None if mask is None else mask.bool()
            del states, valid  # before the next batch is read
        return seen

    def _pass_residuals(
        self, cache: Cache, seen: Tensor | None, states: dict[int, Tensor], valid: Tensor | None
    ) -> Tensor | None:
        """Append prefix positions to a cache by a pass through the decoder → the mask of all of its entries."""
        residuals = Residuals(self.projections, states)
        inputs = residuals.inputs()
        mask, order = self._order(cache.get_seq_length(), seen, inputs.shape[1], valid, inputs)
        self.decoder.base_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=order,
            **{backbones.CACHE: cache},
            use_cache=True,
            **prefix_arguments(residuals),
        )
        return mask

    def _store_direct(
        self, cache: Cache, seen: Tensor | None, states: dict[int, Tensor] | RecordedStates, valid: Tensor | None
    ) -> Tensor | None:
        """Append prefix positions, keys before rotation, to a cache → the mask of all of its entries."""
        inputs: BlockInputs = ProjectedStates(self.projections, states) if isinstance(states, dict) else states
        like = next(iter(states.values() if isinstance(states, dict) else states.states.values()))
        mask, _ = self._order(cache.get_seq_length(), seen, like.shape[1], valid, like)
        store(self.decoder.base_model, inputs, cache)
        return mask

    @staticmethod
    def _order(
        past: int, seen: Tensor | None, new: int, valid: Tensor | None, like: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Attention mask [B, past + new] (None without gaps) and positions [B or 1, new] of new entries.

        Args:
            seen: [B, past], which entries of the cache are real (None: all).
            valid: [B, new], which of the new ones are.
            like: any tensor with the batch size and the device.
        """
        if seen is None and (valid is None or bool(valid.all())):
            return None, torch.arange(past, past + new, device=like.device)[None]

        def full(mask: Tensor | None, width: int) -> Tensor:
            shape = (like.shape[0], width)
            return torch.ones(shape, dtype=torch.long, device=like.device) if mask is None else mask.long()

        mask = torch.cat([full(seen, past), full(valid, new)], 1)
        order = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        return mask, order

    # ---------------------------------------------------------------- context and prompt → logits, tokens
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: CompressedContext | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        rate: int | None = None,
        labels: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
        predicted: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a prompt behind a context.

        Give either `context`, made before, or `context_ids`: then encoder, prefix and prompt go through in one
        pass without a cache, and gradients reach encoder, projections and decoder (section 3.2 of the paper).
        Behind a `context` there are no gradients.

        Args:
            input_ids: [B, Q] the prompt, and in training the target behind it.
            attention_mask: [B, Q], 0 at padding, on either side.
            context_ids, context_mask: [B, T] the texts to compress, and 0 at their padding. A row may hold several
                texts, each with a segment of its own to begin with, as an appended one: their tokens are
                masked 1, 2, ….
            rate: for `context_ids`. Where no weight of the encoder is trained, it reads in batches of
                :data:`BATCH_TOKENS` and keeps nothing for a backward pass.
            labels: [B, Q] as `input_ids`, -100 where there is no loss.
            logits_to_keep: [U] the positions of the prompt to compute logits at, ascending; None: all. With
                labels, all those before a label.
            predicted: for `context_ids`: [B, Q], n > 0 where the decoder is to read not the token of `input_ids` but
                the one that it predicts there itself in the n-th of as many passes without gradients, each behind what
                the one before predicted. Only where there are logits for it.
            kwargs: go to the decoder. `output_hidden_states` and `output_attentions` are given for a `context`, or
                none; of a prompt's positions, in attentions beside the context's.

        Returns:
            logits [B, Q or U, vocabulary] and, with labels, the mean loss.

        Raises:
            InputError, WindowError, ContextError: as :meth:`compress`.
        """
        _check_forward(kwargs, training=context_ids is not None)
        if context is not None and context_ids is not None:
            raise InputError("give context or context_ids, not both.")
        if predicted is not None and context_ids is None:
            raise InputError("predicted is for training: give context_ids with it.")
        if predicted is not None and predicted.shape != input_ids.shape:
            raise InputError(f"predicted has shape {list(predicted.shape)}, but input_ids has {list(input_ids.shape)}.")
        input_ids, attention_mask = _to(input_ids, self.device), _to(attention_mask, self.device)
        prompts = [len(row) for row in encoding.rows_of(input_ids, attention_mask, self._decoder_vocabulary)]
        if labels is not None and labels.shape != input_ids.shape:
            raise InputError(f"labels has shape {list(labels.shape)}, but input_ids has {list(input_ids.shape)}.")
        new = input_ids.shape[1]
        if context_ids is not None:
            return self._train(
                input_ids,
                attention_mask,
                context_ids,
                context_mask,
                rate,
                labels,
                logits_to_keep,
                predicted,
                prompts,
                **kwargs,
            )
        keep = 0 if logits_to_keep is None else logits_to_keep  # 0 is transformers' word for all
        if context is None:
            self._check_window([0] * len(prompts), prompts, None)
            mask, order = self._order(0, None, new, attention_mask, input_ids)
            inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": order}
            return self._decode(keep, labels, logits_to_keep, **inputs, **kwargs)
        context = self._check_context(context, len(input_ids))
        self._check_window([0] * len(prompts), prompts, context)
        context = self.place(context)
        mask, order = self._order(len(context), context.mask, new, attention_mask, input_ids)
        with torch.no_grad(), context.borrow(new) as cache:
            out = self.decoder(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=order,
                **{backbones.CACHE: cache},
                use_cache=True,
                logits_to_keep=keep,
                **kwargs,
            )
        return self._output(out, labels, logits_to_keep)

    def _train(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        context_ids: Tensor,
        context_mask: Tensor | None,
        rate: int | None,
        labels: Tensor | None,
        logits_to_keep: Tensor | None,
        predicted: Tensor | None,
        prompts: list[int],
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        rate = self._check_rate(rate)
        mask = _to(context_mask, self.device)
        rows = encoding.rows_of(_to(context_ids, self.device), mask, self._vocabulary, "context_ids")
        if len(rows) != len(input_ids):
            raise InputError(f"context_ids has {len(rows)} rows, but input_ids has {len(input_ids)}: give as many.")
        texts = encoding.texts_of(rows, mask)
        new = [sum(encoding.positions(len(text), rate, self.config) for text in row) for row in texts]
        self._check_window(new, prompts, None)
        if self._reads_exactly(rate):
            if predicted is not None or any(len(row) > 1 for row in texts):
                raise InputError("rate=1 is read by the decoder itself: without predicted, and one text in each row.")
            return self._read_to_train(rows, input_ids, attention_mask, labels, logits_to_keep, **kwargs)
        states, valid = self._encode_to_train(texts, rate)
        if predicted is not None:
            input_ids = self._predict(
                states, valid, input_ids, attention_mask, logits_to_keep, _to(predicted, self.device), **kwargs
            )
        return self._decode_to_train(states, valid, input_ids, attention_mask, labels, logits_to_keep, **kwargs)

    def _decode_to_train(
        self,
        states: dict[int, Tensor],
        valid: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: Tensor | None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The decoder's part of a training pass, behind what :meth:`_encode_to_train` gave."""
        if self.config.direct:
            assert self.sink is not None
            direct = DirectPrefix(self.sink, ProjectedStates(self.projections, states), len(input_ids))
            valid = None if valid is None else nn.functional.pad(valid, (1, 0), value=True)
            return self._prefixed(
                direct, direct.block_input(0), valid, input_ids, attention_mask, labels, logits_to_keep, **kwargs
            )
        residuals = Residuals(self.projections, states)
        return self._prefixed(
            residuals, residuals.inputs(), valid, input_ids, attention_mask, labels, logits_to_keep, **kwargs
        )

    def _read_to_train(
        self,
        rows: list[Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: Tensor | None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """A training pass at rate 1: the decoder reads the sink, each row's text and its prompt."""
        assert self.sink is not None
        sink = DirectPrefix(self.sink, None, len(rows))
        embed = self.decoder.get_input_embeddings()
        text = embed(pad_sequence(rows, batch_first=True))
        front = torch.cat([sink.block_input(0).to(text.dtype), text], 1)
        lengths, valid = [1 + len(row) for row in rows], None
        if min(lengths) < front.shape[1]:
            ends = torch.tensor(lengths, device=self.device)[:, None]
            valid = torch.arange(front.shape[1], device=self.device) < ends
        return self._prefixed(sink, front, valid, input_ids, attention_mask, labels, logits_to_keep, **kwargs)

    def _prefixed(
        self,
        blocks: Prefix,
        prefix: Tensor,
        valid: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: Tensor | None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass of the decoder without a cache over a prefix and prompts.

        Args:
            blocks: what changes the inputs of the blocks.
            prefix: [B, n, H] the input of the first one, before the prompts'; `valid` [B, n] which of it are real.
        """
        n = prefix.shape[1]
        embeds = self.decoder.get_input_embeddings()(input_ids)
        inputs = torch.cat([prefix, embeds.to(prefix.dtype)], 1)
        everything = None
        if valid is not None or attention_mask is not None:
            everything = torch.cat(
                [
                    torch.ones(inputs.shape[0], n, device=self.device) if valid is None else valid,
                    torch.ones_like(input_ids) if attention_mask is None else attention_mask,
                ],
                1,
            )
        mask, order = self._order(0, None, inputs.shape[1], everything, inputs)
        return self._decode(
            input_ids.shape[1] if logits_to_keep is None else n + logits_to_keep,
            labels,
            logits_to_keep,
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=order,
            **prefix_arguments(blocks),
            **kwargs,
        )

    def _decode(
        self, keep: int | Tensor, labels: Tensor | None, logits_to_keep: Tensor | None, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Run the decoder without a cache and compute the loss, by its own head or by the one for losses.

        Args:
            keep: the positions of `inputs` to compute logits at; a number: so many at the end, 0: all.
            labels, logits_to_keep: as of :meth:`forward`, positions of the prompt.

        Returns:
            logits, or where there is a head for losses the hidden states [B, U, H] they would be made of; and the loss.
        """
        if self.loss_head is None:
            out = self.decoder(use_cache=False, logits_to_keep=keep, **inputs)
            return self._output(out, labels, logits_to_keep)
        states = self.decoder.base_model(use_cache=False, **inputs).last_hidden_state
        states = states[:, slice(-keep, None) if isinstance(keep, int) else keep]
        if labels is None:
            return CausalLMOutputWithPast(hidden_states=(states,))
        targets = _targets(labels.to(states.device), logits_to_keep)
        return CausalLMOutputWithPast(
            loss=self.loss_head.loss(states[:, : targets.shape[1]], targets), hidden_states=(states,)
        )

    @torch.no_grad()
    def _predict(
        self,
        states: dict[int, Tensor],
        valid: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        logits_to_keep: Tensor | None,
        predicted: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids [B, Q] with the decoder's own likeliest tokens of pass n where `predicted` [B, Q] is n > 0."""
        before = torch.arange(input_ids.shape[1], device=self.device) if logits_to_keep is None else logits_to_keep
        inner = before < input_ids.shape[1] - 1
        places, read = before[inner] + 1, input_ids
        for n in range(int(predicted.max())):
            out = self._decode_to_train(states, valid, read, attention_mask, None, logits_to_keep, **kwargs)
            tokens, read = self.likeliest(out)[:, inner], read.clone()
            read[:, places] = torch.where(predicted[:, places] > n, tokens, read[:, places])
        return read

    def _encode_to_train(self, texts: list[tuple[Tensor, ...]], rate: int) -> tuple[dict[int, Tensor], Tensor | None]:
        """The encoder's states {number: [B, n, H]} and which positions are real (None: all).

        A frozen encoder's are computed without gradients, in chunks (section 3.2 of the paper, second stage).
        """
        learning = [*self.encoder.parameters(), self.memory, self.rate_embeddings]
        frozen = not any(parameter.requires_grad for parameter in learning if parameter is not None)
        wanted, pass_tokens = self.projections.states, BATCH_TOKENS if frozen else None
        with torch.no_grad() if frozen else contextlib.nullcontext():
            learned = self.memory, self._offset(rate), pass_tokens, self._sink_token
            read = encoding.encode(self.encoder, texts, rate, self.config, wanted, None, *learned)
            ((states, valid, _),) = read
        return states, valid

    def likeliest(self, out: CausalLMOutputWithPast) -> Tensor:
        """Return the likeliest tokens [B, U] behind the positions that a pass of this model was computed at."""
        if out.logits is not None:
            return out.logits.argmax(-1)
        assert self.loss_head is not None
        assert out.hidden_states is not None
        return self.loss_head.likeliest(out.hidden_states[0])

    def _output(self, out: Any, labels: Tensor | None, kept: Tensor | None) -> CausalLMOutputWithPast:
        loss, logits = None, out.logits
        if labels is not None:
            targets = _targets(labels.to(logits.device), kept)
            loss = self.token_loss(logits[:, : targets.shape[1]], targets)
        more = {name: getattr(out, name, None) for name in ("hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **more)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        context: CompressedContext | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts behind a context, by transformers' `generate`: greedy, sampling, beams, streamers.

        Args:
            input_ids: [B, Q] prompts; B is the context's (`context.expand(n)` for n prompts on one text).
            attention_mask: [B, Q], 0 at padding, which must stand on the left.
            kwargs: everything that transformers' `generate` takes (`max_new_tokens`, `do_sample`, `num_beams`,
                `num_return_sequences`, `streamer`, `generation_config`, …).

        Returns:
            [B · sequences, Q + new] token ids, the prompts included, as `generate` gives them.

        Raises:
            InputError, WindowError, ContextError: as :meth:`compress`.
        """
        input_ids, attention_mask = _to(input_ids, self.device), _to(attention_mask, self.device)
        prompts = [len(row) for row in encoding.rows_of(input_ids, attention_mask, self._decoder_vocabulary)]
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise InputError("attention_mask has padding on the right: generate needs prompts padded on the left.")
        settings: GenerationConfig = kwargs.get("generation_config") or self.decoder.generation_config

        def setting(name: str, default: int) -> int:
            value = kwargs.get(name, getattr(settings, name, None))
            return default if value is None else int(value)

        length = input_ids.shape[1]
        answer = setting("max_new_tokens", max(0, setting("max_length", 20) - length))
        if context is not None:
            context = self._check_context(context, len(prompts))
        self._check_window([0] * len(prompts), [n + answer for n in prompts], context)
        if context is None:
            if attention_mask is None:  # or transformers takes what looks like padding for padding
                attention_mask = torch.ones_like(input_ids)
            return self.decoder.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        context = self.place(context)
        mask = self._order(len(context), context.mask, length, attention_mask, input_ids)[0]
        if mask is None:
            mask = torch.ones(len(input_ids), len(context) + length, dtype=torch.long, device=self.device)
        copies = max(setting("num_beams", 1), setting("num_return_sequences", 1))
        # a cache that is handed out is the caller's: the next question must not write there
        kept = bool(setting("return_dict_in_generate", 0))
        with context.lend(length + answer) if kept else context.borrow(length + answer) as cache:
            if copies > 1:
                cache.batch_repeat_interleave(copies)
            return self.decoder.generate(input_ids=input_ids, attention_mask=mask, **{backbones.CACHE: cache}, **kwargs)

    # ---------------------------------------------------------------- checks
    @property
    def _vocabulary(self) -> int:
        return self.encoder.get_input_embeddings().num_embeddings

    @property
    def _decoder_vocabulary(self) -> int:
        return self.decoder.get_input_embeddings().num_embeddings

    def _check_rate(self, rate: int | None) -> int:
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
        """Positions of the window for a prefix, beside `reserve` for a question and its answer (at most half of it)."""
        return self.window - min(reserve, self.window // 2) - self.config.direct

    def fitting_rate(
        self,
        tokens: list[int],
        context: CompressedContext | None = None,
        reserve: int = SPARE,
        budget: int | None = None,
    ) -> int:
        """The lowest trained rate at which texts of these lengths, one after the other, stay within a budget of
        positions; where there is none, the lowest at which they leave room in the window.

        Args:
            context: to append to.
            reserve: positions to leave for a question and its answer (at most half the window).
            budget: positions that all of the context may take; None: the window alone decides.

        Raises:
            WindowError: they fit at no trained rate.
        """
        held = max(context.lengths) if context is not None else 0
        room = self.room(reserve) - held
        for limit in (room,) if budget is None else (min(room, budget - held), room):
            for rate in sorted(self.config.rates):
                if sum(encoding.positions(n, rate, self.config) for n in tokens) <= limit:
                    return rate
        top = max(self.config.rates)
        raise WindowError(
            f"{sum(tokens):,} tokens do not fit: at the highest trained rate, {top}, they take"
            f" {sum(encoding.positions(n, top, self.config) for n in tokens):,} positions, and the decoder's window of"
            f" {self.window:,} has room for {max(0, room):,} beside a question and its answer; give at most"
            f" {max(0, room) * top:,} tokens, or a higher rate (untrained)."
        )

    def _check_context(self, context: CompressedContext, batch: int) -> CompressedContext:
        _check_is_context(context)
        self.check_fingerprint(context.fingerprint, context.model_name)
        if context.batch_size != batch:
            hint = f"use context.expand({batch})" if context.batch_size == 1 else "give as many of each"
            raise InputError(f"the context holds {context.batch_size} texts, but the batch has {batch}: {hint}.")
        return context.to(self.device, self.dtype)

    def _check_window(self, new: list[int], prompts: list[int], context: CompressedContext | None) -> None:
        """Raise WindowError if some row's context, new prefix positions and tokens exceed the window."""
        before = [0] * len(new) if context is None else context.lengths
        sink = int(self.config.direct and (context is not None or max(new) > 0))
        held, positions, tokens = max(zip(before, new, prompts, strict=True), key=sum)
        if sink + held + positions + tokens > self.window:
            parts = ["The sink"] if sink else []
            parts += [f"{held:,} positions of the context"] if held else []
            parts += [f"{positions:,} new prefix positions"] if positions else []
            parts += [f"{tokens:,} tokens of prompt and answer"] if tokens else []
            remedy = (
                "use a higher rate or less text" if tokens <= self.window // 2 else "shorten the prompt or the answer"
            )
            raise WindowError(
                f"{' and '.join(parts)} are more than the decoder's window of {self.window:,} positions: {remedy}."
            )


class LossHead(Protocol):
    """What takes the place of the decoder's head in training, so that all logits are never in memory."""

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of hidden states [B, U, H] and token ids [B, U] (-100: none)."""
        ...

    def likeliest(self, states: Tensor) -> Tensor:
        """The likeliest token ids [B, U] behind hidden states [B, U, H]."""
        ...


def _targets(labels: Tensor, kept: Tensor | None) -> Tensor:
    """What follows each position that logits are computed at, [B, U], of labels [B, Q]; kept None: all but the last."""
    return labels[:, 1:] if kept is None else nn.functional.pad(labels, (0, 1), value=-100)[:, kept + 1]


def _check_is_context(context: Any) -> None:
    if not isinstance(context, CompressedContext):
        raise InputError(
            f"context must be a CompressedContext, not {type(context).__name__}: compress a text, or load a file with"
            " CompressedContext.load."
        )


def _check_forward(given: dict[str, Any], training: bool) -> None:
    """Take out of the decoder's arguments what says no more than what happens anyway; refuse what cannot be given."""
    decided = {
        "use_cache": (False, "a context holds the cache: leave it out, or ask with generate"),
        "return_dict": (True, "the output has names: leave it out, and take to_tuple() of it"),
    }
    for name, (value, why) in decided.items():
        if (got := given.pop(name, None)) not in (None, value):
            raise InputError(f"{name}={got!r} cannot be used, because {why}.")
    for name in ("inputs_embeds", "position_ids", "cache", "past_key_values"):
        if given.get(name) is not None:
            raise InputError(f"{name} cannot be used: give input_ids, and a context for what comes before them.")
        given.pop(name, None)
    for name in ("output_hidden_states", "output_attentions"):
        if training and given.get(name):
            raise InputError(f"{name} cannot be given for context_ids: give a context.")


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32: logits [B, U, vocabulary], targets [B, U] (-100: none) → scalar."""
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def fingerprint_of(config: RCCConfig, state: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """SHA-256 that names a model: its settings and all its weights.

    Args:
        state: what the model's `state_dict` holds, by name in order, one tensor in memory at a time if need be.
        dtype: that the weights are taken in; None: their own.
    """
    digest = hashlib.sha256(repr(sorted(config.method().items())).encode())
    for name, tensor in state:
        checkpoints.add_tensor(digest, name, tensor.to(dtype=dtype))
    return digest.hexdigest()


def _to(tensor: Any, device: torch.device) -> Any:
    """A tensor on a device; anything else as it is, for the checks to name."""
    return tensor.to(device) if isinstance(tensor, Tensor) else tensor


def _write_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Write a folder's weights, whole or not at all."""
    fileformat.write_weights(folder / WEIGHTS, {name: fileformat.lazy(tensor) for name, tensor in state.items()})


def _load_base(
    source: str | Path | PreTrainedModel, side: str, config: RCCConfig, load: dict[str, Any]
) -> PreTrainedModel:
    """A backbone for :meth:`RCCForCausalLM.from_base`; one that comes from a folder is noted in the config."""
    if isinstance(source, PreTrainedModel):
        source = copy.deepcopy(source)  # hooks and LoRA go into our own copy
        if load["attn_implementation"] is not None and source.config.model_type not in backbones.STATE_SPACE:
            source.set_attn_implementation(load["attn_implementation"])
        return source if side == "decoder" else getattr(source, "base_model", source)
    path = checkpoints.resolve_base(source).absolute()
    model = _load_backbone(path, side, load)
    # a name or hub id is the same everywhere, where it was fetched to is not
    named = str(source) in checkpoints.BASES or not Path(source).expanduser().is_dir()
    config.base[side] = BaseReference(str(source if named else path), checkpoints.weights_sha256(path))
    return model


def _first_token(source: str | Path | PreTrainedModel) -> int:
    """The token that a chat begins with, which the base rests its attention on: the chat form's first, by the base's
    tokenizer; else the model's beginning of text; else 0."""
    if isinstance(source, PreTrainedModel):
        token = source.config.bos_token_id
        return token if isinstance(token, int) else 0
    tokenizer = checkpoints.load_tokenizer(checkpoints.resolve_base(source))
    return int(tokenizer(CHAT_START, add_special_tokens=False)["input_ids"][0])


def _load_backbone(path: Path, side: str, load: dict[str, Any]) -> PreTrainedModel:
    config, _ = checkpoints.load_config(path)
    backbones.check_family(config, side)
    if config.model_type in backbones.STATE_SPACE:  # there is no attention to implement
        load = {**load, "attn_implementation": None}
    return checkpoints.load_backbone(path, side == "decoder", **load)
