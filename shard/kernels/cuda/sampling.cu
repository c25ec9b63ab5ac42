// From rows of f32 logits to tokens.
//
// Greedy rows and log-probabilities of given tokens: many blocks a row, the last of which puts their parts together. What shapes
// the distribution: one block a row, or for few rows a cluster of blocks, each with a slice of it. They find the least logit that
// is kept by counting how far logits are below the best one, and look closer only where the limit lies; nothing is sorted.
// Masses are integers, so that their sums depend on no order: all ranks choose the same token.
#include "common.cuh"
#include "sampling.cuh"

// A part of a row: its best token and the sum of exp(logit - best).
struct Part {
    Best best;
    float sum;
    int unused;
};

constexpr int PART_THREADS = 256, PART_ELEMENTS = 4096;

// The best token of each row, or the token `targets[row]`, and its log-probability. Blocks along the parts of
// PART_ELEMENTS, then the rows; row `blockIdx.y` is row `rows[blockIdx.y]` of the logits where there is a list. `parts` is
// `[gridDim.y, gridDim.x]`, `arrived` `[gridDim.y]` is zero before and after.
extern "C" __global__ void __launch_bounds__(PART_THREADS)
    best_of_rows(const float* logits, int vocab, const int* rows, const int* targets, Part* parts, unsigned* arrived,
                 Result* results) {
    constexpr int PER_THREAD = PART_ELEMENTS / PART_THREADS;
    __shared__ float scratch[32];
    __shared__ Best best_scratch[32];
    __shared__ bool is_last;
    pdl_wait();
    pdl_launch();
    const int row = rows == nullptr ? blockIdx.y : rows[blockIdx.y];
    logits += static_cast<size_t>(row) * vocab;
    const int first = blockIdx.x * PART_ELEMENTS;
    float v[PER_THREAD];
    Best best{-INFINITY, NO_ID};
    if (vocab % 4 == 0) {
#pragma unroll
        for (int k = 0; k < PER_THREAD; k += 4) {
            const int at = first + k * PART_THREADS + threadIdx.x * 4;
            float4 x = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
            if (at < vocab) x = *reinterpret_cast<const float4*>(logits + at);
            v[k] = x.x, v[k + 1] = x.y, v[k + 2] = x.z, v[k + 3] = x.w;
        }
    } else {
#pragma unroll
        for (int k = 0; k < PER_THREAD; ++k) {
            const int at = first + k / 4 * 4 * PART_THREADS + threadIdx.x * 4 + k % 4;
            v[k] = at < vocab ? logits[at] : -INFINITY;
        }
    }
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) {
        v[k] = ordered(v[k]);
        const int at = first + k / 4 * 4 * PART_THREADS + threadIdx.x * 4 + k % 4;
        // Ids ascend, so an equal one is never better; past the row there is none.
        if (at < vocab && (v[k] > best.logit || best.id == NO_ID)) best = Best{v[k], at};
    }
    best = block_best(best, best_scratch);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k) sum += v[k] > -INFINITY ? expf(v[k] - best.logit) : 0.0f;
    sum = block_sum(sum, scratch);
    parts += static_cast<size_t>(blockIdx.y) * gridDim.x;
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = Part{best, sum, 0};
        __threadfence();
        is_last = atomicAdd(&arrived[blockIdx.y], 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last || threadIdx.x >= 32) return;
    // One warp puts the parts together, in the order of the parts.
    __threadfence();
    const volatile Part* all = parts;
    best = Best{-INFINITY, NO_ID};
    for (int i = threadIdx.x; i < gridDim.x; i += 32) {
        const Best other{all[i].best.logit, all[i].best.id};
        if (is_better(other, best)) best = other;
    }
    best = warp_best(best);
    double total = 0.0;
    for (int i = threadIdx.x; i < gridDim.x; i += 32) {
        if (all[i].sum > 0.0f) total += static_cast<double>(all[i].sum) * exp(static_cast<double>(all[i].best.logit - best.logit));
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) total += __shfl_xor_sync(ALL, total, o);
    if (threadIdx.x == 0) {
        arrived[blockIdx.y] = 0;
        const float shift = best.logit + static_cast<float>(log(total));
        const int id = targets == nullptr ? best.id : targets[blockIdx.y];
        const float logit = targets == nullptr ? best.logit : logits[id];
        results[blockIdx.y].id = id;
        results[blockIdx.y].logprob = logit - shift;
        results[blockIdx.y].num_top = 0;
    }
}

