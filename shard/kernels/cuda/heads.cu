// Heads in strided columns: a matrix for each of them, and copies.
#include "common.cuh"
#include "tile.cuh"

// Heads whose matrices one launch takes: their addresses are a parameter, so that a recorded launch keeps them.
constexpr int HEADS = 64;
struct Matrices {
    const void* at[HEADS];
};

// Columns of heads in rows of `width`.
struct Columns {
    int width, first, stride;
};

// `out[h] = x[h] weights[h]^T`: blocks along the outputs, the rows, and the heads.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_tensor(const T* x, Columns from, const Matrices& weights, int pitch, T* out,
                                                Columns to, int rows, int inputs, int outputs) {
    extern __shared__ __align__(16) unsigned char tile_memory[];
    pdl_launch();
    pdl_wait();
    const int head = blockIdx.z, row0 = blockIdx.y * Tile::M, column0 = blockIdx.x * Tile::N;
    const T* const weight = static_cast<const T*>(weights.at[head]);
    const bool are_even = (to.width | to.first | to.stride) % 2 == 0;
    x += from.first + head * from.stride;
    out += to.first + head * to.stride;
    Tile tile;
    tile.run([&](int i) { return row0 + i < rows ? x + static_cast<size_t>(row0 + i) * from.width : nullptr; },
             [&](int j) { return column0 + j < outputs ? weight + static_cast<size_t>(column0 + j) * pitch : nullptr; },
             inputs, tile_memory);
#pragma unroll
    for (int mi = 0; mi < Tile::MI; ++mi)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = row0 + Tile::row(mi, h);
            if (row >= rows) continue;
#pragma unroll
            for (int ni = 0; ni < Tile::NI; ++ni) {
                const int column = column0 + Tile::column(ni, 0);
                T* const place = out + static_cast<size_t>(row) * to.width + column;
                const float pair[2] = {tile.sums[mi][ni][2 * h], tile.sums[mi][ni][2 * h + 1]};
                if (are_even && column + 1 < outputs) {
                    store_floats<T, 2>(place, pair);
                } else {
                    if (column < outputs) place[0] = from_float<T>(pair[0]);
                    if (column + 1 < outputs) place[1] = from_float<T>(pair[1]);
                }
            }
        }
}

template <typename T>
__device__ __forceinline__ void multiply_plain(const T* x, Columns from, const Matrices& weights, int pitch, T* out,
                                               Columns to, int rows, int inputs, int outputs) {
    using Tile = tile::Plain<T>;
    __shared__ typename Tile::Shared shared;
    pdl_launch();
    pdl_wait();
    const int head = blockIdx.z, row0 = blockIdx.y * Tile::M, column0 = blockIdx.x * Tile::N;
    const T* const weight = static_cast<const T*>(weights.at[head]);
    x += from.first + head * from.stride;
    out += to.first + head * to.stride;
    Tile tile;
    tile.run([&](int i) { return row0 + i < rows ? x + static_cast<size_t>(row0 + i) * from.width : nullptr; },
             [&](int j) { return column0 + j < outputs ? weight + static_cast<size_t>(column0 + j) * pitch : nullptr; },
             inputs, shared);
    const int column = column0 + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = row0 + threadIdx.x / 32 + 8 * i;
        if (row < rows && column < outputs)
            out[static_cast<size_t>(row) * to.width + column] = from_float<T>(tile.sums[i]);
    }
}

#define MULTIPLY_PARAMETERS(T)                                                                                          \
    const T *x, int x_width, int x_first, int x_stride, const __grid_constant__ Matrices weights, int pitch, T *out,    \
        int out_width, int out_first, int out_stride, int rows, int inputs, int outputs
#define MULTIPLY_ARGUMENTS                                                                                              \
    x, Columns{x_width, x_first, x_stride}, weights, pitch, out, Columns{out_width, out_first, out_stride}, rows,       \
        inputs, outputs
#define MULTIPLY_TENSOR(T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(tile::THREADS) matmul_heads_32_##T(MULTIPLY_PARAMETERS(T)) {           \
        multiply_tensor<T, tile::Tensor<T, 32>>(MULTIPLY_ARGUMENTS);                                                    \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(tile::THREADS) matmul_heads_128_##T(MULTIPLY_PARAMETERS(T)) {          \
        multiply_tensor<T, tile::Tensor<T, 128>>(MULTIPLY_ARGUMENTS);                                                   \
    }
MULTIPLY_TENSOR(bf16)
MULTIPLY_TENSOR(f16)
#define MULTIPLY_PLAIN(T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(tile::THREADS) matmul_heads_plain_##T(MULTIPLY_PARAMETERS(T)) {        \
        multiply_plain<T>(MULTIPLY_ARGUMENTS);                                                                          \
    }
FOR_EACH_TYPE(MULTIPLY_PLAIN)

// Copies heads of `width` units (of 16 or 2 bytes, in which all sizes are counted): one block a row.
template <typename U>
__device__ __forceinline__ void copy(const U* x, Columns from, U* out, Columns to, int num_heads, int width) {
    pdl_launch();
    pdl_wait();
    x += static_cast<size_t>(blockIdx.x) * from.width + from.first;
    out += static_cast<size_t>(blockIdx.x) * to.width + to.first;
    for (int i = threadIdx.x; i < num_heads * width; i += blockDim.x) {
        const int head = i / width, at = i % width;
        out[head * to.stride + at] = x[head * from.stride + at];
    }
}
#define COPY_PARAMETERS(U)                                                                                              \
    const U *x, int x_width, int x_first, int x_stride, U *out, int out_width, int out_first, int out_stride,           \
        int num_heads, int width
#define COPY_ARGUMENTS                                                                                                  \
    x, Columns{x_width, x_first, x_stride}, out, Columns{out_width, out_first, out_stride}, num_heads, width
extern "C" __global__ void copy_heads_16(COPY_PARAMETERS(uint4)) { copy(COPY_ARGUMENTS); }
extern "C" __global__ void copy_heads_2(COPY_PARAMETERS(uint16_t)) { copy(COPY_ARGUMENTS); }
