"""What a model costs before its weights are here: parameters, bytes of context, memory to serve and to train.

Models are made on torch's meta device, shapes without storage, and passes run there: figures come from the code that
would run, not from a formula of their own.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..config import RCCConfig
from ..context.cache import SPARE, new_cache
from ..errors import ModelError, RCCError, brief
from ..model import backbones, training_pass
from ..model.encoder import Additions, read_segments
from ..model.prefix import prefix_pass
from ..model.projection import layer_map
from ..model.rcc import RCCForCausalLM
from ..model.segments import positions as positions_of
from ..training.groups import freeze
from . import shapes

TRACED = 3
"""Blocks of a side that are run to learn what one of them keeps: the first, one between two others, the last."""
TEXTS = (32_768, 131_072, 1_048_576)
"""Tokens of text that a plan gives the memory to serve for: 32k, 128k, 1M."""
SHORT, LONG, TARGET = 2_048, 16_384, 512
"""The paper's lengths: context tokens of its first and second stage, and decoder tokens (section 4)."""


# ---------------------------------------------------------------- models without storage
@dataclass(frozen=True)
class Blueprint:
    """What a model is made of, where its weights are not at hand.

    Attributes:
        config: of which nothing is left open.
        decoder, encoder: of the backbones; encoder None: the decoder's base is shared.
        dtype: of the backbones' weights.
        attention: `"eager"`, or another that keeps no scores.
    """

    config: RCCConfig
    decoder: PreTrainedConfig
    encoder: PreTrainedConfig | None = None
    dtype: torch.dtype = torch.bfloat16
    attention: str = "sdpa"

    def build(self, device: str = "meta") -> RCCForCausalLM:
        """The model with random weights; on the meta device, with none.

        Raises:
            ModelError: a family that is not supported on its side, or a shape of which no model can be made.
            InputError: a segment that the encoder cannot address.
        """
        backbones.check_family(self.decoder, "decoder")
        if self.encoder is not None:
            backbones.check_family(self.encoder, "encoder")
        with torch.device(device):
            try:
                decoder = self.build_base()
                encoder = None if self.encoder is None else self._side(AutoModel, self.encoder)
                return RCCForCausalLM(self.config, encoder, decoder)
            except (RCCError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever senseless numbers lead to
                raise ModelError(f"no model can be made of this shape ({brief(error)}).") from error

    def build_base(self) -> PreTrainedModel:
        """The decoder's base alone, on torch's present device."""
        return self._side(AutoModelForCausalLM, self.decoder)

    def _side(self, auto: Any, shape: PreTrainedConfig) -> PreTrainedModel:
        attention = None
        if shape.model_type not in backbones.STATE_SPACE:  # there is no attention to implement
            attention = "eager" if self.attention == "eager" else "sdpa"
        # the model writes into its configuration
        return auto.from_config(
            copy.deepcopy(shape), dtype=self.dtype, attn_implementation=attention, trust_remote_code=False
        )

    def shallow(self) -> Blueprint:
        """The same with at most :data:`TRACED` blocks a side, of every kind that there is."""

        def cut(shape: PreTrainedConfig) -> PreTrainedConfig:
            shape = copy.deepcopy(shape)
            blocks = min(TRACED, shape.num_hidden_layers)
            if "layer_types" in vars(shape):  # in some families it follows from the number
                kinds = shape.layer_types
                others = [kind for kind in dict.fromkeys(kinds) if kind not in kinds[:blocks]]
                shape.layer_types = [*kinds[: blocks - len(others)], *others]
            shape.num_hidden_layers = blocks
            return shape

        return replace(self, decoder=cut(self.decoder), encoder=None if self.encoder is None else cut(self.encoder))

    @property
    def states(self) -> list[int]:
        """Encoder states that are read; the last one is also the number of encoder blocks that run."""
        upper = (self.encoder or self.decoder).num_hidden_layers
        return sorted({k for source in layer_map(upper, self.decoder.num_hidden_layers, self.config) for k in source})


@torch.no_grad()
def position_bytes(model: RCCForCausalLM) -> int:
    """Bytes of a position in the decoder's KV cache: what `compress` allocates for one, in the model's dtype."""
    cache = new_cache(len(backbones.blocks(model.decoder.base_model)), 1)
    one = torch.empty(1, 1, model.encoder.config.hidden_size, dtype=model.dtype, device=model.device)
    prefix_pass(model.prefix_maker, cache, None, [(dict.fromkeys(model.projections.states, one), None)])
    return sum(tensor.nbytes for layer in cache.layers for tensor in layer.block)


def stored_bytes(model: nn.Module, adapters: bool = True) -> int:
    """Bytes of a model's weights, shared ones once; with LoRA's or without."""
    return sum(p.nbytes for name, p in model.named_parameters() if adapters or ".lora_" not in name)


def learning_bytes(model: nn.Module) -> int:
    """Bytes of weights, gradients and AdamW's state; what learns has all of them in float32."""
    return sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in model.parameters())


