// From rows of f32 logits to tokens.
//
// Greedy rows and log-probabilities of given tokens: many blocks a row, the last of which puts their parts together. What shapes
// the distribution: one block a row, which finds the least logit that is kept by counting, a digit at a time, and never sorts.
// Masses are integers, so that their sums depend on no order: all ranks choose the same token.
#include "common.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int NO_ID = 0x7fffffff;

// Logits that are no numbers count as impossible, and both zeros are one.
__device__ __forceinline__ float ordered(float x) { return x == x ? x + 0.0f : -INFINITY; }

// A token and its logit; the better of two has the larger logit, or the lower id.
struct Best {
    float logit;
    int id;
};
__device__ __forceinline__ bool is_better(const Best& a, const Best& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}
__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const Best other{__shfl_xor_sync(ALL, best.logit, o), __shfl_xor_sync(ALL, best.id, o)};
        if (is_better(other, best)) best = other;
    }
    return best;
}
// Over the block, on all threads. `scratch` holds 32; a barrier precedes the next use.
__device__ __forceinline__ Best block_best(Best best, Best* scratch) {
    best = warp_best(best);
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[threadIdx.x / 32] = best;
    __syncthreads();
    best = warp_best(lane < warps ? scratch[lane] : Best{-INFINITY, NO_ID});
    __syncthreads();
    return best;
}

// What is found for a row, in memory of the host.
constexpr int MAX_TOP = 16;
struct Result {
    int id;
    float logprob;
    // Best tokens in `top`; more than MAX_TOP when the ties did not fit.
    int num_top;
    int unused;
    int top_ids[MAX_TOP];
    float top_logprobs[MAX_TOP];
};

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

// How a row is chosen from; the host's (sampling.rs).
struct Request {
    // In [0, 1): where in the distribution the token is.
    double uniform;
    // Its row of logits.
    int row;
    int is_greedy;
    float temperature;
    // 0: off.
    int top_k;
    // 1: off.
    float top_p;
    // Best tokens to report, at most MAX_TOP.
    int top_n;
    // 1 and 0: off.
    float repetition_penalty, frequency_penalty;
    // Where its history begins, and how many ids it has.
    int history, history_len;
};

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

// Probability masses: exp(logit - best) in units of 2^-44. Those of a row of 2^18 logits add up to less than 2^63.
using Mass = unsigned long long;
constexpr float MASS_UNIT = 17592186044416.0f;
__device__ __forceinline__ Mass mass_of(float logit, float best) {
    return logit > -INFINITY ? static_cast<Mass>(expf(logit - best) * MASS_UNIT) : 0;
}

// Ascends with the logit.
__device__ __forceinline__ unsigned key_of(float logit) {
    const unsigned bits = __float_as_uint(logit);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ Mass warp_total(Mass v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}

constexpr int THREADS = 1024, BINS = 2048;
// First digit: how far a logit is below the best, in steps of 1/64. Logits of a vocabulary spread over hundreds of these, so
// that few threads meet in one; over the digits of a float they would not.
constexpr float STEPS = 64.0f;
__device__ __forceinline__ int step_of(float logit, float best) {
    return min(BINS - 1, static_cast<int>((best - logit) * STEPS));
}

// What is kept of a row: logits above `least`, and the first `ties` of those equal to it.
struct Kept {
    float least;
    // All of them when negative.
    int ties;
    // Mass above `least`.
    Mass above;
};

struct Shared {
    unsigned counts[BINS], low[BINS], high[BINS];
    Best best[32];
    Mass masses[32];
    int ties[32];
    // What `find_bin` found.
    int bin;
    bool suffices;
    Mass mass;
};

__device__ __forceinline__ void add_mass(Shared& shared, int bin, Mass mass) {
    const unsigned low = static_cast<unsigned>(mass);
    unsigned high = static_cast<unsigned>(mass >> 32);
    const unsigned before = atomicAdd(&shared.low[bin], low);
    high += before + low < before;
    if (high != 0) atomicAdd(&shared.high[bin], high);
}
__device__ __forceinline__ Mass mass_in(const Shared& shared, int bin) {
    return static_cast<Mass>(shared.high[bin]) << 32 | shared.low[bin];
}

__device__ __forceinline__ void clear(Shared& shared) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) shared.counts[i] = shared.low[i] = shared.high[i] = 0;
    __syncthreads();
}

