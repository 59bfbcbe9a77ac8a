#!/usr/bin/env bash
# Checks rcc on a GPU in one call of at most four minutes: nothing is fetched, no weights are needed.
#
# usage: scripts/gpu_check.sh [cuda|cpu] [SECONDS]
#
# 1. equality: a tiny model on the device beside the same one on the CPU, both prefixes, float32 and bfloat16
# 2. speed: `compress` beside the encoder alone, both prefixes, and the first token from a stored context
# 3. memory: `rcc eval resources` of the paper's pair, 1M and 2M tokens, both prefixes, beside the paper's 29.9 and 64.9 GB
#
# Parts that no longer fit into SECONDS are left out, and said. With `cpu` the CPU stands in for the GPU, on a small shape.
# Everything is printed; what is printed also goes to $OUT, where that is set. On a bare machine that lacks a package, carry
# its wheels in .whl (platformdirs, say): they are installed from there.
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda}; seconds=${2:-225}  # and what starting and ending take
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G ".whl/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --target /tmp/gpu-check-packages .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:/tmp/gpu-check-packages"
fi
"$python" scripts/gpu_check.py "$device" "$seconds" 2>&1 | tee "${OUT:-/tmp}/gpu_check.log"
