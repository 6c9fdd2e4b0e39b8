#!/usr/bin/env bash
# Everything that is measured, on one provider: results into a folder, named by today's date.
#
#   benchmarks/run.sh cpu
#   benchmarks/run.sh cuda [OUT]              # a visit: all that a quarter of an hour can tell
#   benchmarks/run.sh cuda --dry-run [OUT]    # every stage of it on the CPU, in tiny
#   QUICK=1 benchmarks/run.sh cpu /tmp/out    # small shapes, to see that all of it runs
#
# On a machine with a GPU and no network: see python -m visit --help (PYTHONPATH=benchmarks), and
# bring along what `--make` made, as benchmarks/artifacts or in ARTIFACTS.
#
# Then, for the README's tables and plots: put the new names into its markers and run
# benchmarks/render.py.
set -euo pipefail
provider=${1:?cpu or cuda}
shift
here=$(dirname "$0")
if [ "$provider" = cuda ]; then
  export PYTHONPATH=$here:$here/..${PYTHONPATH:+:$PYTHONPATH}
  artifacts=${ARTIFACTS:-$here/artifacts}
  visit=(--provider cuda)
  if [ "${1:-}" = --dry-run ]; then
    shift
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    artifacts=$scratch/artifacts
    visit=(--provider cpu --tiny)
    python -m visit "${visit[@]}" --make "$artifacts"
  fi
  out=${1:-${scratch:-benchmarks/results}}
  mkdir -p "$out"
  if [ -d "$artifacts" ]; then visit+=(--artifacts "$artifacts"); fi
  python -m visit "${visit[@]}" --out "$out"
  python -m visit --out "$out" --collect "$out/$(date +%F)-visit.json"
  exit
fi
out=${1:-benchmarks/results}
name=$out/$(date +%F)
mkdir -p "$out"

if [ -n "${QUICK:-}" ]; then
  shape=(--hidden 64 --heads 4 --kv-heads 2 --rounds 2)
  wide=("${shape[@]}") lengths=16,64 long=96 window=16 windows=32,96 rotation=1,4,64,32 rounds=2
else
  shape=(--kv-heads 8) wide=(--hidden 2048 --heads 32 --kv-heads 8 --rounds 60)
  lengths=128,512,1024,2048,4096 long=16384 window=512 windows=1024,16384 rotation=1,32,4096,128 rounds=15
fi

bench() { # NAME OPTION...
  echo "== $1: rope-export bench ${*:2}"
  rope-export bench --provider "$provider" "${@:2}" --json > "$name-$1-$provider.json.tmp"
  mv "$name-$1-$provider.json.tmp" "$name-$1-$provider.json"
}

rope-export doctor --provider "$provider"
bench prefill "${shape[@]}" --seq "$lengths" --phase prefill --peers
bench decode "${wide[@]}" --seq "${lengths##*,}" --phase decode --peers
bench long "${shape[@]}" --seq $long --phase prefill --only eager,compile,ort --rounds 2
bench window "${shape[@]}" --seq $long --window $window --phase prefill --only eager,ort --rounds 2
bench window-decode --hidden 256 --heads 32 --kv-heads 8 --head-dim 64 --window $window \
  --seq "$windows" --phase decode --only eager,ort,ort-window-cache
bench integers-decode "${shape[@]}" --seq "${lengths##*,}" --phase decode \
  --only eager,ort,ort-int8-cache,ort-int4-cache
contenders=rotate_pairs,module,round_last,complex,transformers,rotary-embedding-torch
for strides in contiguous transposed; do
  python "$here/rotation.py" --device "$provider" --shape $rotation --rounds $rounds \
    --strides $strides --only "$contenders" --json "$name-rotation-$provider-$strides.json"
done
train=()
if [ -n "${QUICK:-}" ]; then
  train=(--seq 64 --hidden 64 --heads 4 --kv-heads 2)
fi
python "$here/train.py" --device "$provider" --rounds $rounds "${train[@]}" \
  --json "$name-train-$provider.json"
