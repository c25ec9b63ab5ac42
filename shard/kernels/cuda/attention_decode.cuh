// Attention of sequences with one query: bound by reading keys and values once.
//
// The keys of all sequences and KV heads form one line of *units* of 64 keys, which is cut into equal parts, one a block: the
// grid depends on nothing but the device, and a single long context is spread over all multiprocessors as evenly as many short
// ones. A block may so end in the middle of a sequence's head; whichever block finishes such a head last merges its parts.
//
// Every warp has its own sixteen keys of a unit and its own ring of pages in shared memory, filled some units ahead across the
// ends of sequences. Keys are the rows of a tensor-core product and query heads of a KV head its columns: eight of them, so that
// a warp needs few registers and many warps hide each other's waiting.
#pragma once
#include "attention.cuh"
#include "fp8.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int UNIT_KEYS = PAGE_KEYS * WARPS;
// Query heads of one KV head that are computed together, at most; larger groups take several turns.
constexpr int MOST_HEADS = 16;

// Where a block's parts of heads are left for merging: two a block, of what it began with and of what it ended with.
struct Parts {
    // [2 * blocks, MOST_HEADS, DIM], not yet divided.
    float* sums;
    // [2 * blocks, MOST_HEADS]: highest score and total weight.
    float2* weights;
    // [blocks]: finished parts of the head that the block is the first of; zero between launches.
    int* finished;
    // Pages of keys and of values that a warp has room for: 2 to 4.
    int stages;
};

// How the line of units is cut.
struct Line {
    const int* first_unit;
    const int* contexts;
    int num_seqs, items, total, units_per_block;

    // The last block may have fewer.
    __device__ __forceinline__ int begin_of(int block) const { return min(total, block * units_per_block); }
    __device__ __forceinline__ int owner_of(int place) const { return place / units_per_block; }
};

// A place in it. An *item* is a KV head with some of its query heads.
struct Place {
    int index, item, unit, units, context, first;

    __device__ __forceinline__ void read(const Line& line) {
        context = line.contexts[index];
        units = line.first_unit[index + 1] - line.first_unit[index];
        first = (context + UNIT_KEYS - 1) / UNIT_KEYS - units;
    }
    __device__ __forceinline__ void seek(const Line& line, int place) {
        int low = 0, high = line.num_seqs - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (line.first_unit[middle] * line.items <= place) low = middle;
            else high = middle - 1;
        }
        index = low;
        read(line);
        const int within = place - line.first_unit[index] * line.items;
        item = within / units;
        unit = within % units;
    }
    __device__ __forceinline__ void advance(const Line& line) {
        if (++unit < units) return;
        unit = 0;
        if (++item < line.items) return;
        item = 0;
        if (++index < line.num_seqs) read(line);
    }
    // The page of warp `warp` and whether any query sees a key of it.
    __device__ __forceinline__ int page(int warp) const { return (first + unit) * WARPS + warp; }
    __device__ __forceinline__ bool has(int page, int window) const {
        return page * PAGE_KEYS < context && (window == 0 || (page + 1) * PAGE_KEYS > context - window);
    }
};

// Counts the units of each sequence. `first_unit` [n + 1].
__device__ __forceinline__ void count_units(const Attention& a, const int* decode_seqs, int n, int* first_unit, int* contexts,
                                            int* scratch) {
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int carry = 0;
    if (tid == 0) first_unit[0] = 0;
    for (int base = 0; base < n; base += THREADS) {
        int sum = 0;
        if (base + tid < n) {
            const int context = a.context_lens[decode_seqs[base + tid]];
            contexts[base + tid] = context;
            const int seen = a.window > 0 ? max(0, context - a.window) / UNIT_KEYS : 0;
            sum = (context + UNIT_KEYS - 1) / UNIT_KEYS - seen;
        }
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int before = __shfl_up_sync(0xffffffffu, sum, o);
            if (lane >= o) sum += before;
        }
        if (lane == 31) scratch[warp] = sum;
        __syncthreads();
        int before = carry;
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) before += scratch[w];
            carry += scratch[w];
        }
        if (base + tid < n) first_unit[base + tid + 1] = before + sum;
        __syncthreads();
    }
}

