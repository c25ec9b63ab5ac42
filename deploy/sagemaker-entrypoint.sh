#!/bin/sh
# How Amazon SageMaker starts the image: the model comes in SageMaker's variables, the port is always 8080.
set -eu

if [ -z "${HF_MODEL_ID:-}" ]; then
    echo "HF_MODEL_ID must be set" >&2
    exit 1
fi
export MODEL_ID="$HF_MODEL_ID"
if [ -n "${HF_MODEL_REVISION:-}" ]; then
    export REVISION="$HF_MODEL_REVISION"
fi
# 0 on instances without GPUs, where the launcher decides.
if [ -n "${SM_NUM_GPUS:-}" ] && [ "$SM_NUM_GPUS" != 0 ]; then
    export NUM_SHARD="$SM_NUM_GPUS"
fi
if [ -n "${HF_MODEL_QUANTIZE:-}" ]; then
    export QUANTIZE="$HF_MODEL_QUANTIZE"
fi
if [ -n "${HF_MODEL_TRUST_REMOTE_CODE:-}" ]; then
    TRUST_REMOTE_CODE=$(printf '%s' "$HF_MODEL_TRUST_REMOTE_CODE" | tr '[:upper:]' '[:lower:]')
    export TRUST_REMOTE_CODE
fi

exec text-generation-launcher --port 8080 "$@"
