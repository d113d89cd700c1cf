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
stages=${*:-suite sanitizer op plots models train parity attention}
failed=0

sanitizer() {
  for tool in memcheck racecheck synccheck initcheck; do
    echo "-- $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 tests/sanitize.py || return 1
  done
}
suite() { python3 -m pytest -m gpu -q -rs --tb=short; }
op() { python3 benchmarks/op.py --out "$OUT/op.json"; }
plots() { python3 benchmarks/op_plots.py "$OUT/op.json"; }
models() { python3 benchmarks/models.py --out "$OUT/models.json"; }
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

export -f sanitizer suite op plots models train parity attention
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
