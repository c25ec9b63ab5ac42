// out[M, N] = x[M, K] W[N, K]^T (+ bias) for few rows of x: a race to read the weights once.
//
// Hopper only. The weights are the left side of the tensor cores' product (64 of their rows a warpgroup) and up to TOKENS
// rows of x the right one. Every multiprocessor runs one block that walks over an equal share of all (row tile, k) pieces
// (stream-K, arXiv:2301.03598), so that all of them read until the end. One warp feeds a ring of stages by bulk tensor
// copies; it fills the ring with weights before it waits for the kernel that makes x. A block takes less than half of the
// shared memory, so that the next product's block can fill its ring while this one ends.
//
// A tile that several blocks share is put together by the last of them to arrive, from partial sums in the workspace, in
// the order of the blocks: the same inputs give the same bits.
#include "activation.cuh"
#include "wgmma.cuh"

// Element types of `out` where it is chosen at run time.
enum OutType { OUT_F32 = 0, OUT_BF16 = 1, OUT_F16 = 2 };

#ifdef HAS_WGMMA
constexpr int BOX_COLUMNS = 64;  // elements of 16 bits: 128 bytes, the swizzle's width
constexpr int BOX_ROWS = 64;     // rows of weights of one warpgroup

struct SkinnyArguments {
    void* out;
    const float* bias;
    float* partials;
    uint32_t* arrivals;
    int rows, outputs, inputs, out_type;
    // Of a gated product, which has `outputs` rows of gates and as many of ups.
    int activation;
};

// Which pieces a block computes: piece `i` is k step `i % steps` of row tile `i / steps`.
struct Share {
    uint32_t total, blocks;
    __device__ __forceinline__ uint32_t first(uint32_t block) const {
        return static_cast<uint32_t>(static_cast<uint64_t>(block) * total / blocks);
    }
    __device__ __forceinline__ uint32_t block_of(uint32_t piece) const {
        return static_cast<uint32_t>((static_cast<uint64_t>(piece + 1) * blocks + total - 1) / total) - 1;
    }
};

// Stores one element of the result.
__device__ __forceinline__ void store_one(void* out, int type, int64_t at, float value) {
    if (type == OUT_F32) static_cast<f32*>(out)[at] = value;
    else if (type == OUT_BF16) static_cast<bf16*>(out)[at] = from_float<bf16>(value);
    else static_cast<f16*>(out)[at] = from_float<f16>(value);
}

// Writes the 64 x TOKENS sums of a warpgroup; lane and register say which (PTX ISA, wgmma's D fragment).
template <int TOKENS>
__device__ __forceinline__ void store_tile(const SkinnyArguments& to, const float (&d)[TOKENS / 2], int first_row) {
    const int t = threadIdx.x & 127;
    const int row = first_row + (t >> 5) * 16 + ((t & 31) >> 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int n = row + half * 8;
        if (n >= to.outputs) continue;
        const float bias = to.bias ? to.bias[n] : 0.0f;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int m = j * 8 + (t & 3) * 2 + i;
                if (m < to.rows) store_one(to.out, to.out_type, int64_t(m) * to.outputs + n, d[j * 4 + half * 2 + i] + bias);
            }
        }
    }
}

// A barrier of the threads that put a tile together: a warpgroup's, or those of both halves of a gated tile.
template <bool IS_GATED> __device__ __forceinline__ void meet(int group) {
    if constexpr (IS_GATED) asm volatile("bar.sync 1, 256;" ::: "memory");
    else asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// Hands this block's part of a shared tile in; the last to come has the whole sum in `d` and returns true.
template <int TOKENS, int GROUPS, bool IS_GATED>
__device__ __forceinline__ bool put_together(const SkinnyArguments& to, const Share& share, uint32_t steps, uint32_t tile, int group,
                                             uint32_t* flags, float (&d)[TOKENS / 2]) {
    constexpr int COUNT = TOKENS / 2;
    const int t = threadIdx.x & 127;
    const auto slot = [&](uint32_t block) {
        const uint32_t index = block * 2 + (share.first(block) / steps == tile ? 0 : 1);
        return to.partials + (static_cast<size_t>(index) * GROUPS + group) * (COUNT * 128) + t * 4;
    };
    float* mine = slot(blockIdx.x);
#pragma unroll
    for (int j = 0; j < COUNT / 4; ++j)
        *reinterpret_cast<float4*>(mine + j * 512) = make_float4(d[j * 4], d[j * 4 + 1], d[j * 4 + 2], d[j * 4 + 3]);
    meet<IS_GATED>(group);
    const uint32_t first = share.block_of(tile * steps), last = share.block_of((tile + 1) * steps - 1);
    uint32_t* flag = flags + (IS_GATED ? 0 : group);
    if (IS_GATED ? threadIdx.x == 0 : t == 0) {
        // The barrier has made the others' sums this thread's to publish.
        __threadfence();
        uint32_t* arrived = to.arrivals + tile * GROUPS + (IS_GATED ? 0 : group);
        const bool is_last = atomicAdd(arrived, 1) == last - first;
        if (is_last) *arrived = 0;
        *flag = is_last;
        __threadfence();
    }
    meet<IS_GATED>(group);
    if (!*flag) return false;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) d[j] = 0.0f;
    // As many blocks' sums on their way as there are registers for.
    constexpr uint32_t AHEAD = COUNT <= 8 ? 4 : COUNT <= 16 ? 2 : 1;
    for (uint32_t block = first; block <= last; block += AHEAD) {
        float4 v[AHEAD][COUNT / 4];
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; ++i) {
            const float* part = slot(min(block + i, last));
#pragma unroll
            for (int j = 0; j < COUNT / 4; ++j) v[i][j] = __ldcg(reinterpret_cast<const float4*>(part + j * 512));
        }
#pragma unroll
        for (uint32_t i = 0; i < AHEAD; ++i) {
            if (block + i > last) break;
#pragma unroll
            for (int j = 0; j < COUNT / 4; ++j) {
                d[j * 4] += v[i][j].x;
                d[j * 4 + 1] += v[i][j].y;
                d[j * 4 + 2] += v[i][j].z;
                d[j * 4 + 3] += v[i][j].w;
            }
        }
    }
    return true;
}

