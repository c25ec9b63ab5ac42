// out[M, N] = x[M, K] W[N, K]^T (+ bias) for up to 128 rows of x on Hopper: a race to read the weights once.
//
// The weights are the left side of the tensor cores' product (at most 64 of their rows a warpgroup) and up to TOKENS rows of x the
// right one. A block has one tile of weight rows; of small weights the blocks of a cluster share the tile's K, and their sums meet
// in one another's shared memory, always in the same order: nothing goes through global memory but the result.
//
// One warp fills a ring of stages by bulk tensor copies: with weights before it waits for the kernel that makes x. It lets the
// next kernel start when it has asked for its last stage, not before: what is on the way then takes as long to arrive as the next
// kernel needs to ask for its own weights. A ring of up to 64 rows of x takes less than half of a multiprocessor's shared memory, so
// that both kernels' blocks have room.
#include "activation.cuh"
#include "wgmma.cuh"

// The host knows all of this too: shard/backend/src/cuda/cluster_gemm.rs.
struct ClusterGemm {
    void* out;
    // May be null.
    const float* bias;
    int rows, inputs, out_type, activation;
    // Of the result; a gated product has as many rows of gates and of ups.
    int outputs;
    // Weight rows of a warpgroup: a multiple of 8, at most 64.
    int group_rows;
    // Blocks of a cluster, which share K.
    int split;
    int stages;
    // How many stages before the end the next kernel may start: at least 1.
    int early;
};

enum ClusterOut { CLUSTER_F32 = 0 };

#ifdef HAS_WGMMA
constexpr int COLUMNS = 64;  // of a box: 128 bytes of 16-bit elements, as many as a copy exchanges chunks of
constexpr int MOST_STAGES = 12;
// How the L2 cache keeps what is copied: evict first, and last.
constexpr uint64_t READ_ONCE = 0x12F0000000000000ull;
constexpr uint64_t READ_AGAIN = 0x14F0000000000000ull;

