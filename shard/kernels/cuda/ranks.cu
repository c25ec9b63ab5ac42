// Sums and gathers over the ranks of a model, each rank on a GPU of its own, through memory that they have mapped from one
// another. A rank pushes its part into every other's region and waits until the others' parts have come into its own. All add up
// in rank order, so that every rank has equal bits. `peers.rs` knows the same layout.
#include "common.cuh"

namespace {

constexpr int BLOCKS = 256;
// Of a message of few bytes: a number of call travels beside every four bytes, so that there is nothing to wait for but the data.
constexpr int SMALL_THREADS = 256;
constexpr int UNIT_BYTES = 8, SLOT_BYTES = 16;
// Of long ones: pieces, each announced by one flag.
constexpr int PIECE_THREADS = 512;
constexpr int PIECE_BYTES = 32768;
constexpr int VECTORS = PIECE_BYTES / 16 / PIECE_THREADS;
constexpr int MAX_RANKS = 16;

// Spins between two looks at clock and alarm.
constexpr int SPINS = 4096;

struct Widths { int at[MAX_RANKS]; };

// Who takes part, and where it is said that somebody does not: by value.
struct Group {
    const unsigned long long* bases;
    unsigned int* alarm;
    long long patience;
    int rank, world;
};

// A region: numbers of calls of this rank's own blocks (small, then pieces), flags of pieces, slots of small messages, pieces. The
// slots alternate: whoever writes one for the call after next has seen that all have read it.
__device__ __forceinline__ unsigned int* small_sequence(char* base) { return reinterpret_cast<unsigned int*>(base) + blockIdx.x; }
__device__ __forceinline__ unsigned int* piece_sequence(char* base) { return small_sequence(base) + BLOCKS; }
__device__ __forceinline__ unsigned int* flag(char* base, int source) { return small_sequence(base) + (2 + source) * BLOCKS; }
__device__ __forceinline__ char* slots(char* base) { return base + (2 + MAX_RANKS) * BLOCKS * sizeof(unsigned int); }
__device__ __forceinline__ char* small_slot(const Group& group, int owner, unsigned int parity, int source) {
    const long long index = (static_cast<long long>(parity) * group.world + source) * BLOCKS + blockIdx.x;
    return slots(reinterpret_cast<char*>(group.bases[owner])) + (index * SMALL_THREADS + threadIdx.x) * SLOT_BYTES;
}
__device__ __forceinline__ char* piece_slot(const Group& group, int owner, unsigned int parity, int source) {
    const long long small = 2LL * group.world * BLOCKS * SMALL_THREADS * SLOT_BYTES;
    const long long index = (static_cast<long long>(parity) * group.world + source) * BLOCKS + blockIdx.x;
    return slots(reinterpret_cast<char*>(group.bases[owner])) + small + index * PIECE_BYTES;
}

// Never zero, which is what memory starts with; odd and even alternate when the numbers wrap, too.
__device__ __forceinline__ unsigned int after(unsigned int sequence) { return sequence == 0xffffffffu ? 2 : sequence + 1; }

__device__ __forceinline__ long long nanoseconds() {
    long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Bounds a wait for `source`. Once it is over all waits are: whatever is computed then is not to be used, which the host sees.
struct Watch {
    int spins = 0;
    long long begin = 0;
    __device__ __forceinline__ bool is_over(const Group& group, int source) {
        if (++spins % SPINS != 0) return false;
        volatile unsigned int* alarm = group.alarm;
        if (*alarm != 0) return true;
        const long long now = nanoseconds();
        if (begin == 0) begin = now;
        if (now - begin < group.patience) return false;
        *alarm = 1u + source;
        return true;
    }
};

template <typename T, int V> __device__ __forceinline__ void load_part(const T* x, long long at, long long count, T (&out)[V]) {
    if (at + V <= count) {
        const Vec<T, V> v = *reinterpret_cast<const Vec<T, V>*>(x + at);
#pragma unroll
        for (int i = 0; i < V; ++i) out[i] = v.at[i];
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) out[i] = at + i < count ? x[at + i] : from_float<T>(0.0f);
    }
}
template <typename T, int V>
__device__ __forceinline__ void store_part(T* x, long long at, long long count, const float (&in)[V]) {
    if (at + V <= count) {
        store_floats<T, V>(x + at, in);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i)
            if (at + i < count) x[at + i] = from_float<T>(in[i]);
    }
}
template <typename T, int V> __device__ __forceinline__ void add_part(float (&sum)[V], const T (&part)[V], bool is_first) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] = is_first ? to_float(part[i]) : sum[i] + to_float(part[i]);
}

