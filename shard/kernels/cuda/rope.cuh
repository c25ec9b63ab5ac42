// How positions become angles, and where keys and values go.
#pragma once
#include "fp8.cuh"

constexpr int MAX_PAIRS = 256;

// How positions become angles. `long_context` 0: always `inv_freq`. Prompts longer than it take `long_inv_freq` where there is
// one, else the frequencies of a base that grows with the prompt (dynamic NTK).
struct Frequencies {
    const float* inv_freq;
    const float* long_inv_freq;
    int pairs;
    int is_interleaved;
    int long_context;
    float scale;
    float long_scale;
    double theta;
    double factor;
};

struct Heads {
    int num_heads, num_kv_heads, head_dim, block_size;
};

__device__ __forceinline__ float frequency(const Frequencies& f, int pair, int prompt_len, float& scale) {
    scale = f.scale;
    if (f.long_context == 0 || prompt_len <= f.long_context) return f.inv_freq[pair];
    if (f.long_inv_freq != nullptr) {
        scale = f.long_scale;
        return f.long_inv_freq[pair];
    }
    const double dim = 2.0 * f.pairs;
    const double stretch = f.factor * prompt_len / f.long_context - (f.factor - 1.0);
    const double theta = f.theta * pow(stretch, dim / (dim - 2.0));
    return static_cast<float>(pow(theta, -2.0 * pair / dim));
}
