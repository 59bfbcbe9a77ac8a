#!/usr/bin/env bash
# Trains the default recipe and variants of it for the same time each, one after the other, then measures all of them
# on the same held-out samples. research/2026-11-21-recipe-ablations.md has what came out. Needs data/ (docs/training.md).
# usage: research/scripts/ablations.sh OUT [MINUTES]
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1; minutes=${2:-15}
. research/scripts/arm.sh
variant() { # NAME [OVERRIDE]
  arm recipes/smollm2-135m-cpu.yaml "$out/$1" --init rcc-smollm2-135m --set run.evaluation_samples=0 \
    --set stages.0.max_minutes="$minutes" ${2:+--set "$2"}
}
variant base
variant targets-128 stages.0.target_tokens=128
variant rate-1e-3 stages.0.groups.all.learning_rate=1e-3
variant no-questions "stages.0.tasks={reconstruction: 0.86, continuation: 0.14}"
variant distilled stages.0.distillation.weight=0.5
variant segment-128 model.segment_length=128
variant one-rate "stages.0.rates=[8]"
variant targets-256 stages.0.target_tokens=256
.venv/bin/python research/scripts/measure.py rcc-smollm2-135m "$out"/*/ --recipe recipes/smollm2-135m-cpu.yaml | tee "$out/held_out.md"