constexpr int PENALTY_THREADS = 512, PENALTY_ELEMENTS = 8192;

// Penalties, once for each id of a row's history: blocks along parts of the vocabulary, each of which counts the ids of its
// part, then the rows.
extern "C" __global__ void __launch_bounds__(PENALTY_THREADS)
    penalize(float* logits, int vocab, const Request* requests, const int* histories) {
    __shared__ unsigned counts[PENALTY_ELEMENTS];
    pdl_launch();
    pdl_wait();
    const Request request = requests[blockIdx.y];
    const int first = blockIdx.x * PENALTY_ELEMENTS;
    for (int i = threadIdx.x; i < PENALTY_ELEMENTS; i += PENALTY_THREADS) counts[i] = 0;
    __syncthreads();
    histories += request.history;
    for (int i = threadIdx.x; i < request.history_len; i += PENALTY_THREADS) {
        const unsigned at = static_cast<unsigned>(histories[i]) - first;
        if (at < PENALTY_ELEMENTS) atomicAdd(&counts[at], 1);
    }
    __syncthreads();
    logits += static_cast<size_t>(request.row) * vocab + first;
    const float length = request.history_len;
    for (int i = threadIdx.x; i < PENALTY_ELEMENTS && first + i < vocab; i += PENALTY_THREADS) {
        if (counts[i] == 0) continue;
        float logit = logits[i];
        logit = logit < 0.0f ? logit * request.repetition_penalty : logit / request.repetition_penalty;
        // Rounded step by step, as the processor does it.
        logits[i] = __fsub_rn(logit, __fdiv_rn(__fmul_rn(request.frequency_penalty, static_cast<float>(counts[i])), length));
    }
}

constexpr int THREADS = 1024, BINS = 1024, LIST = 2048;
// How far a logit is below the best, in steps of 1/32. Logits of a vocabulary spread over hundreds of these, so that few threads
// meet in one; over the digits of a float they would not.
constexpr float STEPS = 32.0f;
__device__ __forceinline__ int step_of(float logit, float best) {
    return min(BINS - 1, static_cast<int>((best - logit) * STEPS));
}

// What is kept of a row: logits above `least`, and the first `ties` of those equal to it, all of them when negative.
struct Kept {
    float least;
    int ties;
};

struct Histogram {
    // Of this block's slice. Masses are in two halves, whose atomic additions are quick.
    unsigned counts[BINS], low[BINS], high[BINS];
    // Of the whole row.
    unsigned all_counts[BINS];
    Mass all_masses[BINS];
};
struct List {
    float logits[LIST];
    Mass masses[LIST];
};
// A limit in the order of falling logits: where it lies, what of the wanted count or mass is left there.
struct Limit {
    float logit;
    Mass left;
};
constexpr int MOST_BLOCKS = 8;

struct Shared {
    union {
        Histogram histogram;
        List list;
    };
    int listed;
    // What the blocks tell one another: of each its best token, mass and ties.
    Best bests[MOST_BLOCKS];
    Mass block_masses[MOST_BLOCKS];
    int block_ties[MOST_BLOCKS];
    // What threads tell one another.
    Best best[32];
    Mass masses[32];
    int ties[32];
    int bin;
    bool suffices;
    Mass before;
    Limit limit;
};

