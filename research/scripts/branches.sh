#!/usr/bin/env bash
# Trains the default recipe in two runs side by side, a core each, from the same weights, and averages what they end with:
# on two cores more than one run of both brings in the same time (research/2026-11-25-seventh-weights.md). One reads its own predictions
# in seven of ten samples of reconstruction at 4x, the other the true text and more of the high rates. 15 GB of memory
# in all. Needs data/ (docs/training.md). Interrupted, the same command goes on.
# usage: research/scripts/branches.sh OUT [START [MINUTES [SEED [WEIGHTS]]]]    WEIGHTS: of the two in the mean
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1; start=${2:-rcc-smollm2-135m}; minutes=${3:-90}; seed=${4:-1}; weights=${5:-0.35,0.65}
export OMP_WAIT_POLICY=passive
. research/scripts/arm.sh
mkdir -p "$out"
branch() { # NAME SEED [OVERRIDE …]
  local sets=(); for value in "${@:3}"; do sets+=(--set "$value"); done
  arm recipes/smollm2-135m-cpu.yaml "$out/$1" --init "$start" --set stages.0.max_minutes="$minutes" --set seed="$2" \
    --set run.threads=1 --set run.compile=true --set run.attention=eager --set run.evaluation_samples=2 \
    --set run.evaluate_minutes=200 "${sets[@]}" > "$out/$1.txt" 2>&1
}
qa="data/qa_train_open_*.jsonl.xz"
task=stages.0.tasks.reconstruction
branch predicted "$seed" "$task.rates=[4, 4, 4, 8, 8]" $task.wrong=0 $task.predicted=0.7 "$task.predicted_rates=[4]" $task.passes=6 &
first=$!
branch true $((seed + 1)) "data.text=[{path: 'data/text_train_[bd]*.jsonl.xz'}, {path: '$qa', text: context, include: [clara_wiki, hotpotqa, musique], weight: 0.3}]" &
second=$!
echo "progress: $out/predicted.txt and $out/true.txt"
wait $first; wait $second
[ -e "$out/model" ] || .venv/bin/python research/scripts/average.py "$out/model" "$out/predicted" "$out/true" --rates 4,8,16 --weights "$weights"
.venv/bin/python research/scripts/measure.py "$start" "$out/model" --recipe recipes/smollm2-135m-cpu.yaml --samples 16 \
  --set "stages.0.lengths=[512]" --set "stages.0.tasks={reconstruction: 1}" | tee "$out/held_out.md"
