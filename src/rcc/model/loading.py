"""Models from backbones and from folders, and back into folders: stands above `rcc.py`, whose classmethods call it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import checkpoints
from ..config import BaseReference, RCCConfig
from ..context import file as fileformat
from ..errors import FileError, InputError, ModelError, RCCError
from ..runtime.precision import computing
from . import adapters, backbones, merging, packing
from .pretrained import RCCPreTrainedModel
from .rcc import RCCForCausalLM

WEIGHTS = "model.safetensors"
CHAT_START = "<|im_start|>system"


def from_base(
    encoder: str | Path | PreTrainedModel,
    decoder: str | Path | PreTrainedModel | None = None,
    config: RCCConfig | None = None,
    *,
    device: Any = None,
    dtype: Any = None,
    attn_implementation: str | None = None,
    **kwargs: Any,
) -> RCCForCausalLM:
    """Make an untrained model from pretrained backbones; see :meth:`RCCForCausalLM.from_base`."""
    config = copy.deepcopy(config) if config is not None else RCCConfig()
    config.decide(one_base=decoder is None)
    if config.share_base and decoder is not None:
        raise InputError("share_base needs one base for both sides: leave out the decoder, or set it to False.")
    load = {"dtype": dtype or "auto", "attn_implementation": attn_implementation, **kwargs}
    config.base = {}
    decoder_base = decoder if decoder is not None else encoder
    if config.direct and config.sink_token is None:
        config.sink_token = _first_token(decoder_base)
    decoder_model = _load_base(decoder_base, "decoder", config, load)
    encoder_model = None if config.share_base else _load_base(encoder, "encoder", config, load)
    model = RCCForCausalLM(config, encoder_model, decoder_model)
    if dtype not in (None, "auto"):  # backbones that were handed over are not loaded in it
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model.to(device) if device is not None else model


def from_pretrained(
    name: str | Path,
    *,
    device: Any = None,
    dtype: Any = None,
    attn_implementation: str | None = None,
    adapters: str = "separate",
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> RCCForCausalLM:
    """Load a trained model; see :meth:`RCCForCausalLM.from_pretrained`."""
    if adapters not in ("separate", "merged"):
        raise InputError(f"adapters={adapters!r} is unknown: use separate or merged.")
    folder = checkpoints.resolve_model(name)
    config = RCCConfig.load(folder)
    load = {"dtype": dtype or "auto", "attn_implementation": attn_implementation, **kwargs}
    paths = _bases(config, folder, progress)
    decoder = _load_backbone(paths["decoder"], "decoder", load)
    if checkpoints.weights_sha256(folder) != config.weights_sha256:
        raise ModelError(f"{folder / WEIGHTS} was changed: its SHA-256 is not the one in config.json.")
    own = packing.unpack(checkpoints.read_weights(folder))
    if adapters == "merged":
        target = decoder.device if device is None else device
        nn.Module.to(decoder, target, decoder.dtype if dtype is not None else computing(decoder.dtype, target))
        model = _merged(config, paths.get("encoder", paths["decoder"]), decoder, own, load)
    else:
        encoder = _load_backbone(paths["encoder"], "encoder", load) if "encoder" in paths else None
        model = RCCForCausalLM(config, encoder, decoder)
        model.load_own_state_dict(own)
        if device is not None:
            model.to(device)
    model.record_fingerprint(config.fingerprint)
    return model


def _bases(config: RCCConfig, folder: Path, progress: Callable[[str], None] | None) -> dict[str, Path]:
    """Return the folder of each side's base, whose weights are the right ones."""
    paths = {}
    for side, base in config.base.items():
        path = checkpoints.resolve_base(base.source, relative_to=folder, progress=progress)
        if checkpoints.weights_sha256(path) != base.sha256:
            raise ModelError(
                f"{path} is not the base that {config.name} was trained on (its weights have another SHA-256):"
                " get the original one."
            )
        paths[side] = path
        if path.is_relative_to(folder):  # saved elsewhere, the reference must still lead here
            base.source = str(path.absolute())
    if "decoder" not in paths:
        raise ModelError(f"{folder / 'config.json'} names no base for the decoder: save the model again.")
    return paths


