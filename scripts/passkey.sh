#!/usr/bin/env bash
# Trains the passkey model from the default one, about four hours on two cores: rates from low to high, then longer
# segments, then LoRA cut to small ranks. A step that is finished is not repeated, one that was interrupted goes on.
# usage: scripts/passkey.sh OUT
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1
export OMP_WAIT_POLICY=passive
step() { # NAME INIT [OVERRIDE …]
  [ -e "$out/$1/config.json" ] && return
  local sets=(); for value in "${@:3}"; do sets+=(--set "$value"); done
  local resume=(); [ -e "$out/$1/recipe.yaml" ] && resume=(--resume)
  .venv/bin/rcc train recipes/smollm2-135m-passkey.yaml --output "$out/$1" --init "$2" "${resume[@]}" "${sets[@]}"
}
rank16=(model.encoder_lora_rank=16 model.decoder_lora_rank=16 stages.0.groups.all.learning_rate=3e-4 stages.0.groups.all.schedule=constant)
short=(model.segment_length=128 "stages.0.lengths=[192]" stages.0.batch_tokens=3072)
step low rcc-smollm2-135m "${rank16[@]}" "${short[@]}" "model.rates=[4,8,16,32]" stages.0.max_minutes=20
step mid "$out/low" "${rank16[@]}" "${short[@]}" "model.rates=[16,32,64,128]" stages.0.max_minutes=25
step long "$out/mid" "${rank16[@]}" "model.rates=[64,128,256,512]" "stages.0.lengths=[1024]" stages.0.batch_tokens=8192 stages.0.max_minutes=30
[ -e "$out/small" ] || .venv/bin/python scripts/shrink_lora.py "$out/long" "$out/small" --encoder 4 --decoder 2 --rates 512,128
step final "$out/small"
