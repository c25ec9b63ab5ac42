// out[M, N] = x[M, K] W[N, K]^T (+ bias) for up to 32 rows of x and weights of eight bits: a race to read the weights once.
//
// Hopper only. Tensor cores multiply eight bits, so x is rounded too: each 128 neighbours of a row with a scale of their own, by
// one warpgroup on their way to shared memory. The weights come there by bulk tensor copies that begin before x is there, and are
// the left side of the products, 64 of their rows at a time. Sums of 128 products are multiplied with the scale of x and added in
// float32, since the tensor cores keep fewer bits.
//
// A block has one tile of rows of weights. Of small weights a cluster of blocks shares a tile along k; each of them puts some of
// the tile's sums together from the shared memory of all, in their order: the same inputs give the same bits.
#include "activation.cuh"
#include "fp8.cuh"
#include "wgmma.cuh"

enum Fp8Out { FP8_F32 = 0, FP8_BF16 = 1, FP8_F16 = 2 };

struct Fp8Hopper {
    const void* x;
    // Of each row of the weight.
    const float* scales;
    // May be null.
    const float* bias;
    void* out;
    int inputs;
    // Of the result; a gated product has twice as many rows of weights.
    int outputs, rows, out_type, activation;
};

constexpr int GROUPS = 2;  // warpgroups that multiply
constexpr int MULTIPLIERS = GROUPS * 128, ROUNDERS = 128;
constexpr int THREADS = MULTIPLIERS + ROUNDERS + 32;

#ifdef HAS_WGMMA
constexpr int BOX_ROWS = 64;  // rows of weights of one product
constexpr int K = 128;        // elements of a piece: the swizzle's width
constexpr float LARGEST = 448.0f;
constexpr uint64_t READ_ONCE = 0x12F0000000000000ull;  // evict first
__device__ __forceinline__ void copy_once(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(READ_ONCE)
        : "memory");
}
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What lies at this block's `address` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float load_of(uint32_t address, uint32_t rank) {
    float value;
    asm volatile("{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %1, %2;\nld.shared::cluster.f32 %0, [at];\n}"
                 : "=f"(value)
                 : "r"(address), "r"(rank)
                 : "memory");
    return value;
}

// d[64, TOKENS] (+)= a[64, 32] b[TOKENS, 32]^T, both from shared memory; asynchronous.
template <int TOKENS> struct Eight;
#define D4 "%0,%1,%2,%3"
#define D8 D4 ",%4,%5,%6,%7"
#define D16 D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define IO4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define IO8(i) IO4(i), IO4(i + 4)
#define IO16(i) IO8(i), IO8(i + 8)
#define EIGHT(TOKENS, COUNT, A, B, P)                                                                                     \
    template <> struct Eight<TOKENS> {                                                                                    \
        static __device__ __forceinline__ void run(float (&d)[COUNT], uint64_t a, uint64_t b, int adds) {                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #TOKENS          \
                         "k32.f32.e4m3.e4m3 {" D##COUNT "}, " A ", " B ", p, 1, 1;\n}"                                    \
                         : IO##COUNT(0)                                                                                   \
                         : "l"(a), "l"(b), "r"(adds));                                                                    \
        }                                                                                                                 \
    };
EIGHT(16, 8, "%8", "%9", "%10")
EIGHT(32, 16, "%16", "%17", "%18")