// `x = sum of x over the ranks` of at most BLOCKS * SMALL_THREADS units of 8 bytes, one a thread.
template <typename T> __device__ __forceinline__ void reduce_small(T* x, long long count, const Group& group) {
    constexpr int V = UNIT_BYTES / sizeof(T);
    pdl_launch();
    pdl_wait();
    volatile unsigned int* own_sequence = small_sequence(reinterpret_cast<char*>(group.bases[group.rank]));
    const unsigned int sequence = after(*own_sequence);
    __syncthreads();
    if (threadIdx.x == 0) *own_sequence = sequence;
    const long long at = (static_cast<long long>(blockIdx.x) * SMALL_THREADS + threadIdx.x) * V;
    if (at >= count) return;
    union { T values[V]; uint2 bits; } own, other;
    load_part<T, V>(x, at, count, own.values);
    for (int rank = 0; rank < group.world; ++rank) {
        if (rank == group.rank) continue;
        // Eight bytes arrive at once, so a number says that its four bytes are there.
        asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(small_slot(group, rank, sequence & 1, group.rank)),
                     "r"(own.bits.x), "r"(sequence), "r"(own.bits.y), "r"(sequence)
                     : "memory");
    }
    float sum[V];
    for (int rank = 0; rank < group.world; ++rank) {
        if (rank == group.rank) {
            add_part<T, V>(sum, own.values, rank == 0);
            continue;
        }
        const char* slot = small_slot(group, group.rank, sequence & 1, rank);
        uint4 v;
        Watch watch;
        do {
            asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                         : "l"(slot)
                         : "memory");
        } while ((v.y != sequence || v.w != sequence) && !watch.is_over(group, rank));
        other.bits = make_uint2(v.x, v.z);
        add_part<T, V>(sum, other.values, rank == 0);
    }
    store_part<T, V>(x, at, count, sum);
}

// Says that this block has written its pieces, and waits until the others' have come.
__device__ __forceinline__ void exchange(const Group& group, unsigned int sequence) {
    __syncthreads();
    const int rank = threadIdx.x;
    if (rank < group.world && rank != group.rank) {
        __threadfence_system();
        asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag(reinterpret_cast<char*>(group.bases[rank]), group.rank)),
                     "r"(sequence)
                     : "memory");
        const unsigned int* mine = flag(reinterpret_cast<char*>(group.bases[group.rank]), rank);
        unsigned int seen;
        Watch watch;
        do {
            asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
        } while (static_cast<int>(seen - sequence) < 0 && !watch.is_over(group, rank));
    }
    __syncthreads();
}

// `x = sum of x over the ranks`, of any length: each block does piece after piece.
template <typename T> __device__ __forceinline__ void reduce_pieces(T* x, long long count, const Group& group) {
    constexpr int V = 16 / sizeof(T), E = PIECE_BYTES / sizeof(T);
    pdl_launch();
    pdl_wait();
    volatile unsigned int* own_sequence = piece_sequence(reinterpret_cast<char*>(group.bases[group.rank]));
    unsigned int sequence = *own_sequence;
    for (long long start = static_cast<long long>(blockIdx.x) * E; start < count; start += static_cast<long long>(gridDim.x) * E) {
        sequence = after(sequence);
        union { T values[V]; uint4 bits; } own[VECTORS], other;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int vector = i * PIECE_THREADS + threadIdx.x;
            if (start + vector * V >= count) continue;
            load_part<T, V>(x, start + vector * V, count, own[i].values);
            for (int rank = 0; rank < group.world; ++rank)
                if (rank != group.rank)
                    reinterpret_cast<uint4*>(piece_slot(group, rank, sequence & 1, group.rank))[vector] = own[i].bits;
        }
        exchange(group, sequence);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int vector = i * PIECE_THREADS + threadIdx.x;
            if (start + vector * V >= count) continue;
            float sum[V];
            for (int rank = 0; rank < group.world; ++rank) {
                if (rank == group.rank) {
                    add_part<T, V>(sum, own[i].values, rank == 0);
                } else {
                    other.bits = __ldcg(reinterpret_cast<const uint4*>(piece_slot(group, group.rank, sequence & 1, rank)) + vector);
                    add_part<T, V>(sum, other.values, rank == 0);
                }
            }
            store_part<T, V>(x, start + vector * V, count, sum);
        }
    }
    // Every thread has read the number long ago: there was a barrier in between.
    if (threadIdx.x == 0) *own_sequence = sequence;
}

