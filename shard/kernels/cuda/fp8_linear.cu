// Matrices of eight bits: rounding rows of weights or activations to them, and back.
#include "fp8.cuh"

constexpr int THREADS = 256;
// Elements of a thread at a time.
constexpr int PIECE = 16;
// Pieces that a thread keeps between looking for the largest and rounding; those of longer rows are read again.
constexpr int HELD = 4;
constexpr float LARGEST = 448.0f;

// Each row of x `[rows, width]` as E4M3 `[rows, out_pitch]` with a scale: its largest magnitude over 448. A row that has an infinity
// or what is no number keeps that visible. A block has a row.
template <typename T>
__device__ __forceinline__ void quantize_rows(const T* x, int64_t pitch, uint8_t* out, int64_t out_pitch, float* scales, int width,
                                              int is_wide) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    const T* const row = x + blockIdx.x * pitch;
    uint8_t* const to = out + blockIdx.x * out_pitch;
    float largest = 0.0f;
    const int pieces = is_wide ? width / PIECE : 0;
    const auto look_at = [&](const Vec<T, PIECE>& v) {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) largest = fmaxf(largest, fabsf(to_float(v.at[i])));
    };
    Vec<T, PIECE> held[HELD];
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const int at = threadIdx.x + h * THREADS;
        if (at < pieces) held[h] = *reinterpret_cast<const Vec<T, PIECE>*>(row + at * PIECE);
    }
#pragma unroll
    for (int h = 0; h < HELD; ++h)
        if (static_cast<int>(threadIdx.x) + h * THREADS < pieces) look_at(held[h]);
    for (int at = threadIdx.x + HELD * THREADS; at < pieces; at += THREADS)
        look_at(*reinterpret_cast<const Vec<T, PIECE>*>(row + at * PIECE));
    for (int at = pieces * PIECE + threadIdx.x; at < width; at += THREADS) largest = fmaxf(largest, fabsf(to_float(row[at])));
    largest = block_max(largest, scratch);
    // Below this its inverse would be infinite.
    const float scale = largest > 1e-35f ? largest / LARGEST : 1.0f, inverse = 1.0f / scale;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    const auto round = [&](const Vec<T, PIECE>& v, int at) {
        uint32_t words[PIECE / 4];
#pragma unroll
        for (int i = 0; i < PIECE / 4; ++i)
            words[i] = narrow_two<e4m3>(to_float(v.at[4 * i]) * inverse, to_float(v.at[4 * i + 1]) * inverse) |
                       narrow_two<e4m3>(to_float(v.at[4 * i + 2]) * inverse, to_float(v.at[4 * i + 3]) * inverse) << 16;
        *reinterpret_cast<uint4*>(to + at * PIECE) = make_uint4(words[0], words[1], words[2], words[3]);
    };
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const int at = threadIdx.x + h * THREADS;
        if (at < pieces) round(held[h], at);
    }
    for (int at = threadIdx.x + HELD * THREADS; at < pieces; at += THREADS)
        round(*reinterpret_cast<const Vec<T, PIECE>*>(row + at * PIECE), at);
    for (int at = pieces * PIECE + threadIdx.x; at < width; at += THREADS) to[at] = narrow<e4m3>(to_float(row[at]) * inverse);
}

// Rows of weights of eight bits as T `[rows, out_pitch]`.
template <typename T>
__device__ __forceinline__ void dequantize_rows(const uint8_t* weight, int64_t pitch, const float* scales, T* out, int64_t out_pitch,
                                                int width) {
    pdl_launch();
    pdl_wait();
    const uint8_t* const row = weight + blockIdx.x * pitch;
    T* const to = out + blockIdx.x * out_pitch;
    const float scale = scales[blockIdx.x];
    for (int at = threadIdx.x; at < width; at += THREADS) to[at] = from_float<T>(to_float(e4m3{row[at]}) * scale);
}

// `out = sums + bias`, row by row: `[rows, width]`, rounded once. `sums` may be `out`.
template <typename T>
__device__ __forceinline__ void add_to_rows(const float* sums, T* out, const float* bias, int rows, int width) {
    pdl_launch();
    pdl_wait();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    const float value = bias[column];
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        const int64_t at = static_cast<int64_t>(row) * width + column;
        out[at] = from_float<T>(sums[at] + value);
    }
}

#define INSTANTIATE(T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) fp8_quantize_##T(                                                 \
        const T* x, int64_t pitch, uint8_t* out, int64_t out_pitch, float* scales, int width, int is_wide) {                \
        quantize_rows<T>(x, pitch, out, out_pitch, scales, width, is_wide);                                                 \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) fp8_dequantize_##T(                                               \
        const uint8_t* weight, int64_t pitch, const float* scales, T* out, int64_t out_pitch, int width) {                  \
        dequantize_rows<T>(weight, pitch, scales, out, out_pitch, width);                                                   \
    }                                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) fp8_add_bias_##T(                                                 \
        const float* sums, T* out, const float* bias, int rows, int width) {                                                \
        add_to_rows<T>(sums, out, bias, rows, width);                                                                       \
    }
FOR_EACH_TYPE(INSTANTIATE)
