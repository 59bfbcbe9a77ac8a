"""Which language models' KV pairs can be selected, and of which not: by their family, and by where they are."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import ModelError
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


def check_devices(decoder: PreTrainedModel) -> None:
    """Raise ModelError where accelerate left some of a model's weights outside the devices that compute."""
    devices = set(map(str, getattr(decoder, "hf_device_map", {}).values()))
    if len(devices) > 1 and devices & {"cpu", "disk"}:
        raise ModelError(
            f"{decoder.name_or_path} does not fit into the GPUs' memory: use more of them or quantized weights."
        )
