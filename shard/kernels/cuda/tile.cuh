// The product of a tile of rows with a tile of weight rows, both given row by row: rows may be gathered from anywhere.
// On tensor cores (mma.sync, every GPU since Ampere) where types and alignment allow, else plain.
#pragma once
#include "common.cuh"

namespace tile {

constexpr int THREADS = 256;

__device__ __forceinline__ void copy_async(void* shared, const void* global, bool is_there) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    const int bytes = is_there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// BM rows times 128 weight rows: eight warps, two along the rows and four along the weights, each with BM / 2 x 32.
// A thread's sums: `sums[mi][ni][2 * h + l]` is row `row(mi, h)`, weight row `column(ni, l)`.
template <typename T, int BM> struct Tensor {
    // Rows of 128 bytes: halves of them would be fetched one after the other.
    static constexpr int M = BM, N = 128, K = 64, STAGES = 3, MI = BM / 32, NI = 4;
    // Dynamic shared memory, in bytes; `tensor_tile_bytes` of module.rs says the same.
    static constexpr int SHARED = STAGES * (M + N) * K * static_cast<int>(sizeof(T));
    float sums[MI][NI][4];

    __device__ __forceinline__ static int row(int mi, int h) {
        return (threadIdx.x / 128) * (BM / 2) + mi * 16 + h * 8 + threadIdx.x % 32 / 4;
    }
    __device__ __forceinline__ static int column(int ni, int l) {
        return threadIdx.x / 32 % 4 * 32 + ni * 8 + threadIdx.x % 4 * 2 + l;
    }
    // Places of 16 bytes in a row are exchanged so that eight rows of a column lie in different banks.
    __device__ __forceinline__ static int place(int row, int chunk) { return row * K + ((chunk ^ (row & 7)) << 3); }

    // `a(i)` and `b(j)` point to the k elements of row i and weight row j, or are null where there is none. Rows are
    // aligned to 16 bytes and k is a multiple of 8.
    template <typename A, typename B> __device__ __forceinline__ void run(A a, B b, int k, unsigned char* shared) {
        T* const stages = reinterpret_cast<T*>(shared);
        constexpr int CHUNKS = K / 8, STRIDE = THREADS / CHUNKS;
        constexpr int A_COPIES = M / STRIDE, B_COPIES = N / STRIDE;
        const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
        const T *a_rows[A_COPIES], *b_rows[B_COPIES];
#pragma unroll
        for (int i = 0; i < A_COPIES; ++i) a_rows[i] = a(first + i * STRIDE);
#pragma unroll
        for (int i = 0; i < B_COPIES; ++i) b_rows[i] = b(first + i * STRIDE);
        const T* const any = b(0);
        auto load = [&](int stage, int from) {
            T* const to = stages + stage * (M + N) * K;
            const int at = from + chunk * 8;
#pragma unroll
            for (int i = 0; i < A_COPIES; ++i) {
                const bool is_there = a_rows[i] != nullptr && at < k;
                copy_async(to + place(first + i * STRIDE, chunk), is_there ? a_rows[i] + at : any, is_there);
            }
#pragma unroll
            for (int i = 0; i < B_COPIES; ++i) {
                const bool is_there = b_rows[i] != nullptr && at < k;
                copy_async(to + M * K + place(first + i * STRIDE, chunk), is_there ? b_rows[i] + at : any, is_there);
            }
        };
#pragma unroll
        for (int mi = 0; mi < MI; ++mi)
#pragma unroll
            for (int ni = 0; ni < NI; ++ni)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[mi][ni][i] = 0.0f;
        const int steps = (k + K - 1) / K;
        const int lane = threadIdx.x % 32, a_first = threadIdx.x / 128 * (BM / 2), b_first = threadIdx.x / 32 % 4 * 32;
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            if (stage < steps) load(stage, stage * K);
            commit();
        }
        for (int step = 0; step < steps; ++step) {
            wait<STAGES - 2>();
            __syncthreads();
            const int next = step + STAGES - 1;
            if (next < steps) load(next % STAGES, next * K);
            commit();
            const T* const a_tile = stages + step % STAGES * (M + N) * K;
            const T* const b_tile = a_tile + M * K;
#pragma unroll
            for (int half = 0; half < K / 16; ++half) {
                uint32_t x[MI][4], w[2][4];
#pragma unroll
                for (int mi = 0; mi < MI; ++mi)
                    load_matrices(x[mi], a_tile + place(a_first + mi * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
                for (int ni = 0; ni < 2; ++ni)
                    load_matrices(
                        w[ni], b_tile + place(b_first + ni * 16 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
#pragma unroll
                for (int mi = 0; mi < MI; ++mi)
#pragma unroll
                    for (int ni = 0; ni < NI; ++ni)
                        multiply(sums[mi][ni], x[mi], w[ni / 2][ni % 2 * 2], w[ni / 2][ni % 2 * 2 + 1], T());
            }
        }
        wait<0>();
    }
};

// 32 rows times 32 weight rows in plain arithmetic, for any type, width and alignment: `sums[i]` is row
// `threadIdx.x / 32 + 8 i`, weight row `threadIdx.x % 32`.
template <typename T> struct Plain {
    static constexpr int M = 32, N = 32, K = 32;
    struct Shared {
        float a[M][K + 1], b[N][K + 1];
    };
    float sums[4];

    template <typename A, typename B> __device__ __forceinline__ void run(A a, B b, int k, Shared& shared) {
        const int column = threadIdx.x % 32, first = threadIdx.x / 32;
        const T *a_rows[4], *b_rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[i] = 0.0f;
            a_rows[i] = a(first + 8 * i);
            b_rows[i] = b(first + 8 * i);
        }
        for (int from = 0; from < k; from += K) {
            const int at = from + column;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                shared.a[first + 8 * i][column] = a_rows[i] != nullptr && at < k ? to_float(a_rows[i][at]) : 0.0f;
                shared.b[first + 8 * i][column] = b_rows[i] != nullptr && at < k ? to_float(b_rows[i][at]) : 0.0f;
            }
            __syncthreads();
#pragma unroll 8
            for (int at = 0; at < K; ++at) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[i] = fmaf(shared.a[first + 8 * i][at], shared.b[column][at], sums[i]);
            }
            __syncthreads();
        }
    }
};

}  // namespace tile
