"""Which language models' KV pairs can be selected, and of which not; and how they are loaded for that."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ... import checkpoints
from ...errors import ModelError
from ...runtime.precision import computing
from .. import backbones

NO_PAIRS = {"linear_attention", "mamba", "conv", "recurrent"}
"""What configurations call layers that hold a state instead of KV pairs."""


def check_family(config: PreTrainedConfig) -> None:
    """Raise ModelError unless models of a configuration can be read so."""
    family = config.model_type
    kinds = set(getattr(config, "layer_types", None) or ())
    if family in backbones.STATE_SPACE or kinds & NO_PAIRS:
        raise ModelError(f"{family!r} has state-space layers, which have no KV pairs to choose: use another model.")
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(f"{family!r} has latent attention, which keeps no keys to choose from: use another model.")
    if family not in backbones.BLOCKS and not getattr(config, "rope_parameters", None):
        raise ModelError(f"{family!r} has no rotary positions, so what is kept cannot be moved: use another model.")
    backbones.check_family(config, "decoder")


def load_decoder(
    folder: Path, device: Any, dtype: torch.dtype | None, **settings: Any
) -> tuple[PreTrainedModel, torch.dtype | None]:
    """Load a causal language model's folder, or GGUF file; see :meth:`Selection.from_pretrained`.

    Returns:
        The model, and the precision that its weights are stored in (None: the one that they are in).
    """
    config, _ = checkpoints.load_config(folder)
    check_family(config)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else None
    if dtype is None and stored is not None:
        dtype = computing(stored, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device is not None and getattr(config, "quantization_config", None):
        settings.setdefault("device_map", {"": device})  # some quantized weights cannot move once they are loaded
    decoder = checkpoints.load_backbone(folder, True, config, dtype=dtype or "auto", **settings)
    if device is not None and "device_map" not in settings:
        decoder.to(device)
    check_devices(decoder)
    return decoder, stored


def hash_weights(decoder: PreTrainedModel) -> str:
    """Return the SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(decoder.state_dict().items()):
        checkpoints.add_tensor(digest, name, tensor)
    return digest.hexdigest()


def check_devices(decoder: PreTrainedModel) -> None:
    """Raise ModelError where accelerate left some of a model's weights outside the devices that compute."""
    devices = set(map(str, getattr(decoder, "hf_device_map", {}).values()))
    if len(devices) > 1 and devices & {"cpu", "disk"}:
        raise ModelError(
            f"{decoder.name_or_path} does not fit into the GPUs' memory: use more of them or quantized weights."
        )