// Stores `activation(gate) * up`: the second warpgroup leaves its sums, in `T` as if they had been stored, for the first.
template <typename T, int TOKENS>
__device__ __forceinline__ void store_gated(const SkinnyArguments& to, float (&d)[TOKENS / 2], uint32_t tile, int group, T* ups) {
    const int t = threadIdx.x & 127;
    const int row = tile * BOX_ROWS + (t >> 5) * 16 + ((t & 31) >> 2);
    float biases[2] = {0.0f, 0.0f};
    if (to.bias) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (row + half * 8 < to.outputs) biases[half] = to.bias[row + half * 8 + group * to.outputs];
    }
#pragma unroll
    for (int j = 0; j < TOKENS / 2; ++j) d[j] = to_float(from_float<T>(d[j] + biases[(j >> 1) & 1]));
    if (group == 1) {
#pragma unroll
        for (int j = 0; j < TOKENS / 2; ++j) ups[j * 128 + t] = from_float<T>(d[j]);
    }
    meet<true>(0);
    if (group == 0) {
#pragma unroll
        for (int j = 0; j < TOKENS / 2; ++j) d[j] = activated<T>(d[j], to.activation) * to_float(ups[j * 128 + t]);
        SkinnyArguments without = to;
        without.bias = nullptr;
        store_tile<TOKENS>(without, d, tile * BOX_ROWS);
    }
    // The sums are read before the next tile's are left.
    meet<true>(0);
}