// The last block of a head that is spread over several merges what they left.
template <typename T, int DIM>
__device__ __forceinline__ void merge(const Attention& a, const Parts& parts, T* out, int heads, int first_block, int count) {
    constexpr int GROUP = 4;
    for (int at = threadIdx.x; at < heads * (DIM / GROUP); at += THREADS) {
        const int head = at / (DIM / GROUP), column = at % (DIM / GROUP) * GROUP;
        if (column >= a.head_dim) continue;
        // The first block left the part it ended with, the others those they began with.
        const auto slot = [&](int part) { return part == 0 ? 2 * first_block + 1 : 2 * (first_block + part); };
        float highest = -INFINITY;
#pragma unroll 16
        for (int part = 0; part < count; ++part) {
            highest = fmaxf(highest, __ldcg(&parts.weights[slot(part) * MOST_HEADS + head].x));
        }
        float sums[GROUP] = {}, total = 0.0f;
#pragma unroll 8
        for (int part = 0; part < count; ++part) {
            const int from = slot(part) * MOST_HEADS + head;
            const float2 weight = __ldcg(&parts.weights[from]);
            const float4 sum = __ldcg(reinterpret_cast<const float4*>(parts.sums + static_cast<size_t>(from) * DIM + column));
            const float factor = exp2_fast(weight.x - highest);
            total += weight.y * factor;
            sums[0] += sum.x * factor;
            sums[1] += sum.y * factor;
            sums[2] += sum.z * factor;
            sums[3] += sum.w * factor;
        }
        const float inverse = 1.0f / total;
#pragma unroll
        for (int i = 0; i < GROUP; ++i) sums[i] *= inverse;
        store_floats<T, GROUP>(out + head * a.head_dim + column, sums);
    }
}

