// Attention of sequences with several queries on Hopper: asynchronous products of warpgroups, keys and values by tensor copies.
//
// As in attention_prefill.cu a block has 128 queries of one head. One warp copies pages; two warpgroups have 64 queries each and
// weigh the scores of one tile of keys while the tensor cores add up the values of the tile before (FlashAttention-3,
// arXiv:2407.08608).
#include "attention.cuh"
#include "wgmma.cuh"

constexpr int THREADS = 384;

// [rows, head_dim] of a layer's keys and of its values, in boxes of one page and 64 columns.
struct Pages {
    TensorMap keys;
    TensorMap values;
};

#ifdef HAS_WGMMA
constexpr int QUERIES = 128;
constexpr int GROUP_QUERIES = 64;
constexpr int STAGES = 2;
// Bytes of a row of 64 columns, the most a tensor copy exchanges chunks of.
constexpr int ROW = 128;

template <typename T, int DIM, int KEYS> struct Prefill {
    static constexpr int PARTS = DIM / 64;
    static constexpr int TILE_BYTES = KEYS * DIM * 2;
    static constexpr int QUERY_BYTES = QUERIES * DIM * 2;
    static constexpr int PAGES = KEYS / PAGE_KEYS;

    struct Barriers {
        uint64_t keys_there[STAGES], values_there[STAGES], keys_read[STAGES], values_read[STAGES];
    };

    // Copies tile after tile; a page that lies past the last key becomes zero.
    __device__ static __forceinline__ void produce(const Attention& a, const Pages& pages, Barriers& barriers, uint32_t keys,
                                                   uint32_t values, const int* table, int kv_head, int begin_key, int end_key) {
        const int lane = threadIdx.x % 32;
        const auto row_of = [&](int first) {
            const int page = first / PAGE_KEYS + lane;
            if (lane >= PAGES || page * PAGE_KEYS >= end_key) return -PAGE_KEYS;
            return static_cast<int>(page_row(a, block_of(a, table, page), page, kv_head));
        };
        const auto copy = [&](const TensorMap* map, uint64_t* there, uint64_t* read, uint32_t to, int stage, int phase, int row) {
            barrier_wait(shared_address(read + stage), phase ^ 1);
            const uint32_t barrier = shared_address(there + stage);
            if (lane == 0) barrier_expect(barrier, TILE_BYTES);
            __syncwarp();
            if (lane < PAGES) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    copy_box(to + stage * TILE_BYTES + part * KEYS * ROW + lane * PAGE_KEYS * ROW, map, barrier, part * 64, row);
                }
            }
        };
        int row = row_of(begin_key), stage = 0, phase = 0;
        for (int first = begin_key; first < end_key; first += KEYS) {
            const int next_row = first + KEYS < end_key ? row_of(first + KEYS) : 0;
            copy(&pages.keys, barriers.keys_there, barriers.keys_read, keys, stage, phase, row);
            copy(&pages.values, barriers.values_there, barriers.values_read, values, stage, phase, row);
            row = next_row;
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
        }
    }

    // What a thread knows of its two queries.
    struct State {
        float highest[2], total[2];
    };

    // Scores become weights, not yet rounded; `rescale` is what the sums so far are to be multiplied by.
    __device__ static __forceinline__ void weigh(const Attention& a, float (&scores)[KEYS / 2], State& state, float (&rescale)[2],
                                                 int first, int position, float slope) {
        const int lane = threadIdx.x % 32;
        const bool is_plain = a.soft_cap == 0.0f && a.alibi_heads == 0 && a.scale > 0.0f;
        if (!is_plain) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                const int key = first + (i / 4) * 8 + (lane % 4) * 2 + i % 2;
                scores[i] = score_log2(a, scores[i], slope, position + 8 * (i % 4 / 2) - key);
            }
        }
        // The first query of the warp sees the fewest keys, and the last one's window begins latest.
        const int warp_position = position - lane / 4;
        const bool is_whole = first + KEYS <= warp_position + 1 && (a.window == 0 || first > warp_position + 15 - a.window);
        if (!is_whole) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                const int key = first + (i / 4) * 8 + (lane % 4) * 2 + i % 2, at = position + 8 * (i % 4 / 2);
                if (!(key <= at && (a.window == 0 || key > at - a.window))) scores[i] = -INFINITY;
            }
        }
        const float factor = is_plain ? a.scale * LOG2_E : 1.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = state.highest[half];
#pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) most = fmaxf(most, scores[i / 2 * 4 + 2 * half + i % 2]);
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            // A query that has seen no key yet.
            const float base = most == -INFINITY ? 0.0f : most * factor;
            // Exactly 1 where nothing is higher: how many tiles a query does not see must not show.
            rescale[half] = state.highest[half] == most ? 1.0f : exp2_fast(state.highest[half] * factor - base);
            state.highest[half] = most;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < KEYS / 4; ++i) {
                float& score = scores[i / 2 * 4 + 2 * half + i % 2];
                score = exp2_fast(fmaf(score, factor, -base));
                sum += score;
            }
            state.total[half] = state.total[half] * rescale[half] + sum;
        }
    }

    __device__ static __forceinline__ void round(const float (&scores)[KEYS / 2], uint32_t (&weights)[KEYS / 4]) {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    }

    __device__ static __forceinline__ void score(float (&scores)[KEYS / 2], uint64_t queries, uint64_t keys) {
#pragma unroll
        for (int step = 0; step < DIM / 16; ++step) {
            const int part = step / 4, within = step % 4 * 2;
            Product<T, KEYS>::run(scores, queries + part * (GROUP_QUERIES * ROW / 16) + within, keys + part * (KEYS * ROW / 16) + within,
                                  step > 0);
        }
        products_commit();
    }
    __device__ static __forceinline__ void add_values(float (&sums)[DIM / 2], const uint32_t (&weights)[KEYS / 4], uint64_t values) {
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            ProductOfRegisters<T, DIM>::add(sums, weights + 4 * step, values + step * (16 * ROW / 16));
        }
        products_commit();
    }

    __device__ static __forceinline__ void consume(const Attention& a, Barriers& barriers, uint8_t* shared_values, uint64_t queries,
                                                   uint32_t keys, uint32_t values, int begin_key, int end_key, int context,
                                                   int first_position, int left, float slope, T* out, int group) {
        const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
        const int row = thread / 32 * 16 + lane / 4;
        const int position = first_position + group * GROUP_QUERIES + row;
        float sums[DIM / 2], scores[KEYS / 2], rescale[2];
        uint32_t weights[KEYS / 4];
        State state{{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
#pragma unroll
        for (int i = 0; i < DIM / 2; ++i) sums[i] = 0.0f;
        const auto keys_at = [&](int stage) { return matrix_at(keys + stage * TILE_BYTES, 16); };
        const auto values_at = [&](int stage) { return matrix_at(values + stage * TILE_BYTES, KEYS * ROW); };
        const auto release = [&](uint64_t* barrier) {
            if (thread == 0) barrier_arrive(shared_address(barrier));
        };

        int stage = 0, phase = 0;
        barrier_wait(shared_address(&barriers.keys_there[0]), 0);
        hold(scores);
        products_begin();
        score(scores, queries, keys_at(0));
        products_wait<0>();
        hold(scores);
        release(&barriers.keys_read[0]);
        weigh(a, scores, state, rescale, begin_key, position, slope);
        round(scores, weights);
        for (int first = begin_key + KEYS; first < end_key; first += KEYS) {
            const int before = stage, before_phase = phase;
            if (++stage == STAGES) {
                stage = 0;
                phase ^= 1;
            }
            barrier_wait(shared_address(&barriers.keys_there[stage]), phase);
            hold(scores);
            hold(sums);
            products_begin();
            score(scores, queries, keys_at(stage));
            barrier_wait(shared_address(&barriers.values_there[before]), before_phase);
            add_values(sums, weights, values_at(before));
            products_wait<1>();
            hold(scores);
            release(&barriers.keys_read[stage]);
            weigh(a, scores, state, rescale, first, position, slope);
            products_wait<0>();
            hold(sums);
            release(&barriers.values_read[before]);
#pragma unroll
            for (int i = 0; i < DIM / 2; ++i) sums[i] *= rescale[i % 4 / 2];
            round(scores, weights);
        }
        barrier_wait(shared_address(&barriers.values_there[stage]), phase);
        const int end_row = (end_key + PAGE_KEYS - 1) / PAGE_KEYS * PAGE_KEYS;
        if (end_row > context) {
            // What lies past the context need not be numbers, which a weight of zero would not hide.
            const int last = begin_key + (end_key - begin_key - 1) / KEYS * KEYS;
            const int rows = end_row - context;
            for (int at = threadIdx.x - 128; at < rows * PARTS * (ROW / 16); at += 256) {
                const int which = at / (ROW / 16), past = context - last + which / PARTS;
                *reinterpret_cast<uint4*>(shared_values + stage * TILE_BYTES + which % PARTS * KEYS * ROW + past * ROW + at % (ROW / 16) * 16) =
                    make_uint4(0, 0, 0, 0);
            }
            fence_async();
            sync_some<3, 256>();
        }
        hold(sums);
        products_begin();
        add_values(sums, weights, values_at(stage));
        products_wait<0>();
        hold(sums);

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.total[half] += __shfl_xor_sync(0xffffffffu, state.total[half], 1);
            state.total[half] += __shfl_xor_sync(0xffffffffu, state.total[half], 2);
            const int query = group * GROUP_QUERIES + row + 8 * half;
            if (query >= left) continue;
            const float inverse = 1.0f / state.total[half];
#pragma unroll
            for (int i = 0; i < DIM / 8; ++i) {
                *reinterpret_cast<uint32_t*>(out + static_cast<size_t>(query) * a.num_heads * DIM + i * 8 + (lane % 4) * 2) =
                    pack<T>(sums[4 * i + 2 * half] * inverse, sums[4 * i + 2 * half + 1] * inverse);
            }
        }
    }

    __device__ static __forceinline__ void run(const Attention& a, const int2* tiles, int num_tiles, const Pages& pages) {
        extern __shared__ uint8_t unaligned[];
        __shared__ __align__(8) Barriers barriers;
        uint8_t* const shared = unaligned + (-shared_address(unaligned) & 1023);
        const uint32_t queries_at = shared_address(shared), keys = queries_at + QUERY_BYTES, values = keys + STAGES * TILE_BYTES;
        const int head = blockIdx.x % a.num_heads, kv_head = head / (a.num_heads / a.num_kv_heads);
        const int2 tile = tiles[num_tiles - 1 - static_cast<int>(blockIdx.x) / a.num_heads];
        const int seq = tile.x, first_token = a.cu_seqlens_q[seq], count = a.cu_seqlens_q[seq + 1] - first_token;
        const int context = a.context_lens[seq], first_position = context - count + tile.y, left = count - tile.y;
        const int end_key = context - count + min(tile.y + QUERIES, count);
        const int begin_key = a.window > 0 ? max(0, first_position + 1 - a.window) / KEYS * KEYS : 0;
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                barrier_init(shared_address(&barriers.keys_there[stage]), 1);
                barrier_init(shared_address(&barriers.values_there[stage]), 1);
                barrier_init(shared_address(&barriers.keys_read[stage]), 2);
                barrier_init(shared_address(&barriers.values_read[stage]), 2);
            }
            fence_async();
        }
        __syncthreads();
        pdl_launch();
        pdl_wait();
        if (threadIdx.x < 128) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
            if (threadIdx.x < 32) {
                const int* const table = a.block_tables + static_cast<size_t>(seq) * a.header[BLOCK_TABLE_STRIDE];
                produce(a, pages, barriers, keys, values, table, kv_head, begin_key, end_key);
            }
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
            const int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128;
            const size_t width = static_cast<size_t>(a.num_heads + 2 * a.num_kv_heads) * DIM;
            const T* const from = static_cast<const T*>(a.qkv) + (first_token + tile.y) * width + static_cast<size_t>(head) * DIM;
            uint8_t* const to = shared + group * GROUP_QUERIES * DIM * 2;