# ---------------------------------------------------------------- what a training pass keeps
@dataclass(frozen=True)
class Batch:
    """What a process reads before a backward pass: `rows` texts of `tokens` context tokens at `rate`, each followed by
    `target` decoder tokens."""

    rows: int
    tokens: int
    rate: int
    target: int


@dataclass(frozen=True)
class Activations:
    """Bytes that a training pass needs beside weights, gradients and optimiser: without gradient checkpointing, and
    with it."""

    kept: int
    checkpointed: int


def activations(blueprint: Blueprint, batch: Batch, frozen: Collection[str] = ()) -> Activations:
    """Estimate what a training pass keeps, with the groups in `frozen` not learning.

    The pass itself runs, with and without gradient checkpointing, on tensors without storage whose sizes are counted;
    :data:`TRACED` blocks of each side stand for all. A state-space encoder's kernels cannot run so: what it keeps is
    taken to be what a Transformer does, 34 bytes · width a token and block (Korthikanti et al. 2022, section 4.1).
    """
    plain, again = (_run(blueprint.shallow(), batch, frozen, recompute) for recompute in (False, True))
    # what the blocks add that were not run
    missing = {"encoder": blueprint.states[-1], "decoder": blueprint.decoder.num_hidden_layers}
    kept, forward, backward = plain.peak, again.peak, again.after
    for side, first in plain.blocks.items():
        kept += (missing[side] - first.run) * first.kept
        forward += (missing[side] - first.run) * again.blocks[side].kept
        backward += (missing[side] - first.run) * first.entry
    if "encoder" not in plain.blocks:  # its states are there all the same
        more = (len(blueprint.states) - plain.states) * plain.state
        kept, forward, backward = kept + more, forward + more, backward + more
    # one block's activations are there at a time
    backward += max((block.kept for block in plain.blocks.values()), default=0)
    checkpointed = max(forward, backward)
    if plain.scanned:
        kept += 34 * plain.scanned * missing["encoder"]
        checkpointed += plain.scanned * (2 * missing["encoder"] + 34)
    return Activations(kept, min(kept, checkpointed))


@dataclass
class _Block:
    """One block of a side as it was run: bytes of its input, and bytes that it and its hooks leave behind."""

    run: int
    entry: int
    kept: int


@dataclass
class _Trace:
    """A training pass as it was run, in bytes: the most there was, what was left after the forward pass, and the blocks
    of the sides that ran; how many encoder states there were, and the bytes of each; the tokens · width that a
    state-space encoder would have read and kept."""

    peak: int
    after: int
    blocks: dict[str, _Block]
    states: int
    state: int
    scanned: int


