// Rows of tables: embeddings, learned positions, and gathering rows of activations. One block a row.
#include "common.cuh"

// Runs `each(i, n)` for pieces of a row: n = 8 or, where rows are not whole vectors, n = 1.
template <typename Wide, typename Single>
__device__ __forceinline__ void for_pieces(int width, bool is_wide, Wide wide, Single single) {
    if (is_wide) {
        for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) wide(i);
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) single(i);
    }
}

// `out[t] = table[ids[t] - first_id]`, zeros where that is no row of the table. `pitch` is the table's, in elements.
template <typename T, typename O>
__device__ __forceinline__ void embed_row(const T* table, int pitch, int table_rows, int first_id, const int* ids, O* out,
                                          int width) {
    pdl_launch();
    pdl_wait();
    const long long id = static_cast<long long>(ids[blockIdx.x]) - first_id;
    const bool is_here = id >= 0 && id < table_rows;
    table += is_here ? id * pitch : 0;
    out += static_cast<size_t>(blockIdx.x) * width;
    for_pieces(
        width, width % 8 == 0 && pitch % 8 == 0,
        [&](int i) {
            float v[8] = {};
            if (is_here) load_floats<T, 8>(table + i, v);
            store_floats<O, 8>(out + i, v);
        },
        [&](int i) { out[i] = from_float<O>(is_here ? to_float(table[i]) : 0.0f); });
}

// `out[t] += table[positions[t] + offset]`; the host has checked the positions.
template <typename T, typename O>
__device__ __forceinline__ void add_position_row(const T* table, int pitch, int table_rows, int offset,
                                                 const int* positions, O* out, int width) {
    pdl_launch();
    pdl_wait();
    const int row = min(positions[blockIdx.x] + offset, table_rows - 1);
    table += static_cast<size_t>(row) * pitch;
    out += static_cast<size_t>(blockIdx.x) * width;
    for_pieces(
        width, width % 8 == 0 && pitch % 8 == 0,
        [&](int i) {
            float v[8], sum[8];
            load_floats<T, 8>(table + i, v);
            load_floats<O, 8>(out + i, sum);
#pragma unroll
            for (int k = 0; k < 8; ++k) sum[k] += v[k];
            store_floats<O, 8>(out + i, sum);
        },
        [&](int i) { out[i] = from_float<O>(to_float(out[i]) + to_float(table[i])); });
}

#define TABLE(T, O)                                                                                                     \
    extern "C" __global__ void embed_##T##_##O(const T* table, int pitch, int table_rows, int first_id, const int* ids, \
                                               O* out, int width) {                                                     \
        embed_row<T, O>(table, pitch, table_rows, first_id, ids, out, width);                                           \
    }                                                                                                                   \
    extern "C" __global__ void add_positions_##T##_##O(const T* table, int pitch, int table_rows, int offset,           \
                                                       const int* positions, O* out, int width) {                       \
        add_position_row<T, O>(table, pitch, table_rows, offset, positions, out, width);                                \
    }
#define TABLES(T) TABLE(T, f32) TABLE(T, bf16) TABLE(T, f16)
FOR_EACH_TYPE(TABLES)

// `out[i] = x[rows[i]]`, of any element type: `width` counts units of 16 or 2 bytes.
template <typename U> __device__ __forceinline__ void gather_row(const U* x, const int* rows, U* out, int width) {
    pdl_launch();
    pdl_wait();
    x += static_cast<size_t>(rows[blockIdx.x]) * width;
    out += static_cast<size_t>(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[i] = x[i];
}
extern "C" __global__ void gather_rows_16(const uint4* x, const int* rows, uint4* out, int width) {
    gather_row(x, rows, out, width);
}
extern "C" __global__ void gather_rows_2(const uint16_t* x, const int* rows, uint16_t* out, int width) {
    gather_row(x, rows, out, width);
}
