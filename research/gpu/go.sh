#!/usr/bin/env bash
# go.sh start SECONDS [options]: train.py in a session of its own, outliving the call; go.sh wait SECONDS: until it has ended, or so long; then the newest state in $OUT
set -uo pipefail
cd "$(dirname "$0")"; export PYTHONUNBUFFERED=1; : "${OUT:?}"
pieces() { split -b 15000000 -d "$1" "$OUT/$1." && sha256sum "$1" > "$OUT/$1.sha256"; }
if [ "$1" = start ]; then
  seconds=$2; shift 2; setsid nohup python3 train.py . --seconds "$seconds" "$@" > train.log 2>&1 < /dev/null &
  exit 0
fi
for ((i = 0; i < $2; i++)); do [ -e ended ] && break; pgrep -f train.py > /dev/null || break; sleep 1; done
[ -e ended ] && sleep "${3:-0}"
cp train.log "$OUT/"; tail -n "${4:-20}" train.log
[ -e state.safetensors ] && python3 pack.py small && pieces small.safetensors
ls -la "$OUT"
