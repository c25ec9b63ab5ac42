// Attention in f32 arithmetic for every element type and head size: models in f32, and heads the tensor-core kernels do not take.
//
// A block has one query of one head. Threads take keys for the scores, then columns for the sum of values.
#include "attention.cuh"
#include "fp8.cuh"

constexpr int THREADS = 128;
// Columns of a thread.
constexpr int MOST_COLUMNS = 4;
constexpr int MOST_DIM = THREADS * MOST_COLUMNS;

template <typename C> __device__ __forceinline__ float dot(const float* query, const C* key, int dim, bool is_wide) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (is_wide) {
        for (int d = 0; d < dim; d += 4) {
            float x[4];
            load_floats<C, 4>(key + d, x);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += query[d + i] * x[i];
        }
    } else {
        for (int d = 0; d < dim; ++d) sum[0] += query[d] * to_float(key[d]);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <typename T, typename C> __device__ __forceinline__ void attend(const Attention& a, const int* token_seqs) {
    __shared__ float query[MOST_DIM];
    __shared__ float weights[THREADS];
    __shared__ size_t rows[THREADS];
    __shared__ float scratch[32];
    const int tid = threadIdx.x, token = blockIdx.x, head = blockIdx.y, dim = a.head_dim;
    pdl_launch();
    const int seq = token_seqs[token];
    const int end_key = a.context_lens[seq] - (a.cu_seqlens_q[seq + 1] - 1 - token);
    const int first_key = a.window > 0 ? max(0, end_key - a.window) : 0;
    const int* const table = a.block_tables + static_cast<size_t>(seq) * a.header[BLOCK_TABLE_STRIDE];
    const int kv_head = head / (a.num_heads / a.num_kv_heads);
    const float slope = slope_of(a, head);
    const bool is_wide = dim % 4 == 0;
    pdl_wait();
    const size_t width = static_cast<size_t>(a.num_heads + 2 * a.num_kv_heads) * dim;
    const T* const q = static_cast<const T*>(a.qkv) + token * width + static_cast<size_t>(head) * dim;
    for (int d = tid; d < dim; d += THREADS) query[d] = to_float(q[d]);
    __syncthreads();
    const C* const keys = static_cast<const C*>(a.keys);
    const C* const values = static_cast<const C*>(a.values);
    float sums[MOST_COLUMNS] = {}, highest = -INFINITY, total = 0.0f;
    for (int first = first_key; first < end_key; first += THREADS) {
        const int key = first + tid, count = min(THREADS, end_key - first);
        float score = -INFINITY;
        if (tid < count) {
            const int page = key / PAGE_KEYS;
            const size_t row = page_offset(a, block_of(a, table, page), page, kv_head) + static_cast<size_t>(key % PAGE_KEYS) * dim;
            rows[tid] = row;
            score = dot(query, keys + row, dim, is_wide) * a.scale;
            if (a.soft_cap > 0.0f) score = a.soft_cap * tanhf(score / a.soft_cap);
            score -= slope * static_cast<float>(end_key - 1 - key);
        }
        const float higher = fmaxf(highest, block_max(score, scratch));
        const float weight = tid < count ? expf(score - higher) : 0.0f;
        weights[tid] = weight;
        const float rescale = expf(highest - higher);
        total = total * rescale + block_sum(weight, scratch);
        highest = higher;
#pragma unroll
        for (int column = 0; column < MOST_COLUMNS; ++column) {
            const int d = tid + column * THREADS;
            if (d >= dim) break;
            float sum[2] = {0.0f, 0.0f};
            int i = 0;
            for (; i + 1 < count; i += 2) {
                sum[0] += weights[i] * to_float(values[rows[i] + d]);
                sum[1] += weights[i + 1] * to_float(values[rows[i + 1] + d]);
            }
            if (i < count) sum[0] += weights[i] * to_float(values[rows[i] + d]);
            sums[column] = sums[column] * rescale + (sum[0] + sum[1]);
        }
        __syncthreads();
    }
    T* const out = static_cast<T*>(a.out) + (static_cast<size_t>(token) * a.num_heads + head) * dim;
#pragma unroll
    for (int column = 0; column < MOST_COLUMNS; ++column) {
        const int d = tid + column * THREADS;
        if (d < dim) out[d] = from_float<T>(sums[column] / total);
    }
}

#define ATTENTION_PLAIN(T, C)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        attention_plain_##T##_##C(const __grid_constant__ Attention attention, const int* token_seqs) {         \
        attend<T, C>(attention, token_seqs);                                                                    \
    }
#define ATTENTION_PLAIN_EACH_CACHE(T) \
    ATTENTION_PLAIN(T, f32)           \
    ATTENTION_PLAIN(T, bf16)          \
    ATTENTION_PLAIN(T, f16)           \
    ATTENTION_PLAIN(T, e4m3)          \
    ATTENTION_PLAIN(T, e5m2)
FOR_EACH_TYPE(ATTENTION_PLAIN_EACH_CACHE)
