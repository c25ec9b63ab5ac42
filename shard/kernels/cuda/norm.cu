// RMSNorm and LayerNorm: of rows, alone or after adding to the residual stream, and of heads in place.
#include "common.cuh"
#include "fp8.cuh"

// Elements a thread keeps in registers: two vectors of eight, so that 1024 threads hold a row of 16384.
constexpr int WIDE = 8, VECTORS = 2;

// Rounds a row that the block has in registers, as if it had been stored in D, to E4M3 with a scale: its largest magnitude over
// 448.
template <typename D>
__device__ __forceinline__ void round_kept(float (&v)[VECTORS][WIDE], e4m3* out, int width, float* scale_of_row, float* scratch) {
    float largest = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        if ((threadIdx.x + k * blockDim.x) * WIDE >= width) continue;
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
            v[k][i] = to_float(from_float<D>(v[k][i]));
            largest = fmaxf(largest, fabsf(v[k][i]));
        }
    }
    largest = block_max(largest, scratch);
    // Below this its inverse would be infinite.
    const float scale = largest > 1e-35f ? largest / 448.0f : 1.0f, inverse = 1.0f / scale;
    if (threadIdx.x == 0) *scale_of_row = scale;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int at = (threadIdx.x + k * blockDim.x) * WIDE;
        if (at >= width) continue;
        uint32_t words[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            words[i] = narrow_two<e4m3>(v[k][4 * i] * inverse, v[k][4 * i + 1] * inverse) |
                       narrow_two<e4m3>(v[k][4 * i + 2] * inverse, v[k][4 * i + 3] * inverse) << 16;
        *reinterpret_cast<uint2*>(out + at) = make_uint2(words[0], words[1]);
    }
}

// `out = norm(x)`, or with ADD `x += delta; out = norm(x)`. One block a row; `out` may be `x`.
template <bool LAYER, bool ADD, typename X, typename D, typename O>
__device__ __forceinline__ void norm_row(X* x, const D* delta, const float* weight, const float* bias, float eps, O* out,
                                         int width, float* scales = nullptr) {
    __shared__ float scratch[32];
    pdl_launch();
    const size_t start = static_cast<size_t>(blockIdx.x) * width;
    x += start;
    out += start;
    if (ADD) delta += start;
    if (width % WIDE != 0 || width > WIDE * VECTORS * static_cast<int>(blockDim.x)) {
        // Any width: the row is read again from the cache instead of kept.
        pdl_wait();
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            float v = to_float(x[i]);
            if (ADD) {
                v += to_float(delta[i]);
                x[i] = from_float<X>(v);
            }
            sum += LAYER ? v : v * v;
        }
        float mean = 0.0f;
        if (LAYER) {
            mean = block_sum(sum, scratch) / width;
            sum = 0.0f;
            for (int i = threadIdx.x; i < width; i += blockDim.x) {
                const float v = to_float(x[i]) - mean;
                sum += v * v;
            }
        }
        const float factor = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            const float v = (to_float(x[i]) - mean) * factor * weight[i];
            out[i] = from_float<O>(LAYER ? v + bias[i] : v);
        }
        return;
    }
    // Parameters do not depend on what runs before.
    float w[VECTORS][WIDE], b[VECTORS][WIDE], v[VECTORS][WIDE];
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int at = (threadIdx.x + k * blockDim.x) * WIDE;
        if (at < width) {
            load_floats<f32, WIDE>(weight + at, w[k]);
            if (LAYER) load_floats<f32, WIDE>(bias + at, b[k]);
        }
    }
    pdl_wait();
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int at = (threadIdx.x + k * blockDim.x) * WIDE;
        if (at < width) {
            load_floats<X, WIDE>(x + at, v[k]);
            if (ADD) {
                float d[WIDE];
                load_floats<D, WIDE>(delta + at, d);
#pragma unroll
                for (int i = 0; i < WIDE; ++i) v[k][i] += d[i];
                store_floats<X, WIDE>(x + at, v[k]);
            }
#pragma unroll
            for (int i = 0; i < WIDE; ++i) sum += LAYER ? v[k][i] : v[k][i] * v[k][i];
        }
    }
    if (LAYER) {
        // The differences first: the difference of two large sums would lose what matters.
        const float mean = block_sum(sum, scratch) / width;
        sum = 0.0f;
#pragma unroll
        for (int k = 0; k < VECTORS; ++k) {
            if ((threadIdx.x + k * blockDim.x) * WIDE < width) {
#pragma unroll
                for (int i = 0; i < WIDE; ++i) {
                    v[k][i] -= mean;
                    sum += v[k][i] * v[k][i];
                }
            }
        }
    }
    const float factor = 1.0f / sqrtf(block_sum(sum, scratch) / width + eps);
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
        const int at = (threadIdx.x + k * blockDim.x) * WIDE;
        if (at < width) {
#pragma unroll
            for (int i = 0; i < WIDE; ++i) {
                v[k][i] = v[k][i] * factor * w[k][i];
                if (LAYER) v[k][i] += b[k][i];
            }
            if constexpr (!__is_same(O, e4m3)) store_floats<O, WIDE>(out + at, v[k]);
        }
    }
    if constexpr (__is_same(O, e4m3)) round_kept<D>(v, out, width, scales + blockIdx.x, scratch);
}

