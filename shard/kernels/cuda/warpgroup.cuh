// Matrix instructions of Hopper's warpgroups (wgmma), and a tile of weight rows times a tile of rows made of them.
#pragma once
#include "common.cuh"
#include "tile.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WARPGROUPS 1
#endif

namespace warpgroup {

#ifdef HAS_WARPGROUPS
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// What was stored in shared memory is seen by the matrix units after the next barrier.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Rows of 64 elements of two bytes, 16-byte places exchanged over eight rows (swizzle of 128 bytes).
__device__ __forceinline__ uint64_t describe(const void* tile) {
    const uint64_t address = __cvta_generic_to_shared(tile);
    return (address & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

// `sums += a b^T` of 64 rows of a and N of b, 16 elements each.
template <typename T, int N> struct Multiply;
template <> struct Multiply<bf16, 16> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7"
            "}, %8, %9, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3])
            : "l"(a), "l"(b));
    }
};
template <> struct Multiply<f16, 16> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7"
            "}, %8, %9, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3])
            : "l"(a), "l"(b));
    }
};
template <> struct Multiply<bf16, 32> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
            "}, %16, %17, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
              "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
            : "l"(a), "l"(b));
    }
};
template <> struct Multiply<f16, 32> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
            "}, %16, %17, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
              "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3])
            : "l"(a), "l"(b));
    }
};
template <> struct Multiply<bf16, 64> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
            "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
            "}, %32, %33, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
              "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
              "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
              "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
              "+f"(d[7][2]), "+f"(d[7][3])
            : "l"(a), "l"(b));
    }
};
template <> struct Multiply<f16, 64> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
            "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
            "}, %32, %33, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
              "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
              "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
              "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
              "+f"(d[7][2]), "+f"(d[7][3])
            : "l"(a), "l"(b));
    }
};
template <> struct Multiply<bf16, 128> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
            "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
            "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
            "%56, %57, %58, %59, %60, %61, %62, %63"
            "}, %64, %65, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
              "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
              "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
              "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
              "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
              "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]),
              "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]),
              "+f"(d[11][3]), "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]),
              "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), "+f"(d[14][0]),
              "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]),
              "+f"(d[15][2]), "+f"(d[15][3])
            : "l"(a), "l"(b));
    }
};
template <> struct Multiply<f16, 128> {
    __device__ __forceinline__ static void run(float (*d)[4], uint64_t a, uint64_t b) {
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
            "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
            "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
            "%56, %57, %58, %59, %60, %61, %62, %63"
            "}, %64, %65, 1, 1, 1, 0, 0;"
            : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
              "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
              "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
              "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
              "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
              "+f"(d[7][2]), "+f"(d[7][3]), "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]),
              "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), "+f"(d[10][0]), "+f"(d[10][1]),
              "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]),
              "+f"(d[11][3]), "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]),
              "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), "+f"(d[14][0]),
              "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]),
              "+f"(d[15][2]), "+f"(d[15][3])
            : "l"(a), "l"(b));
    }
};
#endif

// Two values of an 8 x 8 matrix, of row `lane / 4` and columns `lane % 4 * 2 + {0, 1}`, rounded, against those of the column and the
// rows of these numbers.
template <typename T> __device__ __forceinline__ uint32_t transposed(const float* pair) {
    Vec<T, 2> rounded;
    rounded.at[0] = from_float<T>(pair[0]);
    rounded.at[1] = from_float<T>(pair[1]);
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                 : "=r"(result)
                 : "r"(*reinterpret_cast<const uint32_t*>(&rounded)));
    return result;
}

// 128 weight rows times TOKENS rows: two warpgroups with 64 weight rows each, a warp with 16. A thread's sums: `sums[j][2 * h + l]` is
// the warp's weight row `lane / 4 + 8 h`, row `8 j + lane % 4 * 2 + l`.
template <typename T, int TOKENS> struct Tile {
    static constexpr int ROWS = 128, K = 64, STAGES = 4, BYTES = (ROWS + TOKENS) * 128;
    // With room to begin at a multiple of 1024 bytes; `warpgroup_tile_bytes` of module.rs says the same.
    static constexpr int SHARED = STAGES * BYTES + 1024;
    float sums[TOKENS / 8][4];


    // `w(j)` and `x(i)` point to the k elements of weight row j and row i, or are null where there is none; there are none of the
    // latter from `tokens` on. Rows are aligned to 16 bytes and k is a multiple of 8.
    template <typename W, typename X>
    __device__ __forceinline__ void run(W w, X x, int k, int tokens, unsigned char* memory) {
#ifdef HAS_WARPGROUPS
        unsigned char* const stages = memory + (1024 - __cvta_generic_to_shared(memory) % 1024) % 1024;
        constexpr int STRIDE = 32, W_COPIES = ROWS / STRIDE, X_COPIES = (TOKENS + STRIDE - 1) / STRIDE;
        const int chunk = threadIdx.x % 8, first = threadIdx.x / 8;
        const T *w_rows[W_COPIES], *x_rows[X_COPIES];
#pragma unroll
        for (int i = 0; i < W_COPIES; ++i) w_rows[i] = w(first + i * STRIDE);
#pragma unroll
        for (int i = 0; i < X_COPIES; ++i) x_rows[i] = first + i * STRIDE < TOKENS ? x(first + i * STRIDE) : nullptr;
        const T* const any = w(0);
        // Rows are 32 apart, so that they have the same place.
        const int place = first * 128 + ((chunk ^ (first & 7)) << 4);
        auto load = [&](int step) {
            unsigned char* const to = stages + step % STAGES * BYTES + place;
            const int at = step * K + chunk * 8;
#pragma unroll
            for (int i = 0; i < W_COPIES; ++i) {
                const bool is_there = w_rows[i] != nullptr && at < k;
                tile::copy_async(to + i * STRIDE * 128, is_there ? w_rows[i] + at : any, is_there);
            }
#pragma unroll
            for (int i = 0; i < X_COPIES; ++i) {
                const bool is_there = x_rows[i] != nullptr && at < k;
                if (TOKENS % STRIDE == 0 || first < TOKENS)
                    tile::copy_async(to + (ROWS + i * STRIDE) * 128, is_there ? x_rows[i] + at : any, is_there);
            }
        };
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
        const int steps = (k + K - 1) / K;
        load(0);
        tile::commit();
        if (steps > 1) load(1);
        tile::commit();
        for (int step = 0; step < steps; ++step) {
            tile::wait<1>();
            publish();
            __syncthreads();
            // Both warpgroups are done with the step before the last, whose place this takes.
            if (step + 2 < steps) load(step + 2);
            tile::commit();
            const unsigned char* const here = stages + step % STAGES * BYTES;
            const uint64_t a = describe(here + threadIdx.x / 128 * 64 * 128);
            constexpr int N = TOKENS < 128 ? TOKENS : 128;
#pragma unroll
            for (int half = 0; half < TOKENS / N; ++half) {
                if (half > 0 && tokens <= half * N) continue;
                const uint64_t b = describe(here + (ROWS + half * N) * 128);
                fence();
#pragma unroll
                for (int part = 0; part < K / 16; ++part) Multiply<T, N>::run(sums + half * N / 8, a + part * 2, b + part * 2);
            }
            warpgroup::commit();
            warpgroup::wait<1>();
        }
        warpgroup::wait<0>();
#endif
    }
};

}  // namespace warpgroup