// A rank's elements `start..start + n` of `[rows, width]` to their columns, V at a time.
template <int V>
__device__ __forceinline__ void place(const float* from, long long start, long long n, float* out, int width, int row_width) {
    for (long long i = threadIdx.x * V; i < n; i += PIECE_THREADS * V) {
        const long long at = start + i, row = at / width;
        float* to = out + row * row_width + (at - row * width);
        // Not through L1, which does not see what other GPUs write.
        if constexpr (V == 4) {
            *reinterpret_cast<float4*>(to) = __ldcg(reinterpret_cast<const float4*>(from + i));
        } else {
            *to = __ldcg(from + i);
        }
    }
}

// The ranks' `[rows, widths[r]]` side by side, V elements at a time, which all widths are multiples of.
template <int V>
__device__ __forceinline__ void gather(const float* local, float* out, int rows, const Widths& widths, const Group& group) {
    constexpr int E = PIECE_BYTES / sizeof(float);
    pdl_launch();
    pdl_wait();
    int row_width = 0, widest = 0;
    for (int rank = 0; rank < group.world; ++rank) {
        row_width += widths.at[rank];
        widest = max(widest, widths.at[rank]);
    }
    volatile unsigned int* own_sequence = piece_sequence(reinterpret_cast<char*>(group.bases[group.rank]));
    unsigned int sequence = *own_sequence;
    const long long longest = static_cast<long long>(rows) * widest;
    for (long long start = static_cast<long long>(blockIdx.x) * E; start < longest; start += static_cast<long long>(gridDim.x) * E) {
        sequence = after(sequence);
        const long long mine = min(static_cast<long long>(E), static_cast<long long>(rows) * widths.at[group.rank] - start);
        for (long long i = threadIdx.x * V; i < mine; i += PIECE_THREADS * V) {
            const Vec<float, V> v = *reinterpret_cast<const Vec<float, V>*>(local + start + i);
            for (int rank = 0; rank < group.world; ++rank)
                if (rank != group.rank)
                    *reinterpret_cast<Vec<float, V>*>(piece_slot(group, rank, sequence & 1, group.rank) + i * sizeof(float)) = v;
        }
        exchange(group, sequence);
        int column = 0;
        for (int rank = 0; rank < group.world; ++rank) {
            const int width = widths.at[rank];
            const long long n = min(static_cast<long long>(E), static_cast<long long>(rows) * width - start);
            const float* piece = reinterpret_cast<const float*>(piece_slot(group, group.rank, sequence & 1, rank));
            place<V>(rank == group.rank ? local + start : piece, start, n, out + column, width, row_width);
            column += width;
        }
    }
    if (threadIdx.x == 0) *own_sequence = sequence;
}

}  // namespace

#define REDUCE(T)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(SMALL_THREADS) reduce_small_##T(T* x, long long count, Group group) {  \
        reduce_small<T>(x, count, group);                                                                               \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(PIECE_THREADS, 2)                                                      \
        reduce_pieces_##T(T* x, long long count, Group group) {                                                         \
        reduce_pieces<T>(x, count, group);                                                                              \
    }
FOR_EACH_TYPE(REDUCE)

extern "C" __global__ void __launch_bounds__(PIECE_THREADS, 2)
    gather_columns(const float* local, float* out, int rows, Widths widths, Group group) {
    bool is_wide = true;
    for (int rank = 0; rank < group.world; ++rank) is_wide = is_wide && widths.at[rank] % 4 == 0;
    if (is_wide) {
        gather<4>(local, out, rows, widths, group);
    } else {
        gather<1>(local, out, rows, widths, group);
    }
}