template <typename T, int TOKENS, int GROUPS, bool IS_GATED> struct Cluster {
    static constexpr int THREADS = GROUPS * 128;
    static constexpr int SUMS = TOKENS / 2;
    // Of a gated product half of the warpgroups have gates and the others their ups.
    static constexpr int OUT_GROUPS = IS_GATED ? GROUPS / 2 : GROUPS;

    struct Barriers {
        uint64_t full[MOST_STAGES], empty[MOST_STAGES];
        // The rings of all blocks that share K are free, and their sums have come.
        uint64_t drained, gathered;
    };

    const ClusterGemm& to;
    Barriers& barriers;
    uint32_t ring;
    // Bytes of a warpgroup's weights in a stage, and of a stage.
    int box, stage_bytes;
    // Which of the blocks that share K.
    int part;
    // The first row of the result, and the steps of K.
    int first_row, begin, steps;

    __device__ __forceinline__ Cluster(const ClusterGemm& to, Barriers& barriers, uint32_t ring) : to(to), barriers(barriers), ring(ring) {
        part = to.split > 1 ? static_cast<int>(cluster_rank()) : 0;
        box = to.group_rows * 128;
        stage_bytes = GROUPS * box + TOKENS * 128;
        first_row = static_cast<int>(blockIdx.x) / to.split * (OUT_GROUPS * to.group_rows);
        const int all = (to.inputs + COLUMNS - 1) / COLUMNS;
        begin = part * all / to.split;
        steps = (part + 1) * all / to.split - begin;
    }

    __device__ __forceinline__ void make_barriers() const {
        for (int i = 0; i < to.stages; ++i) {
            barrier_init(shared_address(&barriers.full[i]), 1);
            barrier_init(shared_address(&barriers.empty[i]), GROUPS * 4);
        }
        barrier_init(shared_address(&barriers.drained), to.split);
        barrier_init(shared_address(&barriers.gathered), 1);
        barriers_made();
        if (to.split > 1) barrier_expect(shared_address(&barriers.gathered), THREADS * SUMS * 4);
    }

    __device__ __forceinline__ void copy_weights(const TensorMap* weights, int step, int stage) const {
        const uint32_t barrier = shared_address(&barriers.full[stage]), at = ring + stage * stage_bytes;
        const int column = (begin + step) * COLUMNS;
        barrier_expect(barrier, stage_bytes);
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            const int row = IS_GATED && g >= OUT_GROUPS ? to.outputs + first_row + (g - OUT_GROUPS) * to.group_rows
                                                        : first_row + g * to.group_rows;
            copy_box(at + g * box, weights, barrier, column, row, READ_ONCE);
        }
    }

    __device__ __forceinline__ void copy_x(const TensorMap* x, int step, int stage) const {
        const uint32_t at = ring + stage * stage_bytes + GROUPS * box;
        copy_box(at, x, shared_address(&barriers.full[stage]), (begin + step) * COLUMNS, 0, READ_AGAIN);
    }

    // Of one thread.
    __device__ __forceinline__ void produce(const TensorMap* weights, const TensorMap* x) const {
        const int ahead = min(to.stages, steps);
        for (int step = 0; step < ahead; ++step) copy_weights(weights, step, step);
        // Where all weights are on their way there is nothing more to wait for.
        const int last = max(ahead, steps - to.early);
        if (last >= steps) pdl_launch();
        if (to.split > 1) cluster_wait();
        pdl_wait();
        for (int step = 0; step < ahead; ++step) copy_x(x, step, step);
        int stage = 0, phase = 0;
        for (int step = ahead; step < steps; ++step) {
            barrier_wait(shared_address(&barriers.empty[stage]), phase);
            copy_weights(weights, step, stage);
            copy_x(x, step, stage);
            if (step == last) pdl_launch();
            if (++stage == to.stages) stage = 0, phase ^= 1;
        }
    }

    __device__ __forceinline__ void multiply(float (&d)[SUMS], int group) const {
        int stage = 0, phase = 0, previous = 0;
        const auto release = [&](int step, int at) {
            // Nobody waits for a stage that is not filled again.
            if (step + to.stages < steps && threadIdx.x % 32 == 0) barrier_arrive(shared_address(&barriers.empty[at]));
        };
        for (int step = 0; step < steps; ++step) {
            barrier_wait(shared_address(&barriers.full[stage]), phase);
            const uint32_t at = ring + stage * stage_bytes;
            const uint64_t left = matrix_at(at + group * box), right = matrix_at(at + GROUPS * box);
            products_begin();
#pragma unroll
            for (int k = 0; k < COLUMNS / 16; ++k) Product<T, TOKENS>::run(d, left + k * 2, right + k * 2);
            products_commit();
            products_wait<1>();
            if (step > 0) release(step - 1, previous);
            previous = stage;
            if (++stage == to.stages) stage = 0, phase ^= 1;
        }
        products_wait<0>();
    }

    __device__ __forceinline__ uint32_t place(int index, int thread) const { return ring + (index * THREADS + thread) * 16; }

    // Gives the other blocks that share K their columns' sums and gets those of its own.
    __device__ __forceinline__ void exchange(const float (&d)[SUMS], int columns) const {
        const int t = threadIdx.x;
        // Sums take the place of the ring, here and there.
        sync_some<1, THREADS>();
        if (t < to.split) barrier_arrive_at(shared_address(&barriers.drained), t);
        barrier_wait(shared_address(&barriers.drained), 0);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            const int owner = j / columns;
            send(place(part * columns + j % columns, t), shared_address(&barriers.gathered), owner, d[4 * j], d[4 * j + 1], d[4 * j + 2],
                 d[4 * j + 3]);
        }
        barrier_wait_cluster(shared_address(&barriers.gathered), 0);
    }

    // Sums over the blocks, in their order.
    __device__ __forceinline__ void gather(float (&v)[4], int columns, int j, int thread) const {
        v[0] = v[1] = v[2] = v[3] = 0.0f;
        for (int block = 0; block < to.split; ++block) {
            float4 other;
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(other.x), "=f"(other.y), "=f"(other.z), "=f"(other.w)
                         : "r"(place(block * columns + j, thread))
                         : "memory");
            v[0] += other.x;
            v[1] += other.y;
            v[2] += other.z;
            v[3] += other.w;
        }
    }

    // Stores the sums of eight rows of x from `column` on. `n`: the first of the warp's 16 weight rows, of which there are those
    // below `end`.
    __device__ __forceinline__ void store(const float (&v)[4], int column, int n, int end) const {
        const int lane = threadIdx.x % 32;
        if (to.out_type == CLUSTER_F32) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int m = column + lane % 4 * 2 + i % 2, row = n + lane / 4 + i / 2 * 8;
                if (m < to.rows && row < end) static_cast<f32*>(to.out)[static_cast<int64_t>(m) * to.outputs + row] = v[i];
            }
            return;
        }
        const bool is_even = to.outputs % 2 == 0;
        const int m = column + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t pair = transposed<T>(v + 2 * half);
            const int row = n + half * 8 + lane % 4 * 2;
            T* const out = static_cast<T*>(to.out) + static_cast<int64_t>(m) * to.outputs + row;
            if (m >= to.rows || row >= end) continue;
            if (is_even) {
                *reinterpret_cast<uint32_t*>(out) = pair;
            } else {
                const Vec<T, 2> both = *reinterpret_cast<const Vec<T, 2>*>(&pair);
                out[0] = both.at[0];
                if (row + 1 < end) out[1] = both.at[1];
            }
        }
    }

    __device__ __forceinline__ void consume() const {
        const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        float d[SUMS] = {};
        // The other blocks' barriers are there.
        if (to.split > 1) cluster_wait();
        multiply(d, group);
        // What ran before may still read what this overwrites.
        pdl_wait();
        const int columns = TOKENS / 8 / to.split;
        if (to.split > 1) exchange(d, columns);
        const bool is_up = IS_GATED && group >= OUT_GROUPS;
        if constexpr (IS_GATED) {
            if (to.split == 1) {
                sync_some<1, THREADS>();
                if (is_up) {
#pragma unroll
                    for (int j = 0; j < TOKENS / 8; ++j)
                        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(place(j, threadIdx.x)), "f"(d[4 * j]), "f"(d[4 * j + 1]),
                                     "f"(d[4 * j + 2]), "f"(d[4 * j + 3])
                                     : "memory");
                }
                sync_some<1, THREADS>();
            }
        }
        if (is_up) return;
        const int first = first_row + group * to.group_rows, n = first + warp * 16, end = min(first + to.group_rows, to.outputs);
        float biases[2] = {}, up_biases[2] = {};
        if (to.bias) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = n + lane / 4 + half * 8;
                if (row >= end) continue;
                biases[half] = to.bias[row];
                if (IS_GATED) up_biases[half] = to.bias[row + to.outputs];
            }
        }
        const auto finish = [&](float (&v)[4], int j, int column) {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] += biases[i / 2];
            if constexpr (IS_GATED) {
                float up[4];
                gather(up, columns, j, threadIdx.x + OUT_GROUPS * 128);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // As if gate and up had been stored.
                    const float gate = activated<T>(to_float(from_float<T>(v[i])), to.activation);
                    v[i] = gate * to_float(from_float<T>(up[i] + up_biases[i / 2]));
                }
            }
            store(v, column, n, end);
        };
        if (to.split > 1) {
            for (int j = 0; j < columns; ++j) {
                float v[4];
                gather(v, columns, j, threadIdx.x);
                finish(v, j, (part * columns + j) * 8);
            }
        } else {
#pragma unroll
            for (int j = 0; j < TOKENS / 8; ++j) {
                float v[4] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
                finish(v, j, j * 8);
            }
        }
    }

    __device__ static __forceinline__ void run(const TensorMap* weights, const TensorMap* x, const ClusterGemm& to) {
        extern __shared__ char dynamic[];
        __shared__ Barriers barriers;
        const Cluster work(to, barriers, (shared_address(dynamic) + 1023) & ~1023u);
        if (threadIdx.x == THREADS) {
            prefetch_map(weights);
            prefetch_map(x);
        }
        if (threadIdx.x == 0) work.make_barriers();
        __syncthreads();
        if (to.split > 1) cluster_arrive();
        if (threadIdx.x < THREADS) work.consume();
        else if (threadIdx.x == THREADS) work.produce(weights, x);
        else if (to.split > 1) cluster_wait();
    }
};
#endif

