// out[M, N] = x[M, K] W[N, K]^T (+ bias) for 5 to 64 rows of x and weights of eight bits, on any GPU with bf16 tensor cores.
//
// With more rows than a few, x costs more to read than the weights unless a block has many rows of weights: here 128 of them. Each
// of the grid's blocks walks over an equal share of all (row tile, k) pieces (stream-K, arXiv:2301.03598), so that all of them
// read until the end. Pieces come through a ring in shared memory; the weights of the first ones are on their way before x is
// there. Eight warps share a piece: four times 32 rows, two halves of k. Weights become the type of x in registers, exactly, and
// the sums are multiplied with their rows' scales at the end. Which k an element stands for does not matter as long as both
// operands agree, so a lane takes 16 neighbours at once.
//
// A tile that several blocks share is put together by the last of them to arrive, from partial sums in the workspace, in the order of
// the blocks: the same inputs give the same bits.
#include "activation.cuh"
#include "attention.cuh"
#include "fp8.cuh"

enum Fp8Out { FP8_F32 = 0, FP8_BF16 = 1, FP8_F16 = 2 };

constexpr int THREADS = 256;
constexpr int TILE_ROWS = 128;
// Rows of a warp, and elements of a piece.
constexpr int WARP_ROWS = 32;
constexpr int K = 128;

struct Fp8Skinny {
    const uint8_t* weight;
    const float* scales;
    const void* x;
    // May be null.
    const float* bias;
    void* out;
    // Of shared tiles: sums of each block's first and last one, and how many have arrived; those are zero between launches.
    float* partials;
    uint32_t* arrivals;
    // Numbers of a row of the weight and from one to the next; multiples of 16.
    int inputs, pitch;
    // Of the result; a gated product has twice as many rows of weights.
    int outputs, rows, out_type, activation;
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

// The threads that have a tile's sums: the first half of the block.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

template <typename T, int TOKENS, int STAGES, bool IS_GATED> struct Skinny {
    static constexpr int GROUPS = TOKENS / 8;
    // A thread's sums: of two times 16 rows.
    static constexpr int COUNT = 2 * GROUPS * 4;
    static constexpr int WEIGHT_BYTES = TILE_ROWS * K;
    // Rows of 128 bytes, those of the second half of k behind those of the first.
    static constexpr int X_HALF_BYTES = TOKENS * 128;
    static constexpr int STAGE_BYTES = WEIGHT_BYTES + 2 * X_HALF_BYTES;
    // Rows of a tile in the result.
    static constexpr int OUT_ROWS = IS_GATED ? TILE_ROWS / 2 : TILE_ROWS;

    const Fp8Skinny& g;
    uint32_t ring;
    uint32_t steps;

    // Chunks of 16 bytes of a row of 128 are exchanged with the row's number, so that a column's lie in different banks.
    __device__ static __forceinline__ int swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

    __device__ __forceinline__ void fetch_weights(uint32_t piece, int stage) const {
        const int tile = piece / steps, column = piece % steps * K;
        const uint32_t to = ring + stage * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < TILE_ROWS * 8 / THREADS; ++i) {
            const int row = (threadIdx.x + i * THREADS) / 8, chunk = threadIdx.x % 8;
            const int within = IS_GATED ? row % OUT_ROWS : row;
            const int output = min(tile * OUT_ROWS + within, g.outputs - 1) + (IS_GATED && row >= OUT_ROWS ? g.outputs : 0);
            const bool is_there = column + chunk * 16 < g.inputs;
            const uint8_t* from = g.weight + static_cast<int64_t>(output) * g.pitch + (is_there ? column + chunk * 16 : 0);
            cp_async(to + swizzled(row, chunk), from, is_there ? 16 : 0);
        }
    }
    __device__ __forceinline__ void fetch_x(uint32_t piece, int stage) const {
        const int column = piece % steps * K;
        const uint32_t to = ring + stage * STAGE_BYTES + WEIGHT_BYTES;
#pragma unroll
        for (int i = 0; i < TOKENS * 16 / THREADS; ++i) {
            const int at = threadIdx.x + i * THREADS, token = at / 16, chunk = at % 16;
            const bool is_there = token < g.rows && column + chunk * 8 < g.inputs;
            const T* from = static_cast<const T*>(g.x) + (is_there ? static_cast<int64_t>(token) * g.inputs + column + chunk * 8 : 0);
            cp_async(to + chunk / 8 * X_HALF_BYTES + swizzled(token, chunk % 8), from, is_there ? 16 : 0);
        }
    }

