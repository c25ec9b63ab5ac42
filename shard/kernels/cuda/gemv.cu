// Products with few rows of activations: a race to read the weights once. A warp has one output, or the gate and the up of one;
// its weights are on their way, 16 bytes a lane and eight of them at a time, before the activations are there.
#include "activation.cuh"
#include "common.cuh"

constexpr int GEMV_WARPS = 8;
// Pieces of 16 bytes a lane has on their way.
constexpr int GEMV_DEPTH = 8;

struct Gemv {
    const void* weight;
    const void* x;
    // May be null.
    const float* bias;
    void* out;
    // Elements of a row of the weight and from one to the next; multiples of 8.
    int inputs, pitch;
    // Of the result; a gated product has twice as many rows of weights.
    int outputs;
};

template <typename T> __device__ __forceinline__ void unpack(const uint4& v, float (&out)[8]);
template <> __device__ __forceinline__ void unpack<bf16>(const uint4& v, float (&out)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
template <> __device__ __forceinline__ void unpack<f16>(const uint4& v, float (&out)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

// Sums of one output (`IS_GATED`: of its gate and its up) for `ROWS` rows of activations.
template <typename T, typename Out, int ROWS, bool IS_GATED>
__device__ __forceinline__ void gemv(const Gemv& g, int activation) {
    constexpr int SUMS = IS_GATED ? 2 : 1;
    constexpr int DEPTH = GEMV_DEPTH / SUMS;
    extern __shared__ uint4 shared_x[];
    const int lane = threadIdx.x & 31;
    const int output = blockIdx.x * GEMV_WARPS + (threadIdx.x >> 5);
    const bool is_there = output < g.outputs;
    const int pieces = g.inputs / 8;
    const T* rows[SUMS];
#pragma unroll
    for (int s = 0; s < SUMS; ++s) {
        const int row = (is_there ? output : 0) + s * g.outputs;
        rows[s] = static_cast<const T*>(g.weight) + static_cast<int64_t>(row) * g.pitch;
    }
    uint4 ahead[SUMS][DEPTH];
    auto fetch = [&](int first) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int piece = first + i * 32 + lane;
#pragma unroll
            for (int s = 0; s < SUMS; ++s)
                ahead[s][i] = is_there && piece < pieces ? ld_stream(rows[s] + piece * 8) : make_uint4(0, 0, 0, 0);
        }
    };
    // Weights are written by nobody.
    fetch(0);
    pdl_wait();
    pdl_launch();
    for (int at = threadIdx.x; at < ROWS * pieces; at += blockDim.x)
        shared_x[at] = static_cast<const uint4*>(g.x)[at];
    __syncthreads();
    float sums[SUMS][ROWS] = {};
    for (int first = 0; first < pieces; first += 32 * DEPTH) {
        uint4 now[SUMS][DEPTH];
#pragma unroll
        for (int s = 0; s < SUMS; ++s)
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) now[s][i] = ahead[s][i];
        if (first + 32 * DEPTH < pieces) fetch(first + 32 * DEPTH);
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int piece = first + i * 32 + lane;
            if (piece >= pieces) continue;
            float w[SUMS][8];
#pragma unroll
            for (int s = 0; s < SUMS; ++s) unpack<T>(now[s][i], w[s]);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float x[8];
                unpack<T>(shared_x[r * pieces + piece], x);
#pragma unroll
                for (int k = 0; k < 8; ++k)
#pragma unroll
                    for (int s = 0; s < SUMS; ++s) sums[s][r] = fmaf(w[s][k], x[k], sums[s][r]);
            }
        }
    }
#pragma unroll
    for (int s = 0; s < SUMS; ++s)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[s][r] = warp_sum(sums[s][r]);
    if (!is_there || lane != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float value = sums[0][r] + (g.bias ? g.bias[output] : 0.0f);
        if constexpr (IS_GATED) {
            const float up = sums[1][r] + (g.bias ? g.bias[output + g.outputs] : 0.0f);
            // As if gate and up had been stored.
            value = activated<T>(to_float(from_float<T>(value)), activation) * to_float(from_float<T>(up));
        }
        static_cast<Out*>(g.out)[static_cast<int64_t>(r) * g.outputs + output] = from_float<Out>(value);
    }
}

#define INSTANTIATE(T, OUT, ROWS)                                                                         \
    extern "C" __global__ void __launch_bounds__(32 * GEMV_WARPS) gemv_##ROWS##_##T##_##OUT(Gemv g) {    \
        gemv<T, OUT, ROWS, false>(g, 0);                                                                  \
    }
#define INSTANTIATE_GATED(T, ROWS)                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * GEMV_WARPS) gemv_gated_##ROWS##_##T(Gemv g, int a) { \
        gemv<T, T, ROWS, true>(g, a);                                                                     \
    }
#define INSTANTIATE_ROWS(ROWS)                                                                            \
    INSTANTIATE(bf16, bf16, ROWS)                                                                         \
    INSTANTIATE(bf16, f32, ROWS)                                                                          \
    INSTANTIATE(f16, f16, ROWS)                                                                           \
    INSTANTIATE(f16, f32, ROWS)                                                                           \
    INSTANTIATE_GATED(bf16, ROWS)                                                                         \
    INSTANTIATE_GATED(f16, ROWS)
INSTANTIATE_ROWS(1)
INSTANTIATE_ROWS(2)
INSTANTIATE_ROWS(3)
INSTANTIATE_ROWS(4)
