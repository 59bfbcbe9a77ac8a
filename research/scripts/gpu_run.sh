#!/usr/bin/env bash
# On a lent GPU, when all of .gpu/1 … lies in /tmp/rcc-gpu: sets up once, trains, and within MINUTES of its start has handed
# over the newest model in $OUT, in pieces, whatever happens. Repeat it: it goes on where it stopped.
# usage: research/scripts/gpu_run.sh MINUTES [KEY=VALUE …]     the recipe's settings to change (rcc train --set), the same each time
set -euo pipefail
cd "$(dirname "$0")/../.."
repo=$PWD; work=${RCC_GPU:-/tmp/rcc-gpu}; recipe=$repo/recipes/smollm2-135m-gpu.yaml
end=$(awk -v m="${1:?how many minutes?}" 'BEGIN {print int(60 * m)}'); shift
sets=(); for value in "$@"; do sets+=(--set "$value"); done
export RCC_HOME=$work/home PYTHONPATH=$work/site:$repo/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=$work/inductor HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true COLUMNS=200
cd "$work"; mkdir -p "${OUT:?the folder to hand over in}"

hand_over() {
  status=$?; trap - EXIT; kill $(jobs -p) 2> /dev/null || true
  [ ! -e run/log.jsonl ] || cp run/log.jsonl "$OUT/"
  rm -rf model model.tar
  if [ -d run/stages ] && python3 "$repo/research/scripts/export.py" run model --init init; then
    cp run/recipe.yaml model/; tar -cf model.tar model
    split -b 15m -d -a 1 model.tar "$OUT/model.part."; sha256sum model.tar | tee "$OUT/model.sha256"
  else
    echo "there is no model to hand over"
  fi
  echo "status $status after $SECONDS s"; exit "$status"
}
trap hand_over EXIT

if [ ! -e ready ]; then
  cat part.? > payload.tar; sha256sum -c payload.sha256; tar -xf payload.tar
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target site wheels/*.whl
  # the base, then every source's tokens, each in a process of its own
  python3 - "$recipe" "$@" <<'PYTHON'
import sys
from concurrent.futures import ProcessPoolExecutor

from rcc import checkpoints
from rcc.data.corpus import open_questions, open_text
from rcc.training.recipe import Recipe


def tokens(kind: str, number: int) -> str:
    source = getattr(Recipe.load(sys.argv[1], sys.argv[2:]).data, kind)[number]
    corpus = (open_text if "text" in kind else open_questions)(source, checkpoints.load_tokenizer("./init"))
    return f"{kind} {number}: {len(corpus):,} rows, {corpus.tokens_total / 1e6:.1f}M tokens"


checkpoints.ensure_base("smollm2-135m-instruct", print)
data = Recipe.load(sys.argv[1], sys.argv[2:]).data
kinds = ("text", "questions", "evaluation_text", "evaluation_questions")
jobs = [(kind, number) for kind in kinds for number in range(len(getattr(data, kind)))]
with ProcessPoolExecutor(len(jobs)) as pool:
    for line in pool.map(tokens, *zip(*jobs)):
        print(line)
PYTHON
  rm payload.tar; touch ready; echo "set up after $SECONDS s"
fi

# 70 s are left for the step being taken, the checkpoint and the handing over
left=$((end - SECONDS - 70)); [ "$left" -gt 0 ] || { echo "no time is left to train"; exit 1; }
nvidia-smi --query-gpu=name,memory.used,utilization.gpu --format=csv,noheader -l 60 2> /dev/null &
resume=(); [ ! -e run/recipe.yaml ] || resume=(--resume)
# --foreground: else the processes that prepare batches get the signal too, and there is nothing left to save with
timeout --foreground -k 30 -s TERM "$left" \
  python3 -m rcc train "$recipe" --output run --init ./init "${resume[@]}" "${sets[@]}" || [ $? = 124 ]  # time is up