__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// COLUMNS: query heads of an item, at most: 8 or 16. C: elements of the cache, T or of eight bits; those lie in the ring as they are
// and are widened to T before they are multiplied.
template <typename T, typename C, int DIM, int COLUMNS> struct Decode {
    using Lines = Rows<DIM>;
    static constexpr bool WIDENS = sizeof(C) == 1;
    static constexpr int PAGE_BYTES = PAGE_KEYS * Lines::STRIDE;
    static constexpr int RAW_PAGE_BYTES = WIDENS ? PAGE_KEYS * DIM : PAGE_BYTES;
    static constexpr int STAGE_BYTES = 2 * RAW_PAGE_BYTES;
    // A warp's page in T.
    static constexpr int WIDE_BYTES = WIDENS ? 2 * PAGE_BYTES : 0;
    static constexpr int STEPS = DIM / 16;
    static constexpr int TILES = COLUMNS / 8;
    // A head's sums in shared memory, so that a warp's stores go to different banks.
    static constexpr int SUMS_STRIDE = DIM + 4;

    const Attention& a;
    const Parts& parts;
    const int* decode_seqs;
    int warp, lane, group, tiles_per_head, heads;
    // Of the item at hand.
    int token;
    uint32_t ring;
    // The ring and the page in T where elements are widened.
    uint8_t *raw, *wide;
    // [WARPS, shared_heads, SUMS_STRIDE].
    float* shared_sums;
    int shared_heads;
    // [WARPS, COLUMNS]: highest score and total weight.
    float2* shared_weights;
    int* flag;

    // Of the heads 2 (lane % 4) and the next of each tile: the queries as the right side of products, the sums of values as
    // [16 columns of values, 8 heads].
    uint32_t query[TILES][STEPS][2];
    float sums[TILES][STEPS][4];
    float highest[TILES][2], total[TILES][2], slope[TILES][2];

    __device__ __forceinline__ Decode(const Attention& a, const Parts& parts, const int* decode_seqs)
        : a(a), parts(parts), decode_seqs(decode_seqs) {}

    __device__ __forceinline__ const int* table_of(int index) const {
        return a.block_tables + static_cast<size_t>(decode_seqs[index]) * a.header[BLOCK_TABLE_STRIDE];
    }
    __device__ __forceinline__ int token_of(int index) const { return a.cu_seqlens_q[decode_seqs[index]]; }
    __device__ __forceinline__ int block_at(const Place& place) const {
        const int page = place.page(warp);
        return place.has(page, a.window) ? block_of(a, table_of(place.index), page) : 0;
    }
    __device__ __forceinline__ int first_head(const Place& place) const {
        return place.item / tiles_per_head * group + place.item % tiles_per_head * COLUMNS;
    }

    // Starts copying this warp's page of keys and of values. Keys past the context are not masked by their weight of zero
    // if what lies there is no number, so such values become zero.
    __device__ __forceinline__ void fetch(const Place& place, int block, int stage) const {
        const int page = place.page(warp);
        if (!place.has(page, a.window)) return;
        const size_t offset = page_offset(a, block, page, place.item / tiles_per_head);
        const C* const keys = static_cast<const C*>(a.keys) + offset;
        const C* const values = static_cast<const C*>(a.values) + offset;
        const uint32_t to = ring + stage * STAGE_BYTES;
        const int count = place.context - page * PAGE_KEYS;
        if constexpr (WIDENS) {
            constexpr int RAW_CHUNKS = DIM / 16;
#pragma unroll
            for (int i = 0; i < PAGE_KEYS * RAW_CHUNKS / 32; ++i) {
                const int row = (lane + 32 * i) / RAW_CHUNKS, chunk = (lane + 32 * i) % RAW_CHUNKS;
                const int from = row * a.head_dim + chunk * 16;
                const bool is_there = chunk * 16 < a.head_dim, is_value = is_there && row < count;
                cp_async(to + row * DIM + chunk * 16, is_there ? keys + from : keys, is_there ? 16 : 0);
                cp_async(to + RAW_PAGE_BYTES + row * DIM + chunk * 16, is_value ? values + from : values, is_value ? 16 : 0);
            }
            return;
        }
        constexpr int CHUNKS = DIM / 8;
#pragma unroll
        for (int i = 0; i < PAGE_KEYS * CHUNKS / 32; ++i) {
            const int row = (lane + 32 * i) / CHUNKS, chunk = (lane + 32 * i) % CHUNKS;
            const int from = row * a.head_dim + chunk * 8;
            const bool is_there = chunk * 8 < a.head_dim;
            cp_async(to + Lines::at(row, chunk), is_there ? keys + from : keys, is_there ? 16 : 0);
        }
#pragma unroll
        for (int i = 0; i < PAGE_KEYS * CHUNKS / 32; ++i) {
            const int row = (lane + 32 * i) / CHUNKS, chunk = (lane + 32 * i) % CHUNKS;
            const int from = row * a.head_dim + chunk * 8;
            const bool is_there = chunk * 8 < a.head_dim && row < count;
            cp_async(to + PAGE_BYTES + Lines::at(row, chunk), is_there ? values + from : values, is_there ? 16 : 0);
        }
    }

    // A page of the ring in T.
    __device__ __forceinline__ void widen(int stage) const {
        constexpr int RAW_CHUNKS = DIM / 16;
        const uint8_t* const from = raw + stage * STAGE_BYTES;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
#pragma unroll
            for (int i = 0; i < PAGE_KEYS * RAW_CHUNKS / 32; ++i) {
                const int row = (lane + 32 * i) / RAW_CHUNKS, chunk = (lane + 32 * i) % RAW_CHUNKS;
                uint4 first, second;
                widen_piece<C, T>(*reinterpret_cast<const uint4*>(from + part * RAW_PAGE_BYTES + row * DIM + chunk * 16), first, second);
                *reinterpret_cast<uint4*>(wide + part * PAGE_BYTES + Lines::at(row, 2 * chunk)) = first;
                *reinterpret_cast<uint4*>(wide + part * PAGE_BYTES + Lines::at(row, 2 * chunk + 1)) = second;
            }
        }
        __syncwarp();
    }

    // Begins an item.
    __device__ __forceinline__ void begin(const Place& place) {
        const int head = first_head(place);
        heads = min(COLUMNS, group - place.item % tiles_per_head * COLUMNS);
        const T* const q = static_cast<const T*>(a.qkv) +
                           static_cast<size_t>(token) * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim +
                           static_cast<size_t>(head) * a.head_dim;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const int row = tile * 8 + lane / 4;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    const int column = step * 16 + part * 8 + (lane % 4) * 2;
                    query[tile][step][part] =
                        row < heads && column < a.head_dim ? *reinterpret_cast<const uint32_t*>(q + row * a.head_dim + column) : 0u;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[tile][step][i] = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                highest[tile][i] = -INFINITY;
                total[tile][i] = 0.0f;
                slope[tile][i] = slope_of(a, head + tile * 8 + (lane % 4) * 2 + i);
            }
        }
    }

    // Takes in the page of this warp.
    __device__ __forceinline__ void attend(const Place& place, int stage) {
        const int page = place.page(warp);
        if (!place.has(page, a.window)) return;
        if constexpr (WIDENS) widen(stage);
        const uint32_t keys = WIDENS ? shared_address(wide) : ring + stage * STAGE_BYTES, values = keys + PAGE_BYTES;
        const int matrix = lane / 8, within = lane % 8;
        // Even and odd steps add up by themselves: half as many products wait for one another.
        float scores[TILES][2][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t rows[4];
            load_matrices(rows, keys + Lines::at((matrix & 1) * 8 + within, step * 2 + matrix / 2));
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                multiply<T>(scores[tile][step % 2], rows, query[tile][step][0], query[tile][step][1]);
            }
        }
        const bool is_plain = a.soft_cap == 0.0f && a.alibi_heads == 0;
        const float factor = a.scale * LOG2_E;
        const int last = place.context - 1, first_key = page * PAGE_KEYS + lane / 4;
        bool is_seen[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = first_key + 8 * half;
            is_seen[half] = key <= last && (a.window == 0 || key > last - a.window);
        }
        uint32_t weights[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            // Keys lane / 4 and 8 more, each of two heads.
            float(&score)[4] = scores[tile][0];
            bool is_higher = false;
            float most[2] = {highest[tile][0], highest[tile][1]};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[i] += scores[tile][1][i];
                score[i] = is_plain ? score[i] * factor : score_log2(a, score[i], slope[tile][i % 2], last - first_key - 8 * (i / 2));
                score[i] = is_seen[i / 2] ? score[i] : -INFINITY;
                most[i % 2] = fmaxf(most[i % 2], score[i]);
            }
