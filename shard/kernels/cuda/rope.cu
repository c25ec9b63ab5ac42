// Rotates queries and keys in place and stores keys and values in the paged cache.
//
// A block has one token and some of its heads. The token's cosines and sines are computed once a block, in f32 as the models
// were trained: an exact angle would differ from theirs at large positions.
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

// One piece of a head's row: `WIDTH` elements at `first`, and with rotation also those of their partners.
template <int WIDTH, typename T, typename C>
__device__ __forceinline__ void turn(const Frequencies& f, T* head, C* cached, int pair, const float* cosines, const float* sines) {
    // Half: the pairs are (pair + i, pair + pairs + i). Interleaved: 2 WIDTH elements from 2 pair on.
    float a[WIDTH], b[WIDTH];
    const int first = f.is_interleaved ? 2 * pair : pair, second = f.is_interleaved ? first + WIDTH : first + f.pairs;
    load_floats<T, WIDTH>(head + first, a);
    load_floats<T, WIDTH>(head + second, b);
    if (f.is_interleaved) {
        if constexpr (WIDTH == 1) {
            const float x = a[0], y = b[0];
            a[0] = x * cosines[pair] - y * sines[pair];
            b[0] = y * cosines[pair] + x * sines[pair];
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH / 2; ++i) {
                const float c = cosines[pair + i], s = sines[pair + i];
                const float c2 = cosines[pair + WIDTH / 2 + i], s2 = sines[pair + WIDTH / 2 + i];
                const float x = a[2 * i], y = a[2 * i + 1], u = b[2 * i], v = b[2 * i + 1];
                a[2 * i] = x * c - y * s;
                a[2 * i + 1] = y * c + x * s;
                b[2 * i] = u * c2 - v * s2;
                b[2 * i + 1] = v * c2 + u * s2;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const float x = a[i], y = b[i], c = cosines[pair + i], s = sines[pair + i];
            a[i] = x * c - y * s;
            b[i] = y * c + x * s;
        }
    }
    store_floats<T, WIDTH>(head + first, a);
    store_floats<T, WIDTH>(head + second, b);
    if (cached != nullptr) {
        store_floats<C, WIDTH>(cached + first, a);
        store_floats<C, WIDTH>(cached + second, b);
    }
}

template <int WIDTH, typename T, typename C>
__device__ __forceinline__ void copy(const T* head, C* cached, int first) {
    float x[WIDTH];
    load_floats<T, WIDTH>(head + first, x);
    store_floats<C, WIDTH>(cached + first, x);
}

template <int WIDTH, typename T, typename C>
__device__ __forceinline__ void rotate_heads(const Frequencies& f, const Heads& heads, T* row, C* keys, C* values, int slot,
                                             const float* cosines, const float* sines) {
    const int per_block = (heads.num_heads + 2 * heads.num_kv_heads + gridDim.y - 1) / gridDim.y;
    const int first_head = blockIdx.y * per_block;
    const int end_head = min(first_head + per_block, heads.num_heads + 2 * heads.num_kv_heads);
    const int dim = heads.head_dim;
    const int turned = f.pairs / WIDTH;
    // Pieces of a head: pairs first, then what does not turn.
    const int pieces = turned + (dim - 2 * f.pairs) / WIDTH;
    const size_t block = slot / heads.block_size, offset = slot % heads.block_size;
    const int plain = dim / WIDTH;
    const int most = max(pieces, plain);
    for (int at = threadIdx.x; at < (end_head - first_head) * most; at += blockDim.x) {
        const int head = first_head + at / most, piece = at % most;
        T* const x = row + static_cast<size_t>(head) * dim;
        if (head >= heads.num_heads + heads.num_kv_heads) {
            const int kv_head = head - heads.num_heads - heads.num_kv_heads;
            C* const cached = values + ((block * heads.num_kv_heads + kv_head) * heads.block_size + offset) * dim;
            if (piece < plain) copy<WIDTH>(x, cached, piece * WIDTH);
            continue;
        }
        C* cached = nullptr;
        if (head >= heads.num_heads) {
            const int kv_head = head - heads.num_heads;
            cached = keys + ((block * heads.num_kv_heads + kv_head) * heads.block_size + offset) * dim;
        }
        if (piece < turned) {
            turn<WIDTH>(f, x, cached, piece * WIDTH, cosines, sines);
        } else if (piece < pieces && cached != nullptr) {
            copy<WIDTH>(x, cached, 2 * f.pairs + (piece - turned) * WIDTH);
        }
    }
}

template <typename T, typename C>
__device__ __forceinline__ void rope_store(T* qkv, C* keys, C* values, const int* position_ids, const int* slot_mapping,
                                           const int* token_seqs, const int* prompt_lens, const Frequencies& f, const Heads& heads,
                                           int is_wide) {
    __shared__ float cosines[MAX_PAIRS], sines[MAX_PAIRS];
    // The step's inputs were there before the first kernel of the step.
    pdl_launch();
    const int token = blockIdx.x;
    const float position = static_cast<float>(position_ids[token]);
    const int slot = slot_mapping[token];
    const int prompt_len = f.long_context == 0 ? 0 : prompt_lens[token_seqs[token]];
    for (int pair = threadIdx.x; pair < f.pairs; pair += blockDim.x) {
        float scale, sine, cosine;
        const float angle = __fmul_rn(position, frequency(f, pair, prompt_len, scale));
        sincosf(angle, &sine, &cosine);
        cosines[pair] = cosine * scale;
        sines[pair] = sine * scale;
    }
    __syncthreads();
    pdl_wait();
    T* const row = qkv + static_cast<size_t>(token) * (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim;
    if (is_wide) {
        rotate_heads<8>(f, heads, row, keys, values, slot, cosines, sines);
    } else {
        rotate_heads<1>(f, heads, row, keys, values, slot, cosines, sines);
    }
}

#define ROPE_STORE(T, C)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256) rope_store_##T##_##C(                                           \
        T* qkv, C* keys, C* values, const int* position_ids, const int* slot_mapping, const int* token_seqs,           \
        const int* prompt_lens, const __grid_constant__ Frequencies frequencies, const __grid_constant__ Heads heads, \
        int is_wide) {                                                                                                 \
        rope_store<T, C>(qkv, keys, values, position_ids, slot_mapping, token_seqs, prompt_lens, frequencies, heads,   \
                         is_wide);                                                                                     \
    }
#define ROPE_STORE_EACH_CACHE(T) \
    ROPE_STORE(T, f32) ROPE_STORE(T, bf16) ROPE_STORE(T, f16) ROPE_STORE(T, e4m3) ROPE_STORE(T, e5m2)
FOR_EACH_TYPE(ROPE_STORE_EACH_CACHE)
