#!/usr/bin/env bash
# Trains the passkey model from the default model's first weights (commit e96c7ae), about seven hours on two cores: rates from low to high, then longer
# segments, then LoRA cut to small ranks, then keys in ever longer texts. A step that is finished is not repeated, one
# that was interrupted goes on (the last one begins again).
# usage: research/scripts/passkey.sh OUT
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1
export OMP_WAIT_POLICY=passive
. research/scripts/arm.sh
step() { # NAME INIT [OVERRIDE …]
  local sets=(); for value in "${@:3}"; do sets+=(--set "$value"); done
  arm recipes/smollm2-135m-passkey.yaml "$out/$1" --init "$2" "${sets[@]}"
}
first=$out/first
mkdir -p "$first"
for file in config.json model.safetensors; do
  [ -e "$first/$file" ] || git show "e96c7ae:src/rcc/models/rcc-smollm2-135m/$file" > "$first/$file"
done
rank16=(model.encoder_lora_rank=16 model.decoder_lora_rank=16)
stage() { # LENGTH BATCH_TOKENS MINUTES
  echo "stages=[{name: keys, tasks: {passkey: 1}, lengths: [$1], target_tokens: 64, batch_tokens: $2, max_minutes: $3, groups: {all: {learning_rate: 3.0e-4, warmup_steps: 10, schedule: constant}}}]"
}
step low "$first" "${rank16[@]}" model.segment_length=128 "model.rates=[4,8,16,32]" "$(stage 192 3072 20)"
step mid "$out/low" "${rank16[@]}" model.segment_length=128 "model.rates=[16,32,64,128]" "$(stage 192 3072 25)"
step long "$out/mid" "${rank16[@]}" "model.rates=[64,128,256,512]" "$(stage 1024 8192 30)"
[ -e "$out/small" ] || .venv/bin/python research/scripts/lora_rank.py "$out/long" "$out/small" --encoder 4 --decoder 2 --rates 512,128
step final "$out/small"
[ -e "$out/model" ] || .venv/bin/python research/scripts/passkey_decoder.py "$out/final" "$out/model"
