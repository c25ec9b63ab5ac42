// out[M, N] = x[M, K] W[N, K]^T for the many rows of prompts on Hopper, with what follows the product done to its sums.
//
// As many blocks as there are multiprocessors compute tile after tile. One thread fills a ring of stages by bulk tensor copies; two
// blocks of a cluster have the same weights and different rows of x, so each copies one half of the weights to both. Two warpgroups
// multiply 64 rows of x each with all weights of the tile: a right side of 256 columns is read from shared memory the least often.
// Sums leave through shared memory by tensor copies, whose ends nobody waits for, while the ring fills for the next tile.
//
// Every sum is added up in the order of K, 16 products at a time, whatever M is: a row has the same bits in any batch.
#include "hopper_gemm.cuh"

#ifdef HAS_WGMMA
#define HOPPER_GEMM_BODY(T, COLUMNS, CLUSTER, STAGES, END) HopperTiles<T, COLUMNS, CLUSTER, STAGES, END>::run(weights, x, out, to);
#else
// Not launched there.
#define HOPPER_GEMM_BODY(T, COLUMNS, CLUSTER, STAGES, END)
#endif
#define HOPPER_GEMM(NAME, T, COLUMNS, CLUSTER, STAGES, END)                                                                      \
    extern "C" __global__ void __launch_bounds__(384, 1) hopper_gemm_##NAME##_##COLUMNS##_##T(                                     \
        const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap out,    \
        const __grid_constant__ HopperGemm to) {                                                                                 \
        HOPPER_GEMM_BODY(T, COLUMNS, CLUSTER, STAGES, END)                                                                        \
    }
#define HOPPER_GEMM_TYPES(NAME, COLUMNS, CLUSTER, STAGES, END) \
    HOPPER_GEMM(NAME, bf16, COLUMNS, CLUSTER, STAGES, END)     \
    HOPPER_GEMM(NAME, f16, COLUMNS, CLUSTER, STAGES, END)
HOPPER_GEMM_TYPES(plain, 256, 2, 4, STORE)
HOPPER_GEMM_TYPES(gated, 256, 2, 4, GATE)
HOPPER_GEMM_TYPES(add, 256, 2, 4, ADD)
// Of few rows more tiles than those, or most multiprocessors would have none.
HOPPER_GEMM_TYPES(plain, 64, 1, 8, STORE)
HOPPER_GEMM_TYPES(gated, 128, 1, 6, GATE)
HOPPER_GEMM_TYPES(add, 64, 1, 8, ADD)
