// Tokens, their masses, and what host and device tell one another about choosing them.
#pragma once
#include "common.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int NO_ID = 0x7fffffff;

// Logits that are no numbers count as impossible, and both zeros are one.
__device__ __forceinline__ float ordered(float x) { return x == x ? x + 0.0f : -INFINITY; }

// A token and its logit; the better of two has the larger logit, or the lower id.
struct Best {
    float logit;
    int id;
};
__device__ __forceinline__ bool is_better(const Best& a, const Best& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}
__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const Best other{__shfl_xor_sync(ALL, best.logit, o), __shfl_xor_sync(ALL, best.id, o)};
        if (is_better(other, best)) best = other;
    }
    return best;
}
// Over the block, on all threads. `scratch` holds 32; a barrier precedes the next use.
__device__ __forceinline__ Best block_best(Best best, Best* scratch) {
    best = warp_best(best);
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[threadIdx.x / 32] = best;
    __syncthreads();
    best = warp_best(lane < warps ? scratch[lane] : Best{-INFINITY, NO_ID});
    __syncthreads();
    return best;
}

// What is found for a row, in memory of the host.
constexpr int MAX_TOP = 16;
struct Result {
    int id;
    float logprob;
    // Best tokens in `top`; more than MAX_TOP when the ties did not fit.
    int num_top;
    int unused;
    int top_ids[MAX_TOP];
    float top_logprobs[MAX_TOP];
};

// How a row is chosen from; the host's (sampling.rs).
struct Request {
    // In [0, 1): where in the distribution the token is.
    double uniform;
    // Its row of logits.
    int row;
    int is_greedy;
    float temperature;
    // 0: off.
    int top_k;
    // 1: off.
    float top_p;
    // Best tokens to report, at most MAX_TOP.
    int top_n;
    // 1 and 0: off.
    float repetition_penalty, frequency_penalty;
    // Where its history begins, and how many ids it has.
    int history, history_len;
};

// Probability masses: exp(logit - best) in units of 2^-44. Those of a row of 2^18 logits add up to less than 2^63.
using Mass = unsigned long long;
constexpr float MASS_UNIT = 17592186044416.0f;
__device__ __forceinline__ Mass mass_of(float logit, float best) {
    return logit > -INFINITY ? static_cast<Mass>(expf(logit - best) * MASS_UNIT) : 0;
}

// Ascends with the logit.
__device__ __forceinline__ unsigned key_of(float logit) {
    const unsigned bits = __float_as_uint(logit);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ Mass warp_total(Mass v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}
