#!/usr/bin/env bash
# The paper's ablations (figure 3) at the scale of a CPU: all layers against the last one, memory tokens as in ICAE,
# a Transformer against a Mamba encoder, and rates; reconstruction alone, the same texts, the same minutes each, all from
# the base without trained weights, contexts of 128 tokens (one segment), where copying is learnt soonest.
# The arms named run side by side, one thread each: as many as there are cores, all at once, so that none has it quieter.
# research/2026-11-22-paper-ablations.md has what came out. Needs data/ (docs/training.md). Interrupted, the same command goes on.
# usage: research/scripts/ablations_paper.sh OUT MINUTES ARM…      arms: all last icae 8x 16x transformer mamba
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1; minutes=$2; shift 2
. research/scripts/arm.sh
variant() { # NAME [OVERRIDE …]
  local sets=(); for value in "${@:2}"; do sets+=(--set "$value"); done
  arm recipes/smollm2-135m-cpu.yaml "$out/$1" --set "stages.0.tasks={reconstruction: 1}" --set "model.rates=[4]" \
    --set stages.0.max_minutes="$minutes" --set "stages.0.lengths=[128]" --set stages.0.batch_tokens=1024 \
    --set stages.0.groups.all.learning_rate=1e-3 --set run.evaluate_minutes=0 --set run.threads=1 "${sets[@]}" \
    > "$out/$1.txt" 2>&1
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
run() { # NAME
  case $1 in
    all) variant all ;;
    last) variant last model.states=last ;;
    icae) variant icae model.states=last model.readout=memory_tokens ;;
    8x) variant 8x "model.rates=[8]" ;;
    16x) variant 16x "model.rates=[16]" ;;
    transformer) encoder llama && variant transformer "${own[@]}" model.encoder="$out/encoders/llama" ;;
    mamba) encoder mamba && variant mamba "${own[@]}" model.encoder="$out/encoders/mamba" ;;
    *) echo "$0: no arm '$1': all last icae 8x 16x transformer mamba" >&2; return 2 ;;
  esac
}
mkdir -p "$out"
pids=()
for name in "$@"; do run "$name" & pids+=($!); done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=$?; done
exit $failed
