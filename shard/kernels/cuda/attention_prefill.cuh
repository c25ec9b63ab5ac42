// Attention of sequences with several queries over the paged cache, which holds their own keys and values too.
//
// A block has one tile of 128 queries of one head; keys come in tiles, two in shared memory at a time. Each of eight warps keeps
// sixteen queries, their scores and sums in registers (FlashAttention-2, arXiv:2307.08691). The grid's first blocks have the last
// queries, which see most keys.
#pragma once
#include "attention.cuh"
#include "fp8.cuh"

constexpr int QUERIES = 128;
constexpr int WARPS = QUERIES / 16;
constexpr int THREADS = 32 * WARPS;

// C: elements of the cache, T or of eight bits; those come into shared memory as they are, and each tile is widened to T before it
// is multiplied.
template <typename T, typename C, int DIM, int KEYS> struct Prefill {
    using Lines = Rows<DIM>;
    static constexpr bool WIDENS = sizeof(C) == 1;
    static constexpr int STEPS = DIM / 16;
    static constexpr int TILE_BYTES = KEYS * Lines::STRIDE;
    static constexpr int RAW_TILE_BYTES = WIDENS ? KEYS * DIM : TILE_BYTES;
    static constexpr int STAGE_BYTES = 2 * RAW_TILE_BYTES;
    // Where a tile lies in T, behind the two stages.
    static constexpr int WIDE_BYTES = WIDENS ? 2 * TILE_BYTES : 0;
    // Queries of large heads do not fit in registers beside the sums.
    static constexpr bool SHARES_QUERY = DIM > 128;

    // Starts copying the keys and values `first..first + KEYS`; those from `end` on become zero.
    __device__ static __forceinline__ void fetch(const Attention& a, const int* table, int kv_head, int first, int end, uint32_t to) {
        constexpr int ELEMENTS = 16 / sizeof(C);
        constexpr int CHUNKS = DIM / ELEMENTS;
        constexpr int ALL = KEYS * CHUNKS;
#pragma unroll
        for (int i = 0; i < (ALL + THREADS - 1) / THREADS; ++i) {
            const int row = (threadIdx.x + THREADS * i) / CHUNKS, chunk = (threadIdx.x + THREADS * i) % CHUNKS;
            if (ALL % THREADS != 0 && row >= KEYS) break;
            const int key = first + row;
            const bool is_there = key < end && chunk * ELEMENTS < a.head_dim;
            size_t from = 0;
            if (is_there) {
                const int page = key / PAGE_KEYS;
                from = page_offset(a, block_of(a, table, page), page, kv_head) + key % PAGE_KEYS * a.head_dim + chunk * ELEMENTS;
            }
            const int at = WIDENS ? row * DIM + chunk * 16 : Lines::at(row, chunk);
            cp_async(to + at, static_cast<const C*>(a.keys) + from, is_there ? 16 : 0);
            cp_async(to + RAW_TILE_BYTES + at, static_cast<const C*>(a.values) + from, is_there ? 16 : 0);
        }
        cp_async_commit();
    }

    // A stage's keys and values in T.
    __device__ static __forceinline__ void widen(const uint8_t* from, uint8_t* to) {
        constexpr int CHUNKS = DIM / 16;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
            for (int i = 0; i < (KEYS * CHUNKS + THREADS - 1) / THREADS; ++i) {
                const int row = (threadIdx.x + THREADS * i) / CHUNKS, chunk = (threadIdx.x + THREADS * i) % CHUNKS;
                if (KEYS * CHUNKS % THREADS != 0 && row >= KEYS) break;
                uint4 first, second;
                widen_piece<C, T>(*reinterpret_cast<const uint4*>(from + part * RAW_TILE_BYTES + row * DIM + chunk * 16), first, second);
                *reinterpret_cast<uint4*>(to + part * TILE_BYTES + Lines::at(row, 2 * chunk)) = first;
                *reinterpret_cast<uint4*>(to + part * TILE_BYTES + Lines::at(row, 2 * chunk + 1)) = second;
            }
        }
    }

    __device__ static __forceinline__ void run(const Attention& a, const int2* tiles, int num_tiles) {
        extern __shared__ __align__(128) uint8_t shared[];
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, within = lane % 8;
        const int head = blockIdx.x % a.num_heads, kv_head = head / (a.num_heads / a.num_kv_heads);
        const int2 tile = tiles[num_tiles - 1 - static_cast<int>(blockIdx.x) / a.num_heads];
        const int seq = tile.x, first_token = a.cu_seqlens_q[seq], count = a.cu_seqlens_q[seq + 1] - first_token;
        const int* const table = a.block_tables + static_cast<size_t>(seq) * a.header[BLOCK_TABLE_STRIDE];
        // Position of the tile's first query, and keys that its last one sees.
        const int first_position = a.context_lens[seq] - count + tile.y;
        const int end_key = a.context_lens[seq] - count + min(tile.y + QUERIES, count);
        const int begin_key = a.window > 0 ? max(0, first_position + 1 - a.window) / KEYS * KEYS : 0;
        const uint32_t stages = shared_address(shared), query_at = stages + 2 * STAGE_BYTES + WIDE_BYTES;
        pdl_launch();
        pdl_wait();
        fetch(a, table, kv_head, begin_key, end_key, stages);

        const size_t width = static_cast<size_t>(a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
        const T* const queries = static_cast<const T*>(a.qkv) + (first_token + tile.y) * width + static_cast<size_t>(head) * a.head_dim;
        const int left = count - tile.y;
        uint32_t query[SHARES_QUERY ? 1 : STEPS][4];
        if constexpr (SHARES_QUERY) {
            for (int at = threadIdx.x; at < QUERIES * Lines::CHUNKS; at += THREADS) {
                const int row = at / Lines::CHUNKS, chunk = at % Lines::CHUNKS;
                const bool is_there = row < left && chunk * 8 < a.head_dim;
                *reinterpret_cast<uint4*>(shared + 2 * STAGE_BYTES + WIDE_BYTES + Lines::at(row, chunk)) =
                    is_there ? *reinterpret_cast<const uint4*>(queries + row * width + chunk * 8) : make_uint4(0, 0, 0, 0);
            }
        } else {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    const int row = warp * 16 + lane / 4 + (part & 1) * 8, column = step * 16 + (part / 2) * 8 + (lane % 4) * 2;
                    query[step][part] = row < left && column < a.head_dim
                                            ? *reinterpret_cast<const uint32_t*>(queries + row * width + column)
                                            : 0u;
                }
            }
        }

        float sums[2 * STEPS][4] = {}, highest[2] = {-INFINITY, -INFINITY}, total[2] = {};
        const float slope = slope_of(a, head);
        const bool is_plain = a.soft_cap == 0.0f && a.alibi_heads == 0;
        const float factor = a.scale * LOG2_E;
        const int warp_position = first_position + warp * 16;
        int stage = 0;
        for (int first = begin_key; first < end_key; first += KEYS, stage ^= 1) {
            if (first + KEYS < end_key) {
                fetch(a, table, kv_head, first + KEYS, end_key, stages + (stage ^ 1) * STAGE_BYTES);
                cp_async_wait<1>();
            } else {
                cp_async_wait<0>();
            }
            __syncthreads();
            if constexpr (WIDENS) {
                widen(shared + stage * STAGE_BYTES, shared + 2 * STAGE_BYTES);
                __syncthreads();
            }
            const uint32_t keys = stages + (WIDENS ? 2 : stage) * STAGE_BYTES, values = keys + TILE_BYTES;
            // Keys that none of the warp's queries sees cost nothing.
            const bool is_seen = first <= warp_position + 15 && (a.window == 0 || first + KEYS > warp_position + 1 - a.window);
            if (is_seen) {
                float scores[KEYS / 8][4] = {};
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    uint32_t(&q)[4] = query[SHARES_QUERY ? 0 : step];
                    if constexpr (SHARES_QUERY) {
                        load_matrices(q, query_at + Lines::at(warp * 16 + (matrix & 1) * 8 + within, step * 2 + matrix / 2));
                    }
#pragma unroll
                    for (int pair = 0; pair < KEYS / 16; ++pair) {
                        uint32_t b[4];
                        load_matrices(b, keys + Lines::at(pair * 16 + (matrix / 2) * 8 + within, step * 2 + (matrix & 1)));
                        multiply<T>(scores[2 * pair], q, b[0], b[1]);
                        multiply<T>(scores[2 * pair + 1], q, b[2], b[3]);
                    }
                }
                const bool is_whole = first + KEYS <= warp_position + 1 && (a.window == 0 || first > warp_position + 15 - a.window);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int position = warp_position + lane / 4 + 8 * half;
                    float most = highest[half];
#pragma unroll
                    for (int i = 0; i < KEYS / 4; ++i) {
                        float& score = scores[i / 2][2 * half + i % 2];
                        const int key = first + (i / 2) * 8 + (lane % 4) * 2 + i % 2;
                        if (!is_plain) {
                            score = score_log2(a, score, slope, position - key);
                        } else {
                            score *= factor;
                        }
                        if (!is_whole && !(key <= position && (a.window == 0 || key > position - a.window))) score = -INFINITY;
                        most = fmaxf(most, score);
                    }
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                    // A query that has seen no key yet.
                    const float base = most == -INFINITY ? 0.0f : most;
                    const float rescale = exp2_fast(highest[half] - base);
                    highest[half] = most;
                    float sum = 0.0f;
#pragma unroll
                    for (int i = 0; i < KEYS / 4; ++i) {
                        float& score = scores[i / 2][2 * half + i % 2];
                        score = exp2_fast(score - base);
                        sum += score;
                    }
                    total[half] = total[half] * rescale + sum;
#pragma unroll
                    for (int i = 0; i < 2 * STEPS; ++i) {
                        sums[i][2 * half] *= rescale;
                        sums[i][2 * half + 1] *= rescale;
                    }
                }