#pragma unroll
            for (int o = 4; o < 32; o *= 2) {
                most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], o));
                most[1] = fmaxf(most[1], __shfl_xor_sync(0xffffffffu, most[1], o));
            }
            is_higher = most[0] > highest[tile][0] || most[1] > highest[tile][1];
            if (__any_sync(0xffffffffu, is_higher)) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float rescale = exp2_fast(highest[tile][i] - most[i]);
                    highest[tile][i] = most[i];
                    total[tile][i] *= rescale;
#pragma unroll
                    for (int step = 0; step < STEPS; ++step) {
                        sums[tile][step][i] *= rescale;
                        sums[tile][step][2 + i] *= rescale;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                score[i] = exp2_fast(score[i] - most[i % 2]);
                total[tile][i % 2] += score[i];
            }
            weights[tile][0] = transpose(pack<T>(score[0], score[1]));
            weights[tile][1] = transpose(pack<T>(score[2], score[3]));
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t columns[4];
            load_matrices_transposed(columns, values + Lines::at((matrix / 2) * 8 + within, step * 2 + (matrix & 1)));
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) multiply<T>(sums[tile][step], columns, weights[tile][0], weights[tile][1]);
        }
    }

    // Leaves this warp's sums and weights in shared memory.
    __device__ __forceinline__ void put() {
        float* const to = shared_sums + warp * shared_heads * SUMS_STRIDE;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int o = 4; o < 32; o *= 2) total[tile][i] += __shfl_xor_sync(0xffffffffu, total[tile][i], o);
                const int head = tile * 8 + (lane % 4) * 2 + i;
                if (head >= heads) continue;
                if (lane < 4) shared_weights[warp * COLUMNS + head] = make_float2(highest[tile][i], total[tile][i]);
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    to[head * SUMS_STRIDE + step * 16 + lane / 4] = sums[tile][step][i];
                    to[head * SUMS_STRIDE + step * 16 + 8 + lane / 4] = sums[tile][step][2 + i];
                }
            }
        }
    }

    // Ends an item, or this block's part of it: `begins` and `ends` say whether the part does so with the item.
    __device__ __forceinline__ void end(const Line& line, const Place& place, bool begins, bool ends) {
        put();
        T* const out = static_cast<T*>(a.out) + (static_cast<size_t>(token) * a.num_heads + first_head(place)) * a.head_dim;
        const bool is_whole = begins && ends;
        const int slot = 2 * blockIdx.x + (begins ? 1 : 0);
        __syncthreads();
        constexpr int GROUP = 4;
        for (int at = threadIdx.x; at < heads * (DIM / GROUP); at += THREADS) {
            const int head = at / (DIM / GROUP), column = at % (DIM / GROUP) * GROUP;
            float most = -INFINITY, all = 0.0f, sum[GROUP] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared_weights[w * COLUMNS + head].x);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float2 weight = shared_weights[w * COLUMNS + head];
                const float factor = exp2_fast(weight.x - most);
                const float4 x = *reinterpret_cast<const float4*>(shared_sums + (w * shared_heads + head) * SUMS_STRIDE + column);
                all += weight.y * factor;
                sum[0] += x.x * factor;
                sum[1] += x.y * factor;
                sum[2] += x.z * factor;
                sum[3] += x.w * factor;
            }
            if (is_whole) {
                const float inverse = 1.0f / all;
#pragma unroll
                for (int i = 0; i < GROUP; ++i) sum[i] *= inverse;
                if (column < a.head_dim) store_floats<T, GROUP>(out + head * a.head_dim + column, sum);
            } else {
                const size_t to = static_cast<size_t>(slot) * MOST_HEADS + head;
                if (column == 0) parts.weights[to] = make_float2(most, all);
                *reinterpret_cast<float4*>(parts.sums + to * DIM + column) = make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
        }
        if (is_whole) {
            // The next item's sums may not come before these are read.
            __syncthreads();
            return;
        }
        const int units_before = line.first_unit[place.index] * line.items + place.item * place.units;
        const int first_block = line.owner_of(units_before), last_block = line.owner_of(units_before + place.units - 1);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) *flag = atomicAdd(parts.finished + first_block, 1) == last_block - first_block;
        __syncthreads();
        if (*flag) {
            __threadfence();
            merge<T, DIM>(a, parts, out, heads, first_block, last_block - first_block + 1);
            if (threadIdx.x == 0) parts.finished[first_block] = 0;
        }
    }

    __device__ __forceinline__ void run(const Line& line) {
        const int begin_place = line.begin_of(blockIdx.x), end_place = line.begin_of(blockIdx.x + 1);
        Place ahead, now;
        ahead.seek(line, begin_place);
        now = ahead;
        int block = block_at(ahead), fetched = begin_place;
        const auto fetch_next = [&](int stage) {
            if (fetched < end_place) {
                fetch(ahead, block, stage);
                if (++fetched < end_place) {
                    ahead.advance(line);
                    block = block_at(ahead);
                }
            }
            cp_async_commit();
        };
        // In a step that only decodes, pages without the newest key were there before: they may be read while the kernel
        // before still runs.
        bool has_waited = a.header[NUM_PREFILL_TILES] != 0;
        if (has_waited) pdl_wait();
        const int stages = parts.stages;
        for (int stage = 0; stage < stages - 1; ++stage) {
            if (!has_waited && fetched < end_place && (ahead.page(warp) + 1) * PAGE_KEYS >= ahead.context) {
                pdl_wait();
                has_waited = true;
            }
            fetch_next(stage);
        }
        token = token_of(now.index);
        pdl_launch();
        if (!has_waited) pdl_wait();
        bool begins = now.unit == 0;
        begin(now);
        int stage = 0;
        for (int place = begin_place; place < end_place; ++place) {
            if (stages == 3) cp_async_wait<1>();
            else if (stages == 4) cp_async_wait<2>();
            else cp_async_wait<0>();
            __syncwarp();
            fetch_next(stage == 0 ? stages - 1 : stage - 1);
            attend(now, stage);
            stage = stage + 1 == stages ? 0 : stage + 1;
            const bool ends = now.unit + 1 == now.units;
            if (ends || place + 1 == end_place) {
                end(line, now, begins, ends);
                if (place + 1 == end_place) break;
                now.advance(line);
                token = token_of(now.index);
                begin(now);
                begins = true;
            } else {
                ++now.unit;
            }
        }
        cp_async_wait<0>();
    }
};

