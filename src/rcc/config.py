"""What an RCC model is made of, as data: the two backbones, the segment, the rates and how states are handed over."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import InputError, ModelError, brief
from .runtime import atomic, plain

FORMAT_VERSION = 1
"""Version of the model folder's config.json; a folder with a higher one is refused."""


@dataclass
class BaseReference:
    """Where the frozen weights under one side come from.

    Args:
        source: a name in :data:`rcc.checkpoints.BASES`, a folder (relative to the model's own), or a hub id.
        sha256: of its weights, see :func:`rcc.checkpoints.weights_sha256`.
    """

    source: str
    sha256: str


@dataclass(frozen=True)
class SideConfig:
    """One side of a model: its encoder or its decoder.

    Args:
        lora_rank: of LoRA on every linear layer of the side's blocks (in Mamba's, on `in_proj`). 0: no LoRA; where the
            base is not shared, the side's own weights are trained. None: see :meth:`RCCConfig.decide`.
    """

    lora_rank: int | None = None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class RCCConfig:
    """Configuration of an RCC model (the terms are those of arXiv 2406.06110).

    Args:
        segment_length: tokens that the encoder reads at once; segments do not see each other.
        rates: compression rates that the model was trained for, the default one first. Any other divisor of
            `segment_length` can be asked for and brings a warning.
        prefix: how the decoder takes the encoder's states in. `"residual"` (the paper): their projections are added to
            the decoder's residual stream at the prefix positions, which pass through its blocks. `"direct"`: they
            become the input of the blocks there, of which only keys and values are made; so no prefix position
            depends on another segment, and contexts can be joined, cut and reordered.
        sink_token: with `prefix="direct"`, the token that the encoder reads before each segment, and that the learnt
            position at the front of the cache starts as: the chat form's first. None: see
            :meth:`RCCForCausalLM.from_base`.
        states: `"all"` hands over one encoder state per decoder layer (the paper), `"last"` only the
            encoder's last one, as the prefix's input (the paper's ablation, section 4).
        readout: `"strided"` keeps the states of every rate-th token (the paper). `"memory_tokens"` appends learned
            embeddings to each segment, one for every `rate` tokens or part of that, and keeps the states of those;
            there are as many as the lowest of `rates` asks for, and no lower rate can be used.
        rate_embeddings: tells the encoder at which rate it reads, by a learned embedding of each of `rates`, added to
            its tokens' embeddings; between those of two rates as their logarithms lie, beyond them the nearest's.
            Without, a state that several rates keep has to serve them all.
        layer_map: how encoder states are matched to a decoder of another depth: `"duplicate"` or `"average"`.
        segment_padding: `"none"` keeps the state of a partial group's last token; `"repeat"` is the published
            checkpoint's rule, which repeats tokens until the segment is full.
        share_base: the encoder runs on the decoder's own frozen weights. None: see :meth:`decide`.
        encoder, decoder: the settings of each side, which files call `encoder_lora_rank` and `decoder_lora_rank`.
        lora_alpha: LoRA's scale is alpha / rank. None: equal to the rank, a scale of 1.
        name: what contexts and messages call the model.

    The rest is filled in by rcc: `base` (where each side's weights are), `weights_sha256` and `fingerprint`.

    Raises:
        InputError: naming the argument that cannot be used.
    """

    segment_length: int = 2048
    rates: list[int] = field(default_factory=lambda: [32])
    prefix: str = "residual"
    sink_token: int | None = None
    states: str = "all"
    readout: str = "strided"
    rate_embeddings: bool = False
    layer_map: str = "duplicate"
    segment_padding: str = "none"
    share_base: bool | None = None
    encoder: SideConfig = field(default_factory=SideConfig, metadata=plain.inline("encoder_"))
    decoder: SideConfig = field(default_factory=SideConfig, metadata=plain.inline("decoder_"))
    lora_alpha: float | None = None
    name: str = "rcc"
    base: dict[str, BaseReference] = field(default_factory=dict)
    weights_sha256: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        choices = {
            "prefix": ("residual", "direct"),
            "states": ("all", "last"),
            "readout": ("strided", "memory_tokens"),
            "layer_map": ("duplicate", "average"),
            "segment_padding": ("none", "repeat"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise InputError(f"{key}={getattr(self, key)!r} is unknown: use one of {', '.join(allowed)}.")
        if self.prefix == "direct":
            for key in ("states", "readout", "segment_padding"):
                default = getattr(RCCConfig, key)
                if getattr(self, key) != default:
                    raise InputError(f'{key}={getattr(self, key)!r} needs prefix="residual": use {default!r}.')
        elif self.sink_token is not None:
            raise InputError('sink_token needs prefix="direct": leave it out.')
        token = self.sink_token
        if token is not None and (not _is_count(token) or token < 0):
            raise InputError(f"sink_token must be a token id, not {token!r}.")
        if not _is_count(self.segment_length) or not 1 <= self.segment_length < 1 << 31:
            raise InputError(f"segment_length must be a positive whole number, not {self.segment_length!r}.")
        if not isinstance(self.rates, (list, tuple)):
            raise InputError(f"rates must be a list of whole numbers, not {self.rates!r}.")
        self.rates = list(self.rates)
        if not self.rates:
            raise InputError("rates is empty: name at least one compression rate.")
        for rate in self.rates:
            self.check_rate(rate)
        for name, side in self.sides.items():
            if not isinstance(side, SideConfig):
                raise InputError(f"{name} must be a SideConfig, not {side!r}.")
            rank = side.lora_rank
            if rank is not None and (not _is_count(rank) or not 0 <= rank < 1 << 31):
                raise InputError(f"{name}_lora_rank must be a whole number that is not negative, not {rank!r}.")
        self._check_types()
        self.base = {k: v if isinstance(v, BaseReference) else BaseReference(**v) for k, v in self.base.items()}

    def _check_types(self) -> None:
        alpha = self.lora_alpha
        if alpha is not None and (
            not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < float("inf")
        ):
            raise InputError(f"lora_alpha must be a number above 0, not {alpha!r}.")
        for key in ("name", "weights_sha256", "fingerprint"):
            if not isinstance(getattr(self, key), str):
                raise InputError(f"{key} must be a text, not {getattr(self, key)!r}.")
        for key, kinds in (("rate_embeddings", (bool,)), ("share_base", (bool, type(None)))):
            if not isinstance(getattr(self, key), kinds):
                raise InputError(f"{key} must be true or false, not {getattr(self, key)!r}.")
        if not isinstance(self.base, dict) or not set(self.base) <= {"encoder", "decoder"}:
            raise InputError("base must be a table of a decoder and, where it has one of its own, an encoder.")
        for side, base in self.base.items():
            values = vars(base) if isinstance(base, BaseReference) else base
            if not isinstance(values, dict) or set(values) != {"source", "sha256"}:
                raise InputError(f"base.{side} must be a table of source and sha256.")
            if not all(isinstance(value, str) and "\0" not in value for value in values.values()):
                raise InputError(f"base.{side} must hold texts, not {values!r}.")

    def decide(self, one_base: bool) -> None:
        """Decide what was left open: one base is shared, and with LoRA of rank 16; otherwise all weights are trained.

        Args:
            one_base: whether both sides start from one base, rather than from one each.
        """
        if self.share_base is None:
            self.share_base = one_base
        rank = 16 if self.share_base else 0
        if self.encoder.lora_rank is None:
            self.encoder = replace(self.encoder, lora_rank=rank)
        if self.decoder.lora_rank is None:
            self.decoder = replace(self.decoder, lora_rank=rank)

    @property
    def sides(self) -> dict[str, SideConfig]:
        """Both sides' settings by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def is_frozen(self, side: str) -> bool:
        """Return whether a side's base is frozen: shared, or under LoRA."""
        return bool(self.share_base or self.sides[side].lora_rank)

    def check_rate(self, rate: int | None) -> int:
        """Return the rate to use: `rate`, or the default one for None.

        Raises:
            InputError: it does not divide the segment, or there are too few memory tokens for it.
        """
        if rate is None:
            return self.rates[0]
        if not _is_count(rate) or rate < 1 or self.segment_length % rate:
            divisors = [d for d in range(1, self.segment_length + 1) if self.segment_length % d == 0]
            raise InputError(
                f"rate={rate!r} does not divide the segment of {self.segment_length} tokens:"
                f" use one of {', '.join(map(str, divisors))}."
            )
        if self.readout == "memory_tokens" and rate not in self.rates and rate < min(self.rates):
            raise InputError(
                f"rate={rate} needs more memory tokens than the model has: use {min(self.rates)} or a higher one."
            )
        return rate

    @property
    def memory_length(self) -> int:
        """Memory embeddings of `readout="memory_tokens"`; 0 with another readout."""
        return self.segment_length // min(self.rates) if self.readout == "memory_tokens" else 0

    @property
    def direct(self) -> bool:
        """Whether the prefix is made directly of the encoder's states."""
        return self.prefix == "direct"

    def decoder_reads(self, rate: int) -> bool:
        """Return whether the decoder reads a text itself, as it is: a direct prefix at rate 1."""
        return self.direct and rate == 1

    def method(self) -> dict[str, Any]:
        """Return the settings that change what a context holds, for the fingerprint."""
        keys = ["segment_length", "states", "readout", "layer_map", "segment_padding", "lora_alpha"]
        # what is off by default is left out: contexts of before it was there stay valid
        if self.direct:
            keys += ["prefix", "sink_token"]
        return {k: getattr(self, k) for k in keys} | ({"rate_embeddings": self.rates} if self.rate_embeddings else {})

    def settings(self) -> dict[str, Any]:
        """Return all settings by the names that files have for them, such as `encoder_lora_rank`."""
        settings: dict[str, Any] = plain.to_plain(self)
        return settings

    def save(self, folder: Path) -> None:
        """Write `config.json` into a folder."""
        data = {"model_type": "rcc", "format_version": FORMAT_VERSION, **self.settings()}
        if not self.direct:  # an rcc that knows no other prefix reads the folder as before
            del data["prefix"], data["sink_token"]
        atomic.write_text(folder / "config.json", json.dumps(data, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RCCConfig:
        """Read `config.json` from a folder.

        Raises:
            ModelError: it is missing, not JSON, not an RCC model's, or of a newer format.
        """
        file = folder / "config.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"{folder} is not an RCC model: it has no config.json.") from None
        except (ValueError, OSError, RecursionError) as error:
            raise ModelError(f"{file} cannot be read as JSON ({brief(error)}): get the model again.") from None
        if not isinstance(data, dict) or data.pop("model_type", None) != "rcc":
            raise ModelError(
                f"{folder} is not an RCC model: make one from it with RCCForCausalLM.from_base({str(folder)!r})."
            )
        version = data.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ModelError(f"{file} has format version {version}, this rcc reads {FORMAT_VERSION}: update rcc.")
        if unknown := sorted(set(data) - set(plain.settings_of(cls))):
            raise ModelError(f"{file} has unknown settings ({', '.join(unknown)}): update rcc.")
        try:
            return plain.make(cls, data)
        except (TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise ModelError(f"{file}: {error}") from None
            raise ModelError(f"{file} has a setting of the wrong type ({error}).") from None
