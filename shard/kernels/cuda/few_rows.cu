// out[M, N] = x[M, K] W[N, K]^T (+ bias) for 2 to 16 rows of x, on any GPU with bf16 tensor cores.
//
// A block has 16 or 32 rows of the weights, and its eight warps share their elements. Weights go from memory to the
// registers of the tensor cores' operand without a detour: which k an element stands for does not matter to a sum as long
// as both operands agree, so that a lane takes 8 neighbours at once. The first are on their way before x is there.
#include "activation.cuh"
#include "common.cuh"

enum FewRowsOut { FEW_F32 = 0, FEW_BF16 = 1, FEW_F16 = 2 };

constexpr int FEW_WARPS = 8;
// Loads of 16 bytes that a lane has on their way.
constexpr int FEW_LOADS = 8;
// Elements that four lanes take of a row at once.
constexpr int FEW_BLOCK = 32;

struct FewRows {
    const void* weight;
    const void* x;
    // May be null.
    const float* bias;
    void* out;
    // Elements of a row of the weight and from one to the next; multiples of 8.
    int inputs, pitch;
    // Of the result; a gated product has twice as many rows of weights.
    int outputs, rows, out_type, activation;
};

__device__ __forceinline__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// TILES times 16 rows of the weights; of a gated product half of the warps have 16 gates and the others their ups.
template <typename T, int TOKENS, int TILES, bool IS_GATED>
__device__ __forceinline__ void few_rows(const FewRows& g) {
    static_assert(!IS_GATED || TILES == 1, "a warp has gates or ups");
    constexpr int SHARING = IS_GATED ? FEW_WARPS / 2 : FEW_WARPS;  // warps that share the elements of a row
    constexpr int BLOCKS = FEW_LOADS / 2 / TILES, SPAN = BLOCKS * FEW_BLOCK, GROUPS = TOKENS / 8;
    constexpr int PITCH = TILES * 16 + 4;  // no two lanes of a warp write to one bank
    __shared__ float sums[FEW_WARPS][TOKENS][PITCH];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
    const int first = blockIdx.x * (16 * TILES);
    const int64_t half_rows = IS_GATED && warp >= SHARING ? g.outputs : 0;
    const T* from[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int output = min(first + tile * 16 + half * 8 + group, g.outputs - 1);
            from[tile][half] = static_cast<const T*>(g.weight) + (half_rows + output) * g.pitch + quad * 8;
        }
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const int last = g.inputs - quad * 8;  // this lane has elements at `k < last`
    uint4 ahead[BLOCKS][TILES][2];
    const auto fetch = [&](int k) {
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    ahead[b][tile][half] = k + b * FEW_BLOCK < last ? ld_stream(from[tile][half] + k + b * FEW_BLOCK) : zero;
    };
    int k = warp % SHARING * SPAN;
    fetch(k);
    pdl_launch();
    pdl_wait();
    const T* x[GROUPS];
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
        x[i] = static_cast<const T*>(g.x) + static_cast<int64_t>(min(i * 8 + group, g.rows - 1)) * g.inputs + quad * 8;
    float d[TILES][GROUPS][4] = {};
    for (; k < g.inputs; k += SHARING * SPAN) {
        uint4 now[BLOCKS][TILES][2];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half) now[b][tile][half] = ahead[b][tile][half];
        fetch(k + SHARING * SPAN);
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            uint4 v[GROUPS];
            const int at = k + b * FEW_BLOCK;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) v[i] = at < last ? *reinterpret_cast<const uint4*>(x[i] + at) : zero;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 a = now[b][tile][0], c = now[b][tile][1];
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) {
                    multiply_add(d[tile][i], a.x, c.x, a.y, c.y, v[i].x, v[i].y, T{});
                    multiply_add(d[tile][i], a.z, c.z, a.w, c.w, v[i].z, v[i].w, T{});
                }
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sums[warp][i * 8 + quad * 2 + (e & 1)][tile * 16 + (e >> 1) * 8 + group] = d[tile][i][e];
    __syncthreads();
    const auto total = [&](int token, int row, int warps) {
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < SHARING; ++w) value += sums[warps + w][token][row];
        return value;
    };
    constexpr int ROWS = 16 * TILES;
    for (int at = threadIdx.x; at < ROWS * TOKENS; at += blockDim.x) {
        const int token = at / ROWS, row = at % ROWS, output = first + row;
        if (token >= g.rows || output >= g.outputs) continue;
        float value = total(token, row, 0) + (g.bias ? g.bias[output] : 0.0f);
        if constexpr (IS_GATED) {
            const float up = total(token, row, SHARING) + (g.bias ? g.bias[output + g.outputs] : 0.0f);
            // As if gate and up had been stored.
            value = activated<T>(to_float(from_float<T>(value)), g.activation) * to_float(from_float<T>(up));
        }
        const int64_t to = static_cast<int64_t>(token) * g.outputs + output;
        if (g.out_type == FEW_F32) static_cast<f32*>(g.out)[to] = value;
        else static_cast<T*>(g.out)[to] = from_float<T>(value);
    }
}

// Names and numbers are also those of shard/backend/src/cuda/few_rows.rs.
#define FEW_ROWS(NAME, T, TOKENS, TILES, IS_GATED)                                                                \
    extern "C" __global__ void __launch_bounds__(FEW_WARPS * 32, 2) NAME##_##TOKENS##_##TILES##_##T(FewRows g) { \
        few_rows<T, TOKENS, TILES, IS_GATED>(g);                                                                  \
    }
#define FEW_ROWS_TYPES(NAME, TOKENS, TILES, IS_GATED) \
    FEW_ROWS(NAME, bf16, TOKENS, TILES, IS_GATED)     \
    FEW_ROWS(NAME, f16, TOKENS, TILES, IS_GATED)
FEW_ROWS_TYPES(few_rows, 8, 1, false)
FEW_ROWS_TYPES(few_rows, 16, 1, false)
FEW_ROWS_TYPES(few_rows_gated, 8, 1, true)
FEW_ROWS_TYPES(few_rows_gated, 16, 1, true)
