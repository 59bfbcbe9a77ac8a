"""RCCPreTrainedModel: what an RCC model consists of, the weights that are its own, and the name that they give it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import RCCConfig
from ..context.pieces import Piece
from ..errors import InputError, ModelError
from ..text import prompting
from ..text.prompting import Prompt
from . import adapters, backbones, merging, segments
from . import encoder as encoding
from .asking import prepare_asking
from .decoder import accept_prefix
from .encoder import Additions
from .fingerprint import fingerprint_of
from .generating import check_maker
from .merging import DeferredEncoder
from .prefix import DirectPrefix, PrefixMaker, ResidualPrefix, new_sink
from .projection import Projections, layer_map

if TYPE_CHECKING:
    from .rcc import RCCForCausalLM


class RCCPreTrainedModel(nn.Module):
    """An encoder, projections and a decoder, with their weights, as one module.

    Attributes:
        decoder: a causal language model.
        merged: whether LoRA is merged into the weights, for inference alone (`from_pretrained(adapters="merged")`).
        projections: the linear maps from the encoder's states to the decoder.
        memory: [M, H_encoder] of `readout="memory_tokens"`, or None.
        rate_embeddings: [rates, H_encoder], or None.
        sink: [L, H_decoder] of a direct prefix, or None.
    """

    def __init__(self, config: RCCConfig, encoder: PreTrainedModel | DeferredEncoder | None, decoder: PreTrainedModel):
        """Join two backbones.

        Args:
            config: of which nothing is left open, see :meth:`RCCConfig.decide`.
            encoder: a base model without head; None shares the decoder's weights. One that is read later makes a model
                for inference, both of whose sides have their LoRA merged: no adapters are added.
            decoder: a causal language model, which is changed in place (hooks, LoRA).

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
            encoder = copy.deepcopy(backbones.body(decoder), memo=shared)
        self.encoder_config = encoder.config
        if config.direct and config.sink_token is None:
            config.sink_token = 0
        _check_segment(config, backbones.window(self.encoder_config))
        accept_prefix(backbones.body(self.decoder))
        prepare_asking(self.decoder)
        self._deferred = encoder if isinstance(encoder, DeferredEncoder) else None
        self.merged = self._deferred is not None
        if isinstance(encoder, PreTrainedModel):
            encoding.capture_states(encoder)
            self._modules["encoder"] = encoder  # nn.Module would ask the property below whether it is there
        sizes = self.encoder_config.hidden_size, self.decoder.config.hidden_size
        depth = self.encoder_config.num_hidden_layers
        sources = layer_map(depth, len(backbones.blocks(backbones.body(self.decoder))), config)
        self.projections = Projections(sources, *sizes, config.direct).to(self.decoder.device, self.decoder.dtype)
        # of an encoder that is read later only the shape counts here: the model's own weights follow
        embeddings = self.projections.weight(0).new_zeros(2, sizes[0])
        if isinstance(encoder, PreTrainedModel):
            embeddings = backbones.embeddings(encoder).weight
        self.memory = adapters.new_memory(embeddings, config.memory_length) if config.memory_length else None
        rates = adapters.new_rate_embeddings(embeddings, len(config.rates)) if config.rate_embeddings else None
        self.rate_embeddings = rates
        token = config.sink_token
        self.sink = nn.Parameter(new_sink(backbones.body(self.decoder), token)) if config.direct else None
        if isinstance(encoder, PreTrainedModel):
            last_state = max(self.projections.states)
            adapters.add_lora(encoder, backbones.body(self.decoder), config, last_state)
            adapters.freeze(encoder, self.decoder, config, last_state)
        self._recorded: tuple[str, tuple[int, ...]] | None = None  # fingerprint, and the weights' versions then
        self._warned: set[int] = set()  # of which untrained rates
        self.eval()

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder, a transformers base model without head; where adapters are merged, it is read at first use."""
        if self._deferred is not None:
            with merging.reading:
                if self._deferred is not None:
                    encoder, name = self._deferred.read(), self.fingerprint
                    encoding.capture_states(encoder)
                    self._modules["encoder"] = encoder.eval()
                    self.record_fingerprint(name)  # weights have joined, and it is the same model
                    self._deferred = None
        return cast(PreTrainedModel, self._modules["encoder"])

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
        """Make an untrained model from pretrained backbones (folders, hub ids, names of bases, or models).

        Args:
            encoder: what reads the texts.
            decoder: None: the encoder's own base.
            config: see :class:`RCCConfig`. Left open there: the base is shared where no decoder is given, and
                :meth:`RCCConfig.decide` says which weights are trained.
            device: of the model; where transformers loads it by default.
            dtype: of the backbones; as stored by default.
            attn_implementation: transformers' name of one, for both sides; its own choice by default.
            **kwargs: go to transformers' `from_pretrained`.

        Raises:
            ModelError: a backbone that cannot be loaded or is of an unsupported family.
            InputError: settings that contradict each other.
        """
        from . import loading

        return loading.from_base(
            encoder,
            decoder,
            config,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **kwargs,
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        adapters: str = "separate",
        progress: Callable[[str], None] | None = None,
        **kwargs: Any,
    ) -> RCCForCausalLM:
        """Load a trained model: a shipped name (`rcc models`), a folder, or a hub id.

        Args:
            name: which model.
            device: of the model; where transformers loads it by default.
            dtype: a torch dtype or its name; as the base is stored by default.
            attn_implementation: transformers' name of one, for both sides; its own choice by default.
            adapters: `"merged"`: for inference alone, and faster at it. LoRA is added to the weights that it adapts,
                the encoder is read when it is first used, and by default a CPU without bfloat16 computes in float32.
                The linear layers of a shared base are then there twice, once for each side.
            progress: told in a few words what is being done where that takes long (fetching a base).
            **kwargs: go to transformers' `from_pretrained`, for the bases.

        Raises:
            ModelError: nothing there, no weights, damaged, or a base other than the one it was trained on.
            FileError: the base cannot be fetched.
        """
        from . import loading

        return loading.from_pretrained(
            name,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            adapters=adapters,
            progress=progress,
            **kwargs,
        )

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
            folder: is made where there is none.
            full: write the bases too, so that the folder needs nothing else.
            dtype: of the weights that are written; None: as they are.
            eight_bits: parts of the model whose matrices are written in 8 bits, `"projections"` or `"lora"` (see
                :mod:`rcc.model.packing`); the model takes on what is written.

        Raises:
            InputError: an unknown part. FileError: the folder cannot be written.
        """
        from . import loading

        loading.save_pretrained(self, folder, full, dtype, eight_bits)

    def own_state_dict(self) -> dict[str, Tensor]:
        """Return the weights that are not a base's (projections, LoRA, embeddings), by their names in a file."""
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
        adapters.check_names(targets, state)
        with torch.no_grad():
            for name, target in targets.items():
                if target.shape != state[name].shape:
                    raise ModelError(
                        f"{name} has shape {list(state[name].shape)} instead of {list(target.shape)}:"
                        " the model's configuration does not fit its weights."
                    )
                target.copy_(state[name])

    def set_rates(self, rates: Sequence[int], embeddings: bool) -> None:
        """Change the trained rates, with or without embeddings; those there are serve the new rates as they did.

        Raises:
            InputError: a rate that cannot be, or embeddings that would be lost.
        """
        if self.rate_embeddings is not None and not embeddings:
            raise InputError("the model has rate_embeddings, which it cannot do without: set rate_embeddings to true.")
        for rate in rates:
            self.config.check_rate(rate)
        if embeddings:
            words = backbones.embeddings(self.encoder).weight
            table = adapters.rate_embeddings_for(rates, words, self.rate_embeddings, self.config.rates)
            self.rate_embeddings = nn.Parameter(table)
        self.config.rates, self.config.rate_embeddings = list(rates), embeddings

    @property
    def device(self) -> torch.device:
        """Device of the weights, and of what :meth:`compress` gives."""
        return self.projections.weight(0).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the decoder, and of what :meth:`compress` gives."""
        return self.decoder.dtype

    @property
    def window(self) -> int:
        """Positions that the decoder can address: prefix, prompt and answer together."""
        return backbones.window(self.decoder.config)

    @property
    def name(self) -> str:
        """What contexts and messages call the model."""
        return self.config.name

    @property
    def stored_dtype(self) -> torch.dtype:
        """Precision that the decoder is stored in, and that a context is kept in."""
        return cast(torch.dtype, self.decoder.config.dtype)

    @property
    def sink_positions(self) -> int:
        """Positions that stand in the decoder's cache before a context's."""
        return self.prefix_maker.sink_positions

    @property
    def reads_special(self) -> bool:
        """Whether chat marks in texts are always the special tokens that they name."""
        return prompting.allows_special(self.config)

    def piece(self, ids: Tensor, rate: int) -> Piece:
        """Return the record of a text of token ids [T]."""
        return segments.piece_of(ids, rate, self.config)

    def prompt(self, question: str, mode: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """Return the prompt for a question; see :func:`rcc.text.prompting.build`."""
        return prompting.build(question, mode, history)

    def joins(self, prompt: Prompt) -> bool:
        """Return whether a text at hand and a prompt are read as one; see :func:`rcc.text.prompting.joins`."""
        return prompting.joins(self.config, prompt)

    @property
    def vocabulary(self) -> int:
        """Token ids that texts may have."""
        return int(self.encoder_config.vocab_size)

    @property
    def decoder_vocabulary(self) -> int:
        """Token ids that prompts may have."""
        return backbones.embeddings(self.decoder).num_embeddings

    @property
    def prefix_maker(self) -> PrefixMaker:
        """What makes the decoder's cache of encoder states: the paper's way, or the direct one."""
        body = backbones.body(self.decoder)
        return (
            ResidualPrefix(body, self.projections)
            if self.sink is None
            else DirectPrefix(body, self.projections, self.sink)
        )

    def additions(self, rate: int) -> Additions:
        """Return what is added to the embeddings of each segment at a rate."""
        offset = adapters.rate_offset(self.rate_embeddings, self.config.rates, rate)
        return Additions(self.memory, offset, self.config.sink_token if self.config.direct else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move and cast as any module, but keep rotary frequencies and embedding scales exact, as transformers does."""
        names = ("inv_freq", "embed_scale")
        exact = [(m, name, b) for m in self.modules() for name, b in m._buffers.items() if name.endswith(names)]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
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
            self._recorded = self.compute_fingerprint(), versions
        return self._recorded[0]

    def compute_fingerprint(self, dtype: torch.dtype | None = None) -> str:
        """Compute :attr:`fingerprint` anew, of the weights as they are; in another precision, if one is given."""
        return fingerprint_of(self.config, sorted(self.state_dict().items()), dtype)

    def record_fingerprint(self, fingerprint: str) -> None:
        """Take a fingerprint as that of the present weights."""
        self._recorded = fingerprint, self._versions()

    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters())

    def check_fingerprint(self, fingerprint: str, name: str, what: str = "the context") -> None:
        """Raise ContextError unless this model made it."""
        check_maker(self.fingerprint, self.config.name, fingerprint, name, what)


def _check_segment(config: RCCConfig, readable: int) -> None:
    """Raise InputError where a segment, with what is added to it, is more than an encoder can address."""
    if config.segment_length + config.memory_length + config.direct > readable:
        added = f" with its {config.memory_length} memory tokens" if config.memory_length else ""
        added = " with the sink before it" if config.direct else added
        raise InputError(
            f"segment_length={config.segment_length}{added} is more than the {readable} positions that the encoder"
            " can address: use a shorter segment."
        )