// The larger magnitudes of two pairs.
__device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 a, uint32_t b, bf16) {
    return __hmax2(a, __habs2(*reinterpret_cast<const __nv_bfloat162*>(&b)));
}
__device__ __forceinline__ __half2 larger(__half2 a, uint32_t b, f16) {
    return __hmax2(a, __habs2(*reinterpret_cast<const __half2*>(&b)));
}
__device__ __forceinline__ float2 both(__nv_bfloat162 v) { return __bfloat1622float2(v); }
__device__ __forceinline__ float2 both(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 both(uint32_t v, bf16) { return both(*reinterpret_cast<const __nv_bfloat162*>(&v)); }
__device__ __forceinline__ float2 both(uint32_t v, f16) { return both(*reinterpret_cast<const __half2*>(&v)); }

// TOKENS rows of x at most; a warpgroup has SUBS times 64 rows of weights, of a gated product gates and their ups; CLUSTER blocks
// share a tile.
template <typename T, int TOKENS, int SUBS, int CLUSTER, int STAGES, bool IS_GATED> struct Hopper {
    static_assert(!IS_GATED || SUBS == 2, "gates and ups");
    static constexpr int COUNT = TOKENS / 2;
    static constexpr int WEIGHT_BOX = BOX_ROWS * 128;
    static constexpr int WEIGHT_BYTES = GROUPS * SUBS * WEIGHT_BOX, STAGE = WEIGHT_BYTES + TOKENS * 128;
    // Rows of a tile in the result.
    static constexpr int TILE_ROWS = IS_GATED ? GROUPS * BOX_ROWS : GROUPS * SUBS * BOX_ROWS;
    static constexpr int SLICE = COUNT / CLUSTER;

    const Fp8Hopper& g;
    uint32_t ring, full, empty;
    float (*x_scales)[TOKENS];
    // Pieces of this block.
    int begin, end, tile;

    // Where box `s` of warpgroup `group` is in the result, and in the weight.
    __device__ __forceinline__ int row_of(int group, int s) const {
        return tile * TILE_ROWS + (IS_GATED ? group : group * SUBS + s) * BOX_ROWS;
    }
    __device__ __forceinline__ int weight_row_of(int group, int s) const { return row_of(group, s) + (IS_GATED ? s * g.outputs : 0); }

    // One thread.
    __device__ __forceinline__ void copy(const TensorMap* weights) const {
        for (int piece = begin, stage = 0, phase = 1; piece < end; ++piece) {
            if (piece - begin >= STAGES) barrier_wait(empty + stage * 8, phase);
            const uint32_t barrier = full + stage * 8, to = ring + stage * STAGE;
            barrier_expect(barrier, WEIGHT_BYTES);
#pragma unroll
            for (int group = 0; group < GROUPS; ++group)
#pragma unroll
                for (int s = 0; s < SUBS; ++s)
                    // Two numbers are one of the copied elements.
                    copy_once(to + (group * SUBS + s) * WEIGHT_BOX, weights, barrier, piece * (K / 2), weight_row_of(group, s));
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }

    // A warpgroup: pieces of x to eight bits in shared memory.
    __device__ __forceinline__ void round() const {
        constexpr int SHARING = ROUNDERS / TOKENS;  // threads of a row
        constexpr int CHUNKS = 16 / SHARING;        // of eight numbers
        const int t = threadIdx.x - MULTIPLIERS, token = t / SHARING, part = t % SHARING;
        const T* const row = static_cast<const T*>(g.x) + static_cast<int64_t>(min(token, g.rows - 1)) * g.inputs;
        uint4 ahead[CHUNKS];
        const auto fetch = [&](int piece) {
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                const int column = piece * K + (i * SHARING + part) * 8;
                const bool is_there = token < g.rows && column < g.inputs;
                ahead[i] = is_there ? __ldcg(reinterpret_cast<const uint4*>(row + column)) : make_uint4(0, 0, 0, 0);
            }
        };
        fetch(begin);
        for (int piece = begin, stage = 0, phase = 1; piece < end; ++piece) {
            uint4 now[CHUNKS];
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) now[i] = ahead[i];
            if (piece + 1 < end) fetch(piece + 1);
            auto most = larger({}, 0u, T{});
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                most = larger(most, now[i].x, T{});
                most = larger(most, now[i].y, T{});
                most = larger(most, now[i].z, T{});
                most = larger(most, now[i].w, T{});
            }
            const float2 two = both(most);
            float largest = fmaxf(two.x, two.y);
#pragma unroll
            for (int o = 1; o < SHARING; o <<= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, o));
            // Below this its inverse would be infinite.
            const float scale = largest > 1e-35f ? largest / LARGEST : 1.0f, inverse = 1.0f / scale;
            if (piece - begin >= STAGES) barrier_wait(empty + stage * 8, phase);
            const uint32_t to = ring + stage * STAGE + WEIGHT_BYTES + token * 128;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                const float2 a = both(now[i].x, T{}), b = both(now[i].y, T{}), c = both(now[i].z, T{}), d = both(now[i].w, T{});
                const uint32_t low = narrow_two<e4m3>(a.x * inverse, a.y * inverse) | narrow_two<e4m3>(b.x * inverse, b.y * inverse) << 16;
                const uint32_t high = narrow_two<e4m3>(c.x * inverse, c.y * inverse) | narrow_two<e4m3>(d.x * inverse, d.y * inverse) << 16;
                const int chunk = i * SHARING + part;
                asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to + ((chunk / 2 ^ (token & 7)) << 4) + chunk % 2 * 8), "r"(low), "r"(high)
                             : "memory");
            }
            if (part == 0) x_scales[stage][token] = scale;
            fence_async();
            barrier_arrive(full + stage * 8);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
    }

    __device__ __forceinline__ void store(int token, int row, float value) const {
        if (token >= g.rows || row >= g.outputs) return;
        const int64_t at = static_cast<int64_t>(token) * g.outputs + row;
        if (g.out_type == FP8_F32) static_cast<f32*>(g.out)[at] = value;
        else static_cast<T*>(g.out)[at] = from_float<T>(value);
    }

    // Stores sums `j` of a thread (PTX ISA, wgmma's D fragment) of its boxes; `scales` and `biases` are those of its rows.
    __device__ __forceinline__ void finish(int j, const float (&sums)[SUBS], const float (&scales)[SUBS][2], const float (&biases)[SUBS][2]) const {
        const int t = threadIdx.x % 128, half = j >> 1 & 1;
        const int token = (j >> 2) * 8 + (t & 3) * 2 + (j & 1), within = (t >> 5) * 16 + ((t & 31) >> 2) + half * 8;
        float values[SUBS];
#pragma unroll
        for (int s = 0; s < SUBS; ++s)
            values[s] = sums[s] * (half ? scales[s][1] : scales[s][0]) + (half ? biases[s][1] : biases[s][0]);
        const int group = threadIdx.x / 128;
        if constexpr (IS_GATED) {
            // As if gate and up had been stored.
            const float gate = activated<T>(to_float(from_float<T>(values[0])), g.activation);
            store(token, row_of(group, 0) + within, gate * to_float(from_float<T>(values[1])));
        } else {
#pragma unroll
            for (int s = 0; s < SUBS; ++s) store(token, row_of(group, s) + within, values[s]);
        }
    }

    // The warpgroups that have the sums.
    __device__ __forceinline__ void multiply_all() const {
        const int t = threadIdx.x % 128, group = threadIdx.x / 128;
        float scales[SUBS][2], biases[SUBS][2];
#pragma unroll
        for (int s = 0; s < SUBS; ++s)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int within = (t >> 5) * 16 + ((t & 31) >> 2) + half * 8;
                const bool is_there = row_of(group, s) + within < g.outputs;
                const int row = weight_row_of(group, s) + within;
                scales[s][half] = is_there ? g.scales[row] : 0.0f;
                biases[s][half] = is_there && g.bias ? g.bias[row] : 0.0f;
            }
        pdl_wait();
        float sums[SUBS][COUNT] = {};
        for (int piece = begin, stage = 0, phase = 0; piece < end; ++piece) {
            barrier_wait(full + stage * 8, phase);
            const uint32_t at = ring + stage * STAGE;
            float2 of_x[TOKENS / 8];
#pragma unroll
            for (int i = 0; i < TOKENS / 8; ++i) of_x[i] = *reinterpret_cast<const float2*>(&x_scales[stage][i * 8 + (t & 3) * 2]);
            const uint64_t right = matrix_at(at + WEIGHT_BYTES, 16);
#pragma unroll
            for (int s = 0; s < SUBS; ++s) {
                const uint64_t left = matrix_at(at + (group * SUBS + s) * WEIGHT_BOX, 16);
                float d[COUNT] = {};
                hold(d);
                products_begin();
#pragma unroll
                for (int k = 0; k < K / 32; ++k) Eight<TOKENS>::run(d, left + k * 2, right + k * 2, k);
                products_commit();
                products_wait<0>();
                hold(d);
#pragma unroll
                for (int j = 0; j < COUNT; ++j) sums[s][j] = fmaf(d[j], j & 1 ? of_x[j >> 2].y : of_x[j >> 2].x, sums[s][j]);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(empty + stage * 8);
            if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        if constexpr (CLUSTER == 1) {
#pragma unroll
            for (int j = 0; j < COUNT; ++j) {
                float mine[SUBS];
#pragma unroll
                for (int s = 0; s < SUBS; ++s) mine[s] = sums[s][j];
                finish(j, mine, scales, biases);
            }
        } else {
            // Both warpgroups have read all pieces.
            sync_some<1, MULTIPLIERS>();
            const uint32_t place = ring + threadIdx.x * 4;
#pragma unroll
            for (int s = 0; s < SUBS; ++s)
#pragma unroll
                for (int j = 0; j < COUNT; ++j)
                    asm volatile("st.shared.f32 [%0], %1;" ::"r"(place + (s * COUNT + j) * MULTIPLIERS * 4), "f"(sums[s][j]) : "memory");
            meet_cluster();
            const int first = blockIdx.x % CLUSTER * SLICE;
#pragma unroll
            for (int i = 0; i < SLICE; ++i) {
                float parts[SUBS][CLUSTER];
#pragma unroll
                for (int s = 0; s < SUBS; ++s)
#pragma unroll
                    for (int rank = 0; rank < CLUSTER; ++rank)
                        parts[s][rank] = load_of(place + (s * COUNT + first + i) * MULTIPLIERS * 4, rank);
                float total[SUBS] = {};
#pragma unroll
                for (int s = 0; s < SUBS; ++s)
#pragma unroll
                    for (int rank = 0; rank < CLUSTER; ++rank) total[s] += parts[s][rank];
                finish(first + i, total, scales, biases);
            }
            // The others still read this block's.
            meet_cluster();
        }
    }
};

