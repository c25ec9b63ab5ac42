#!/bin/sh
# Installs NVIDIA's CUDA compiler from pinned Python wheels, for machines with no CUDA toolkit.
#
#   usage: scripts/install_nvcc.sh [FOLDER]          (default: target/nvcc; about 104 MB to fetch, 271 MB on disk)
#
# Needs python3 with pip, and gcc (nvcc runs it as preprocessor; 12.2 was tried). No GPU, driver or root.
# Prints the path of nvcc. The wheels hold the compiler and headers only: enough for -cubin, -fatbin and
# -ptx, not for linking host programs against cudart (our binaries load the driver at run time instead).
# 13.0 is pinned on purpose: its PTX is accepted by every CUDA 13 driver (>= 580), a later one's is not.
set -eu

version=13.0.88
folder=${1:-target/nvcc}
nvcc=$folder/nvidia/cu13/bin/nvcc

if [ -x "$nvcc" ] && "$nvcc" --version | grep -q "V$version"; then
    echo "$nvcc"
    exit 0
fi
command -v gcc >/dev/null || { echo "install_nvcc: nvcc needs gcc, and none is on the PATH" >&2; exit 1; }
python3 -m pip --version >/dev/null 2>&1 || { echo "install_nvcc: needs python3 with pip" >&2; exit 1; }

mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$work"' EXIT

# two hashes each: x86_64, aarch64
cat >"$work/wheels.txt" <<END
nvidia-cuda-nvcc==13.0.88 --hash=sha256:56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03 --hash=sha256:c7ff28f86a24effdc6c034fa15230c549a273e4771b10a7fec14996f8cf3307f
nvidia-nvvm==13.0.88 --hash=sha256:c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0 --hash=sha256:c4376a291d72d22a315d9d2f69bdae8f8cd83a627f75bad395cee49a0fe65dc1
nvidia-cuda-crt==13.0.88 --hash=sha256:2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4 --hash=sha256:ee2ea2a97073e02ee62bb27841f437332be2c248e3eac013df07997ada39c003
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548 --hash=sha256:ef9bcbe90493a2b9d810e43d249adb3d02e98dd30200d86607d8d02687c43f55
nvidia-cuda-cccl==13.0.85 --hash=sha256:e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649 --hash=sha256:6f0203e29fed809ee2b7fe9b1344df66ecab990c37d6a2e0e189b26d6c97ed7c
END
PIP_ROOT_USER_ACTION=ignore python3 -m pip --disable-pip-version-check install --quiet --no-deps --no-compile \
    --only-binary=:all: --require-hashes --target "$work/files" --requirement "$work/wheels.txt" >&2

# A kernel that needs every wheel: cuda_bf16.h (runtime, crt, cccl), cicc (nvvm), ptxas and fatbinary (nvcc).
cat >"$work/try.cu" <<END
#include <cuda_bf16.h>
extern "C" __global__ void half_of(__nv_bfloat16 *x) { x[threadIdx.x] = __float2bfloat16(0.5f * __bfloat162float(x[threadIdx.x])); }
END
"$work/files/nvidia/cu13/bin/nvcc" -std=c++17 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a \
    -fatbin -o "$work/try.fatbin" "$work/try.cu"

rm -rf "$folder"
mv "$work/files" "$folder"
echo "$nvcc"
