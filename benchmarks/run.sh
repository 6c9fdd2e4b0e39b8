#!/usr/bin/env bash
# Everything that is measured, on one provider: results into a folder, named by today's date.
#
#   benchmarks/run.sh cpu
#   benchmarks/run.sh cuda            # proofs of every target and dtype first
#   QUICK=1 benchmarks/run.sh cpu /tmp/out    # small shapes, to see that all of it runs
#
# What a quarter of an hour on CUDA can tell: PYTHONPATH=benchmarks python -m visit --help
#
# Then, for the README's tables and plots: put the new names into its markers and run
# benchmarks/render.py.
set -euo pipefail
provider=${1:?cpu or cuda}
out=${2:-benchmarks/results}
here=$(dirname "$0")
name=$out/$(date +%F)
mkdir -p "$out"

if [ -n "${QUICK:-}" ]; then
  shape=(--hidden 64 --heads 4 --kv-heads 2 --rounds 2)
  wide=("${shape[@]}") lengths=16,64 long=96 window=16 proof=48 rotation=1,4,64,32 rounds=2
else
  shape=(--kv-heads 8) wide=(--hidden 2048 --heads 32 --kv-heads 8 --rounds 60)
  lengths=128,512,1024,2048,4096 long=16384 window=512 proof=4096 rotation=1,32,4096,128 rounds=15
fi

bench() { # NAME OPTION...
  echo "== $1: rope-export bench ${*:2}"
  rope-export bench --provider "$provider" "${@:2}" --json > "$name-$1-$provider.json.tmp"
  mv "$name-$1-$provider.json.tmp" "$name-$1-$provider.json"
}

rope-export doctor --provider "$provider"
if [ "$provider" = cuda ]; then
  python "$here/providers.py" --provider cuda --seq $proof --json "$name-proof-cuda.json"
  dtypes=(float16 bfloat16 float32)
  lengths=$lengths,$long
else
  dtypes=(float32)
fi
for dtype in "${dtypes[@]}"; do
  suffix=$([ "$dtype" = float32 ] || echo "-$dtype")
  bench "prefill$suffix" "${shape[@]}" --dtype "$dtype" --seq "$lengths" --phase prefill --peers
  bench "decode$suffix" "${wide[@]}" --dtype "$dtype" --seq "${lengths##*,}" --phase decode --peers
done
if [ "$provider" = cpu ]; then
  bench long "${shape[@]}" --seq $long --phase prefill --only eager,compile,ort --rounds 2
  bench window "${shape[@]}" --seq $long --window $window --phase prefill --only eager,ort --rounds 2
fi
contenders=rotate_pairs,module,round_last,complex,transformers,rotary-embedding-torch
for strides in contiguous transposed; do
  python "$here/rotation.py" --device "$provider" --shape $rotation --rounds $rounds \
    --strides $strides --only "$contenders" --json "$name-rotation-$provider-$strides.json"
done
train=()
if [ -n "${QUICK:-}" ]; then
  train=(--seq 64 --hidden 64 --heads 4 --kv-heads 2)
elif [ "$provider" = cuda ]; then
  train=(--dtype bfloat16 --seq 4096)
fi
python "$here/train.py" --device "$provider" --rounds $rounds "${train[@]}" \
  --json "$name-train-$provider.json"
