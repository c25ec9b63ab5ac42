// What the attention kernels share: parameters, what happens to a score, tensor-core products of 16-bit elements.
#pragma once
#include "common.cuh"

// The cache holds [num_blocks, num_kv_heads, block_size, head_dim]; sixteen keys of a head lie in one run, a *page*.
constexpr int PAGE_KEYS = 16;
constexpr float LOG2_E = 1.4426950408889634f;

struct Attention {
    // [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], queries first.
    const void* qkv;
    const void* keys;
    const void* values;
    // [num_tokens, num_heads * head_dim].
    void* out;
    // Of the step.
    const int* header;
    const int* cu_seqlens_q;
    const int* context_lens;
    const int* block_tables;
    int num_heads;
    int num_kv_heads;
    int head_dim;
    int pages_per_block;
    // A query sees itself and the window - 1 keys before it; 0: all.
    int window;
    float scale;
    // 0: none.
    float soft_cap;
    // Linear biases: heads of the whole model (0: none), and which of them is the first here.
    int alibi_heads;
    int alibi_first;
    float alibi_max_bias;
    float alibi_multiplier;
};

// What a head's score loses for each token between key and query. A model whose heads are no power of two takes the slopes of the
// next lower one first, then every other one of the next higher.
__device__ __forceinline__ float slope_of(const Attention& a, int head) {
    if (a.alibi_heads == 0) return 0.0f;
    const int at = a.alibi_first + head, lower = 1 << (31 - __clz(a.alibi_heads));
    const int power = at < lower ? at + 1 : 2 * (at - lower) + 1, heads = at < lower ? lower : 2 * lower;
    return exp2f(-a.alibi_max_bias * static_cast<float>(power) / static_cast<float>(heads)) * a.alibi_multiplier;
}

// The first row of a page of one sequence's KV head in [num_blocks * num_kv_heads * block_size, head_dim].
__device__ __forceinline__ size_t page_row(const Attention& a, int block, int page, int kv_head) {
    const int within = a.pages_per_block == 1 ? 0 : page % a.pages_per_block;
    return ((static_cast<size_t>(block) * a.num_kv_heads + kv_head) * a.pages_per_block + within) * PAGE_KEYS;
}
// The same as an offset in elements.
__device__ __forceinline__ size_t page_offset(const Attention& a, int block, int page, int kv_head) {
    return page_row(a, block, page, kv_head) * a.head_dim;
}
__device__ __forceinline__ int block_of(const Attention& a, const int* table, int page) {
    return __ldg(table + (a.pages_per_block == 1 ? page : page / a.pages_per_block));
}

// 1 - 2 / (e^2x + 1): absolute error of some 1e-7, where the hardware's tanh has 5e-4.
__device__ __forceinline__ float tanh_by_exp(float x) { return 1.0f - __fdividef(2.0f, __expf(2.0f * x) + 1.0f); }

// A raw product of query and key as what exp2 takes. `distance` is how many tokens the key lies before the query.
__device__ __forceinline__ float score_log2(const Attention& a, float product, float slope, int distance) {
    float score = product * a.scale;
    if (a.soft_cap > 0.0f) score = a.soft_cap * tanh_by_exp(score / a.soft_cap);
    return (score - slope * static_cast<float>(distance)) * LOG2_E;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes to shared memory, of which `bytes` (0 or 16) are read and the others become zero.
__device__ __forceinline__ void cp_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8].
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (sizeof(T) == 2 && __is_same(T, bf16)) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

template <typename T> __device__ __forceinline__ uint32_t pack(float low, float high);
template <> __device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> __device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Rows of `DIM` 16-bit elements in shared memory, in chunks of 16 bytes, so that eight chunks of a column lie in different banks:
// by exchanging chunks where rows are multiples of 128 bytes, else by an odd number of chunks a row.
template <int DIM> struct Rows {
    static constexpr int CHUNKS = DIM / 8;
    static constexpr bool EXCHANGES = CHUNKS % 8 == 0;
    static constexpr int STRIDE = (EXCHANGES ? CHUNKS : CHUNKS | 1) * 16;
    __device__ static __forceinline__ uint32_t at(int row, int chunk) {
        return row * STRIDE + (EXCHANGES ? chunk ^ (row & 7) : chunk) * 16;
    }
};