// GROUPS warpgroups compute 64 weight rows each, and one more warp copies. Of a gated product the first computes gates and
// the second their ups.
template <typename T, int TOKENS, int GROUPS, int BOXES, int STAGES, bool IS_GATED>
__device__ __forceinline__ void skinny(const TensorMap* weights, const TensorMap* x, const SkinnyArguments& to) {
    constexpr int WEIGHT_BOX = BOX_ROWS * 128, X_BOX = TOKENS * 128;
    constexpr int X_OFFSET = BOXES * GROUPS * WEIGHT_BOX, STAGE = X_OFFSET + BOXES * X_BOX;
    constexpr int K = BOXES * BOX_COLUMNS;
    extern __shared__ char dynamic[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    __shared__ uint32_t flags[GROUPS];
    constexpr int TILE_ROWS = IS_GATED ? BOX_ROWS : BOX_ROWS * GROUPS;
    const uint32_t base = (shared_address(dynamic) + 1023) & ~1023u;
    const uint32_t steps = (to.inputs + K - 1) / K, tiles = (to.outputs + TILE_ROWS - 1) / TILE_ROWS;
    const Share share{tiles * steps, gridDim.x};
    const uint32_t begin = share.first(blockIdx.x), end = share.first(blockIdx.x + 1);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(shared_address(&full[i]), 1);
            barrier_init(shared_address(&empty[i]), GROUPS * 4);
        }
        barriers_made();
    }
    __syncthreads();
    pdl_launch();
    const int group = threadIdx.x / 128;
    if (group == GROUPS) {
        if (threadIdx.x % 32 == 0) {
            const auto copy_weights = [&](uint32_t piece, int stage) {
                const uint32_t barrier = shared_address(&full[stage]);
                const int row = piece / steps * TILE_ROWS, column = piece % steps * K;
                barrier_expect(barrier, STAGE);
#pragma unroll
                for (int g = 0; g < GROUPS; ++g)
#pragma unroll
                    for (int b = 0; b < BOXES; ++b)
                        copy_box(base + stage * STAGE + (b * GROUPS + g) * WEIGHT_BOX, weights, barrier, column + b * BOX_COLUMNS,
                                 row + g * (IS_GATED ? to.outputs : BOX_ROWS), READ_ONCE);
            };
            const auto copy_x = [&](uint32_t piece, int stage) {
                const int column = piece % steps * K;
#pragma unroll
                for (int b = 0; b < BOXES; ++b)
                    copy_box(base + stage * STAGE + X_OFFSET + b * X_BOX, x, shared_address(&full[stage]), column + b * BOX_COLUMNS, 0,
                             READ_AGAIN);
            };
            const uint32_t ahead = min(begin + STAGES, end);
            for (uint32_t piece = begin; piece < ahead; ++piece) copy_weights(piece, piece - begin);
            pdl_wait();
            for (uint32_t piece = begin; piece < ahead; ++piece) copy_x(piece, piece - begin);
            int stage = 0, parity = 0;
            for (uint32_t piece = ahead; piece < end; ++piece) {
                barrier_wait(shared_address(&empty[stage]), parity);
                copy_weights(piece, stage);
                copy_x(piece, stage);
                if (++stage == STAGES) stage = 0, parity ^= 1;
            }
        }
        return;
    }
    pdl_wait();
    float d[TOKENS / 2];
    int stage = 0, parity = 0;
    for (uint32_t piece = begin; piece < end;) {
        const uint32_t tile = piece / steps, tile_begin = tile * steps, tile_end = min(tile_begin + steps, end);
        const bool is_whole = piece == tile_begin && tile_end == tile_begin + steps;
        int previous = -1;
#pragma unroll
        for (int j = 0; j < TOKENS / 2; ++j) d[j] = 0.0f;
        for (; piece < tile_end; ++piece) {
            barrier_wait(shared_address(&full[stage]), parity);
            const uint32_t at = base + stage * STAGE;
            products_begin();
#pragma unroll
            for (int b = 0; b < BOXES; ++b) {
                const uint64_t left = matrix_at(at + (b * GROUPS + group) * WEIGHT_BOX);
                const uint64_t right = matrix_at(at + X_OFFSET + b * X_BOX);
#pragma unroll
                for (int k = 0; k < 4; ++k) Product<T, TOKENS>::run(d, left + k * 2, right + k * 2);
            }
            products_commit();
            products_wait<1>();
            if (previous >= 0 && threadIdx.x % 32 == 0) barrier_arrive(shared_address(&empty[previous]));
            previous = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        products_wait<0>();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared_address(&empty[previous]));
        if (!is_whole && !put_together<TOKENS, GROUPS, IS_GATED>(to, share, steps, tile, group, flags, d)) continue;
        if constexpr (IS_GATED)
            store_gated<T, TOKENS>(to, d, tile, group, reinterpret_cast<T*>(dynamic + (base - shared_address(dynamic)) + STAGES * STAGE));
        else store_tile<TOKENS>(to, d, (tile * GROUPS + group) * BOX_ROWS);
    }
}
#endif

// The host knows these numbers too: shard/backend/src/cuda/skinny.rs.
#define SKINNY(NAME, T, TOKENS, GROUPS, BOXES, STAGES, BLOCKS, IS_GATED)                                              \
    extern "C" __global__ void __launch_bounds__(GROUPS * 128 + 32, BLOCKS) NAME##_##TOKENS##_##GROUPS##_##T(         \
        const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, void* out, const float* bias, \
        float* partials, uint32_t* arrivals, int rows, int outputs, int inputs, int out_type, int activation) {       \
        SKINNY_BODY(T, TOKENS, GROUPS, BOXES, STAGES, IS_GATED)                                                       \
    }
#ifdef HAS_WGMMA
#define SKINNY_BODY(T, TOKENS, GROUPS, BOXES, STAGES, IS_GATED)                                               \
    const SkinnyArguments to{out, bias, partials, arrivals, rows, outputs, inputs, out_type, activation};     \
    skinny<T, TOKENS, GROUPS, BOXES, STAGES, IS_GATED>(&weights, &x, to);
#else
#define SKINNY_BODY(T, TOKENS, GROUPS, BOXES, STAGES, IS_GATED)
#endif
#define SKINNY_TYPES(NAME, TOKENS, GROUPS, BOXES, STAGES, BLOCKS, IS_GATED) \
    SKINNY(NAME, bf16, TOKENS, GROUPS, BOXES, STAGES, BLOCKS, IS_GATED)     \
    SKINNY(NAME, f16, TOKENS, GROUPS, BOXES, STAGES, BLOCKS, IS_GATED)
SKINNY_TYPES(skinny, 32, 1, 2, 4, 2, false)
SKINNY_TYPES(skinny, 64, 1, 1, 6, 2, false)
SKINNY_TYPES(skinny_gated, 32, 2, 1, 5, 2, true)
SKINNY_TYPES(skinny_gated, 64, 2, 1, 4, 2, true)
