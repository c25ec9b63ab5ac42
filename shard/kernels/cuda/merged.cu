// The instantiations of merged.cuh: element type, elements of a head, sequences.
#include "merged.cuh"

#ifdef HAS_WGMMA
#define MERGED_BODY(T, DIM, ROWS) merged::Step<T, DIM, ROWS, 512>::run(m);
#else
// Not launched there.
#define MERGED_BODY(T, DIM, ROWS)
#endif
#define MERGED(T, DIM, ROWS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(288, 1) merged_##DIM##_##ROWS##_##T(const __grid_constant__ Merged m) { \
        MERGED_BODY(T, DIM, ROWS)                                                                                   \
    }
#define MERGED_EACH_SIZE(T) MERGED(T, 64, 1) MERGED(T, 64, 2) MERGED(T, 128, 1) MERGED(T, 128, 2)
MERGED_EACH_SIZE(bf16)
MERGED_EACH_SIZE(f16)
