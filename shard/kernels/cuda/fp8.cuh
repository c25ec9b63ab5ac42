// Numbers of eight bits: E4M3 (up to 448) and E5M2 (up to 57344), and what they are in other types.
#pragma once
#include <cuda_fp8.h>

#include "common.cuh"

struct e4m3 {
    uint8_t bits;
};
struct e5m2 {
    uint8_t bits;
};

// Four numbers of a word, exactly. From sm_89 on the hardware widens two at a time to f16, which has them all.
template <typename F> __device__ __forceinline__ __half2 widen(uint32_t two);
template <> __device__ __forceinline__ __half2 widen<e4m3>(uint32_t two) {
    return __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3));
}
template <> __device__ __forceinline__ __half2 widen<e5m2>(uint32_t two) {
    return __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E5M2));
}

// The same as floats.
template <typename F> __device__ __forceinline__ void widen_to_floats(uint32_t four, float* out) {
    const float2 low = __half22float2(widen<F>(four & 0xffffu)), high = __half22float2(widen<F>(four >> 16));
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
}

// The same as two words of two numbers of T.
template <typename F, typename T> struct Widen;
template <typename F> struct Widen<F, f16> {
    static __device__ __forceinline__ void run(uint32_t four, uint32_t& low, uint32_t& high) {
        const __half2 a = widen<F>(four & 0xffffu), b = widen<F>(four >> 16);
        low = *reinterpret_cast<const uint32_t*>(&a);
        high = *reinterpret_cast<const uint32_t*>(&b);
    }
};
// A magnitude of eight bits, moved to where bfloat16 has the lower bits of its exponent, is the number over a power of two, of numbers
// below the smallest normal one too; multiplying is exact.
template <typename F> struct Widen<F, bf16> {
    static constexpr int SHIFT = __is_same(F, e4m3) ? 4 : 3;
    static constexpr uint32_t MAGNITUDE = __is_same(F, e4m3) ? 0x07f007f0u : 0x0fe00fe0u;
    // 2^120 and 2^112.
    static constexpr uint32_t FACTOR = __is_same(F, e4m3) ? 0x7b807b80u : 0x77807780u;
    static __device__ __forceinline__ uint32_t two(uint32_t high_bytes) {
        const uint32_t moved = (high_bytes & 0x80008000u) | ((high_bytes >> SHIFT) & MAGNITUDE);
        const uint32_t factor = FACTOR;
        const __nv_bfloat162 product =
            __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&moved), *reinterpret_cast<const __nv_bfloat162*>(&factor));
        return *reinterpret_cast<const uint32_t*>(&product);
    }
    static __device__ __forceinline__ void run(uint32_t four, uint32_t& low, uint32_t& high) {
        low = two(__byte_perm(four, 0, 0x1404));
        high = two(__byte_perm(four, 0, 0x3424));
    }
};

// The nearest number; what is beyond the largest becomes the largest.
template <typename F> __device__ __forceinline__ uint8_t narrow(float x);
template <> __device__ __forceinline__ uint8_t narrow<e4m3>(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
template <> __device__ __forceinline__ uint8_t narrow<e5m2>(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2); }
template <typename F> __device__ __forceinline__ uint32_t narrow_two(float a, float b);
template <> __device__ __forceinline__ uint32_t narrow_two<e4m3>(float a, float b) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
template <> __device__ __forceinline__ uint32_t narrow_two<e5m2>(float a, float b) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E5M2);
}

// As for other element types (common.cuh).
__device__ __forceinline__ float to_float(e4m3 x) { return __half2float(__low2half(widen<e4m3>(x.bits))); }
__device__ __forceinline__ float to_float(e5m2 x) { return __half2float(__low2half(widen<e5m2>(x.bits))); }
template <> __device__ __forceinline__ e4m3 from_float<e4m3>(float x) { return e4m3{narrow<e4m3>(x)}; }
template <> __device__ __forceinline__ e5m2 from_float<e5m2>(float x) { return e5m2{narrow<e5m2>(x)}; }

// Sixteen numbers of a cache as two pieces of 16 bytes of T.
template <typename F, typename T> __device__ __forceinline__ void widen_piece(const uint4& raw, uint4& first, uint4& second) {
    Widen<F, T>::run(raw.x, first.x, first.y);
    Widen<F, T>::run(raw.y, first.z, first.w);
    Widen<F, T>::run(raw.z, second.x, second.y);
    Widen<F, T>::run(raw.w, second.z, second.w);
}
