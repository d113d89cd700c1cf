#!/usr/bin/env bash
# Everything that needs a GPU, in stages; each leaves a log and its results in OUT.
#
#   bash benchmarks/on_gpu.sh                      # all stages
#   OUT=/tmp/gpu bash benchmarks/on_gpu.sh suite sanitizer
#
# LIMIT_<stage>=seconds changes a stage's time limit. A stage that fails does not stop the next one;
# the exit status is the number of stages that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
stages=${*:-suite sanitizer op plots profile models train parity attention host plan recipe lra}
failed=0

sanitizer() {
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  check() {
    echo "-- $*"
    compute-sanitizer --tool "$1" --error-exitcode 9 python3 tests/sanitize.py "${@:2}"
  }
  check memcheck && check synccheck &&
    check racecheck --paths sm90 --dtypes bfloat16 --block-sizes 32 64 128 &&
    check racecheck --paths sm80 --dtypes bfloat16 float32 --block-sizes 16 64 &&
    check initcheck --parts linear layer-norm --paths sm80 --dtypes bfloat16 float32 # reports what TMA stored as never written
}
suite() { python3 -m pytest -m gpu -q -rs --tb=short; }
op() { python3 benchmarks/op.py --out "$OUT/op.json"; }
plots() { python3 benchmarks/op_plots.py "$OUT/op.json"; }
profile() { python3 benchmarks/kernel_profile.py --out "$OUT/kernel_profile.json"; }
models() { python3 benchmarks/models.py --fuse-mlp --fuse-blocks --fuse-loss --out "$OUT/models.json"; }
host() { python3 benchmarks/host.py --compile --out "$OUT/host.json"; }
plan() { python3 benchmarks/plan.py --out "$OUT/plan.json"; }
recipe() { python3 benchmarks/recipe.py --time-limit 560 --out "$OUT/recipe.json"; }
lra() { python3 benchmarks/lra.py --mode speed --compile --graph --out "$OUT/lra.json"; }
attention() { python3 benchmarks/attention.py --out "$OUT/attention.json"; }
train() {
  python3 benchmarks/train.py --data fashion-mnist --model mixer --width 512 --layers 4 \
    --patch-size 4 --block-size 64 --batch 256 --steps 3000 --amp --out "$OUT/mixer" &&
    python3 benchmarks/train.py --data fashion-mnist --model vit_tiny_patch16_224 \
      --patch-size 4 --block-size 16 --batch 256 --steps 3000 --amp --out "$OUT/vit"
}
parity() {
  python3 benchmarks/parity.py --data fashion-mnist --width 512 --block-size 64 --amp \
    --out "$OUT/parity"
}

export -f sanitizer suite op plots profile models train parity attention host plan recipe lra
export OUT PYTHONUNBUFFERED=1
for stage in $stages; do
  limit="LIMIT_$stage"
  start=$SECONDS
  timeout "${!limit:-580}" bash -c "$stage" > "$OUT/$stage.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  echo "== $stage: exit $status, $((SECONDS - start)) s"
  tail -n 5 "$OUT/$stage.log"
done
exit $failed