// The first bin from `start` in direction `way` at which the wanted count, or the wanted mass, is reached, with what lies
// before it; of what does not suffice the last bin that holds anything. One warp looks at 32 bins at a time. Says whether it
// suffices.
__device__ __forceinline__ bool find_bin(Shared& shared, bool by_mass, bool descending, unsigned count, Mass mass) {
    if (threadIdx.x < 32) {
        Mass before = 0, last_before = 0;
        int found = -1, last = 0;
        for (int base = 0; base < BINS && found < 0; base += 32) {
            const int bin = descending ? BINS - 1 - base - threadIdx.x : base + threadIdx.x;
            const Mass own = by_mass ? mass_in(shared, bin) : shared.counts[bin];
            Mass sum = own;
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                const Mass other = __shfl_up_sync(ALL, sum, o);
                if (threadIdx.x >= o) sum += other;
            }
            const Mass wanted = by_mass ? mass : count;
            const unsigned reached = __ballot_sync(ALL, own > 0 && before + sum >= wanted);
            const unsigned holding = __ballot_sync(ALL, own > 0);
            const int lane = reached != 0 ? __ffs(reached) - 1 : holding != 0 ? 31 - __clz(holding) : -1;
            if (lane >= 0) {
                last_before = before + __shfl_sync(ALL, sum - own, lane);
                last = __shfl_sync(ALL, bin, lane);
            }
            if (reached != 0) found = last;
            before += __shfl_sync(ALL, sum, 31);
        }
        if (threadIdx.x == 0) {
            shared.bin = last;
            shared.mass = last_before;
            shared.suffices = found >= 0;
        }
    }
    __syncthreads();
    return shared.suffices;
}

// Runs `each(logit, id)` for the block's row.
template <typename Each> __device__ __forceinline__ void for_row(const float* logits, int vocab, Each each) {
    if (vocab % 4 == 0) {
        for (int at = threadIdx.x * 4; at < vocab; at += THREADS * 4) {
            const float4 x = *reinterpret_cast<const float4*>(logits + at);
            each(ordered(x.x), at), each(ordered(x.y), at + 1), each(ordered(x.z), at + 2), each(ordered(x.w), at + 3);
        }
    } else {
        for (int at = threadIdx.x; at < vocab; at += THREADS) each(ordered(logits[at]), at);
    }
}

// Within step `step` (of those at or above `floor`) the logit at which `wanted` of count or mass is reached. What lies above it
// is added to `above` and taken from `wanted`.
template <bool BY_MASS>
__device__ __forceinline__ float refine(Shared& shared, const float* logits, int vocab, float best, int step, float floor,
                                        Mass& wanted, Mass& above) {
    unsigned prefix = 0;
    int shift = 21;
    for (int digits = 11; shift >= 0; digits = shift == 10 ? 11 : 10) {
        clear(shared);
        const unsigned known = shift + digits >= 32 ? 0 : ~0u << (shift + digits);
        for_row(logits, vocab, [&](float logit, int) {
            if (logit > -INFINITY && logit >= floor && step_of(logit, best) == step) {
                const unsigned key = key_of(logit);
                if ((key & known) == prefix) {
                    const int bin = key >> shift & ((1 << digits) - 1);
                    if (BY_MASS) {
                        add_mass(shared, bin, mass_of(logit, best));
                    } else {
                        atomicAdd(&shared.counts[bin], 1);
                    }
                }
            }
        });
        __syncthreads();
        find_bin(shared, BY_MASS, true, static_cast<unsigned>(wanted), wanted);
        prefix |= static_cast<unsigned>(shared.bin) << shift;
        wanted -= min(wanted, shared.mass);
        above += shared.mass;
        if (shift == 0) break;
        shift = shift == 21 ? 10 : 0;
        __syncthreads();
    }
    __syncthreads();
    return logit_of(prefix);
}

// Counts, or weighs, the row by steps.
template <bool COUNTS, bool MASSES>
__device__ __forceinline__ void fill_steps(Shared& shared, const float* logits, int vocab, float best, float floor) {
    clear(shared);
    for_row(logits, vocab, [&](float logit, int) {
        if (logit > -INFINITY && logit >= floor) {
            const int step = step_of(logit, best);
            if (COUNTS) atomicAdd(&shared.counts[step], 1);
            if (MASSES) {
                const Mass mass = mass_of(logit, best);
                if (mass != 0) add_mass(shared, step, mass);
            }
        }
    });
    __syncthreads();
}