#pragma unroll
                for (int pair = 0; pair < KEYS / 16; ++pair) {
                    const auto& low = scores[2 * pair];
                    const auto& high = scores[2 * pair + 1];
                    const uint32_t weights[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                                                 pack<T>(high[2], high[3])};
#pragma unroll
                    for (int step = 0; step < STEPS; ++step) {
                        uint32_t b[4];
                        load_matrices_transposed(
                            b, values + Lines::at(pair * 16 + (matrix & 1) * 8 + within, step * 2 + matrix / 2));
                        multiply<T>(sums[2 * step], weights, b[0], b[1]);
                        multiply<T>(sums[2 * step + 1], weights, b[2], b[3]);
                    }
                }
            }
            __syncthreads();
        }

        T* const out = static_cast<T*>(a.out) + (static_cast<size_t>(first_token + tile.y) * a.num_heads + head) * a.head_dim;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
            const int row = warp * 16 + lane / 4 + 8 * half;
            if (row >= left) continue;
            const float inverse = 1.0f / total[half];
#pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) {
                const int column = i * 8 + (lane % 4) * 2;
                if (column >= a.head_dim) continue;
                *reinterpret_cast<uint32_t*>(out + static_cast<size_t>(row) * a.num_heads * a.head_dim + column) =
                    pack<T>(sums[i][2 * half] * inverse, sums[i][2 * half + 1] * inverse);
            }
        }
    }
};

#define ATTENTION_PREFILL(T, C, DIM, KEYS)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_##DIM##_##T##_##C(            \
        const __grid_constant__ Attention attention, const int2* tiles, int num_tiles) {                     \
        Prefill<T, C, DIM, KEYS>::run(attention, tiles, num_tiles);                                           \
    }
#define ATTENTION_PREFILL_EACH_DIM(T, C)                                                                       \
    ATTENTION_PREFILL(T, C, 64, 64)                                                                            \
    ATTENTION_PREFILL(T, C, 96, 64)                                                                            \
    ATTENTION_PREFILL(T, C, 128, 64)                                                                           \
    ATTENTION_PREFILL(T, C, 192, 32)                                                                           \
    ATTENTION_PREFILL(T, C, 256, 32)