#define NORM(X, O)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(1024)                                                                  \
        rms_norm_##X##_##O(const X* x, const float* weight, float eps, O* out, int width) {                             \
        norm_row<false, false, X, X, O>(const_cast<X*>(x), nullptr, weight, nullptr, eps, out, width);                  \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(1024)                                                                  \
        layer_norm_##X##_##O(const X* x, const float* weight, const float* bias, float eps, O* out, int width) {        \
        norm_row<true, false, X, X, O>(const_cast<X*>(x), nullptr, weight, bias, eps, out, width);                      \
    }
NORM(f32, f32)
NORM(f32, bf16)
NORM(f32, f16)
NORM(bf16, bf16)
NORM(f16, f16)
NORM(bf16, f32)
NORM(f16, f32)

// The residual stream is f32.
#define ADD_NORM(D, O)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                                                  \
        add_rms_norm_##D##_##O(float* x, const D* delta, const float* weight, float eps, O* out, int width) {           \
        norm_row<false, true, f32, D, O>(x, delta, weight, nullptr, eps, out, width);                                   \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(1024) add_layer_norm_##D##_##O(                                        \
        float* x, const D* delta, const float* weight, const float* bias, float eps, O* out, int width) {               \
        norm_row<true, true, f32, D, O>(x, delta, weight, bias, eps, out, width);                                       \
    }
ADD_NORM(f32, f32)
ADD_NORM(f32, bf16)
ADD_NORM(f32, f16)
ADD_NORM(bf16, bf16)
ADD_NORM(f16, f16)
ADD_NORM(bf16, f32)
ADD_NORM(f16, f32)

// The same for a product that multiplies eight bits: numbers and a scale a row.
#define ADD_NORM_ROUNDED(D)                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024)                                                                  \
        add_rms_norm_rounded_##D(float* x, const D* delta, const float* weight, float eps, e4m3* out, float* scales,    \
                                 int width) {                                                                           \
        norm_row<false, true, f32, D, e4m3>(x, delta, weight, nullptr, eps, out, width, scales);                        \
    }
FOR_EACH_TYPE(ADD_NORM_ROUNDED)

