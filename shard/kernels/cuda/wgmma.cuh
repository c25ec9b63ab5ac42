// What Hopper (sm_90a) alone has: barriers of copies, tensor copies, clusters, and asynchronous products of a warpgroup.
#pragma once
#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#endif

// A tensor map as the driver makes it.
struct alignas(64) TensorMap {
    char opaque[128];
};

// Two values of an 8 x 8 matrix, of row `lane / 4` and columns `lane % 4 * 2 + {0, 1}`, rounded, against those of the column and the
// rows of these numbers.
template <typename T> __device__ __forceinline__ uint32_t transposed(const float* pair) {
    Vec<T, 2> rounded;
    rounded.at[0] = from_float<T>(pair[0]);
    rounded.at[1] = from_float<T>(pair[1]);
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                 : "=r"(result)
                 : "r"(*reinterpret_cast<const uint32_t*>(&rounded)));
    return result;
}

#ifdef HAS_WGMMA
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int phase) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier),
        "r"(phase)
        : "memory");
}
// Barriers that were made are seen by copies and by the other blocks of the cluster, after a barrier.
__device__ __forceinline__ void barriers_made() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// Shared memory that was written by ordinary stores may be read by products and copies after this and a barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// A box of a two-dimensional tensor to shared memory; what lies outside of it becomes zero.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(column), "r"(row)
                 : "memory");
}
// The same with a policy of the L2 cache.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
template <int ID, int THREADS> __device__ __forceinline__ void sync_some() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The same place in the shared memory of a block of the cluster.
__device__ __forceinline__ uint32_t at_block(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// Without a fence: for those that have only read.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(at_block(barrier, rank)) : "memory");
}
// The same as `barrier_wait` for what other blocks of the cluster did.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, int phase) {
    asm volatile(
        "{\n.reg .pred p;\nAGAIN: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier),
        "r"(phase)
        : "memory");
}
// Sends 16 bytes to a block of the cluster, whose barrier counts them.
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, uint32_t rank, float a, float b, float c, float d) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(at_block(to, rank)),
                 "r"(at_block(barrier, rank)), "f"(a), "f"(b), "f"(c), "f"(d)
                 : "memory");
}

// Rows of 128 bytes whose chunks are exchanged. `stride`: bytes to the next 64 columns where those are what is summed over
// by rows (a transposed right side), else of no meaning.
__device__ __forceinline__ uint64_t matrix_at(uint32_t address, uint32_t stride = 16) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | (static_cast<uint64_t>(stride >> 4) << 16) |
           (static_cast<uint64_t>(1024 >> 4) << 32) | (static_cast<uint64_t>(1) << 62);
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// The compiler may not move what follows before what is above.
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Names of the sums' registers in an instruction, and the sums themselves.
#define REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGISTERS_16 REGISTERS_8 \
    ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 REGISTERS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 REGISTERS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128 REGISTERS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)

// d[64, N] (+)= a b: the left side 64 x 16 in shared memory or in registers, the right side 16 x N in shared memory. A, B and C
// are the numbers of the operands after the SUMS registers of a thread's sums. Thread t of the warpgroup has in `d[4 * j + 2 * h + i]`
// row `t / 32 * 16 + t % 32 / 4 + 8 * h`, column `8 * j + t % 4 * 2 + i`.
template <typename T, int N> struct Product;
#define PRODUCT(T, NAME, N, SUMS, A, B, C)                                                                                     \
    template <> struct Product<T, N> {                                                                                         \
        /* Both sides have what is summed over in their rows. */                                                              \
        __device__ static __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, int adds = 1) {                  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #C ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME \
                         "." NAME " {" REGISTERS_##SUMS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;\n}"                               \
                         : SUMS_##SUMS(0)                                                                                     \
                         : "l"(a), "l"(b), "r"(adds));                                                                        \
        }                                                                                                                     \
    };
PRODUCT(bf16, "bf16", 16, 8, 8, 9, 10)
PRODUCT(f16, "f16", 16, 8, 8, 9, 10)
PRODUCT(bf16, "bf16", 32, 16, 16, 17, 18)
PRODUCT(f16, "f16", 32, 16, 16, 17, 18)
PRODUCT(bf16, "bf16", 64, 32, 32, 33, 34)
PRODUCT(f16, "f16", 64, 32, 32, 33, 34)
PRODUCT(bf16, "bf16", 128, 64, 64, 65, 66)
PRODUCT(f16, "f16", 128, 64, 64, 65, 66)
PRODUCT(bf16, "bf16", 256, 128, 128, 129, 130)
PRODUCT(f16, "f16", 256, 128, 128, 129, 130)

// The left side in registers, and on the right one what is summed over in the columns.
template <typename T, int N> struct ProductOfRegisters;
#define PRODUCT_OF_REGISTERS(T, NAME, N, SUMS, A, B, C, D, E)                                                                  \
    template <> struct ProductOfRegisters<T, N> {                                                                              \
        __device__ static __forceinline__ void add(float (&d)[N / 2], const uint32_t* a, uint64_t b) {                         \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS_##SUMS                 \
                         "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", 1, 1, 1, 1;"                                       \
                         : SUMS_##SUMS(0)                                                                                     \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
        }                                                                                                                     \
    };
PRODUCT_OF_REGISTERS(bf16, "bf16", 64, 32, 32, 33, 34, 35, 36)
PRODUCT_OF_REGISTERS(f16, "f16", 64, 32, 32, 33, 34, 35, 36)
PRODUCT_OF_REGISTERS(bf16, "bf16", 128, 64, 64, 65, 66, 67, 68)
PRODUCT_OF_REGISTERS(f16, "f16", 128, 64, 64, 65, 66, 67, 68)
PRODUCT_OF_REGISTERS(bf16, "bf16", 256, 128, 128, 129, 130, 131, 132)
PRODUCT_OF_REGISTERS(f16, "f16", 256, 128, 128, 129, 130, 131, 132)
#endif
