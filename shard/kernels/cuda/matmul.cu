// What matrix products need beside the product: a bias, activations of another type.
#include "common.cuh"

// `out += bias`, row by row: `[rows, width]`.
template <typename T>
__device__ __forceinline__ void add_to_rows(T* out, const float* bias, int rows, int width) {
    pdl_launch();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    // A weight: nobody writes it.
    const float value = column < width ? bias[column] : 0.0f;
    pdl_wait();
    if (column >= width) return;
    for (int row = blockIdx.y; row < rows; row += gridDim.y) {
        T* at = out + static_cast<int64_t>(row) * width + column;
        *at = from_float<T>(to_float(*at) + value);
    }
}

// `out = x` in another type.
template <typename T, typename Out> __device__ __forceinline__ void convert(const T* x, Out* out, int64_t count) {
    pdl_launch();
    pdl_wait();
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride)
        out[at] = from_float<Out>(to_float(x[at]));
}

#define INSTANTIATE(T)                                                                                      \
    extern "C" __global__ void add_bias_##T(T* out, const float* bias, int rows, int width) {              \
        add_to_rows<T>(out, bias, rows, width);                                                            \
    }
FOR_EACH_TYPE(INSTANTIATE)

#define INSTANTIATE_CONVERT(T, OUT) \
    extern "C" __global__ void convert_##T##_##OUT(const T* x, OUT* out, int64_t count) { convert<T, OUT>(x, out, count); }
INSTANTIATE_CONVERT(f32, bf16)
INSTANTIATE_CONVERT(f32, f16)
INSTANTIATE_CONVERT(bf16, f32)
INSTANTIATE_CONVERT(f16, f32)