    __device__ static __forceinline__ uint4 load(uint32_t address) {
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
        return v;
    }

    // Adds a piece's products: of this warp's 32 rows over its half of k.
    __device__ __forceinline__ void add(int stage, float (&d)[2][GROUPS][4]) const {
        const int lane = threadIdx.x % 32, group = lane >> 2, quad = lane & 3, warp = threadIdx.x / 32;
        const int half = warp / 4;
        const uint32_t weights = ring + stage * STAGE_BYTES, x = weights + WEIGHT_BYTES + half * X_HALF_BYTES;
        uint4 a[2][2];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
            for (int part = 0; part < 2; ++part)
                a[tile][part] = load(weights + swizzled(warp % 4 * WARP_ROWS + tile * 16 + part * 8 + row_of(group), half * 4 + quad));
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            uint32_t w[2][2][4];
#pragma unroll
            for (int tile = 0; tile < 2; ++tile)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    Widen<e4m3, T>::run(part == 0 ? a[tile][r].x : a[tile][r].z, w[tile][r][0], w[tile][r][1]);
                    Widen<e4m3, T>::run(part == 0 ? a[tile][r].y : a[tile][r].w, w[tile][r][2], w[tile][r][3]);
                }
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) {
                const uint4 v = load(x + swizzled(i * 8 + group, quad * 2 + part));
#pragma unroll
                for (int tile = 0; tile < 2; ++tile) {
                    const uint32_t first[4] = {w[tile][0][0], w[tile][1][0], w[tile][0][1], w[tile][1][1]};
                    const uint32_t second[4] = {w[tile][0][2], w[tile][1][2], w[tile][0][3], w[tile][1][3]};
                    multiply<T>(d[tile][i], first, v.x, v.y);
                    multiply<T>(d[tile][i], second, v.z, v.w);
                }
            }
        }
    }

    // The row of a group of eight that a lane group has: eight lanes' chunks then lie in different banks.
    __device__ static __forceinline__ int row_of(int group) { return (group >> 1) | (group & 1) << 2; }

    // Hands this block's part of a shared tile in; the last to come has the whole sum in `d` and returns true.
    __device__ __forceinline__ bool put_together(const Share& share, uint32_t tile, uint32_t* flag, float (&d)[COUNT]) const {
        const int t = threadIdx.x;
        const auto slot = [&](uint32_t block) {
            const uint32_t index = block * 2 + (share.first(block) / steps == tile ? 0 : 1);
            return g.partials + static_cast<size_t>(index) * (COUNT * 128) + t * 4;
        };
        float* mine = slot(blockIdx.x);
#pragma unroll
        for (int j = 0; j < COUNT / 4; ++j)
            *reinterpret_cast<float4*>(mine + j * 512) = make_float4(d[j * 4], d[j * 4 + 1], d[j * 4 + 2], d[j * 4 + 3]);
        meet();
        const uint32_t first = share.block_of(tile * steps), last = share.block_of((tile + 1) * steps - 1);
        if (t == 0) {
            // The barrier has made the others' sums this thread's to publish.
            __threadfence();
            const bool is_last = atomicAdd(g.arrivals + tile, 1) == last - first;
            if (is_last) g.arrivals[tile] = 0;
            *flag = is_last;
            __threadfence();
        }
        meet();
        if (!*flag) return false;
#pragma unroll
        for (int j = 0; j < COUNT; ++j) d[j] = 0.0f;
        constexpr uint32_t AHEAD = COUNT <= 16 ? 4 : COUNT <= 32 ? 2 : 1;
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

    // Stores a tile's sums, of a gated product gate times up: `between` takes the ups to the threads of their gates.
    __device__ __forceinline__ void store(uint32_t tile, float (&d)[COUNT], float* between) const {
        const int t = threadIdx.x, lane = t % 32, quad = lane & 3, row = t / 32 * WARP_ROWS + row_of(lane >> 2);
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int at = row + part * 8;
            const int within = IS_GATED ? at % OUT_ROWS : at, output = tile * OUT_ROWS + within;
            if (output >= g.outputs) continue;
            const int from = output + (IS_GATED && at >= OUT_ROWS ? g.outputs : 0);
            const float scale = g.scales[from], bias = g.bias ? g.bias[from] : 0.0f;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& value = d[((part / 2) * GROUPS + i) * 4 + (part % 2) * 2 + e];
                    value = value * scale + bias;
                    // As if gate and up had been stored.
                    if constexpr (IS_GATED) value = to_float(from_float<T>(value));
                }
        }
        if constexpr (IS_GATED) {
            if (t >= 64) {
#pragma unroll
                for (int j = 0; j < COUNT; ++j) between[j * 64 + t - 64] = d[j];
            }
            meet();
            if (t < 64) {
#pragma unroll
                for (int j = 0; j < COUNT; ++j) d[j] = activated<T>(d[j], g.activation) * between[j * 64 + t];
            }
            meet();
            if (t >= 64) return;
        }
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int output = tile * OUT_ROWS + row + part * 8;
            if (output >= g.outputs) continue;
