// All layers of a decode step of one or two sequences in one launch, on Hopper.
//
// A step reads every weight once; launch by launch, memory rests between one product's last load and the next one's first, which
// must wait for activations. Here a block a multiprocessor runs through the whole step. One of its threads does nothing but copy the
// block's share of all weights, product after product, layer after layer, into one ring in shared memory: it waits for free places,
// never for activations, so that memory works on while the other warps meet the other blocks, norm, attend and merge. The ring
// covers 8 us of such pauses. While it fills, less is asked for at once: what queues up for memory is in the way of what the other
// warps ask the L2 for.
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
    const float *norm, *mlp_norm;
    void *keys, *values;
};

struct Merged {
    const MergedLayer* layers;
    // [num_layers, 4]: of the weights of queries, keys and values; out; gates and ups; down. A weight is [64 columns, rows, blocks of
    // columns], a box 64 columns, 8 rows and as many blocks as a piece has.
    const TensorMap* weights;
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
    // Bytes of shared memory for activations, and places of the ring: at least as many as warps take pieces.
    int x_bytes, stages;
    // Pieces that are on their way at most, and where more than `level` lie in the ring: what queues up for memory stands in the way of
    // what the other warps ask the L2 for.
    int in_flight, few_in_flight, level;
};

#ifdef HAS_WGMMA
namespace merged {

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int TILE = 16;
constexpr int MOST_STAGES = 32;
// How the L2 cache keeps weights: evict first.
constexpr uint64_t READ_ONCE = 0x12F0000000000000ull;
// Clocks that blocks wait for one another, two seconds: then the kernel fails, and the device counts as lost.
constexpr long long PATIENCE = 4000000000ll;

enum Kind { QKV = 0, OUT = 1, GATE_UP = 2, DOWN = 3 };

// Columns of a piece. In the ring it is two halves of 8 rows, each in blocks of 64 columns whose chunks of 16 bytes are exchanged.
template <int PIECE> struct Pieces {
    static constexpr int BLOCK = 1024, HALF = PIECE / 64 * BLOCK, BYTES = 2 * HALF;
};

struct Product {
    // `stride` rows of weights from a tile to the next; its rows from the eighth on are `second` after the first.
    int tiles, inputs, stride, second;
};

__device__ __forceinline__ Product product_of(const Merged& m, int kind, int head_dim) {
    switch (kind) {
        case QKV: return {(m.num_heads + 2 * m.num_kv_heads) * head_dim / TILE, m.hidden, TILE, 8};
        case OUT: return {m.hidden / TILE, m.num_heads * head_dim, TILE, 8};
        case GATE_UP: return {m.inner / 8, m.hidden, 8, m.inner};
        default: return {m.hidden / TILE, m.inner, TILE, 8};
    }
}

__device__ __forceinline__ void copy_half(uint32_t to, const TensorMap* map, int row, int block, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(0), "r"(row), "r"(block), "l"(READ_ONCE)
        : "memory");
}
__device__ __forceinline__ uint4 read_l2(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ bool has_passed(uint32_t barrier, int phase) {
    uint32_t has;
    asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(has)
                 : "r"(barrier), "r"(phase)
                 : "memory");
    return has != 0;
}
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

    __device__ __forceinline__ Step(const Merged& m, Shared& shared, unsigned char* x) : m(m), shared(shared), x(x) {
        ring = (shared_address(x) + m.x_bytes + 1023) & ~1023u;
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

    // --- The thread that copies.

    // A piece, and its place in the ring.
    struct Cursor {
        int count = 0, stage = 0, phase = 0;
        __device__ __forceinline__ void advance(int stages) {
            ++count;
            if (++stage == stages) stage = 0, phase ^= 1;
        }
    };

    __device__ __forceinline__ void produce() {
        Cursor next, landed, freed;
        for (int at = 0; at < m.num_layers; ++at) {
            for (int kind = QKV; kind <= DOWN; ++kind) {
                const Product p = product_of(m, kind, DIM);
                const TensorMap* const map = m.weights + at * 4 + kind;
                for (int tile = first_tile(); tile < p.tiles; tile += blocks) {
                    for (int k = 0; k < p.inputs; k += PIECE) {
                        const uint32_t barrier = shared_address(&shared.full[next.stage]), to = ring + next.stage * Ring::BYTES;
                        barrier_wait(shared_address(&shared.empty[next.stage]), next.phase ^ 1);
                        // Pieces that lie in the ring say that the other warps wait for something.
                        while (freed.count < next.count && has_passed(shared_address(&shared.empty[freed.stage]), freed.phase)) freed.advance(m.stages);
                        const int on_the_way = next.count - freed.count > m.level ? m.few_in_flight : m.in_flight;
                        for (; landed.count <= next.count - on_the_way; landed.advance(m.stages))
                            barrier_wait(shared_address(&shared.full[landed.stage]), landed.phase);
                        barrier_expect(barrier, Ring::BYTES);
                        copy_half(to, map, tile * p.stride, k / 64, barrier);
                        copy_half(to + Ring::HALF, map, tile * p.stride + p.second, k / 64, barrier);
                        next.advance(m.stages);
                    }
                }
                end_tiles(p.tiles);
            }
        }
    }

    // --- Meeting the other blocks.

    // What this block wrote may be read by those that wait for as many meetings.
    __device__ __forceinline__ void arrive() {
        meet();
        ++meetings;
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(m.arrived) : "memory");
        }
    }
    __device__ __forceinline__ void await() const {
        if (threadIdx.x == 0) {
            const unsigned wanted = meetings * static_cast<unsigned>(blocks);
            const long long begin = clock64();
            unsigned seen;
            while (true) {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(m.arrived) : "memory");
                if (static_cast<int>(seen - wanted) >= 0) break;
                if (clock64() - begin > PATIENCE) __trap();
            }
        }
        meet();
    }

    // --- Activations.

    static __device__ __forceinline__ int x_pitch(int inputs) { return inputs * 2 + 16; }

    __device__ __forceinline__ void prefetch(const float* weight) const {
        for (int at = threadIdx.x * 32; at < m.hidden; at += THREADS * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + at));
    }

    // The residual's rows over the roots of their mean squares, times the weight. `which`: where the sums of squares are; before the
    // first layer (negative) nobody has left any.
    __device__ __forceinline__ void load_normed(const float* weight, int which) {
        const int pitch = x_pitch(m.hidden);
        constexpr int AHEAD = ROWS > 4 ? 1 : 4 / ROWS, STRIDE = THREADS * 4;
        float4 v[AHEAD][ROWS], w[AHEAD];
        const auto load = [&](int first) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = min(first + i * STRIDE, m.hidden - 4);
                w[i] = *reinterpret_cast<const float4*>(weight + at);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) v[i][row] = __ldcg(reinterpret_cast<const float4*>(m.residual + row * m.hidden + at));
            }
        };
        // On their way while the sums of squares are.
        load(threadIdx.x * 4);
        float factor[ROWS];
        if (which < 0) add_squares(factor);
        else gather_squares(factor, which);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) factor[row] = 1.0f / sqrtf(factor[row] / m.hidden + m.eps);
        for (int first = threadIdx.x * 4; first < m.hidden; first += AHEAD * STRIDE) {
            if (first >= AHEAD * STRIDE) load(first);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = first + i * STRIDE;
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

    // Sums of squares of the rows of the residual.
    __device__ __forceinline__ void add_squares(float (&sums)[ROWS]) {
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
            sums[row] = sum;
            meet();
        }
    }
    // The same of what the blocks left.
    __device__ __forceinline__ void gather_squares(float (&sums)[ROWS], int which) const {
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sums[row] = 0.0f;
        const float* const from = m.squares + which * 8 * blocks;
#pragma unroll 5
        for (int at = lane; at < blocks; at += 32) {
#pragma unroll
            for (int row = 0; row < ROWS; ++row) sums[row] += __ldcg(from + row * blocks + at);
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) sums[row] = warp_sum(sums[row]);
    }

    // Rows of `inputs` elements as they are.
    __device__ __forceinline__ void load_plain(const void* from, int inputs) {
        const int pitch = x_pitch(inputs), chunks = inputs / 8;
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
    }

    // --- Products.

    // Takes in a piece from column `k` on.
    __device__ __forceinline__ void multiply_piece(float (&d)[2][4], int k, int inputs) {
        constexpr int BLOCKS = PIECE / 64;
        const int there = min(PIECE, inputs - k) / 64, row = lane % 8, matrix = lane / 8;
        const uint32_t weights = ring + slot * Ring::BYTES + (matrix & 1) * Ring::HALF + row * 128;
        const uint32_t from = shared_address(x) + min(row, ROWS - 1) * x_pitch(inputs) + k * 2 + matrix * 16;
        const auto add = [&](int block) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t first[4], second[4], b[4];
                load_matrices(b, from + block * 128 + half * 64);
                load_matrices(first, weights + block * Ring::BLOCK + (((half * 4 + matrix / 2) ^ row) << 4));
                load_matrices(second, weights + block * Ring::BLOCK + (((half * 4 + 2 + matrix / 2) ^ row) << 4));
                multiply<T>(d[0], first, b[0], b[1]);
                multiply<T>(d[1], second, b[2], b[3]);
            }
        };
        // Whose turn a place has shows only while nobody is a whole turn behind: another warp may still have the piece before.
        barrier_wait(shared_address(&shared.empty[slot]), parity ^ 1);
        barrier_wait(shared_address(&shared.full[slot]), parity);
        if (there == BLOCKS) {
#pragma unroll 4
            for (int block = 0; block < BLOCKS; ++block) add(block);
        } else {
            for (int block = 0; block < there; ++block) add(block);
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

    template <int KIND> __device__ __forceinline__ void multiply_tiles(bool is_last) {
        const Product p = product_of(m, KIND, DIM);
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
            for (; next < pieces; next += WARPS) multiply_piece(d, next * PIECE, p.inputs);
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
        load_normed(layer.norm, at > 0 ? 1 : -1);
        multiply_tiles<QKV>(false);
        arrive();
        attend(layer);
        arrive();
        await();
        load_plain(m.heads, m.num_heads * DIM);
        multiply_tiles<OUT>(false);
        put_squares(0);
        arrive();
        prefetch(layer.mlp_norm);
        await();
        load_normed(layer.mlp_norm, 0);
        multiply_tiles<GATE_UP>(false);
        arrive();
        await();
        load_plain(m.activated, m.inner);
        if (is_last) pdl_launch();
        multiply_tiles<DOWN>(is_last);
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
        if (threadIdx.x == THREADS) step.produce();
        else if (threadIdx.x < THREADS) step.consume();
    }
};

}  // namespace merged
#endif
