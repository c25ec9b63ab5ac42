// A tile of weight rows times a tile of rows by products of Hopper's warpgroups, both given row by row.
#pragma once
#include "tile.cuh"
#include "wgmma.cuh"

namespace warpgroup {

// 128 weight rows times TOKENS rows: two warpgroups with 64 weight rows each, a warp with 16. A thread's sums:
// `pair(j, h)[l]` is the warp's weight row `lane / 4 + 8 h`, row `8 j + lane % 4 * 2 + l`.
template <typename T, int TOKENS> struct Tile {
    static constexpr int ROWS = 128, K = 64, STAGES = 4, BYTES = (ROWS + TOKENS) * 128;
    // With room to begin at a multiple of 1024 bytes; `warpgroup_tile_bytes` of module.rs says the same.
    static constexpr int SHARED = STAGES * BYTES + 1024;
    // Rows of one product.
    static constexpr int N = TOKENS < 128 ? TOKENS : 128;
    float sums[TOKENS / N][N / 2];

    __device__ __forceinline__ const float* pair(int j, int h) const { return &sums[j / (N / 8)][j % (N / 8) * 4 + 2 * h]; }

    // `w(j)` and `x(i)` point to the k elements of weight row j and row i, or are null where there is none; there are none of the
    // latter from `tokens` on. Rows are aligned to 16 bytes and k is a multiple of 8.
    template <typename W, typename X>
    __device__ __forceinline__ void run(W w, X x, int k, int tokens, unsigned char* memory) {
#ifdef HAS_WGMMA
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
        for (int half = 0; half < TOKENS / N; ++half)
#pragma unroll
            for (int i = 0; i < N / 2; ++i) sums[half][i] = 0.0f;
        const int steps = (k + K - 1) / K;
        load(0);
        tile::commit();
        if (steps > 1) load(1);
        tile::commit();
        for (int step = 0; step < steps; ++step) {
            tile::wait<1>();
            fence_async();
            __syncthreads();
            // Both warpgroups are done with the step before the last, whose place this takes.
            if (step + 2 < steps) load(step + 2);
            tile::commit();
            const unsigned char* const here = stages + step % STAGES * BYTES;
            const uint64_t a = matrix_at(shared_address(here + threadIdx.x / 128 * 64 * 128));
#pragma unroll
            for (int half = 0; half < TOKENS / N; ++half) {
                if (half > 0 && tokens <= half * N) continue;
                const uint64_t b = matrix_at(shared_address(here + (ROWS + half * N) * 128));
                products_begin();
#pragma unroll
                for (int part = 0; part < K / 16; ++part) Product<T, N>::run(sums[half], a + part * 2, b + part * 2);
            }
            products_commit();
            products_wait<1>();
        }
        products_wait<0>();
#endif
    }
};

}  // namespace warpgroup