// A row, and the slice of it that is this block's among the BLOCKS of its cluster.
template <int BLOCKS> struct Slice {
    const float* logits;
    int begin, end, rank;

    __device__ __forceinline__ Slice(const float* row, int vocab) : logits(row), rank(blockIdx.x % BLOCKS) {
        const int size = ((vocab + BLOCKS - 1) / BLOCKS + 127) / 128 * 128;
        begin = min(vocab, rank * size);
        end = min(vocab, begin + size);
        is_wide = vocab % 4 == 0;
    }

    // Runs `each(logit, id)` for the slice, or for `first..last` by a warp alone.
    template <typename Each> __device__ __forceinline__ void each(Each each) const {
        walk<THREADS>(begin, end, threadIdx.x, each);
    }
    template <typename Each> __device__ __forceinline__ void each_of_warp(int first, int last, Each each) const {
        walk<32>(first, last, threadIdx.x % 32, each);
    }

  private:
    bool is_wide;

    // With several loads under way, since each takes long. Slices and parts of them begin at whole vectors.
    template <int COUNT, typename Each>
    __device__ __forceinline__ void walk(int first, int last, int thread, Each each) const {
        constexpr int BATCH = 4;
        for (int base = first; base < last; base += BATCH * COUNT * 4) {
            float v[BATCH][4];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int at = base + (b * COUNT + thread) * 4;
                if (is_wide) {
                    float4 x = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
                    if (at < last) x = *reinterpret_cast<const float4*>(logits + at);
                    v[b][0] = x.x, v[b][1] = x.y, v[b][2] = x.z, v[b][3] = x.w;
                } else {
#pragma unroll
                    for (int k = 0; k < 4; ++k) v[b][k] = at + k < last ? logits[at + k] : -INFINITY;
                }
            }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int at = base + (b * COUNT + thread) * 4;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    if (at + k < last) each(ordered(v[b][k]), at + k);
                }
            }
        }
    }
};

// All threads of all blocks of the row have come here, and see what the others have written.
template <int BLOCKS> __device__ __forceinline__ void meet() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (BLOCKS > 1) {
        asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
}

// The same place in the shared memory of another block of the row.
template <int BLOCKS, typename T> __device__ __forceinline__ T* in_block(T* place, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (BLOCKS > 1) {
        T* there;
        asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
        return there;
    }
#endif
    return place;
}

__device__ __forceinline__ void add_mass(Histogram& histogram, int bin, Mass mass) {
    const unsigned low = static_cast<unsigned>(mass);
    unsigned high = static_cast<unsigned>(mass >> 32);
    const unsigned before = atomicAdd(&histogram.low[bin], low);
    high += before + low < before;
    if (high != 0) atomicAdd(&histogram.high[bin], high);
}

// Counts and weighs the row by what `bin_of(logit)` says; nothing below zero.
template <int BLOCKS, bool COUNTS, bool MASSES, typename BinOf>
__device__ __forceinline__ void fill(Shared& shared, const Slice<BLOCKS>& slice, float best, BinOf bin_of) {
    Histogram& own = shared.histogram;
    for (int i = threadIdx.x; i < BINS; i += THREADS) own.counts[i] = own.low[i] = own.high[i] = 0;
    __syncthreads();
    slice.each([&](float logit, int) {
        const int bin = logit > -INFINITY ? bin_of(logit) : -1;
        if (bin < 0) return;
        if (COUNTS) atomicAdd(&own.counts[bin], 1);
        if (MASSES) {
            const Mass mass = mass_of(logit, best);
            if (mass != 0) add_mass(own, bin, mass);
        }
    });
    meet<BLOCKS>();
    // Each block adds up a part of the bins for all of them.
    constexpr int PART = BINS / BLOCKS;
    for (int i = threadIdx.x; i < PART; i += THREADS) {
        const int bin = slice.rank * PART + i;
        unsigned count = 0;
        Mass mass = 0;
#pragma unroll
        for (int rank = 0; rank < BLOCKS; ++rank) {
            if (COUNTS) count += *in_block<BLOCKS>(&own.counts[bin], rank);
            if (MASSES) {
                mass += static_cast<Mass>(*in_block<BLOCKS>(&own.high[bin], rank)) << 32;
                mass += *in_block<BLOCKS>(&own.low[bin], rank);
            }
        }
#pragma unroll
        for (int rank = 0; rank < BLOCKS; ++rank) {
            if (COUNTS) *in_block<BLOCKS>(&own.all_counts[bin], rank) = count;
            if (MASSES) *in_block<BLOCKS>(&own.all_masses[bin], rank) = mass;
        }
    }
    meet<BLOCKS>();
}