template <typename T, typename C, int DIM, int COLUMNS>
__device__ __forceinline__ void attend_decode(const Attention& a, const Parts& parts, const int* decode_seqs) {
    using Work = Decode<T, C, DIM, COLUMNS>;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float2 weights[WARPS * COLUMNS];
    __shared__ int scratch[WARPS];
    const int n = a.header[NUM_DECODE_SEQS];
    Work work(a, parts, decode_seqs);
    work.group = a.num_heads / a.num_kv_heads;
    work.tiles_per_head = (work.group + COLUMNS - 1) / COLUMNS;
    work.warp = threadIdx.x / 32;
    work.lane = threadIdx.x % 32;
    work.shared_heads = min(work.group, COLUMNS);
    work.shared_sums = reinterpret_cast<float*>(shared + WARPS * (parts.stages * Work::STAGE_BYTES + Work::WIDE_BYTES));
    int* const first_unit = reinterpret_cast<int*>(work.shared_sums + WARPS * work.shared_heads * Work::SUMS_STRIDE);
    int* const contexts = first_unit + n + 1;
    count_units(a, decode_seqs, n, first_unit, contexts, scratch);
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    Line line{first_unit, contexts, n, a.num_kv_heads * work.tiles_per_head, 0, 0};
    line.total = first_unit[n] * line.items;
    // Equal parts in whole units: where contexts are alike, parts and heads then end together more often.
    line.units_per_block = (line.total + blocks - 1) / blocks;
    if (block * line.units_per_block >= line.total) {
        pdl_launch();
        pdl_wait();
        return;
    }
    work.raw = shared + work.warp * parts.stages * Work::STAGE_BYTES;
    work.wide = shared + WARPS * parts.stages * Work::STAGE_BYTES + work.warp * Work::WIDE_BYTES;
    work.ring = shared_address(work.raw);
    work.shared_weights = weights;
    work.flag = scratch;
    work.run(line);
}

// BLOCKS: of a multiprocessor at a time.
#define ATTENTION_DECODE(T, C, DIM, COLUMNS, BLOCKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_decode_##DIM##_##COLUMNS##_##T##_##C(    \
        const __grid_constant__ Attention attention, const __grid_constant__ Parts parts, const int* decode_seqs) { \
        attend_decode<T, C, DIM, COLUMNS>(attention, parts, decode_seqs);                                            \
    }
#define ATTENTION_DECODE_EACH_DIM(T, C)  \
    ATTENTION_DECODE(T, C, 64, 8, 4)     \
    ATTENTION_DECODE(T, C, 64, 16, 4)    \
    ATTENTION_DECODE(T, C, 96, 8, 3)     \
    ATTENTION_DECODE(T, C, 96, 16, 3)    \
    ATTENTION_DECODE(T, C, 128, 8, 3)    \
    ATTENTION_DECODE(T, C, 128, 16, 2)   \
    ATTENTION_DECODE(T, C, 192, 8, 2)    \
    ATTENTION_DECODE(T, C, 256, 8, 1)