// Top-k, which keeps what ties with the k-th, then top-p, which keeps the first of equals.
__device__ __forceinline__ Kept shape(Shared& shared, const float* logits, int vocab, float best, int top_k, float top_p) {
    Kept kept{-INFINITY, -1, 0};
    if (top_k > 0 && top_k < vocab) {
        fill_steps<true, false>(shared, logits, vocab, best, -INFINITY);
        const bool suffices = find_bin(shared, false, false, top_k, 0);
        Mass wanted = top_k - shared.mass, above = 0;
        const int step = shared.bin;
        __syncthreads();
        // Fewer possible tokens than k: all are kept.
        if (suffices) kept.least = refine<false>(shared, logits, vocab, best, step, -INFINITY, wanted, above);
    }
    if (top_p < 1.0f) {
        fill_steps<false, true>(shared, logits, vocab, best, kept.least);
        Mass total = 0;
        for (int i = threadIdx.x; i < BINS; i += THREADS) total += mass_in(shared, i);
        total = warp_total(total);
        if (threadIdx.x % 32 == 0) shared.masses[threadIdx.x / 32] = total;
        __syncthreads();
        total = warp_total(shared.masses[threadIdx.x % 32]);
        Mass wanted = static_cast<Mass>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
        const bool suffices = find_bin(shared, true, false, 0, wanted);
        wanted -= min(wanted, shared.mass);
        kept.above = shared.mass;
        const int step = shared.bin;
        __syncthreads();
        if (suffices) {
            kept.least = refine<true>(shared, logits, vocab, best, step, kept.least, wanted, kept.above);
            const Mass each = mass_of(kept.least, best);
            // At least one, and as many as it takes.
            kept.ties = each == 0 ? 1 : static_cast<int>(max((wanted + each - 1) / each, Mass(1)));
        }
    }
    return kept;
}

// Mass of what is kept in `begin..end`, by 32 parts of `part` elements each, one warp a part: `masses` above the least, and
// how many equal it.
__device__ __forceinline__ void weigh_parts(Shared& shared, const float* logits, float best, const Kept& kept, int begin,
                                            int end, int part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = begin + warp * part, last = min(end, first + part);
    Mass mass = 0;
    int ties = 0;
    for (int i = first + lane; i < last; i += 32) {
        const float logit = ordered(logits[i]);
        if (logit > kept.least) {
            mass += mass_of(logit, best);
        } else if (logit == kept.least && logit > -INFINITY) {
            ++ties;
        }
    }
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

// The token at `uniform` of the distribution function, ids ascending, and the mass of all that is kept.
__device__ __forceinline__ int choose(Shared& shared, const float* logits, int vocab, float best, const Kept& kept,
                                      double uniform, Mass& total) {
    const Mass tie_mass = kept.least > -INFINITY ? mass_of(kept.least, best) : 0;
    const int lane = threadIdx.x % 32;
    int begin = 0, end = vocab, ties_before = 0;
    Mass target = 0;
    bool is_first = true;
    while (is_first || end - begin > 128) {
        const int part = ((end - begin + 31) / 32 + 31) / 32 * 32;
        weigh_parts(shared, logits, best, kept, begin, end, part);
        // Every warp does the same.
        const int own_ties = shared.ties[lane];
        int ties = own_ties;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int other = __shfl_up_sync(ALL, ties, o);
            if (lane >= o) ties += other;
        }
        const int before = ties_before + ties - own_ties;
        const Mass own = shared.masses[lane] + kept_ties(kept, before, own_ties) * tie_mass;
        Mass sum = own;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const Mass other = __shfl_up_sync(ALL, sum, o);
            if (lane >= o) sum += other;
        }
        if (is_first) {
            total = __shfl_sync(ALL, sum, 31);
            if (total == 0) return -1;
            target = min(static_cast<Mass>(uniform * static_cast<double>(total)), total - 1);
            is_first = false;
        }
        const unsigned reached = __ballot_sync(ALL, target < sum);
        // Only infinite logits lead here.
        if (reached == 0) return -1;
        const int chosen = __ffs(reached) - 1;
        target -= __shfl_sync(ALL, sum - own, chosen);
        ties_before = __shfl_sync(ALL, before, chosen);
        begin += chosen * part;
        end = min(end, begin + part);
        __syncthreads();
    }
    // The first warp's answer counts; all of them look.
    for (int base = begin; base < end; base += 32) {
        const int at = base + lane;
        const float logit = at < end ? ordered(logits[at]) : -INFINITY;
        const bool is_tie = logit == kept.least && logit > -INFINITY;
        const unsigned ties = __ballot_sync(ALL, is_tie);
        const int before = ties_before + __popc(ties & ((1u << lane) - 1));
        const bool is_kept = logit > kept.least || (is_tie && kept_ties(kept, before, 1) == 1);
        const Mass own = is_kept ? mass_of(logit, best) : 0;
        Mass sum = own;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const Mass other = __shfl_up_sync(ALL, sum, o);
            if (lane >= o) sum += other;
        }
        const unsigned reached = __ballot_sync(ALL, target < sum);
        if (reached != 0) return base + __ffs(reached) - 1;
        target -= __shfl_sync(ALL, sum, 31);
        ties_before += __popc(ties);
    }
    return -1;
}

