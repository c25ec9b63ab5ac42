// All layers of a decode step of one to eight sequences in one launch, on Hopper.
//
// A step reads every weight once; launch by launch, memory rests between one product's last load and the next one's first, which
// must wait for activations. Here a block a multiprocessor runs through the whole step. One of its warps does nothing but copy the
// block's share of all weights, product after product, layer after layer, into one ring in shared memory: it waits for free places,
// never for activations, so that memory works on while the other warps meet the other blocks, norm, attend and merge. The ring
// covers 8 us of such pauses.
//
// A product's tile is 16 rows of weights (of a gated product 8 gates and their 8 ups); tiles go round the blocks, beginning where the
// product before ended. A tile comes in pieces of some columns; each warp takes every eighth piece, and the warps' sums meet in
// shared memory. Five times a layer all blocks meet: they count their arrivals in one word.
#pragma once
#include "activation.cuh"
#include "attention.cuh"
#include "wgmma.cuh"

// The host knows all of this too: shard/backend/src/cuda/merged.rs.
struct MergedLayer {
    // Row-major, without gaps.
    const void *qkv, *out, *gate_up, *down;
    const float *norm, *mlp_norm;
    void *keys, *values;
};

struct Merged {
    const MergedLayer* layers;
    // [rows, hidden], what the layers add to; all but the last product of all.
    float* residual;
    // [rows, hidden]: the last product.
    void* delta;
    // [rows, (num_heads + 2 num_kv_heads) head_dim], [rows, num_heads head_dim], [rows, inner].
    void *qkv, *heads, *activated;
    // Of the step.
    const int *header, *position_ids, *context_lens, *block_tables;
    const float* inv_freq;
    // Parts of heads, as in attention_decode.cuh: [2 blocks, 8, head_dim], [2 blocks, 8] and [blocks].
    float* part_sums;
    float2* part_weights;
    int* finished;
    // [2, 8, blocks]: each block's share of the sums of squares of the rows of the residual.
    float* squares;
    // [2]: arrivals, and blocks that have ended; zero between launches.
    unsigned* arrived;
    int num_layers, hidden, inner, num_heads, num_kv_heads, pages_per_block, activation;
    float attention_scale, eps, rope_scale;
    // Bytes of shared memory for activations, places of the ring, and how many pieces are on their way at most: what waits in a
    // queue for memory stands in the way of all else.
    int x_bytes, stages, in_flight;
    int flags;
#ifdef MERGED_STAMPS
    long long* stamps;
#endif
};

