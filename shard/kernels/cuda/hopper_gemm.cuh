// The tiles of hopper_gemm.cu.
#pragma once
#include "activation.cuh"
#include "wgmma.cuh"

// The host knows all of this too: shard/backend/src/cuda/hopper_gemm.rs.
struct HopperGemm {
    // Of each weight row; may be null.
    const float* bias;
    int rows, inputs;
    // Of the result; a gated product has as many rows of gates and of ups.
    int outputs;
    // Tiles of rows of x whose tiles of weights follow one another: what is read again meanwhile stays in the L2 cache.
    int group;
    int activation;
    // Of a box of x: where there are fewer than a tile has, no more than 8 of them more than needed, as the copy of rows that are
    // not there takes its time.
    int box_rows;
};

// What becomes of the sums: the result; activation(gate) * up; or they are added to a float32 matrix.
enum End { STORE, GATE, ADD };

#ifdef HAS_WGMMA
// The same box to the same places of all blocks of the cluster, whose barriers count it.
__device__ __forceinline__ void copy_box_to_all(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
        : "memory");
}
// A box from shared memory: stored, or added to what is there.
__device__ __forceinline__ void store_box(const TensorMap* map, uint32_t from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(column), "r"(row)
                 : "memory");
}
__device__ __forceinline__ void add_box(const TensorMap* map, uint32_t from, int column, int row) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(column),
                 "r"(row)
                 : "memory");
}
__device__ __forceinline__ void boxes_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the last N groups of this thread have been read from shared memory.
template <int N> __device__ __forceinline__ void boxes_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
__device__ __forceinline__ void boxes_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Four 8 x 8 matrices: thread t gives the place of row t % 8 of matrix t / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
template <typename T> __device__ __forceinline__ uint32_t rounded_pair(float a, float b) {
    Vec<T, 2> pair;
    pair.at[0] = from_float<T>(a);
    pair.at[1] = from_float<T>(b);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Tiles of 128 rows of x and COLUMNS rows of weights, of a gated product one half gates and the other their ups.
template <typename T, int COLUMNS, int CLUSTER, int STAGES, End END> struct HopperTiles {
    static constexpr int GROUPS = 2, ROWS = GROUPS * 64;
    // Elements of a row in a box: 128 bytes, the most a copy exchanges chunks of.
    static constexpr int K = 64, ROW = 128;
    static constexpr int X_BYTES = ROWS * ROW, HALF_BYTES = COLUMNS / 2 * ROW, STAGE = X_BYTES + 2 * HALF_BYTES;
    static constexpr int OUT_COLUMNS = END == GATE ? COLUMNS / 2 : COLUMNS;
    // Columns of a box of the result, 16 rows of 128 bytes; every warp has two of them.
    static constexpr int BOX = END == ADD ? 32 : 64, BOX_BYTES = 16 * ROW;
    static constexpr int SHARED = STAGES * STAGE + GROUPS * 4 * 2 * BOX_BYTES + 1024;

    struct Barriers {
        uint64_t full[STAGES], empty[STAGES];
    };

    const HopperGemm& to;
    uint32_t full, empty, ring;
    int rank, tiles_m, tiles, steps;

    __device__ __forceinline__ HopperTiles(const HopperGemm& to, Barriers& barriers, uint32_t ring)
        : to(to), full(shared_address(barriers.full)), empty(shared_address(barriers.empty)), ring(ring) {
        rank = CLUSTER > 1 ? static_cast<int>(cluster_rank()) : 0;
        tiles_m = (to.rows + CLUSTER * ROWS - 1) / (CLUSTER * ROWS);
        tiles = tiles_m * ((to.outputs + OUT_COLUMNS - 1) / OUT_COLUMNS);
        steps = (to.inputs + K - 1) / K;
    }

    // Calls `work(row, column)` of this block's tiles, in the order that all its warps have.
    template <typename Work> __device__ __forceinline__ void for_each_tile(Work work) const {
        const int of_group = to.group * (tiles / tiles_m);
        for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
            const int first = tile / of_group * to.group, left = tile % of_group, height = min(to.group, tiles_m - first);
            work(((first + left % height) * CLUSTER + rank) * ROWS, left / height * OUT_COLUMNS);
        }
    }

    // This block's half of the weights of a stage, or both.
    __device__ __forceinline__ void copy_weights(const TensorMap* weights, int stage, int step, int column) const {
        const uint32_t barrier = full + stage * 8, at = ring + stage * STAGE + X_BYTES;
        const int second = END == GATE ? to.outputs + column : column + COLUMNS / 2;
        // Rows of x that are not copied are multiplied all the same, to rows that are not stored.
        barrier_expect(barrier, to.box_rows * ROW + 2 * HALF_BYTES);
        if constexpr (CLUSTER == 1) {
            copy_box(at, weights, barrier, step * K, column);
            copy_box(at + HALF_BYTES, weights, barrier, step * K, second);
        } else {
            copy_box_to_all(at + rank * HALF_BYTES, weights, barrier, step * K, rank ? second : column, 3);
        }
    }

    // One thread.
    __device__ __forceinline__ void produce(const TensorMap* weights, const TensorMap* x) const {
        int stage = 0, phase = 1;
        // Weights that are on their way before the kernel that makes x has ended.
        int ahead = min(STAGES, steps);
        for_each_tile([&](int row, int column) {
            if (ahead > 0) {
                for (int step = 0; step < ahead; ++step) copy_weights(weights, step, step, column);
                pdl_wait();
            }
            for (int step = 0; step < steps; ++step) {
                if (step >= ahead) {
                    barrier_wait(empty + stage * 8, phase);
                    copy_weights(weights, stage, step, column);
                }
                copy_box(ring + stage * STAGE, x, full + stage * 8, step * K, row);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            ahead = 0;
        });
    }

    // The warpgroup has read a stage.
    __device__ __forceinline__ void release(int stage) const {
        const int thread = threadIdx.x % 128;
        if constexpr (CLUSTER == 1) {
            if (thread == 0) barrier_arrive(empty + stage * 8);
        } else {
            if (thread < CLUSTER) barrier_arrive_at(empty + stage * 8, thread);
        }
    }

    // What is done to a pair of sums of neighbouring columns, the first of which is `column`.
    __device__ __forceinline__ void add_bias(float (&d)[COLUMNS / 2], int column) const {
        if (to.bias == nullptr) return;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) {
            const int half = END == GATE && j >= COLUMNS / 16;
            const int at = column + j * 8 - half * (COLUMNS / 2) + threadIdx.x % 4 * 2;
            if (at >= to.outputs) continue;
            const float2 bias = *reinterpret_cast<const float2*>(to.bias + half * to.outputs + at);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                d[4 * j + 2 * h] += bias.x;
                d[4 * j + 2 * h + 1] += bias.y;
            }
        }
    }

    // Values of the result from the sums of columns 8 j and following, of row h * 8 further down.
    template <int ACTIVATION> __device__ __forceinline__ static uint32_t pair_of(const float (&d)[COLUMNS / 2], int j, int h) {
        const int i = 4 * j + 2 * h;
        if constexpr (END == GATE) {
            float v[2];
#pragma unroll
            for (int l = 0; l < 2; ++l) {
                // As if gate and up had been stored.
                const float gate = activated<T>(to_float(from_float<T>(d[i + l])), ACTIVATION);
                v[l] = gate * to_float(from_float<T>(d[i + l + COLUMNS / 4]));
            }
            return rounded_pair<T>(v[0], v[1]);
        } else {
            return rounded_pair<T>(d[i], d[i + 1]);
        }
    }

    // A warp's 16 rows to shared memory and from there to the result; `turn` says which of its two boxes is the older.
    template <int ACTIVATION>
    __device__ __forceinline__ static void finish(const float (&d)[COLUMNS / 2], const TensorMap* out, uint32_t boxes, int& turn, int row, int column) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int part = 0; part < OUT_COLUMNS / BOX; ++part) {
            const uint32_t box = boxes + turn * BOX_BYTES;
            if (lane == 0) boxes_read<1>();
            __syncwarp();
            if constexpr (END == ADD) {
#pragma unroll
                for (int j = 0; j < BOX / 8; ++j)
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int within = lane / 4 + 8 * h, chunk = 2 * j + lane % 4 / 2, i = 4 * (part * (BOX / 8) + j) + 2 * h;
                        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(box + within * ROW + ((chunk ^ (within & 7)) << 4) + lane % 2 * 8),
                                     "f"(d[i]), "f"(d[i + 1])
                                     : "memory");
                    }
            } else {
                const int within = lane % 16;
#pragma unroll
                for (int j = 0; j < BOX / 8; j += 2) {
                    const int at = part * (BOX / 8) + j, chunk = j + lane / 16;
                    store_matrices(box + within * ROW + ((chunk ^ (within & 7)) << 4), pair_of<ACTIVATION>(d, at, 0),
                                   pair_of<ACTIVATION>(d, at, 1), pair_of<ACTIVATION>(d, at + 1, 0), pair_of<ACTIVATION>(d, at + 1, 1));
                }
            }
            fence_async();
            __syncwarp();
            if (lane == 0) {
                if constexpr (END == ADD) add_box(out, box, column + part * BOX, row);
                else store_box(out, box, column + part * BOX, row);
                boxes_commit();
            }
            turn ^= 1;
        }
    }

    __device__ __forceinline__ void consume(const TensorMap* out) const {
        const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4;
        const uint32_t boxes = ring + STAGES * STAGE + (group * 4 + warp) * 2 * BOX_BYTES;
        int stage = 0, phase = 0, turn = 0;
        float d[COLUMNS / 2];
        for_each_tile([&](int row, int column) {
            int previous = 0;
            hold(d);
            for (int step = 0; step < steps; ++step) {
                barrier_wait(full + stage * 8, phase);
                const uint32_t at = ring + stage * STAGE;
                const uint64_t left = matrix_at(at + group * 64 * ROW), right = matrix_at(at + X_BYTES);
                products_begin();
#pragma unroll
                for (int k = 0; k < K / 16; ++k) Product<T, COLUMNS>::run(d, left + k * 2, right + k * 2, step > 0 || k > 0);
                products_commit();
                products_wait<1>();
                if (step > 0) release(previous);
                previous = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            products_wait<0>();
            hold(d);
            release(previous);
            add_bias(d, column);
            const int first_row = row + group * 64 + warp * 16;
            // Each has code of its own, or all of it would be fetched again for every tile.
            if (END != GATE || to.activation == SILU) finish<SILU>(d, out, boxes, turn, first_row, column);
            else if (to.activation == GELU_TANH) finish<GELU_TANH>(d, out, boxes, turn, first_row, column);
            else if (to.activation == GELU) finish<GELU>(d, out, boxes, turn, first_row, column);
            else finish<RELU>(d, out, boxes, turn, first_row, column);
        });
        if (threadIdx.x % 32 == 0) boxes_done();
    }

    __device__ static __forceinline__ void run(const TensorMap& weights, const TensorMap& x, const TensorMap& out, const HopperGemm& to) {
        extern __shared__ char dynamic[];
        __shared__ __align__(8) Barriers barriers;
        const HopperTiles work(to, barriers, (shared_address(dynamic) + 1023) & ~1023u);
        if (threadIdx.x == 0) {
            prefetch_map(&weights);
            prefetch_map(&x);
            prefetch_map(&out);
            for (int i = 0; i < STAGES; ++i) {
                barrier_init(work.full + i * 8, 1);
                barrier_init(work.empty + i * 8, GROUPS * CLUSTER);
            }
            barriers_made();
        }
        __syncthreads();
        if constexpr (CLUSTER > 1) {
            cluster_arrive();
            cluster_wait();
        }
        pdl_launch();
        if (threadIdx.x < 128) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
            if (threadIdx.x == 0) work.produce(&weights, &x);
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
            // What ran before may still read what this overwrites.
            pdl_wait();
            work.consume(&out);
        }
        // The other block may still copy to this one, and count what it has read.
        if constexpr (CLUSTER > 1) {
            cluster_arrive();
            cluster_wait();
        }
    }
};
#endif
