#!/usr/bin/env bash
# The paper's ablations (figure 3) at the scale of two cores: all layers against the last one, memory tokens as in ICAE,
# a Transformer against a Mamba encoder, and rates; reconstruction alone, the same texts, the same minutes each, all from
# the base without trained weights, contexts of 128 tokens (one segment), where copying is learnt soonest.
# docs/training-notes.md has what came out. Needs data/ (docs/training.md).
# usage: scripts/ablations_paper.sh OUT [MINUTES]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1; minutes=${2:-20}
export OMP_WAIT_POLICY=passive
arm() { # NAME [OVERRIDE …]
  [ -e "$out/$1/config.json" ] && return
  local sets=(); for value in "${@:2}"; do sets+=(--set "$value"); done
  local resume=(); [ -e "$out/$1/recipe.yaml" ] && resume=(--resume)
  .venv/bin/rcc train recipes/smollm2-135m-cpu.yaml --output "$out/$1" "${resume[@]}" \
    --set "stages.0.tasks={reconstruction: 1}" --set stages.0.max_minutes="$minutes" --set "model.rates=[4]" \
    --set "stages.0.lengths=[128]" --set stages.0.groups.all.learning_rate=1e-3 --set run.evaluate_minutes=0 "${sets[@]}"
}
# encoders of their own with random weights, as no Mamba's trained ones can be had offline: 12 layers each, about as many
# weights, all of them learn; the decoder is the same under LoRA
encoder() { # FAMILY
  [ -e "$out/encoders/$1/config.json" ] && return
  .venv/bin/python - "$out/encoders/$1" "$1" <<'PYTHON'
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from rcc import checkpoints
base = checkpoints.resolve_base("smollm2-135m-instruct")
shape = {"hidden_size": 576, "num_hidden_layers": 12, "vocab_size": 49152, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 2}
more = {"llama": {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}, "mamba": {"intermediate_size": 1152, "state_size": 16}}
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sys.argv[2], **shape, **more[sys.argv[2]]))
model.to(torch.bfloat16).save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(base).save_pretrained(sys.argv[1])
print(sys.argv[2], f"{sum(p.numel() for p in model.parameters()):,} parameters")
PYTHON
}
own=(model.decoder=smollm2-135m-instruct model.share_base=false model.encoder_lora_rank=0 model.decoder_lora_rank=16)
arm all
arm last model.states=last
arm icae model.states=last model.readout=memory_tokens
arm 8x "model.rates=[8]"
arm 16x "model.rates=[16]"
encoder llama && arm transformer "${own[@]}" model.encoder="$out/encoders/llama"
encoder mamba && arm mamba "${own[@]}" model.encoder="$out/encoders/mamba"
