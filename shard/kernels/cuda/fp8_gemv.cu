// Products of weights of eight bits with few rows of activations: as gemv.cu, at half of its bytes. A warp has one output, or the
// gate and the up of one; numbers become floats exactly, and the sum is multiplied with its row's scale at the end.
#include "activation.cuh"
#include "rope.cuh"

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

// The products of rows `row_of` of the weight, one after the other, with all rows of x, on every lane of a warp; what does not depend on x
// is done `meanwhile`.
template <typename T, int ROWS, int SUMS, typename Meanwhile>
__device__ __forceinline__ void products(const Fp8Gemv& g, const int (&row_of)[SUMS], bool is_there, float (&sums)[SUMS][ROWS],
                                         Meanwhile meanwhile) {
    constexpr int DEPTH = DEPTH_OF_ALL / SUMS;
    // Of each row of x the first halves of all pieces, then the second ones: lanes then read neighbours.
    extern __shared__ uint4 shared_x[];
    const int lane = threadIdx.x & 31;
    const int pieces = g.inputs / PIECE;
    const uint8_t* rows[SUMS];
#pragma unroll
    for (int s = 0; s < SUMS; ++s) rows[s] = g.weight + static_cast<int64_t>(is_there ? row_of[s] : 0) * g.pitch;
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
    float scales[SUMS], biases[SUMS];
#pragma unroll
    for (int s = 0; s < SUMS; ++s) {
        scales[s] = is_there ? g.scales[row_of[s]] : 0.0f;
        biases[s] = is_there && g.bias ? g.bias[row_of[s]] : 0.0f;
    }
    meanwhile();
    pdl_wait();
    pdl_launch();
    for (int at = threadIdx.x; at < ROWS * pieces * 2; at += blockDim.x) {
        const int row = at / (pieces * 2), within = at % (pieces * 2);
        shared_x[(row * 2 + within % 2) * pieces + within / 2] = static_cast<const uint4*>(g.x)[at];
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < SUMS; ++s)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[s][r] = 0.0f;
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
        for (int r = 0; r < ROWS; ++r) sums[s][r] = warp_sum(sums[s][r]) * scales[s] + biases[s];
}

template <typename T, typename Out, int ROWS, bool IS_GATED>
__device__ __forceinline__ void multiply(const Fp8Gemv& g, int activation) {
    const int output = blockIdx.x * WARPS + (threadIdx.x >> 5);
    const bool is_there = output < g.outputs;
    float values[ROWS];
    if constexpr (IS_GATED) {
        float sums[2][ROWS];
        products<T, ROWS, 2>(g, {output, output + g.outputs}, is_there, sums, [] {});
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            // As if gate and up had been stored.
            values[r] = activated<T>(to_float(from_float<T>(sums[0][r])), activation) * to_float(from_float<T>(sums[1][r]));
    } else {
        float sums[1][ROWS];
        products<T, ROWS, 1>(g, {output}, is_there, sums, [] {});
#pragma unroll
        for (int r = 0; r < ROWS; ++r) values[r] = sums[0][r];
    }
    if (!is_there || (threadIdx.x & 31) != 0) return;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) static_cast<Out*>(g.out)[static_cast<int64_t>(r) * g.outputs + output] = from_float<Out>(values[r]);
}

// What is read by the product after the next kernel. Attention leaves memory idle, so it is asked for before it begins.
struct Ahead {
    const uint8_t* from;
    // Of which as many bytes, by as many of the last blocks.
    int64_t bytes;
    int blocks;
};

__device__ __forceinline__ void ask(const Ahead& ahead) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr int64_t MOST = 8 << 10;
    const int index = static_cast<int>(blockIdx.x) - (static_cast<int>(gridDim.x) - ahead.blocks);
    if (threadIdx.x != 0 || index < 0) return;
    for (int64_t at = index * MOST; at < ahead.bytes; at += ahead.blocks * MOST)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(ahead.from + at),
                     "r"(static_cast<uint32_t>(min(MOST, ahead.bytes - at)))
                     : "memory");
#endif
}

// Queries, keys and values of one token, rotated, and keys and values also stored: a warp has a pair of elements that turn together,
// those `head_dim / 2` apart. Everything is rounded as if it came from the kernels that do one thing after the other.
template <typename T, typename C>
__device__ __forceinline__ void project(const Fp8Gemv& g, C* keys, C* values, const int* position_ids, const int* slot_mapping,
                                        const int* token_seqs, const int* prompt_lens, const Frequencies& f, const Heads& heads,
                                        const Ahead& ahead) {
    const int at = blockIdx.x * WARPS + (threadIdx.x >> 5), dim = heads.head_dim;
    const int head = at / f.pairs, pair = at % f.pairs, turning = heads.num_heads + heads.num_kv_heads;
    const bool is_there = head < turning + heads.num_kv_heads;
    const int first = head * dim + pair, second = first + f.pairs;
    float sine = 0.0f, cosine = 1.0f;
    int slot = 0;
    float sums[2][1];
    products<T, 1, 2>(g, {first, second}, is_there, sums, [&] {
        // The step's inputs were there before the first kernel of the step.
        slot = slot_mapping[0];
        if (head >= turning) return;
        const int prompt_len = f.long_context == 0 ? 0 : prompt_lens[token_seqs[0]];
        float scale;
        const float angle = __fmul_rn(static_cast<float>(position_ids[0]), frequency(f, pair, prompt_len, scale));
        sincosf(angle, &sine, &cosine);
        sine *= scale, cosine *= scale;
    });
    ask(ahead);
    if (!is_there || (threadIdx.x & 31) != 0) return;
    float a = to_float(from_float<T>(sums[0][0])), b = to_float(from_float<T>(sums[1][0]));
    if (head < turning) {
        const float x = a, y = b;
        a = x * cosine - y * sine;
        b = y * cosine + x * sine;
    }
    T* const out = static_cast<T*>(g.out);
    out[first] = from_float<T>(a);
    out[second] = from_float<T>(b);
    if (head < heads.num_heads) return;
    const int64_t block = slot / heads.block_size, offset = slot % heads.block_size;
    const int kv_head = head < turning ? head - heads.num_heads : head - turning;
    C* const cached = (head < turning ? keys : values) + ((block * heads.num_kv_heads + kv_head) * heads.block_size + offset) * dim;
    cached[pair] = from_float<C>(a);
    cached[pair + f.pairs] = from_float<C>(b);
}

#define PROJECT(T, C)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) fp8_project_##T##_##C(                                          \
        const __grid_constant__ Fp8Gemv g, C* keys, C* values, const int* position_ids, const int* slot_mapping,             \
        const int* token_seqs, const int* prompt_lens, const __grid_constant__ Frequencies f, const __grid_constant__ Heads heads, \
        const __grid_constant__ Ahead ahead) {                                                                               \
        project<T, C>(g, keys, values, position_ids, slot_mapping, token_seqs, prompt_lens, f, heads, ahead);                \
    }
#define PROJECT_EACH_CACHE(T) PROJECT(T, T) PROJECT(T, e4m3) PROJECT(T, e5m2)
PROJECT_EACH_CACHE(bf16)
PROJECT_EACH_CACHE(f16)

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
