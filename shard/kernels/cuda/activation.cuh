// The non-linearities of feed-forward layers.
#pragma once
#include "common.cuh"

// The numbers are the host's (elementwise.rs).
enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

// x times the logistic function of z, to 2^-21 of it. An exponential that is infinite gives zero.
__device__ __forceinline__ float times_logistic(float x, float z) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
    return x * inverse;
}

// Of a value that is then rounded to T: where T has few bits, the quick exponential costs nothing.
template <typename T> __device__ __forceinline__ float activated(float x, int activation) {
    constexpr bool EXACT = sizeof(T) == 4;
    switch (activation) {
        case SILU: return EXACT ? x / (1.0f + expf(-x)) : times_logistic(x, x);
        case GELU_TANH: {
            const float inner = 0.797884583f * fmaf(x * x * x, 0.044715f, x);
            // (1 + tanh(y)) / 2 is the logistic function of 2 y.
            return EXACT ? 0.5f * x * (1.0f + tanhf(inner)) : times_logistic(x, 2.0f * inner);
        }
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.707106781f));
        default: return fmaxf(x, 0.0f);
    }
}