#ifdef HAS_WGMMA
namespace merged {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int TILE = 16;
constexpr int MOST_STAGES = 32;
// How the L2 cache keeps weights: evict first.
constexpr uint64_t READ_ONCE = 0x12F0000000000000ull;
// Clocks that blocks wait for one another: whoever waits two seconds ends the program.
constexpr long long PATIENCE = 4000000000ll;

enum Kind { QKV = 0, OUT = 1, GATE_UP = 2, DOWN = 3 };

// Columns of a piece; its rows in the ring are 64 bytes apart from multiples of 128, so that two rows lie in different banks.
template <int PIECE> struct Pieces {
    static constexpr int PITCH = PIECE * 2 + 64, BYTES = TILE * PITCH;
};

struct Product {
    const void* weight;
    // `stride` rows of weights from a tile to the next; its rows from the eighth on are `second` after the first.
    int tiles, inputs, stride, second;
};

__device__ __forceinline__ Product product_of(const Merged& m, const MergedLayer& layer, int kind, int head_dim) {
    switch (kind) {
        case QKV: return {layer.qkv, (m.num_heads + 2 * m.num_kv_heads) * head_dim / TILE, m.hidden, TILE, 8};
        case OUT: return {layer.out, m.hidden / TILE, m.num_heads * head_dim, TILE, 8};
        case GATE_UP: return {layer.gate_up, m.inner / 8, m.hidden, 8, m.inner};
        default: return {layer.down, m.hidden / TILE, m.inner, TILE, 8};
    }
}

__device__ __forceinline__ void copy_row(uint32_t to, const void* from, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(READ_ONCE)
        : "memory");
}
__device__ __forceinline__ uint4 read_shared(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}
__device__ __forceinline__ uint4 read_l2(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ void meet() { sync_some<1, THREADS>(); }

template <typename T, int DIM, int ROWS, int PIECE> struct Step {
    using Ring = Pieces<PIECE>;
    static constexpr int SETS = DIM / 64;    // of 64 dimensions of a value
    static constexpr int CHUNKS = DIM / 32;  // of 8 dimensions of a query or key that a lane has
    static constexpr int PARTS_STRIDE = DIM + 4;

    struct Shared {
        uint64_t full[MOST_STAGES], empty[MOST_STAGES];
        float sums[2][WARPS][ROWS][TILE];
        float2 turns[ROWS][DIM / 2];
        float2 weights[WARPS][8];
        float scratch[WARPS];
        // First page of each sequence on the line of all, and contexts.
        int first_page[ROWS + 1], contexts[ROWS];
        int is_last;
    };

    const Merged& m;
    Shared& shared;
    // Activations, and the ring behind them.
    unsigned char* x;
    uint32_t ring;
    int blocks, block, warp, lane, group, quad;

    // Of the warps that multiply: the next piece of this warp, counted from the first of the tile at hand, and its place.
    int next, slot, parity;
    // Where the tiles of the product at hand begin.
    int first_block;
    unsigned meetings;
    // Rows of sums of squares that this thread has added up.
    float squares;
#ifdef MERGED_STAMPS
    int stamp_at = 0;
    long long waited = 0;
    __device__ __forceinline__ void stamp() {
        if (threadIdx.x == 0 && stamp_at < MERGED_STAMPS) {
            long long now;
            asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
            m.stamps[block * MERGED_STAMPS + stamp_at++] = now;
        }
    }
#else
    __device__ __forceinline__ void stamp() {}
#endif

    __device__ __forceinline__ Step(const Merged& m, Shared& shared, unsigned char* x) : m(m), shared(shared), x(x) {
        ring = shared_address(x) + m.x_bytes;
        blocks = gridDim.x;
        block = blockIdx.x;
        warp = threadIdx.x / 32;
        lane = threadIdx.x % 32;
        group = lane / 4;
        quad = lane % 4;
        next = slot = warp;
        parity = 0;
        while (slot >= m.stages) slot -= m.stages, parity ^= 1;
        first_block = 0;
        meetings = 0;
        squares = 0.0f;
    }

    __device__ __forceinline__ void make_barriers() const {
        for (int stage = 0; stage < m.stages; ++stage) {
            barrier_init(shared_address(&shared.full[stage]), 1);
            barrier_init(shared_address(&shared.empty[stage]), 1);
        }
        barriers_made();
    }

    // Of the blocks' order a product's first tile: the tiles go on where those of the product before ended.
    __device__ __forceinline__ int first_tile() const { return block >= first_block ? block - first_block : block - first_block + blocks; }
    __device__ __forceinline__ void end_tiles(int tiles) { first_block = (first_block + tiles) % blocks; }

    // --- The warp that copies.

    __device__ __forceinline__ void produce() {
        int stage = 0, phase = 1;
        // The piece that must have come before the next is asked for.
        int awaited = 0, awaited_phase = 0, count = 0;
        for (int at = 0; at < m.num_layers; ++at) {
            const MergedLayer layer = m.layers[at];
            for (int kind = QKV; kind <= DOWN; ++kind) {
                const Product p = product_of(m, layer, kind, DIM);
                const int row = (lane & 7) + (lane & 8 ? p.second : 0);
                for (int tile = first_tile(); tile < p.tiles; tile += blocks) {
                    const T* const from = static_cast<const T*>(p.weight) + static_cast<int64_t>(tile * p.stride + row) * p.inputs;
                    for (int k = 0; k < p.inputs; k += PIECE) {
                        const int bytes = min(PIECE, p.inputs - k) * 2;
                        const uint32_t barrier = shared_address(&shared.full[stage]);
#ifdef MERGED_STAMPS
                        const long long before = clock64();
#endif
                        barrier_wait(shared_address(&shared.empty[stage]), phase);
#ifdef MERGED_STAMPS
                        waited += clock64() - before;
#endif
                        if (count++ >= m.in_flight) {
                            barrier_wait(shared_address(&shared.full[awaited]), awaited_phase);
                            if (++awaited == m.stages) awaited = 0, awaited_phase ^= 1;
                        }
                        if (lane == 0) barrier_expect(barrier, TILE * bytes);
                        __syncwarp();
                        if (lane < TILE) copy_row(ring + stage * Ring::BYTES + lane * Ring::PITCH, from + k, bytes, barrier);
                        if (++stage == m.stages) stage = 0, phase ^= 1;
                    }
                }
                end_tiles(p.tiles);
            }
        }
#ifdef MERGED_STAMPS
        if (lane == 0) m.stamps[blocks * MERGED_STAMPS + block] = waited;
#endif
    }

    // --- Meeting the other blocks.

    // What this block wrote may be read by those that wait for as many meetings.
    __device__ __forceinline__ void arrive() {
        stamp();
        meet();
        ++meetings;
        if (threadIdx.x == 0) {
            if (m.flags & 2) __threadfence();
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(m.arrived) : "memory");
        }
    }
    __device__ __forceinline__ void await() const {
        if (lane == 0 && (!(m.flags & 1) || warp == 0)) {
            const unsigned wanted = meetings * static_cast<unsigned>(blocks);
            const long long begin = clock64();
            unsigned seen;
            while (true) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(m.arrived) : "memory");
                if (static_cast<int>(seen - wanted) >= 0) break;
                if (clock64() - begin > PATIENCE) __trap();
            }
        }
        if (m.flags & 1) meet();
        else __syncwarp();
    }

    // --- Activations.

    static __device__ __forceinline__ int x_pitch(int inputs) { return inputs * 2 + 64; }

    __device__ __forceinline__ void prefetch(const float* weight) const {
        for (int at = threadIdx.x * 32; at < m.hidden; at += THREADS * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + at));
    }

    // The residual's rows over the roots of their mean squares, times the weight. `which`: where the sums of squares are; before the
    // first layer (negative) nobody has left any.
    __device__ __forceinline__ void load_normed(const float* weight, int which) {
        float factor[ROWS];
        if (which < 0) {
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                float sum = 0.0f;
                for (int at = threadIdx.x * 4; at < m.hidden; at += THREADS * 4) {
                    const float4 v = __ldcg(reinterpret_cast<const float4*>(m.residual + row * m.hidden + at));
                    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
                }
                sum = warp_sum(sum);
                if (lane == 0) shared.scratch[warp] = sum;
                meet();
                sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += shared.scratch[w];
                factor[row] = sum;
                meet();
            }
        } else {
#pragma unroll
            for (int row = 0; row < ROWS; ++row) factor[row] = 0.0f;
            const float* const from = m.squares + which * 8 * blocks;
            for (int at = lane; at < blocks; at += 32) {
#pragma unroll
                for (int row = 0; row < ROWS; ++row) factor[row] += __ldcg(from + row * blocks + at);
            }
#pragma unroll
            for (int row = 0; row < ROWS; ++row) factor[row] = warp_sum(factor[row]);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) factor[row] = 1.0f / sqrtf(factor[row] / m.hidden + m.eps);
        const int pitch = x_pitch(m.hidden);
        constexpr int AHEAD = ROWS > 4 ? 1 : 4 / ROWS;
        for (int first = threadIdx.x * 4; first < m.hidden; first += AHEAD * THREADS * 4) {
            float4 v[AHEAD][ROWS], w[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = min(first + i * THREADS * 4, m.hidden - 4);
                w[i] = *reinterpret_cast<const float4*>(weight + at);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) v[i][row] = __ldcg(reinterpret_cast<const float4*>(m.residual + row * m.hidden + at));
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = first + i * THREADS * 4;
                if (at >= m.hidden) continue;
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    const float f = factor[row];
                    const uint2 pair = make_uint2(pack<T>(v[i][row].x * f * w[i].x, v[i][row].y * f * w[i].y),
                                                  pack<T>(v[i][row].z * f * w[i].z, v[i][row].w * f * w[i].w));
                    *reinterpret_cast<uint2*>(x + row * pitch + at * 2) = pair;
                }
            }
        }
        meet();
    }

    // Rows of `inputs` elements as they are; false: there is no room for them.
    __device__ __forceinline__ bool load_plain(const void* from, int inputs) {
        const int pitch = x_pitch(inputs), chunks = inputs / 8;
        if (ROWS * pitch > m.x_bytes) return false;
        constexpr int AHEAD = 4;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const uint4* const source = static_cast<const uint4*>(from) + row * chunks;
            for (int first = threadIdx.x; first < chunks; first += AHEAD * THREADS) {
                uint4 v[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) v[i] = __ldcg(source + min(first + i * THREADS, chunks - 1));
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) {
                    const int at = first + i * THREADS;
                    if (at < chunks) *reinterpret_cast<uint4*>(x + row * pitch + at * 16) = v[i];
                }
            }
        }
        meet();
        return true;
    }

    // --- Products.

    // Takes in a piece from column `k` on. `global_x`: where the rows are, if not in shared memory.
    __device__ __forceinline__ void multiply_piece(float (&d)[2][4], int k, int inputs, const T* global_x) {
        constexpr int STEPS = PIECE / 32;
        const int steps = min(PIECE, inputs - k) / 32;
        const int row = min(group, ROWS - 1);
        const uint32_t weights = ring + slot * Ring::BYTES + group * Ring::PITCH + quad * 16;
        const uint32_t full = shared_address(&shared.full[slot]);
        // Whose turn a place has shows only while nobody is a whole turn behind: another warp may still have the piece before.
        barrier_wait(shared_address(&shared.empty[slot]), parity ^ 1);
        const auto add = [&](int i, const uint4& b) {
            const uint4 low = read_shared(weights + i * 64), high = read_shared(weights + 8 * Ring::PITCH + i * 64);
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
            multiply<T>(d[0], first, b.x, b.y);
            multiply<T>(d[1], second, b.z, b.w);
        };
        if (global_x != nullptr) {
            // On their way while the weights are awaited.
            constexpr int AHEAD = STEPS < 8 ? STEPS : 8;
            const T* const from = global_x + static_cast<int64_t>(row) * inputs + k + quad * 8;
            uint4 b[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) b[i] = read_l2(from + min(i, steps - 1) * 32);
            barrier_wait(full, parity);
            for (int first = 0; first < steps; first += AHEAD) {
                uint4 now[AHEAD];
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) now[i] = b[i];
                if (first + AHEAD < steps) {
#pragma unroll
                    for (int i = 0; i < AHEAD; ++i) b[i] = read_l2(from + min(first + AHEAD + i, steps - 1) * 32);
                }
#pragma unroll
                for (int i = 0; i < AHEAD; ++i)
                    if (first + i < steps) add(first + i, now[i]);
            }
        } else {
            const uint32_t from = shared_address(x) + row * x_pitch(inputs) + k * 2 + quad * 16;
            barrier_wait(full, parity);
            if (steps == STEPS) {
#pragma unroll 8
                for (int i = 0; i < STEPS; ++i) add(i, read_shared(from + i * 64));
            } else {
                for (int i = 0; i < steps; ++i) add(i, read_shared(from + i * 64));
            }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&shared.empty[slot]));
        slot += WARPS;
        while (slot >= m.stages) slot -= m.stages, parity ^= 1;
    }

    // The sums of all warps, rounded to T or added to the residual. This thread has weight row `row` of the tile and a row of x.
    template <int KIND> __device__ __forceinline__ void store(float sum, float before, int tile, int row, int x_row, bool is_last) {
        if constexpr (KIND == QKV) {
            const int width = (m.num_heads + 2 * m.num_kv_heads) * DIM;
            static_cast<T*>(m.qkv)[x_row * width + tile * TILE + row] = from_float<T>(sum);
        } else if constexpr (KIND == GATE_UP) {
            const float up = __shfl_down_sync(0xffffffffu, sum, 8);
            // As if gate and up had been stored.
            const float gate = activated<T>(to_float(from_float<T>(sum)), m.activation);
            if (row < 8) static_cast<T*>(m.activated)[x_row * m.inner + tile * 8 + row] = from_float<T>(gate * to_float(from_float<T>(up)));
        } else if (is_last) {
            static_cast<T*>(m.delta)[x_row * m.hidden + tile * TILE + row] = from_float<T>(sum);
        } else {
            const float value = before + sum;
            m.residual[x_row * m.hidden + tile * TILE + row] = value;
            float square = value * value;
#pragma unroll
            for (int o = 8; o > 0; o /= 2) square += __shfl_xor_sync(0xffffffffu, square, o);
            squares += square;
        }
    }

    template <int KIND> __device__ __forceinline__ void multiply_tiles(const MergedLayer& layer, const T* global_x, bool is_last) {
        const Product p = product_of(m, layer, KIND, DIM);
        const int pieces = (p.inputs + PIECE - 1) / PIECE;
        const int x_row = threadIdx.x / TILE, row = threadIdx.x % TILE;
        // Warps without a row of x only multiply.
        const bool stores = warp < (ROWS + 1) / 2;
        const bool adds = (KIND == OUT || KIND == DOWN) && !is_last && stores;
        const int there = min(x_row, ROWS - 1);
        int turn = 0;
        for (int tile = first_tile(); tile < p.tiles; tile += blocks, turn ^= 1) {
            const float before = adds ? __ldcg(m.residual + there * m.hidden + tile * TILE + row) : 0.0f;
            float d[2][4] = {};
            for (; next < pieces; next += WARPS) multiply_piece(d, next * PIECE, p.inputs, global_x);
            next -= pieces;
            float(&sums)[WARPS][ROWS][TILE] = shared.sums[turn];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = quad * 2 + i % 2;
                if (column < ROWS) sums[warp][column][group + i / 2 * 8] = d[0][i] + d[1][i];
            }
            meet();
            if (!stores) continue;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) sum += sums[w][there][row];
            // With one row the other half of the warp does the same once more.
            store<KIND>(sum, before, tile, row, there, is_last);
        }
        end_tiles(p.tiles);
    }

    // Leaves this block's share of the rows' sums of squares.
    __device__ __forceinline__ void put_squares(int which) {
        const int x_row = threadIdx.x / TILE;
        if (threadIdx.x % TILE == 0 && x_row < ROWS) m.squares[(which * 8 + x_row) * blocks + block] = squares;
        squares = 0.0f;
    }