#pragma unroll
            for (int i = 0; i < GROUPS; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int token = i * 8 + quad * 2 + e;
                    if (token >= g.rows) continue;
                    const float value = d[((part / 2) * GROUPS + i) * 4 + (part % 2) * 2 + e];
                    const int64_t to = static_cast<int64_t>(token) * g.outputs + output;
                    if (g.out_type == FP8_F32) static_cast<f32*>(g.out)[to] = value;
                    else static_cast<T*>(g.out)[to] = from_float<T>(value);
                }
        }
    }

    __device__ __forceinline__ void run() {
        extern __shared__ __align__(1024) uint8_t shared[];
        __shared__ uint32_t flag;
        ring = shared_address(shared);
        // What the second half of the warps leaves for the first.
        float* const between = reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES);
        steps = (g.inputs + K - 1) / K;
        const uint32_t tiles = (g.outputs + OUT_ROWS - 1) / OUT_ROWS;
        const Share share{tiles * steps, gridDim.x};
        const uint32_t begin = share.first(blockIdx.x), end = share.first(blockIdx.x + 1);
        // Weights are written by nobody.
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i)
            if (begin + i < end) fetch_weights(begin + i, i);
        pdl_launch();
        pdl_wait();
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) {
            if (begin + i < end) fetch_x(begin + i, i);
            cp_async_commit();
        }
        int stage = 0, next = STAGES - 1;
        for (uint32_t piece = begin; piece < end;) {
            const uint32_t tile = piece / steps, tile_begin = tile * steps, tile_end = min(tile_begin + steps, end);
            const bool is_whole = piece == tile_begin && tile_end == tile_begin + steps;
            float d[2][GROUPS][4] = {};
            for (; piece < tile_end; ++piece) {
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                if (piece + STAGES - 1 < end) {
                    fetch_weights(piece + STAGES - 1, next);
                    fetch_x(piece + STAGES - 1, next);
                }
                cp_async_commit();
                add(stage, d);
                if (++stage == STAGES) stage = 0;
                if (++next == STAGES) next = 0;
            }
            float(&sums)[COUNT] = *reinterpret_cast<float(*)[COUNT]>(&d);
            const int t = threadIdx.x;
            if (t >= 128) {
#pragma unroll
                for (int j = 0; j < COUNT; ++j) between[j * 128 + t - 128] = sums[j];
            }
            __syncthreads();
            if (t < 128) {
#pragma unroll
                for (int j = 0; j < COUNT; ++j) sums[j] += between[j * 128 + t];
                // A gated tile's ups come to the same place.
                if constexpr (IS_GATED) meet();
                if (is_whole || put_together(share, tile, &flag, sums)) store(tile, sums, between);
            }
            // `between` is read before the next tile's sums come: there is a barrier in every step.
        }
        cp_async_wait<0>();
    }
};

// Names and numbers are also those of shard/backend/src/cuda/fp8_skinny.rs.
#define SKINNY(NAME, T, TOKENS, STAGES, BLOCKS, IS_GATED)                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME##_##TOKENS##_##T(Fp8Skinny g) { \
        Skinny<T, TOKENS, STAGES, IS_GATED> work{g, 0, 0};                                             \
        work.run();                                                                                    \
    }
#define SKINNY_ALL(TOKENS, STAGES, BLOCKS)                           \
    SKINNY(fp8_skinny, bf16, TOKENS, STAGES, BLOCKS, false)          \
    SKINNY(fp8_skinny, f16, TOKENS, STAGES, BLOCKS, false)           \
    SKINNY(fp8_skinny_gated, bf16, TOKENS, STAGES, BLOCKS, true)     \
    SKINNY(fp8_skinny_gated, f16, TOKENS, STAGES, BLOCKS, true)
SKINNY_ALL(16, 4, 2)
SKINNY_ALL(32, 4, 2)
SKINNY_ALL(64, 4, 1)
