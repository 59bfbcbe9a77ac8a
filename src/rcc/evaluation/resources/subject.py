"""What resources are measured or computed of: a model, or the shape of one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from ... import checkpoints
from ...config import RCCConfig, SideConfig
from ...model.compressor import Compressor
from ...model.opening import check_compressor, language_model
from ...model.selection.names import SELECTION, rule_of
from ...model.selection.selection import Selection
from ...planning import blueprint as planning
from ...planning import shapes
from ...planning.reading import Reading

RATES = (8, 32)
"""Of a shape, unless others are asked for."""


@dataclass(frozen=True)
class Subject:
    """A model, or the shape of one.

    Attributes:
        name: of a model, by which it can be loaded, or of a shape.
        blueprint: what it is made of; of a selection only the decoder counts.
        fingerprint: of a model; None: a shape.
        selection: without storage, where the model is one.
        compressor: by which it is loaded; see :func:`rcc.model.opening.open_compressor`.
        tokenizer: by which a model's tokenizer can be loaded.
    """

    name: str
    blueprint: planning.Blueprint
    fingerprint: str | None = None
    selection: Selection | None = None
    compressor: str | None = None
    tokenizer: str | Path = ""

    @cached_property
    def model(self) -> Compressor:
        """The model without storage."""
        return self.selection or self.blueprint.build()

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all weights, shared ones once."""
        return planning.stored_bytes(weights(self.model))

    @property
    def sides(self) -> str:
        """What it is made of, in a few words."""
        if self.selection is not None:
            return "pairs of the model's own"
        return "one base under LoRA" if self.blueprint.encoder is None else "an encoder and a decoder of their own"

    @cached_property
    def reading(self) -> Reading:
        """What reading takes, computed."""
        return Reading(self.blueprint)

    @cached_property
    def position_bytes(self) -> int:
        """Bytes of one position's keys and values."""
        return self.reading.position_bytes()

    def digests(self) -> dict[str, str | None]:
        """Return the SHA-256 of both sides' shapes; None for a side that has none of its own."""
        return {"decoder": _digest(self.blueprint.decoder), "encoder": _digest(self.blueprint.encoder)}

    @property
    def is_the_papers(self) -> bool:
        """Whether the paper's figures are of this model: two models of Pythia-1.4B's shape, read in 2,048 tokens."""
        plan, known = self.blueprint, shapes.find("pythia-1.4b").to_dict()
        sides = plan.decoder, plan.encoder
        papers = plan.config.segment_length == 2048 and not plan.config.direct
        papers = papers and self.selection is None
        return papers and all(s is not None and s.to_dict() == known for s in sides)


def weights(model: Compressor) -> nn.Module:
    """Return the module that holds all weights of a model."""
    return model if isinstance(model, nn.Module) else model.decoder


def loadable(name: str, dtype: torch.dtype | None = None, compressor: str | None = None) -> Subject:
    """Return a model as a subject, by what its folder and its bases' say.

    Args:
        name: of an RCC model, or of any language model.
        dtype: to compute in; None: as stored.
        compressor: see :func:`rcc.model.opening.open_compressor`.

    Raises:
        InputError: an unknown compressor. ModelError: there is no such model or base.
        FileError: a base cannot be fetched.
    """
    check_compressor(compressor)
    selected = language_model(name, compressor)
    if selected is not None:
        own, folder = selected
        shape = checkpoints.load_config(folder)[0]
        blueprint = planning.Blueprint(
            RCCConfig(), shape, None, dtype or getattr(shape, "dtype", None) or torch.float32
        )
        with torch.device("meta"):
            decoder = blueprint.build_base()
        tokenizer, rule = checkpoints.load_tokenizer(folder), rule_of(compressor or SELECTION)
        selection = Selection(decoder, tokenizer, own, rule, weights_sha256=checkpoints.weights_sha256(folder))
        return Subject(name, blueprint, selection.fingerprint, selection, compressor, folder)
    folder = checkpoints.resolve_model(name)
    config = RCCConfig.load(folder)
    sides = {
        side: shapes.find(checkpoints.resolve_base(base.source, relative_to=folder))
        for side, base in config.base.items()
    }
    stored = dtype or getattr(sides["decoder"], "dtype", None) or torch.float32
    blueprint = planning.Blueprint(config, sides["decoder"], sides.get("encoder"), stored)
    return Subject(name, blueprint, config.fingerprint, tokenizer=name)


def shaped(
    name: str,
    encoder_name: str | None = None,
    *,
    share_base: bool = False,
    rates: Sequence[int] = RATES,
    segment_length: int = 2048,
    prefix: str = "residual",
    dtype: torch.dtype = torch.bfloat16,
) -> Subject:
    """Return a model of known shape: a decoder and an encoder with all their weights, as the paper's (section 4).

    Args:
        name: of the decoder's shape, see :func:`rcc.planning.shapes.find`.
        encoder_name: of the encoder's; None: the same.
        share_base: one base for both sides instead, under LoRA of rank 16.
        rates: tokens a position, of the model's configuration.
        segment_length: tokens of a segment.
        prefix: `"residual"`, the paper's, or `"direct"`.
        dtype: of all weights.

    Raises:
        ModelError: a shape that is not known or not supported. InputError: settings that cannot be used.
    """
    side = SideConfig(lora_rank=16 if share_base else 0)
    config = RCCConfig(
        segment_length=segment_length,
        rates=list(rates),
        share_base=share_base,
        encoder=side,
        decoder=side,
        prefix=prefix,
        name=name,
    )
    encoder_shape = None if share_base else shapes.find(encoder_name or name)
    subject = Subject(name, planning.Blueprint(config, shapes.find(name), encoder_shape, dtype))
    assert subject.model is not None  # which refuses what cannot be made
    return subject


def _digest(shape: PreTrainedConfig | None) -> str | None:
    return None if shape is None else hashlib.sha256(shape.to_json_string().encode()).hexdigest()
