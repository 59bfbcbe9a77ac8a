#!/usr/bin/env bash
# Trains the default recipe and variants of it for the same time each, one after the other, then measures all of them
# on the same held-out samples. docs/training-notes.md has what came out. Needs data/ (docs/training.md).
# usage: scripts/ablations.sh OUT [MINUTES]
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1; minutes=${2:-15}
arm() { # NAME [OVERRIDE …]
  [ -e "$out/$1/config.json" ] && return
  local sets=(); for value in "${@:2}"; do sets+=(--set "$value"); done
  local resume=(); [ -e "$out/$1/recipe.yaml" ] && resume=(--resume)
  .venv/bin/rcc train recipes/smollm2-135m-cpu.yaml --output "$out/$1" --init rcc-smollm2-135m "${resume[@]}" \
    --set stages.0.max_minutes="$minutes" --set run.evaluation_samples=0 "${sets[@]}"
}
arm base
arm targets-128 stages.0.target_tokens=128
arm rate-1e-3 stages.0.groups.all.learning_rate=1e-3
arm no-questions "stages.0.tasks={reconstruction: 0.86, continuation: 0.14}"
arm distilled stages.0.distillation.weight=0.5
arm segment-256 model.segment_length=256
arm one-rate "stages.0.rates=[8]"
arm targets-504 stages.0.target_tokens=504
.venv/bin/python scripts/measure.py rcc-smollm2-135m "$out"/*/ --recipe recipes/smollm2-135m-cpu.yaml | tee "$out/held_out.md"
