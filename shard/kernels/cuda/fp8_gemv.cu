// Products of weights of eight bits with few rows of activations: as gemv.cu, at half of its bytes. A warp has one output, or the
// gate and the up of one; numbers become floats exactly, and the sum is multiplied with its row's scale at the end.
#include "activation.cuh"
#include "fp8.cuh"

constexpr int WARPS = 8;
// Pieces of 16 numbers a lane has on their way.
constexpr int DEPTH_OF_ALL = 8;
constexpr int PIECE = 16;

struct Fp8Gemv {
    const uint8_t* weight;
    // Of each row of the weight.
    const float* scales;
    const void* x;
    // May be null.
    const float* bias;
    void* out;
    // Numbers of a row of the weight and from one to the next; multiples of 16.
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

template <typename T, typename Out, int ROWS, bool IS_GATED>
__device__ __forceinline__ void multiply(const Fp8Gemv& g, int activation) {
    constexpr int SUMS = IS_GATED ? 2 : 1;
    constexpr int DEPTH = DEPTH_OF_ALL / SUMS;
    // Of each row of x the first halves of all pieces, then the second ones: lanes then read neighbours.
    extern __shared__ uint4 shared_x[];
    const int lane = threadIdx.x & 31;
    const int output = blockIdx.x * WARPS + (threadIdx.x >> 5);
    const bool is_there = output < g.outputs;
    const int pieces = g.inputs / PIECE;
    const uint8_t* rows[SUMS];
#pragma unroll
    for (int s = 0; s < SUMS; ++s) {
        const int row = (is_there ? output : 0) + s * g.outputs;
        rows[s] = g.weight + static_cast<int64_t>(row) * g.pitch;
    }
    uint4 ahead[SUMS][DEPTH];
    auto fetch = [&](int first) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int piece = first + i * 32 + lane;
#pragma unroll
            for (int s = 0; s < SUMS; ++s)
                ahead[s][i] = is_there && piece < pieces ? ld_stream(rows[s] + piece * PIECE) : make_uint4(0, 0, 0, 0);
        }
    };
    // Weights are written by nobody.
    fetch(0);
    float scales[SUMS];
#pragma unroll
    for (int s = 0; s < SUMS; ++s) scales[s] = g.scales[(is_there ? output : 0) + s * g.outputs];
    pdl_wait();
    pdl_launch();
    for (int at = threadIdx.x; at < ROWS * pieces * 2; at += blockDim.x) {
        const int row = at / (pieces * 2), within = at % (pieces * 2);
        shared_x[(row * 2 + within % 2) * pieces + within / 2] = static_cast<const uint4*>(g.x)[at];
    }
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
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float w[SUMS][8];
#pragma unroll
                for (int s = 0; s < SUMS; ++s) {
                    widen_to_floats<e4m3>(half == 0 ? now[s][i].x : now[s][i].z, w[s]);
                    widen_to_floats<e4m3>(half == 0 ? now[s][i].y : now[s][i].w, w[s] + 4);
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    float x[8];
                    unpack<T>(shared_x[(r * 2 + half) * pieces + piece], x);
#pragma unroll
                    for (int k = 0; k < 8; ++k)
#pragma unroll
                        for (int s = 0; s < SUMS; ++s) sums[s][r] = fmaf(w[s][k], x[k], sums[s][r]);
                }
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
        float value = sums[0][r] * scales[0] + (g.bias ? g.bias[output] : 0.0f);
        if constexpr (IS_GATED) {
            const float up = sums[1][r] * scales[1] + (g.bias ? g.bias[output + g.outputs] : 0.0f);
            // As if gate and up had been stored.
            value = activated<T>(to_float(from_float<T>(value)), activation) * to_float(from_float<T>(up));
        }
        static_cast<Out*>(g.out)[static_cast<int64_t>(r) * g.outputs + output] = from_float<Out>(value);
    }
}

#define INSTANTIATE(T, OUT, ROWS)                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) fp8_gemv_##ROWS##_##T##_##OUT(Fp8Gemv g) { \
        multiply<T, OUT, ROWS, false>(g, 0);                                                             \
    }
#define INSTANTIATE_GATED(T, ROWS)                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) fp8_gemv_gated_##ROWS##_##T(Fp8Gemv g, int a) { \
        multiply<T, T, ROWS, true>(g, a);                                                                      \
    }
#define INSTANTIATE_ROWS(ROWS)    \
    INSTANTIATE(bf16, bf16, ROWS) \
    INSTANTIATE(bf16, f32, ROWS)  \
    INSTANTIATE(f16, f16, ROWS)   \
    INSTANTIATE(f16, f32, ROWS)   \
    INSTANTIATE_GATED(bf16, ROWS) \
    INSTANTIATE_GATED(f16, ROWS)
INSTANTIATE_ROWS(1)
INSTANTIATE_ROWS(2)
INSTANTIATE_ROWS(3)
INSTANTIATE_ROWS(4)