// Sum over the threads before this one; `total` is that of all.
__device__ __forceinline__ Mass block_scan(Shared& shared, Mass own, Mass& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto scan = [&](Mass v) {
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const Mass other = __shfl_up_sync(ALL, v, o);
            if (lane >= o) v += other;
        }
        return v;
    };
    const Mass sum = scan(own);
    if (lane == 31) shared.masses[warp] = sum;
    __syncthreads();
    const Mass warps = scan(shared.masses[lane]);
    total = __shfl_sync(ALL, warps, 31);
    const Mass before = __shfl_sync(ALL, warps, (warp + 31) % 32);
    __syncthreads();
    return (warp > 0 ? before : 0) + sum - own;
}

// The first bin at which the wanted count, or mass, is reached, from the first on or from the last, into `shared.bin`, and what lies
// before it into `shared.before`. Says whether it is reached at all.
__device__ __forceinline__ bool find_bin(Shared& shared, bool by_mass, bool descending, Mass wanted) {
    const int bin = descending ? BINS - 1 - threadIdx.x : threadIdx.x;
    const Mass own = by_mass ? shared.histogram.all_masses[bin] : shared.histogram.all_counts[bin];
    Mass total;
    const Mass before = block_scan(shared, own, total);
    // At least one is wanted.
    wanted = max(wanted, Mass(1));
    if (before < wanted && before + own >= wanted) {
        shared.bin = bin;
        shared.before = before;
    }
    __syncthreads();
    return total >= wanted;
}

// The limit in step `step` among logits of at least `floor`, when they are too many for a list: by the digits of the numbers.
template <int BLOCKS, bool BY_MASS>
__device__ __noinline__ Limit limit_by_digits(Shared& shared, const Slice<BLOCKS>& slice, float best, int step, float floor,
                                              Mass wanted) {
    unsigned prefix = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        const unsigned known = shift == 24 ? 0 : ~0u << (shift + 8);
        fill<BLOCKS, !BY_MASS, BY_MASS>(shared, slice, best, [&](float logit) {
            const unsigned key = key_of(logit);
            const bool is_here = logit >= floor && step_of(logit, best) == step && (key & known) == prefix;
            return is_here ? static_cast<int>(key >> shift & 255) : -1;
        });
        find_bin(shared, BY_MASS, true, wanted);
        prefix |= static_cast<unsigned>(shared.bin) << shift;
        wanted -= min(wanted, shared.before);
        meet<BLOCKS>();
    }
    return Limit{logit_of(prefix), wanted};
}

// The limit in step `step` among logits of at least `floor`: where `wanted` of count or mass is reached.
template <int BLOCKS, bool BY_MASS>
__device__ __forceinline__ Limit find_limit(Shared& shared, const Slice<BLOCKS>& slice, float best, int step, float floor,
                                            Mass wanted) {
    // The list takes the place of the counts.
    if (threadIdx.x == 0) shared.listed = 0;
    meet<BLOCKS>();
    List& list = *in_block<BLOCKS>(&shared.list, 0);
    int* const listed = in_block<BLOCKS>(&shared.listed, 0);
    slice.each([&](float logit, int) {
        if (logit > -INFINITY && logit >= floor && step_of(logit, best) == step) {
            const int place = atomicAdd(listed, 1);
            if (place < LIST) {
                list.logits[place] = logit;
                list.masses[place] = BY_MASS ? mass_of(logit, best) : 1;
            }
        }
    });
    meet<BLOCKS>();
    const int count = *listed;
    if (count > LIST) {
        meet<BLOCKS>();
        return limit_by_digits<BLOCKS, BY_MASS>(shared, slice, best, step, floor, wanted);
    }
    if (slice.rank == 0) {
        const Mass least = max(wanted, Mass(1));
        for (int i = threadIdx.x; i < count; i += THREADS) {
            const float logit = shared.list.logits[i];
            Mass above = 0, equal = 0;
            for (int j = 0; j < count; ++j) {
                const float other = shared.list.logits[j];
                const Mass mass = shared.list.masses[j];
                above += other > logit ? mass : 0;
                equal += other == logit ? mass : 0;
            }
            // All that are equal find the same.
            if (above < least && above + equal >= least) {
#pragma unroll
                for (int rank = 0; rank < BLOCKS; ++rank)
                    *in_block<BLOCKS>(&shared.limit, rank) = Limit{logit, wanted - min(wanted, above)};
            }
        }
    }
    meet<BLOCKS>();
    return shared.limit;
}

