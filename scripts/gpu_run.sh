#!/bin/sh
# Runs on the machine with the GPU what gpu_kit.sh packed: correctness first, then steps of models with random weights in real
# shapes. JSON and logs go to OUT_DIR (default: results). Models are written to memory (MODELS, default /dev/shm/quartet-models).
set -u

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-results}
models=${MODELS:-/dev/shm/quartet-models}
mkdir -p "$out" "$models"
failures=0
step() {
    name=$1
    shift
    echo "== $name"
    "$@" >"$out/$name.txt" 2>&1 || { failures=$((failures + 1)); echo "FAILED: $name"; }
    tail -n 12 "$out/$name.txt"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/gpu.txt"
step op-tests "$here/bin/op_tests" --test-threads 1
# By itself: its process has no use of the GPU afterwards.
step fault "$here/bin/op_tests" --ignored a_fault
# Half a minute: as long as a rank waits for one that is gone.
step lost-rank "$here/bin/op_tests" --ignored a_rank_that_is_gone
step tiny-llama "$here/bin/check_golden" "$here/models/tiny-llama" "$here/models/tiny-llama/golden.json" --device cuda --dtype float32
for size in 3.2-1b 3.1-8b; do
    step "make-$size" "$here/bin/random_model" "$here/models/llama-$size.json" "$models/llama-$size"
    step "steps-$size" "$here/bin/step_bench" "$models/llama-$size" --json "$out/steps-$size.json"
done
[ "$failures" -eq 0 ]
