// What the hardware allows: a loop that only reads. And what it does not.
#include "common.cuh"

// Reads `count` times 16 bytes; `out` is written only where the sum is a number that random data does not give.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* data, int64_t count, uint32_t* out) {
    pdl_wait();
    uint32_t sum = 0;
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; at + 7 * stride < count; at += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = ld_stream(data + at + i * stride);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    for (; at < count; at += stride) {
        const uint4 v = ld_stream(data + at);
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x5eed1e55u) *out = sum;
    pdl_launch();
}

// Goes wrong, to see what is said then.
extern "C" __global__ void fault() {
    pdl_wait();
    asm volatile("trap;");
}

// Numbers that look random, about even between -1 and 1.
extern "C" __global__ void fill_random_bf16(bf16* data, int64_t count, uint32_t seed) {
    pdl_wait();
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    for (int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride) {
        uint32_t z = uint32_t(at) * 0x9E3779B9u + seed + uint32_t(at >> 32) * 0x85EBCA6Bu;
        z = (z ^ (z >> 16)) * 0x21F0AAADu;
        z = (z ^ (z >> 15)) * 0x735A2D97u;
        z ^= z >> 15;
        data[at] = from_float<bf16>(float(int32_t(z)) * (1.0f / 2147483648.0f));
    }
    pdl_launch();
}