// Heads in the columns `first..first + num_heads * head_dim` of rows of `width`, each normalised by itself: one warp a
// head. RMSNorm has one weight for all heads, LayerNorm (without a bias) one for each.
template <bool LAYER, typename T>
__device__ __forceinline__ void norm_heads(T* x, const float* weight, float eps, int rows, int width, int first,
                                           int num_heads, int head_dim) {
    constexpr int V = 4, K = 4;
    pdl_launch();
    pdl_wait();
    const int lane = threadIdx.x % 32;
    const int head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (head >= rows * num_heads) return;
    x += static_cast<size_t>(head / num_heads) * width + first + head % num_heads * head_dim;
    if (LAYER) weight += head % num_heads * head_dim;
    if (head_dim % V != 0 || first % V != 0 || width % V != 0 || head_dim > 32 * V * K) {
        float mean = 0.0f, sum = 0.0f;
        if (LAYER) {
            for (int i = lane; i < head_dim; i += 32) sum += to_float(x[i]);
            mean = warp_sum(sum) / head_dim;
            sum = 0.0f;
        }
        for (int i = lane; i < head_dim; i += 32) {
            const float v = to_float(x[i]) - mean;
            sum += v * v;
        }
        const float factor = 1.0f / sqrtf(warp_sum(sum) / head_dim + eps);
        for (int i = lane; i < head_dim; i += 32) x[i] = from_float<T>((to_float(x[i]) - mean) * factor * weight[i]);
        return;
    }
    float v[K][V], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int at = (lane + k * 32) * V;
        if (at < head_dim) {
            load_floats<T, V>(x + at, v[k]);
#pragma unroll
            for (int i = 0; i < V; ++i) sum += LAYER ? v[k][i] : v[k][i] * v[k][i];
        }
    }
    if (LAYER) {
        const float mean = warp_sum(sum) / head_dim;
        sum = 0.0f;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if ((lane + k * 32) * V < head_dim) {
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    v[k][i] -= mean;
                    sum += v[k][i] * v[k][i];
                }
            }
        }
    }
    const float factor = 1.0f / sqrtf(warp_sum(sum) / head_dim + eps);
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int at = (lane + k * 32) * V;
        if (at < head_dim) {
            float w[V];
            load_floats<f32, V>(weight + at, w);
#pragma unroll
            for (int i = 0; i < V; ++i) v[k][i] = v[k][i] * factor * w[i];
            store_floats<T, V>(x + at, v[k]);
        }
    }
}

// Norm of columns that are spread over the ranks: first each rank's share of the sum of squares, then, with the sum over
// the ranks, the columns themselves. One block a row.
template <typename T>
__device__ __forceinline__ void squares_of(const T* x, int width, int first, int count, float share, float* squares) {
    __shared__ float scratch[32];
    pdl_launch();
    pdl_wait();
    x += static_cast<size_t>(blockIdx.x) * width + first;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float v = to_float(x[i]);
        sum += v * v;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum * share;
}
template <typename T>
__device__ __forceinline__ void scale_by_squares(T* x, int width, int first, int count, const float* squares,
                                                 float total_width, const float* weight, float eps) {
    pdl_launch();
    pdl_wait();
    x += static_cast<size_t>(blockIdx.x) * width + first;
    const float factor = 1.0f / sqrtf(squares[blockIdx.x] / total_width + eps);
    for (int i = threadIdx.x; i < count; i += blockDim.x) x[i] = from_float<T>(to_float(x[i]) * factor * weight[i]);
}

#define HEAD_NORMS(T)                                                                                                   \
    extern "C" __global__ void rms_norm_heads_##T(T* x, const float* weight, float eps, int rows, int width, int first, \
                                                  int num_heads, int head_dim) {                                        \
        norm_heads<false, T>(x, weight, eps, rows, width, first, num_heads, head_dim);                                  \
    }                                                                                                                   \
    extern "C" __global__ void layer_norm_heads_##T(T* x, const float* weight, float eps, int rows, int width,          \
                                                    int first, int num_heads, int head_dim) {                           \
        norm_heads<true, T>(x, weight, eps, rows, width, first, num_heads, head_dim);                                   \
    }                                                                                                                   \
    extern "C" __global__ void squares_##T(const T* x, int width, int first, int count, float share, float* squares) {  \
        squares_of<T>(x, width, first, count, share, squares);                                                          \
    }                                                                                                                   \
    extern "C" __global__ void scale_by_squares_##T(T* x, int width, int first, int count, const float* squares,        \
                                                    float total_width, const float* weight, float eps) {                \
        scale_by_squares<T>(x, width, first, count, squares, total_width, weight, eps);                                 \
    }
FOR_EACH_TYPE(HEAD_NORMS)