// The best tokens of what is kept, one look at the row for each.
__device__ __forceinline__ void report_top(Shared& shared, const float* logits, int vocab, const Kept& kept, float shift,
                                           int top_n, Result& result) {
    Best last{INFINITY, -1};
    float nth = -INFINITY;
    int ties = 0, found = 0;
    for (; found <= MAX_TOP; ++found) {
        Best best{-INFINITY, NO_ID};
        for_row(logits, vocab, [&](float logit, int id) {
            const Best token{logit, id};
            if (is_better(last, token) && is_better(token, best)) best = token;
        });
        best = block_best(best, shared.best);
        const bool is_tie = best.logit == kept.least;
        ties += is_tie;
        const bool is_kept = best.logit > kept.least || (is_tie && kept_ties(kept, ties - 1, 1) == 1);
        if (best.id == NO_ID || best.logit == -INFINITY || !is_kept || (found >= top_n && best.logit < nth)) break;
        if (found < MAX_TOP && threadIdx.x == 0) {
            result.top_ids[found] = best.id;
            result.top_logprobs[found] = best.logit - shift;
        }
        nth = best.logit;
        last = best;
    }
    if (threadIdx.x == 0) result.num_top = found;
}

// Chooses a token for each request, one block each: temperature, top-k, top-p, then the random choice or the best.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    choose_tokens(float* logits, int vocab, const Request* requests, Result* results) {
    __shared__ Shared shared;
    pdl_launch();
    pdl_wait();
    const Request request = requests[blockIdx.x];
    Result& result = results[blockIdx.x];
    logits += static_cast<size_t>(request.row) * vocab;
    Best best{-INFINITY, NO_ID};
    const bool is_scaled = !request.is_greedy && request.temperature != 1.0f;
    if (is_scaled) {
        for (int i = threadIdx.x; i < vocab; i += THREADS) {
            const float logit = ordered(logits[i]) / request.temperature;
            logits[i] = logit;
            if (is_better(Best{logit, i}, best)) best = Best{logit, i};
        }
    } else {
        for_row(logits, vocab, [&](float logit, int id) {
            if (is_better(Best{logit, id}, best)) best = Best{logit, id};
        });
    }
    best = block_best(best, shared.best);
    Kept kept{-INFINITY, -1, 0};
    if (!request.is_greedy) kept = shape(shared, logits, vocab, best.logit, request.top_k, request.top_p);
    Mass total = 0;
    int id = choose(shared, logits, vocab, best.logit, kept, request.uniform, total);
    const float shift = best.logit + static_cast<float>(log(static_cast<double>(total) / static_cast<double>(MASS_UNIT)));
    if (request.is_greedy || id < 0) id = best.id;
    if (threadIdx.x == 0) {
        result.id = id;
        result.logprob = ordered(logits[id]) - shift;
        result.num_top = 0;
    }
    if (request.top_n > 0) report_top(shared, logits, vocab, kept, shift, request.top_n, result);
}