template <typename T, int TOKENS, int SUBS, int CLUSTER, int STAGES, bool IS_GATED>
__device__ __forceinline__ void run(const TensorMap* weights, const Fp8Hopper& g) {
    extern __shared__ char dynamic[];
    __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
    __shared__ __align__(8) float x_scales[STAGES][TOKENS];
    using Work = Hopper<T, TOKENS, SUBS, CLUSTER, STAGES, IS_GATED>;
    const int steps = (g.inputs + K - 1) / K, rank = blockIdx.x % CLUSTER;
    const Work work{g,
                    (shared_address(dynamic) + 1023) & ~1023u,
                    shared_address(full),
                    shared_address(empty),
                    x_scales,
                    steps * rank / CLUSTER,
                    steps * (rank + 1) / CLUSTER,
                    static_cast<int>(blockIdx.x / CLUSTER)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(work.full + i * 8, 1 + ROUNDERS);
            barrier_init(work.empty + i * 8, GROUPS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    pdl_launch();
    const int warp = threadIdx.x / 32;
    if (warp < MULTIPLIERS / 32) work.multiply_all();
    else if (warp < (MULTIPLIERS + ROUNDERS) / 32) {
        pdl_wait();
        work.round();
    } else if (threadIdx.x % 32 == 0) work.copy(weights);
}
#endif

// The host knows these numbers too: shard/backend/src/cuda/fp8_hopper.rs.
#if defined(HAS_WGMMA)
#define HOPPER_BODY(T, TOKENS, SUBS, CLUSTER, STAGES, IS_GATED) run<T, TOKENS, SUBS, CLUSTER, STAGES, IS_GATED>(&weights, g);
#define HOPPER_CLUSTER(CLUSTER) __cluster_dims__(CLUSTER, 1, 1)
#else
#define HOPPER_BODY(T, TOKENS, SUBS, CLUSTER, STAGES, IS_GATED)
#define HOPPER_CLUSTER(CLUSTER)
#endif
#define HOPPER(NAME, T, TOKENS, SUBS, CLUSTER, STAGES, BLOCKS, IS_GATED)                                          \
    extern "C" __global__ void HOPPER_CLUSTER(CLUSTER) __launch_bounds__(THREADS, BLOCKS)                         \
        NAME##_##TOKENS##_##SUBS##_##CLUSTER##_##T(const __grid_constant__ TensorMap weights, const Fp8Hopper g) { \
        HOPPER_BODY(T, TOKENS, SUBS, CLUSTER, STAGES, IS_GATED)                                                   \
    }
#define HOPPER_TYPES(NAME, TOKENS, SUBS, CLUSTER, STAGES, BLOCKS, IS_GATED) \
    HOPPER(NAME, bf16, TOKENS, SUBS, CLUSTER, STAGES, BLOCKS, IS_GATED)     \
    HOPPER(NAME, f16, TOKENS, SUBS, CLUSTER, STAGES, BLOCKS, IS_GATED)
#define HOPPER_CLUSTERS(TOKENS, SUBS, STAGES, BLOCKS)                  \
    HOPPER_TYPES(fp8_hopper, TOKENS, SUBS, 1, STAGES, BLOCKS, false)   \
    HOPPER_TYPES(fp8_hopper, TOKENS, SUBS, 2, STAGES, BLOCKS, false)   \
    HOPPER_TYPES(fp8_hopper, TOKENS, SUBS, 4, STAGES, BLOCKS, false)
HOPPER_CLUSTERS(32, 1, 5, 2)
HOPPER_CLUSTERS(32, 2, 3, 2)
HOPPER_TYPES(fp8_hopper_gated, 32, 2, 1, 3, 2, true)