#ifdef HAS_WGMMA
#define CLUSTER_BODY(T, TOKENS, GROUPS, IS_GATED) Cluster<T, TOKENS, GROUPS, IS_GATED>::run(&weights, &x, to);
#else
// Not launched there.
#define CLUSTER_BODY(T, TOKENS, GROUPS, IS_GATED)
#endif
#define CLUSTER(NAME, T, TOKENS, GROUPS, BLOCKS, IS_GATED)                                                                 \
    extern "C" __global__ void __launch_bounds__(GROUPS * 128 + 32, BLOCKS) NAME##_##TOKENS##_##GROUPS##_##T(            \
        const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, const __grid_constant__ ClusterGemm to) { \
        CLUSTER_BODY(T, TOKENS, GROUPS, IS_GATED)                                                                          \
    }
#define CLUSTER_TYPES(NAME, TOKENS, GROUPS, BLOCKS, IS_GATED) \
    CLUSTER(NAME, bf16, TOKENS, GROUPS, BLOCKS, IS_GATED)     \
    CLUSTER(NAME, f16, TOKENS, GROUPS, BLOCKS, IS_GATED)
CLUSTER_TYPES(cluster, 16, 1, 2, false)
CLUSTER_TYPES(cluster, 32, 1, 2, false)
CLUSTER_TYPES(cluster, 64, 1, 2, false)
CLUSTER_TYPES(cluster, 128, 1, 1, false)
CLUSTER_TYPES(cluster_gated, 16, 2, 2, true)
CLUSTER_TYPES(cluster_gated, 32, 2, 2, true)
CLUSTER_TYPES(cluster_gated, 64, 2, 2, true)