def _run(blueprint: Blueprint, batch: Batch, frozen: Collection[str], recompute: bool) -> _Trace:
    model, wanted = blueprint.build(), blueprint.states
    freeze(model, frozen, blueprint.dtype)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # all segments of one length: a last one that is not full counts as full
    length = min(batch.tokens, blueprint.config.segment_length)
    segments = batch.rows * -(-batch.tokens // length)
    width = model.encoder.config.hidden_size
    shape = batch.rows, segments // batch.rows * -(-length // batch.rate), width
    learning = any(p.requires_grad for name, p in model.named_parameters() if name.startswith(("encoder", "memory")))
    exactly = blueprint.config.direct and batch.rate == 1  # by the decoder itself
    scans = learning and not exactly and model.encoder.config.model_type in backbones.STATE_SPACE
    state = 0
    live = _Live()
    live.adopt(model)
    marks: dict[str, list[tuple[int, int]]] = {"encoder": [], "decoder": []}

    def note(side: str, module: nn.Module, arguments: tuple) -> None:
        marks[side].append((live.now, arguments[0].untyped_storage().nbytes()))

    for side, body in (("encoder", model.encoder), ("decoder", model.decoder.base_model)):
        for block in backbones.blocks(body):  # before our other hooks, so that what they keep is the block's
            block.register_forward_pre_hook(partial(note, side), prepend=True)
    with live, torch.autocast("cpu", blueprint.dtype, enabled=blueprint.dtype != torch.float32):
        prompt = torch.zeros(batch.rows, batch.target, dtype=torch.long)
        if exactly:
            texts = [torch.zeros(batch.tokens, dtype=torch.long)] * batch.rows
            out = training_pass.read_and_decode(model, texts, training_pass.TrainingBatch(prompt, labels=prompt))
        else:
            if learning and not scans:
                ids = [torch.zeros(length, dtype=torch.long)] * segments
                sink = blueprint.config.sink_token
                read, _ = read_segments(model.encoder, ids, batch.rate, wanted, Additions(model.memory, sink=sink))
                states = {k: h.reshape(shape) for k, h in read.items()}
                del read
            else:
                states = {k: torch.empty(shape, dtype=blueprint.dtype, requires_grad=learning) for k in wanted}
            state = next(iter(states.values())).nbytes
            out = training_pass.decode_states(model, states, None, training_pass.TrainingBatch(prompt, labels=prompt))
    after = live.now
    with live:
        torch.autograd.grad(out.loss, out.logits)  # logits are in memory most often on the way back
    blocks = {
        side: _Block(wanted[-1] if side == "encoder" else len(seen), seen[-1][1], seen[-1][0] - seen[-2][0])
        for side, seen in marks.items()
        if len(seen) > 1
    }
    return _Trace(live.peak, after, blocks, len(wanted), state, scans * segments * length * width)


class _Live(FakeTensorMode):
    """Counts the bytes of tensors that exist, now and at most, while a model without storage runs.

    Fake tensors are on the CPU by their own account, so autocast and the attention without scores are chosen as they
    are in training, which on the meta device they are not.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.now = self.peak = 0
        self.known: set[int] = set()
        self.inside = False

    def adopt(self, model: nn.Module) -> None:
        """Put fake tensors in the place of a meta model's; they do not count."""
        made: dict[int, Any] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in made:
                        fake = FakeTensor(self, tensor.detach().to("meta"), torch.device("cpu"))
                        self.known.add(fake.untyped_storage()._cdata)
                        learns = isinstance(tensor, nn.Parameter)
                        # the tensor too: another one must not get its id
                        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if learns else fake, tensor
                    if tensor is not None:
                        tensors[name] = made[id(tensor)][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside, self.inside = self.inside, True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.inside = inside
        # what an operator is made of, which fake tensors go through at its first use, is not what its kernel allocates
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in () if inside else outputs:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


# ---------------------------------------------------------------- what reading holds
class Reading:
    """A model without storage that reads a text, in front of its end, where a reader holds most.

    The passes are `compress`'s own and the base's, on tensors whose sizes are counted. A state-space encoder's kernels
    cannot run so: what one of its blocks holds is estimated at 34 bytes · width a token, as in :func:`activations`.
    """

    def __init__(self, blueprint: Blueprint):
        self.blueprint, self.model = blueprint, blueprint.build()
        with torch.device("meta"):
            self.base = blueprint.build_base().eval()
        self.live = _Live()
        for model in (self.model, self.base):
            self.live.adopt(model)

    @torch.no_grad()
    def compress(self, tokens: int, rate: int, batch_tokens: int) -> int:
        """Bytes that `compress` holds at most beside the weights: the KV cache with its spare room, and a batch."""
        config, model = self.blueprint.config, self.model
        length = min(tokens, config.segment_length)
        each, n = positions_of(length, rate, config), positions_of(tokens, rate, config)
        new = min(n, each * max(1, batch_tokens // config.segment_length))
        cache = self._cache(n + SPARE)
        scans = model.encoder.config.model_type in backbones.STATE_SPACE
        width = model.encoder.config.hidden_size

        def chunks() -> Iterator[tuple[dict[int, Tensor], None]]:
            for batch in self._ends(cache, new, n):
                segments = -(-batch // each) if batch == new else 0  # where the cache is only made
                if scans or not segments:
                    torch.empty(34 * width * segments * length, dtype=torch.uint8)
                    states = {k: torch.empty(1, batch, width, dtype=model.dtype) for k in model.projections.states}
                else:
                    ids = [torch.zeros(length, dtype=torch.long)] * segments
                    additions = Additions(model.memory, sink=config.sink_token)
                    read, _ = read_segments(model.encoder, ids, rate, model.projections.states, additions)
                    states = {k: h.reshape(1, -1, width)[:, :batch] for k, h in read.items()}
                yield states, None
                del states

        with self.live:
            prefix_pass(model.prefix_maker, cache, None, chunks())
        return self.live.peak

    @torch.no_grad()
    def prefill(self, tokens: int, batch_tokens: int) -> int:
        """Bytes that the base holds at most beside its weights when it reads a text batch by batch."""
        new = min(tokens, batch_tokens)
        cache = self._cache(tokens)
        with self.live:
            for batch in self._ends(cache, new, tokens):
                past = cache.get_seq_length()
                order = torch.arange(past, past + batch)[None]
                ids = torch.zeros(1, batch, dtype=torch.long)
                self.base(
                    input_ids=ids, position_ids=order, **{backbones.CACHE: cache}, use_cache=True, logits_to_keep=1
                )
        return self.live.peak

    def _cache(self, capacity: int) -> Cache:
        self.live.peak = self.live.now
        return new_cache(len(backbones.blocks(self.base.base_model)), capacity)

    @staticmethod
    def _ends(cache: Cache, new: int, n: int) -> Iterator[int]:
        """Positions of the last batch, `new` of them, with the cache as if all others had been read before."""
        if n > new:
            yield 1  # which makes the cache
            for layer in cache.layers:
                layer.length = n - new
                layer._show()
        yield new


# ---------------------------------------------------------------- a plan
def plan(
    decoder: str | Path,
    encoder: str | Path | None = None,
    rates: Collection[int] = (8, 32),
    segment_length: int = 2048,
    lora_rank: int | None = None,
    full: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """What an RCC model on a backbone would cost, as plain data; sizes in bytes.

    Args:
        decoder, encoder: see :func:`rcc.planning.shapes.find`; without an encoder the decoder's base reads as well.
        lora_rank: of LoRA on both sides. None: 16, or where an encoder is named, all weights of both sides.
        full: all weights of both sides.

    Raises:
        ModelError: a backbone that is not found or not supported. InputError: settings that cannot be used.
    """
    lower = shapes.find(decoder)
    upper = None if encoder is None else shapes.find(encoder)
    rank = lora_rank or 16
    ways = {}
    for name, own in ((f"LoRA of rank {rank}", 0), ("all weights", 1)):
        config = RCCConfig(
            segment_length=segment_length,
            rates=list(rates),
            share_base=upper is None and not own,
            encoder_lora_rank=0 if own else rank,
            decoder_lora_rank=0 if own else rank,
        )
        ways[name] = Blueprint(config, lower, upper if upper is not None or not own else lower, dtype)
    chosen = list(ways)[full or (upper is not None and lora_rank is None)]
    models = {name: way.build() for name, way in ways.items()}
    model = models[chosen]
    position, plain = position_bytes(model), stored_bytes(model.decoder, adapters=False)
    data = {
        "backbone": _about(decoder, model.decoder),
        "encoder": None if upper is None else _about(encoder, model.encoder),
        "dtype": str(dtype).removeprefix("torch."),
        "segment_length": segment_length,
        "learns": chosen,
        "added": _added(model),
        "parameters": sum(p.numel() for p in model.parameters()),
        "position_bytes": position,
        "reserve": model.window - model.room(),
        "reading": [
            _reading(model, rate, position, plain if rate is None else stored_bytes(model)) for rate in (None, *rates)
        ],
    }
    training = [
        _training(name, way, models[name], tokens, frozen)  # which sets the model up to learn
        for name, way in ways.items()
        for tokens, frozen in ((SHORT, []), (LONG, ["encoder"]))
    ]
    return {**data, "training": training}


def _about(name: Any, side: PreTrainedModel) -> dict[str, Any]:
    shape = side.config
    scans = shape.model_type in backbones.STATE_SPACE
    heads = None if scans else shape.num_attention_heads
    return {
        "name": str(name),
        "family": shape.model_type,
        "layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "attention_heads": heads,
        "key_value_heads": getattr(shape, "num_key_value_heads", None) or heads,
        "window": None if scans else backbones.window(shape),
        "parameters": sum(p.numel() for name, p in side.named_parameters() if ".lora_" not in name),
    }


def _added(model: RCCForCausalLM) -> dict[str, int]:
    """Parameters beside the decoder's base, by what they are."""
    base = {id(p) for p in model.decoder.parameters()}
    added = {"projections": sum(p.numel() for p in model.projections.parameters())}
    if model.sink is not None:
        added["sink"] = model.sink.numel()
    for side, body in (("encoder", model.encoder), ("decoder", model.decoder)):
        lora = [p for name, p in body.named_parameters() if ".lora_" in name]
        adapters = {id(p) for p in lora}
        weights = [p for p in body.parameters() if id(p) not in base | adapters]
        for name, parameters in ((side, weights), (f"lora_{side}", lora)):
            if parameters:
                added[name] = sum(p.numel() for p in parameters)
    return added


def _reading(model: RCCForCausalLM, rate: int | None, position: int, weights: int) -> dict[str, Any]:
    """The longest text at a rate, and the memory that texts take; rate None: the base's own, read as plain text."""
    texts = []
    for tokens in TEXTS:
        positions = positions_of(tokens, rate or 1, model.config)
        kv, fits = positions * position, positions <= model.room()
        texts.append({"tokens": tokens, "positions": positions, "kv_bytes": kv, "bytes": weights + kv, "fits": fits})
    return {"rate": rate, "longest_text": model.room() * (rate or 1), "weights_bytes": weights, "texts": texts}


def _training(name: str, blueprint: Blueprint, model: RCCForCausalLM, tokens: int, frozen: list[str]) -> dict[str, Any]:
    """Memory to train on one text, at the lowest rate at which it fits the window."""
    config = blueprint.config
    freeze(model, frozen, blueprint.dtype)
    tokens = max(tokens, config.segment_length)
    fitting = (r for r in sorted(config.rates) if positions_of(tokens, r, config) + TARGET <= model.window)
    batch = Batch(1, tokens, next(fitting, max(config.rates)), TARGET)
    found = activations(blueprint, batch, frozen)
    return {
        "learns": name,
        "frozen": frozen,
        "texts": batch.rows,
        "context_tokens": batch.tokens,
        "rate": batch.rate,
        "decoder_tokens": batch.target,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "state_bytes": learning_bytes(model),
        "estimated_activations_bytes": found.kept,
        "estimated_checkpointed_bytes": found.checkpointed,
    }


# ---------------------------------------------------------------- for reading
def lines(data: dict[str, Any]) -> Iterator[str]:
    """A plan as text, line by line."""
    for side in filter(None, (data["backbone"], data["encoder"])):
        facts = [side["family"], f"{side['layers']} layers of width {side['hidden_size']:,}"]
        if side["attention_heads"]:
            facts.append(f"{side['attention_heads']} heads")
            if side["key_value_heads"] != side["attention_heads"]:
                facts[-1] += f" ({side['key_value_heads']} of keys and values)"
            facts.append(f"a window of {side['window']:,} positions")
        yield f"{side['name']}: {', '.join(facts)}"

    base = data["backbone"]["parameters"]
    names = {
        "projections": "projections",
        "sink": "sink",
        "encoder": f"encoder, {'a second copy' if data['encoder'] is None else data['encoder']['name']}",
        "lora_encoder": f"{data['learns']}, encoder",
        "lora_decoder": f"{data['learns']}, decoder",
    }
    yield "\nparameters"
    yield from _table(
        ["base", f"{base:,}"],
        *([names[key], f"{count:,}"] for key, count in data["added"].items()),
        ["in all", f"{data['parameters']:,}", f"{data['parameters'] / base - 1:.1%} more than the base"],
    )

    plain = data["reading"][0]
    yield f"\ncompressed context, segments of {data['segment_length']:,} tokens"
    yield f"  {data['position_bytes']:,} bytes a position, {data['dtype']}"
    yield from _table(
        ["", "longest text, tokens", f"KV cache of {plain['texts'][-1]['tokens']:,}"],
        *([_rate(r), f"{r['longest_text']:,}", _gb(r["texts"][-1]["kv_bytes"])] for r in data["reading"]),
    )
    yield f"  beside {data['reserve']:,} positions for a question and its answer"

    yield f"\nmemory to serve, {data['dtype']} weights and KV cache; what a pass works with comes on top"
    table = [["text, tokens", *(_rate(r) for r in data["reading"])]]
    for i, text in enumerate(plain["texts"]):
        cells = [r["texts"][i] for r in data["reading"]]
        table.append([f"{text['tokens']:,}", *(_gb(c["bytes"]) + (" " if c["fits"] else "*") for c in cells)])
    yield from _table(*table)
    if any("*" in cell for row in table for cell in row):
        yield "  * does not fit the window"

    first = data["training"][0]
    yield f"\nmemory to train, {first['texts']} text a batch and {first['decoder_tokens']} decoder tokens"
    table = [["what learns", "text, tokens", "rate", "state", "activations", "with checkpointing"]]
    for row in data["training"]:
        sizes = (f"about {_gb(row[f'estimated_{what}_bytes'])}" for what in ("activations", "checkpointed"))
        name = ", ".join([row["learns"], *(f"{side} frozen" for side in row["frozen"])])
        table.append([name, f"{row['context_tokens']:,}", _rate(row), _gb(row["state_bytes"]), *sizes])
    yield from _table(*table)
    yield "  state: weights, gradients and AdamW's moments; activations are estimates, and grow with the texts a batch"


def _rate(row: dict[str, Any]) -> str:
    return "plain" if row["rate"] is None else f"{row['rate']}×"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"


def _table(*rows: list[str]) -> Iterator[str]:
    """Rows of cells, the first column to the left, numbers to the right, a remark behind the second column as it is."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    for first, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=False)]
        yield "  ".join(["", first.ljust(widths[0]), *aligned]).rstrip()
