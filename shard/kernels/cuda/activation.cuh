// The non-linearities of feed-forward layers.
#pragma once
#include "common.cuh"

// The numbers are the host's (elementwise.rs).
enum Activation { SILU = 0, GELU_TANH = 1, GELU = 2, RELU = 3 };

// Of a value that is then rounded to T: where T has few bits, the quick exponential costs nothing.
template <typename T> __device__ __forceinline__ float activated(float x, int activation) {
    constexpr bool EXACT = sizeof(T) == 4;
    switch (activation) {
        case SILU: return EXACT ? x / (1.0f + expf(-x)) : __fdividef(x, 1.0f + __expf(fminf(-x, 80.0f)));
        case GELU_TANH: {
            const float inner = 0.797884583f * fmaf(x * x * x, 0.044715f, x);
            // tanh(y) = 1 - 2 / (1 + exp(2 y)), whose exponential may be infinite.
            const float t = EXACT ? tanhf(inner) : 1.0f - __fdividef(2.0f, 1.0f + __expf(fminf(2.0f * inner, 80.0f)));
            return 0.5f * x * (1.0f + t);
        }
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.707106781f));
        default: return fmaxf(x, 0.0f);
    }
}
