// out[N] = W[N, K] x[K] (+ bias) for one row of x: a warp a row of the weights, eight loads of 16 bytes in flight.
//
// The first loads are on their way before the kernel waits for the one that makes x.
#include "common.cuh"

// Element types of `out` where it is chosen at run time.
enum OutType { OUT_F32 = 0, OUT_BF16 = 1, OUT_F16 = 2 };

constexpr int GEMV_LOADS = 8;

__device__ __forceinline__ float2 floats(uint32_t pair, bf16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ __forceinline__ float2 floats(uint32_t pair, f16) { return __half22float2(*reinterpret_cast<__half2*>(&pair)); }
template <typename T> __device__ __forceinline__ void add_product(float2& sum, uint32_t w, uint32_t x) {
    const float2 a = floats(w, T{}), b = floats(x, T{});
    sum.x = fmaf(a.x, b.x, sum.x);
    sum.y = fmaf(a.y, b.y, sum.y);
}
template <> __device__ __forceinline__ void add_product<f32>(float2& sum, uint32_t w, uint32_t x) {
    sum.x = fmaf(__uint_as_float(w), __uint_as_float(x), sum.x);
}

template <typename T>
__device__ __forceinline__ void gemv(const T* x, const T* weights, void* out, const float* bias, int outputs, int inputs, int stride,
                                     int out_type) {
    extern __shared__ uint4 shared_x[];
    const int lane = threadIdx.x & 31, row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    const int pieces = inputs / (16 / static_cast<int>(sizeof(T)));
    const uint4* from = reinterpret_cast<const uint4*>(weights + static_cast<int64_t>(min(row, outputs - 1)) * stride);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4 now[GEMV_LOADS];
#pragma unroll
    for (int i = 0; i < GEMV_LOADS; ++i) now[i] = i * 32 + lane < pieces ? ld_stream(from + i * 32 + lane) : zero;
    pdl_launch();
    pdl_wait();
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) shared_x[i] = reinterpret_cast<const uint4*>(x)[i];
    __syncthreads();
    float2 sum = make_float2(0.0f, 0.0f);
    for (int k = lane; k < pieces; k += 32 * GEMV_LOADS) {
        uint4 next[GEMV_LOADS];
#pragma unroll
        for (int i = 0; i < GEMV_LOADS; ++i) {
            const int at = k + (GEMV_LOADS + i) * 32;
            next[i] = at < pieces ? ld_stream(from + at) : zero;
        }
#pragma unroll
        for (int i = 0; i < GEMV_LOADS; ++i) {
            const uint4 v = k + i * 32 < pieces ? shared_x[k + i * 32] : zero;
            add_product<T>(sum, now[i].x, v.x);
            add_product<T>(sum, now[i].y, v.y);
            add_product<T>(sum, now[i].z, v.z);
            add_product<T>(sum, now[i].w, v.w);
        }
#pragma unroll
        for (int i = 0; i < GEMV_LOADS; ++i) now[i] = next[i];
    }
    float total = warp_sum(sum.x + sum.y);
    if (lane == 0 && row < outputs) {
        if (bias) total += bias[row];
        if (out_type == OUT_F32) static_cast<f32*>(out)[row] = total;
        else if (out_type == OUT_BF16) static_cast<bf16*>(out)[row] = from_float<bf16>(total);
        else static_cast<f16*>(out)[row] = from_float<f16>(total);
    }
}

#define INSTANTIATE(T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) gemv_##T(const T* x, const T* weights, void* out, const float* bias, \
                                                               int outputs, int inputs, int stride, int out_type) {  \
        gemv<T>(x, weights, out, bias, outputs, inputs, stride, out_type);                                           \
    }
FOR_EACH_TYPE(INSTANTIATE)