#pragma unroll 4
            for (int at = thread; at < GROUP_QUERIES * (DIM / 8); at += 128) {
                const int row = at / (DIM / 8), chunk = at % (DIM / 8), query = group * GROUP_QUERIES + row;
                *reinterpret_cast<uint4*>(to + chunk / 8 * GROUP_QUERIES * ROW + row * ROW + (chunk % 8 ^ (row & 7)) * 16) =
                    query < left ? *reinterpret_cast<const uint4*>(from + query * width + chunk * 8) : make_uint4(0, 0, 0, 0);
            }
            fence_async();
            if (group == 0) sync_some<1, 128>();
            else sync_some<2, 128>();
            T* const out = static_cast<T*>(a.out) + (static_cast<size_t>(first_token + tile.y) * a.num_heads + head) * DIM;
            consume(a, barriers, shared + QUERY_BYTES + STAGES * TILE_BYTES, matrix_at(queries_at + group * GROUP_QUERIES * DIM * 2, 16),
                    keys, values, begin_key, end_key, context, first_position, left, slope_of(a, head), out, group);
        }
    }
};
#define RUN(T, DIM, KEYS) Prefill<T, DIM, KEYS>::run(attention, tiles, num_tiles, pages)
#else
// Launched on Hopper only.
#define RUN(T, DIM, KEYS)
#endif

#define ATTENTION_HOPPER(T, DIM, KEYS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                             \
        attention_hopper_##DIM##_##T(const __grid_constant__ Attention attention, const int2* tiles, int num_tiles,     \
                                     const __grid_constant__ Pages pages) {                                              \
        RUN(T, DIM, KEYS);                                                                                               \
    }
#define ATTENTION_HOPPER_EACH_DIM(T) \
    ATTENTION_HOPPER(T, 64, 128)     \
    ATTENTION_HOPPER(T, 128, 128)    \
    ATTENTION_HOPPER(T, 256, 64)
ATTENTION_HOPPER_EACH_DIM(bf16)
ATTENTION_HOPPER_EACH_DIM(f16)