// Top-k, which keeps what ties with the k-th, then top-p, which keeps the first of equals.
template <int BLOCKS>
__device__ __forceinline__ Kept shape(Shared& shared, const Slice<BLOCKS>& slice, int vocab, float best, int top_k, float top_p) {
    Kept kept{-INFINITY, -1};
    if (top_k > 0 && top_k < vocab) {
        fill<BLOCKS, true, false>(shared, slice, best, [&](float logit) { return step_of(logit, best); });
        // Fewer possible tokens than k: all are kept.
        if (find_bin(shared, false, false, top_k)) {
            const int step = shared.bin;
            kept.least = find_limit<BLOCKS, false>(shared, slice, best, step, -INFINITY, top_k - shared.before).logit;
        }
    }
    if (top_p < 1.0f) {
        const float floor = kept.least;
        meet<BLOCKS>();
        fill<BLOCKS, false, true>(shared, slice, best, [&](float logit) { return logit >= floor ? step_of(logit, best) : -1; });
        Mass total;
        block_scan(shared, shared.histogram.all_masses[threadIdx.x], total);
        const Mass wanted = static_cast<Mass>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
        if (find_bin(shared, true, false, wanted)) {
            const int step = shared.bin;
            const Mass left = wanted - min(wanted, shared.before);
            const Limit limit = find_limit<BLOCKS, true>(shared, slice, best, step, floor, left);
            kept.least = limit.logit;
            // At least one, and as many as it takes.
            const Mass each = max(mass_of(limit.logit, best), Mass(1));
            kept.ties = static_cast<int>(max((limit.left + each - 1) / each, Mass(1)));
        }
    }
    return kept;
}

// Elements of each of 32 parts of `count`: whole vectors for a warp where there are many.
__device__ __forceinline__ int part_of(int count) {
    const int unit = count > 4096 ? 128 : 32;
    return ((count + 31) / 32 + unit - 1) / unit * unit;
}

// Mass of what is kept in `begin..end`, by 32 parts of `part` elements each, one warp a part: `masses` above the least, and
// how many equal it.
template <int BLOCKS>
__device__ __forceinline__ void weigh_parts(Shared& shared, const Slice<BLOCKS>& slice, float best, const Kept& kept, int begin,
                                            int end, int part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = begin + warp * part, last = min(end, first + part);
    Mass mass = 0;
    int ties = 0;
    slice.each_of_warp(first, last, [&](float logit, int) {
        if (logit > kept.least) {
            mass += mass_of(logit, best);
        } else if (logit == kept.least && logit > -INFINITY) {
            ++ties;
        }
    });
    mass = warp_total(mass);
    ties = __reduce_add_sync(ALL, ties);
    if (lane == 0) {
        shared.masses[warp] = mass;
        shared.ties[warp] = ties;
    }
    __syncthreads();
}

// How many of `ties` are kept when `before` came before them.
__device__ __forceinline__ int kept_ties(const Kept& kept, int before, int ties) {
    return kept.ties < 0 ? ties : min(ties, max(0, kept.ties - before));
}

// A place in the distribution function: what is left to go, and ties that lie before.
struct Target {
    Mass left;
    int ties_before;
};

// The lane in whose share the target lies, on all lanes; the target is moved to its beginning. Negative: in none.
__device__ __forceinline__ int find_lane(const Kept& kept, Mass above, int ties, Mass tie_mass, Target& target, Mass& total) {
    const int lane = threadIdx.x % 32;
    int ties_end = ties;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(ALL, ties_end, o);
        if (lane >= o) ties_end += other;
    }
    const int before = target.ties_before + ties_end - ties;
    const Mass own = above + kept_ties(kept, before, ties) * tie_mass;
    Mass end = own;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const Mass other = __shfl_up_sync(ALL, end, o);
        if (lane >= o) end += other;
    }
    total = __shfl_sync(ALL, end, 31);
    const unsigned reached = __ballot_sync(ALL, target.left < end);
    if (reached == 0) {
        target.left -= min(target.left, total);
        target.ties_before = __shfl_sync(ALL, before + ties, 31);
        return -1;
    }
    const int found = __ffs(reached) - 1;
    target.left -= __shfl_sync(ALL, end - own, found);
    target.ties_before = __shfl_sync(ALL, before, found);
    return found;
}