#include "merged_attention.cuh"

    // --- The step.

    __device__ __forceinline__ void run_layer(const MergedLayer& layer, int at) {
        const bool is_last = at + 1 == m.num_layers;
        prefetch(layer.norm);
        if (at > 0) await();
        stamp();
        load_normed(layer.norm, at > 0 ? 1 : -1);
        stamp();
        multiply_tiles<QKV>(layer, nullptr, false);
        arrive();
        attend(layer);
        arrive();
        await();
        stamp();
        const bool has_heads = load_plain(m.heads, m.num_heads * DIM);
        stamp();
        multiply_tiles<OUT>(layer, has_heads ? nullptr : static_cast<const T*>(m.heads), false);
        put_squares(0);
        arrive();
        prefetch(layer.mlp_norm);
        await();
        stamp();
        load_normed(layer.mlp_norm, 0);
        stamp();
        multiply_tiles<GATE_UP>(layer, nullptr, false);
        arrive();
        await();
        stamp();
        const bool has_activated = load_plain(m.activated, m.inner);
        if (is_last) pdl_launch();
        stamp();
        multiply_tiles<DOWN>(layer, has_activated ? nullptr : static_cast<const T*>(m.activated), is_last);
        if (is_last) return;
        put_squares(1);
        arrive();
    }

    __device__ __forceinline__ void consume() {
        pdl_wait();
        if (threadIdx.x == 0) {
            shared.first_page[0] = 0;
            for (int seq = 0; seq < ROWS; ++seq) {
                shared.contexts[seq] = m.context_lens[seq];
                shared.first_page[seq + 1] = shared.first_page[seq] + (shared.contexts[seq] + PAGE_KEYS - 1) / PAGE_KEYS;
            }
        }
        for (int at = threadIdx.x; at < ROWS * (DIM / 2); at += THREADS) {
            const int seq = at / (DIM / 2), pair = at % (DIM / 2);
            float sine, cosine;
            sincosf(__fmul_rn(static_cast<float>(m.position_ids[seq]), m.inv_freq[pair]), &sine, &cosine);
            shared.turns[seq][pair] = make_float2(cosine * m.rope_scale, sine * m.rope_scale);
        }
        meet();
        for (int at = 0; at < m.num_layers; ++at) {
            const MergedLayer layer = m.layers[at];
            run_layer(layer, at);
        }
        stamp();
        // Nobody waits any more once all are here.
        if (threadIdx.x == 0 && atomicAdd(m.arrived + 1, 1u) == static_cast<unsigned>(blocks) - 1) {
            m.arrived[0] = 0;
            m.arrived[1] = 0;
        }
    }

    static __device__ __forceinline__ void run(const Merged& m) {
        extern __shared__ __align__(128) unsigned char dynamic[];
        __shared__ Shared shared;
        Step step(m, shared, dynamic);
        if (threadIdx.x == THREADS) step.make_barriers();
        __syncthreads();
        if (step.warp == WARPS) step.produce();
        else step.consume();
    }
};

}  // namespace merged
#endif