def _merged(
    config: RCCConfig, encoder_path: Path, decoder: PreTrainedModel, own: dict[str, Tensor], load: dict[str, Any]
) -> RCCForCausalLM:
    """Make a model for inference: LoRA merged on both sides, the encoder read when it is first used.

    Args:
        config: of the model.
        encoder_path: folder of the encoder's base.
        decoder: its base, on its device and in the precision to compute in.
        own: the weights that are the model's own.
        load: arguments of transformers' `from_pretrained`.
    """
    lora, rest = merging.split_lora(own)

    def merge(side: str, body: PreTrainedModel, prefix: str, layers: list[str]) -> None:
        matrices = {name[len(prefix) :]: tensor for name, tensor in lora.items() if name.startswith(f"{side}.")}
        rank = config.sides[side].lora_rank
        merging.merge_lora(body, layers if rank else [], matrices, adapters.lora_scale(config, rank) if rank else 0.0)

    def read_encoder() -> PreTrainedModel:
        body = _load_backbone(encoder_path, "encoder", load)
        nn.Module.to(body, decoder.device, decoder.dtype)
        if config.share_base:
            body.set_input_embeddings(decoder.get_input_embeddings())
        merge("encoder", body, "encoder.", adapters.encoder_lora_layers(body, config, max(model.projections.states)))
        return body

    body = backbones.body(decoder)
    prefix = f"decoder.{decoder.base_model_prefix}." if body is not decoder else "decoder."
    merge("decoder", body, prefix, backbones.linear_names(body))
    settings = body.config if config.share_base else checkpoints.load_config(encoder_path)[0]
    model = RCCForCausalLM(config, merging.DeferredEncoder(settings, read_encoder), decoder)
    model.load_own_state_dict(rest)
    model.requires_grad_(False)
    return model


def save_pretrained(
    model: RCCPreTrainedModel,
    folder: str | Path,
    full: bool = False,
    dtype: torch.dtype | None = None,
    eight_bits: Collection[str] = (),
) -> None:
    """Write a model's folder; see :meth:`RCCForCausalLM.save_pretrained`."""
    if model.merged:
        raise InputError('the model has merged adapters: load it with adapters="separate" to save it.')
    folder = Path(folder)
    packed = packing.pack(model.own_state_dict(), eight_bits)
    if eight_bits:
        model.load_own_state_dict(packing.unpack(packed))
    config = copy.deepcopy(model.config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for side in ("decoder",) if config.share_base else ("decoder", "encoder"):
            if full or not config.is_frozen(side) or side not in config.base:
                _save_base(getattr(model, side), model.config.base.get(side), folder / side, dtype)
                config.base[side] = BaseReference(side, checkpoints.weights_sha256(folder / side))
        _write_weights({k: t if packing.is_packed(k) else t.to(dtype=dtype) for k, t in packed.items()}, folder)
        config.weights_sha256 = checkpoints.weights_sha256(folder)
        config.fingerprint = model.fingerprint if dtype is None else model.compute_fingerprint(dtype)
        config.save(folder)
    except OSError as error:
        raise FileError(f"{folder} cannot be written: {error.strerror or error}.") from error


def _save_base(
    module: PreTrainedModel, reference: BaseReference | None, folder: Path, dtype: torch.dtype | None
) -> None:
    """Write one side's base, without LoRA, as an ordinary transformers folder, with its tokenizer where it has one.

    Args:
        module: a decoder with its head, or an encoder without.
        reference: where the base came from, and with it its tokenizer; None: not from a folder.
        folder: is made where there is none.
        dtype: of the weights that are written; None: as they are.
    """
    state = {}
    for name, tensor in module.state_dict().items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = tensor
    has_head = module.get_output_embeddings() is not None
    if has_head and module.config.tie_word_embeddings:
        tied = id(module.get_input_embeddings().weight)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) == tied and name.startswith("lm_head"):
                state.pop(name, None)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights({k: v.to(dtype=dtype).contiguous() for k, v in state.items()}, folder)
    settings = copy.deepcopy(module.config)
    settings.dtype = dtype or module.dtype  # which `to` does not tell it
    settings.save_pretrained(folder)
    if has_head:
        module.generation_config.save_pretrained(folder)
    if reference is not None:
        with contextlib.suppress(ModelError):  # a base without a tokenizer stays one
            source = checkpoints.resolve_base(reference.source)
            try:
                checkpoints.load_tokenizer(source).save_pretrained(folder)
            except RCCError:
                raise
            except Exception as error:  # how a full disk shows itself on the Rust side
                raise OSError(str(error)) from error


def _write_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Write a folder's weights, whole or not at all."""
    fileformat.write_weights(folder / WEIGHTS, {name: fileformat.lazy(tensor) for name, tensor in state.items()})


def _load_base(
    source: str | Path | PreTrainedModel, side: str, config: RCCConfig, load: dict[str, Any]
) -> PreTrainedModel:
    """Load a backbone for :func:`from_base`; one that comes from a folder is noted in the config."""
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
    """Return the token that a chat begins with, which the base rests its attention on.

    That is the chat form's first, by the base's tokenizer; of a model that was handed over, its begin token, else 0.
    """
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