// The token at the target in `begin..end`, ids ascending; every warp finds it. Negative: none, as infinite logits have it.
template <int BLOCKS>
__device__ __forceinline__ int find_token(Shared& shared, const Slice<BLOCKS>& slice, float best, const Kept& kept,
                                          Target target) {
    int begin = slice.begin, end = slice.end;
    const Mass tie_mass = kept.least > -INFINITY ? mass_of(kept.least, best) : 0;
    const int lane = threadIdx.x % 32;
    Mass total;
    while (end - begin > 128) {
        const int part = part_of(end - begin);
        weigh_parts(shared, slice, best, kept, begin, end, part);
        const int found = find_lane(kept, shared.masses[lane], shared.ties[lane], tie_mass, target, total);
        __syncthreads();
        if (found < 0) return -1;
        begin += found * part;
        end = min(end, begin + part);
    }
    for (int base = begin; base < end; base += 32) {
        const float logit = base + lane < end ? ordered(slice.logits[base + lane]) : -INFINITY;
        const Mass above = logit > kept.least ? mass_of(logit, best) : 0;
        const int is_tie = logit == kept.least && logit > -INFINITY;
        const int found = find_lane(kept, above, is_tie, tie_mass, target, total);
        if (found >= 0) return base + found;
    }
    return -1;
}

// Mass of all that is kept. Where the target, at `uniform` of it, lies in this block's slice, `target` becomes its place there.
template <int BLOCKS>
__device__ __forceinline__ Mass weigh(Shared& shared, const Slice<BLOCKS>& slice, float best, const Kept& kept, double uniform,
                                      bool& is_here, Target& target) {
    const int lane = threadIdx.x % 32;
    weigh_parts(shared, slice, best, kept, slice.begin, slice.end, part_of(slice.end - slice.begin));
    const Mass above = warp_total(shared.masses[lane]);
    const int ties = __reduce_add_sync(ALL, shared.ties[lane]);
    if (threadIdx.x < BLOCKS) {
        *in_block<BLOCKS>(&shared.block_masses[slice.rank], threadIdx.x) = above;
        *in_block<BLOCKS>(&shared.block_ties[slice.rank], threadIdx.x) = ties;
    }
    meet<BLOCKS>();
    const Mass tie_mass = kept.least > -INFINITY ? mass_of(kept.least, best) : 0;
    const Mass their_mass = lane < BLOCKS ? shared.block_masses[lane] : 0;
    const int their_ties = lane < BLOCKS ? shared.block_ties[lane] : 0;
    Mass total;
    target = Target{0, 0};
    find_lane(kept, their_mass, their_ties, tie_mass, target, total);
    target = Target{min(static_cast<Mass>(uniform * static_cast<double>(total)), total - min(total, Mass(1))), 0};
    Mass again;
    is_here = find_lane(kept, their_mass, their_ties, tie_mass, target, again) == slice.rank;
    return total;
}

// The best token of the row, on all threads of all blocks.
template <int BLOCKS> __device__ __forceinline__ Best best_of_blocks(Shared& shared, const Slice<BLOCKS>& slice, Best best) {
    best = block_best(best, shared.best);
    if (BLOCKS == 1) return best;
    if (threadIdx.x < BLOCKS) *in_block<BLOCKS>(&shared.bests[slice.rank], threadIdx.x) = best;
    meet<BLOCKS>();
    const int lane = threadIdx.x % 32;
    best = warp_best(lane < BLOCKS ? shared.bests[lane] : Best{-INFINITY, NO_ID});
    // Before the next one is told.
    meet<BLOCKS>();
    return best;
}

