#!/bin/sh
# Packs what shows the CUDA backend at work into gpu-kit/: programs, op tests, benches, small models and their references.
# The folder runs on a machine that has a driver and cuBLASLt and nothing else of ours: `sh gpu-kit/run.sh [OUT_DIR]`.
set -eu

cargo=${CARGO:-cargo}
kit=gpu-kit
bin=${CARGO_TARGET_DIR:-target}/release

$cargo build --release --locked --bins
$cargo build --release --locked -p models --features cuda --examples
tests=$($cargo test --release --locked -p backend --features cuda --test ops --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -1)

rm -rf "$kit"
mkdir -p "$kit/bin" "$kit/models"
for program in launcher shard router benchmark examples/check_golden examples/random_model examples/step_bench; do
    strip -o "$kit/bin/$(basename "$program")" "$bin/$program"
done
strip -o "$kit/bin/op_tests" "$tests"
cp -r integration-tests/fixtures/tiny-llama "$kit/models/"
cp shard/models/examples/random_model/*.json "$kit/models/"
cp scripts/gpu_run.sh "$kit/run.sh"

size=$(du -sm "$kit" | cut -f1)
echo "$kit: $size MiB"
[ "$size" -lt 64 ] || { echo "gpu_kit: expected less than 64 MiB; build for fewer architectures (QUARTET_CUDA_ARCHITECTURES)" >&2; exit 1; }
