// Operations on each element by itself, 16 bytes a thread.
#include "activation.cuh"
#include "common.cuh"

// What `map` does; the numbers are the host's (elementwise.rs).
enum Map { CLAMP = 0, SCALE = 1, SOFT_CAP = 2, ACTIVATE = 3 };

template <typename T> __device__ __forceinline__ float mapped(float x, int map, float value, int activation) {
    switch (map) {
        // In this order a value that is no number stays one.
        case CLAMP: return x > value ? value : (x < -value ? -value : x);
        case SCALE: return x * value;
        case SOFT_CAP: return value * tanhf(x / value);
        default: return activated<T>(x, activation);
    }
}

// `x = map(x)`; what is left of the last vector is the business of threads past the vectors.
template <typename T>
__device__ __forceinline__ void map_elements(T* x, long long count, int map, float value, int activation) {
    constexpr int V = 16 / sizeof(T);
    pdl_launch();
    pdl_wait();
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long vectors = count / V;
    if (index < vectors) {
        float v[V];
        load_floats<T, V>(x + index * V, v);
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = mapped<T>(v[i], map, value, activation);
        store_floats<T, V>(x + index * V, v);
    } else if (index < vectors + count % V) {
        T* at = x + vectors * V + (index - vectors);
        *at = from_float<T>(mapped<T>(to_float(*at), map, value, activation));
    }
}

// `x += y`.
template <typename X, typename Y> __device__ __forceinline__ void add_elements(X* x, const Y* y, long long count) {
    constexpr int V = 16 / (sizeof(X) > sizeof(Y) ? sizeof(X) : sizeof(Y));
    pdl_launch();
    pdl_wait();
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long vectors = count / V;
    if (index < vectors) {
        float a[V], b[V];
        load_floats<X, V>(x + index * V, a);
        load_floats<Y, V>(y + index * V, b);
#pragma unroll
        for (int i = 0; i < V; ++i) a[i] += b[i];
        store_floats<X, V>(x + index * V, a);
    } else if (index < vectors + count % V) {
        const long long at = vectors * V + (index - vectors);
        x[at] = from_float<X>(to_float(x[at]) + to_float(y[at]));
    }
}

// `out = activation(gate) * up`, `[rows, 2 * width] -> [rows, width]`.
template <typename T>
__device__ __forceinline__ void gate(const T* gate_up, T* out, int rows, int width, int activation) {
    constexpr int V = 16 / sizeof(T);
    pdl_launch();
    pdl_wait();
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (width % V == 0) {
        const int vectors = width / V;
        const long long row = index / vectors;
        if (row >= rows) return;
        const int at = static_cast<int>(index - row * vectors) * V;
        float g[V], u[V];
        load_floats<T, V>(gate_up + row * 2 * width + at, g);
        load_floats<T, V>(gate_up + row * 2 * width + width + at, u);
#pragma unroll
        for (int i = 0; i < V; ++i) g[i] = activated<T>(g[i], activation) * u[i];
        store_floats<T, V>(out + row * width + at, g);
    } else {
        const long long row = index / width;
        if (row >= rows) return;
        const int at = static_cast<int>(index - row * width);
        const T* from = gate_up + row * 2 * width + at;
        out[row * width + at] = from_float<T>(activated<T>(to_float(from[0]), activation) * to_float(from[width]));
    }
}

#define ELEMENTWISE(T)                                                                                                  \
    extern "C" __global__ void map_##T(T* x, long long count, int map, float value, int activation) {                   \
        map_elements<T>(x, count, map, value, activation);                                                              \
    }                                                                                                                   \
    extern "C" __global__ void gated_activation_##T(const T* gate_up, T* out, int rows, int width, int activation) {    \
        gate<T>(gate_up, out, rows, width, activation);                                                                 \
    }
FOR_EACH_TYPE(ELEMENTWISE)

#define ADD(X, Y)                                                                                                       \
    extern "C" __global__ void add_##X##_##Y(X* x, const Y* y, long long count) { add_elements<X, Y>(x, y, count); }
ADD(f32, f32)
ADD(f32, bf16)
ADD(f32, f16)
ADD(bf16, bf16)
ADD(bf16, f32)
ADD(f16, f16)
ADD(f16, f32)