// The best tokens of what is kept, one look at the row for each.
template <int BLOCKS>
__device__ __forceinline__ void report_top(Shared& shared, const Slice<BLOCKS>& slice, const Kept& kept, float shift, int top_n,
                                           Result& result) {
    const bool writes = slice.rank == 0 && threadIdx.x == 0;
    Best last{INFINITY, -1};
    float nth = -INFINITY;
    int ties = 0, found = 0;
    for (; found <= MAX_TOP; ++found) {
        Best best{-INFINITY, NO_ID};
        slice.each([&](float logit, int id) {
            const Best token{logit, id};
            if (is_better(last, token) && is_better(token, best)) best = token;
        });
        best = best_of_blocks<BLOCKS>(shared, slice, best);
        const bool is_tie = best.logit == kept.least;
        ties += is_tie;
        const bool is_kept = best.logit > kept.least || (is_tie && kept_ties(kept, ties - 1, 1) == 1);
        if (best.id == NO_ID || best.logit == -INFINITY || !is_kept || (found >= top_n && best.logit < nth)) break;
        if (found < MAX_TOP && writes) {
            result.top_ids[found] = best.id;
            result.top_logprobs[found] = best.logit - shift;
        }
        nth = best.logit;
        last = best;
    }
    if (writes) result.num_top = found;
}

// Chooses a token for a request: temperature, top-k, top-p, then the random choice or the best.
template <int BLOCKS>
__device__ __forceinline__ void choose(float* logits, int vocab, const Request* requests, Result* results) {
    __shared__ Shared shared;
    pdl_launch();
    pdl_wait();
    const Request request = requests[blockIdx.x / BLOCKS];
    Result& result = results[blockIdx.x / BLOCKS];
    logits += static_cast<size_t>(request.row) * vocab;
    const Slice<BLOCKS> slice(logits, vocab);
    const bool is_scaled = !request.is_greedy && request.temperature != 1.0f;
    Best best{-INFINITY, NO_ID};
    slice.each([&](float logit, int id) {
        if (is_scaled) {
            logit /= request.temperature;
            logits[id] = logit;
        }
        if (is_better(Best{logit, id}, best)) best = Best{logit, id};
    });
    // Every block is there before another one reaches into it.
    meet<BLOCKS>();
    best = best_of_blocks<BLOCKS>(shared, slice, best);
    Kept kept{-INFINITY, -1};
    if (!request.is_greedy) kept = shape<BLOCKS>(shared, slice, vocab, best.logit, request.top_k, request.top_p);
    bool is_here = false;
    Target target{0, 0};
    const Mass total = weigh<BLOCKS>(shared, slice, best.logit, kept, request.uniform, is_here, target);
    const float shift = best.logit + static_cast<float>(log(static_cast<double>(total) / static_cast<double>(MASS_UNIT)));
    // One block writes: whose slice has the token, or, where nothing is drawn, the first.
    const bool draws = !request.is_greedy && total > 0;
    __syncthreads();
    int id = best.id;
    if (draws && is_here) {
        const int drawn = find_token(shared, slice, best.logit, kept, target);
        id = drawn < 0 ? best.id : drawn;
    }
    if ((draws ? is_here : slice.rank == 0) && threadIdx.x == 0) {
        result.id = id;
        result.logprob = ordered(logits[id]) - shift;
        if (request.top_n == 0) result.num_top = 0;
    }
    if (request.top_n > 0) report_top<BLOCKS>(shared, slice, kept, shift, request.top_n, result);
    // No block ends while another one may reach into it.
    meet<BLOCKS>();
}

// One block a request.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    choose_tokens(float* logits, int vocab, const Request* requests, Result* results) {
    choose<1>(logits, vocab, requests, results);
}

// A cluster of MOST_BLOCKS a request, since Hopper.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CLUSTER
#else
#define CLUSTER __cluster_dims__(MOST_BLOCKS, 1, 1)
#endif
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
    choose_tokens_in_clusters(float* logits, int vocab, const Request* requests, Result* results) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    choose<MOST_BLOCKS>(logits, vocab, requests, results);
#endif
}
