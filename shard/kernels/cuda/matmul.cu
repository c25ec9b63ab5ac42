// What matrix products need beside the product: activations and results of another type.
#include "common.cuh"

// `out = x` in another type, or as it is.
template <typename T, typename Out> __device__ __forceinline__ void convert(const T* x, Out* out, int64_t count) {
    pdl_launch();
    pdl_wait();
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < count; at += stride)
        out[at] = from_float<Out>(to_float(x[at]));
}

#define INSTANTIATE_CONVERT(T, OUT) \
    extern "C" __global__ void convert_##T##_##OUT(const T* x, OUT* out, int64_t count) { convert<T, OUT>(x, out, count); }
INSTANTIATE_CONVERT(f32, f32)
INSTANTIATE_CONVERT(bf16, bf16)
INSTANTIATE_CONVERT(f16, f16)
INSTANTIATE_CONVERT(f32, bf16)
INSTANTIATE_CONVERT(f32, f16)
INSTANTIATE_CONVERT(bf16, f32)
INSTANTIATE_CONVERT(f16, f32)
