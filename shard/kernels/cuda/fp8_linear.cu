// Matrices of eight bits: rounding rows of weights or activations to them, and back.
#include "activation.cuh"
#include "fp8.cuh"

constexpr int THREADS = 256;
// Elements of a thread at a time.
constexpr int PIECE = 16;
// Pieces that a thread keeps between looking for the largest and rounding; those of longer rows are read again.
constexpr int HELD = 4;
constexpr float LARGEST = 448.0f;

// A row as E4M3 with a scale: its largest magnitude over 448. A row that has an infinity or what is no number keeps that visible.
// `piece(at)` are its 16 elements from `at * 16` on, `one(at)` is one of those that are left.
template <typename T, typename Piece, typename One>
__device__ __forceinline__ void round_row(Piece piece, One one, uint8_t* to, float* scale_of_row, int pieces, int width) {
    __shared__ float scratch[32];
    float largest = 0.0f;
    const auto look_at = [&](const Vec<T, PIECE>& v) {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) largest = fmaxf(largest, fabsf(to_float(v.at[i])));
    };
    Vec<T, PIECE> held[HELD];
#pragma unroll
    for (int h = 0; h < HELD; ++h) {
        const int at = threadIdx.x + h * THREADS;
        if (at < pieces) held[h] = piece(at);
    }
#pragma unroll
    for (int h = 0; h < HELD; ++h)
        if (static_cast<int>(threadIdx.x) + h * THREADS < pieces) look_at(held[h]);
    for (int at = threadIdx.x + HELD * THREADS; at < pieces; at += THREADS) look_at(piece(at));
    for (int at = pieces * PIECE + threadIdx.x; at < width; at += THREADS) largest = fmaxf(largest, fabsf(one(at)));
    largest = block_max(largest, scratch);
    // Below this its inverse would be infinite.
    const float scale = largest > 1e-35f ? largest / LARGEST : 1.0f, inverse = 1.0f / scale;
    if (threadIdx.x == 0) *scale_of_row = scale;
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
    for (int at = threadIdx.x + HELD * THREADS; at < pieces; at += THREADS) round(piece(at), at);
    for (int at = pieces * PIECE + threadIdx.x; at < width; at += THREADS) to[at] = narrow<e4m3>(one(at) * inverse);
}

// Each row of x `[rows, width]` rounded to `[rows, out_pitch]`. A block has a row.
template <typename T>
__device__ __forceinline__ void quantize_rows(const T* x, int64_t pitch, uint8_t* out, int64_t out_pitch, float* scales, int width,
                                              int is_wide) {
    pdl_launch();
    pdl_wait();
    const T* const row = x + blockIdx.x * pitch;
    round_row<T>([&](int at) { return *reinterpret_cast<const Vec<T, PIECE>*>(row + at * PIECE); }, [&](int at) { return to_float(row[at]); },
                 out + blockIdx.x * out_pitch, scales + blockIdx.x, is_wide ? width / PIECE : 0, width);
}

// The same of `activation(gate) * up`, `[rows, 2 * width] -> [rows, width]`, as if that had been stored in T; width is a multiple of 16.
template <typename T>
__device__ __forceinline__ void gate_rows(const T* gate_up, uint8_t* out, float* scales, int width, int activation) {
    pdl_launch();
    pdl_wait();
    const T* const row = gate_up + static_cast<int64_t>(blockIdx.x) * 2 * width;
    const auto piece = [&](int at) {
        const Vec<T, PIECE> gate = *reinterpret_cast<const Vec<T, PIECE>*>(row + at * PIECE);
        const Vec<T, PIECE> up = *reinterpret_cast<const Vec<T, PIECE>*>(row + width + at * PIECE);
        Vec<T, PIECE> v;
#pragma unroll
        for (int i = 0; i < PIECE; ++i) v.at[i] = from_float<T>(activated<T>(to_float(gate.at[i]), activation) * to_float(up.at[i]));
        return v;
    };
    round_row<T>(piece, [](int) { return 0.0f; }, out + static_cast<int64_t>(blockIdx.x) * width, scales + blockIdx.x, width / PIECE,
                 width);
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
    extern "C" __global__ void __launch_bounds__(THREADS) fp8_gate_##T(                                                     \
        const T* gate_up, uint8_t* out, float* scales, int width, int activation) {                                         \
        gate_rows<T>(gate_up, out, scales, width, activation);                                                              \
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
