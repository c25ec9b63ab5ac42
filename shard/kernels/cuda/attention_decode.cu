// Attention of sequences with one query: bound by reading keys and values once.
//
// The keys of all sequences and KV heads form one line of *units* of 64 keys, which is cut into equal parts, one a block: the
// grid depends on nothing but the device, and a single long context is spread over all multiprocessors as evenly as many short
// ones. A block may so end in the middle of a sequence's head; whichever block finishes such a head last merges its parts.
//
// Every warp has its own sixteen keys of a unit and its own ring of pages in shared memory, filled some units ahead across the
// ends of sequences. All query heads of a KV head are the rows of one tensor-core tile.
#include "attention.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int UNIT_KEYS = PAGE_KEYS * WARPS;
// Rows of a tile: query heads that share a KV head; larger groups take several tiles.
constexpr int TILE_ROWS = 16;

// Where a block's parts of heads are left for merging: two a block, of what it began with and of what it ended with.
struct Parts {
    // [2 * blocks, TILE_ROWS, DIM], not yet divided.
    float* sums;
    // [2 * blocks, TILE_ROWS]: highest score and total weight.
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
    int num_seqs, items, total, blocks, window;

    __device__ __forceinline__ int begin_of(int block) const {
        return static_cast<int>(static_cast<long long>(total) * block / blocks);
    }
    __device__ __forceinline__ int owner_of(int place) const {
        return static_cast<int>((static_cast<long long>(place + 1) * blocks - 1) / total);
    }
};

// A place in it. An *item* is a KV head with at most TILE_ROWS of its query heads.
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
__device__ __forceinline__ void merge(const Attention& a, const Parts& parts, T* out, int rows, int first_block, int count) {
    constexpr int GROUP = 4;
    for (int at = threadIdx.x; at < rows * (DIM / GROUP); at += THREADS) {
        const int row = at / (DIM / GROUP), column = at % (DIM / GROUP) * GROUP;
        if (column >= a.head_dim) continue;
        // The first block left the part it ended with, the others those they began with.
        const auto slot = [&](int part) { return part == 0 ? 2 * first_block + 1 : 2 * (first_block + part); };
        float highest = -INFINITY;
#pragma unroll 8
        for (int part = 0; part < count; ++part) {
            highest = fmaxf(highest, __ldcg(&parts.weights[slot(part) * TILE_ROWS + row].x));
        }
        float sums[GROUP] = {}, total = 0.0f;
#pragma unroll 4
        for (int part = 0; part < count; ++part) {
            const int from = slot(part) * TILE_ROWS + row;
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
        store_floats<T, GROUP>(out + static_cast<size_t>(row) * a.head_dim + column, sums);
    }
}

template <typename T, int DIM> struct Decode {
    using Lines = Rows<DIM>;
    static constexpr int PAGE_BYTES = PAGE_KEYS * Lines::STRIDE;
    static constexpr int STAGE_BYTES = 2 * PAGE_BYTES;
    static constexpr int STEPS = DIM / 16;
    // A row of sums in shared memory: rows lie in different banks.
    static constexpr int TREE_ROW = DIM + 8;
    // Queries of large heads do not fit in registers beside the sums.
    static constexpr bool SHARES_QUERY = DIM > 128;
    static constexpr int QUERY_BYTES = SHARES_QUERY ? TILE_ROWS * Lines::STRIDE : 0;

    const Attention& a;
    const Parts& parts;
    const int* decode_seqs;
    int warp, lane, group, tiles_per_head, rows;
    uint32_t ring;
    float* tree;
    float2* shared_weights;
    int* flag;

    uint8_t* shared_query;
    uint32_t query[SHARES_QUERY ? 1 : STEPS][4];
    float sums[2 * STEPS][4];
    float highest[2], total[2], slope[2];

    __device__ __forceinline__ Decode(const Attention& a, const Parts& parts, const int* decode_seqs)
        : a(a), parts(parts), decode_seqs(decode_seqs) {}

    __device__ __forceinline__ const int* table_of(int index) const {
        return a.block_tables + static_cast<size_t>(decode_seqs[index]) * a.header[BLOCK_TABLE_STRIDE];
    }
    __device__ __forceinline__ int block_at(const Place& place) const {
        const int page = place.page(warp);
        return place.has(page, a.window) ? block_of(a, table_of(place.index), page) : 0;
    }

    // Starts copying this warp's page of keys and of values. Keys past the context are not masked by their weight of zero
    // if what lies there is no number, so such values become zero.
    __device__ __forceinline__ void fetch(const Place& place, int block, int stage) const {
        const int page = place.page(warp);
        if (!place.has(page, a.window)) return;
        const size_t offset = page_offset(a, block, page, place.item / tiles_per_head);
        const T* const keys = static_cast<const T*>(a.keys) + offset;
        const T* const values = static_cast<const T*>(a.values) + offset;
        const uint32_t to = ring + stage * STAGE_BYTES;
        const int count = place.context - page * PAGE_KEYS;
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

    // Begins an item: its queries as the left side of products.
    __device__ __forceinline__ void begin(const Place& place) {
        const int kv_head = place.item / tiles_per_head, first = place.item % tiles_per_head * TILE_ROWS;
        rows = min(TILE_ROWS, group - first);
        const int token = a.cu_seqlens_q[decode_seqs[place.index]];
        const int head = kv_head * group + first;
        const T* const q = static_cast<const T*>(a.qkv) +
                           static_cast<size_t>(token) * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim +
                           static_cast<size_t>(head) * a.head_dim;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            const bool is_row = row < rows;
            slope[half] = is_row ? slope_of(a, head + row) : 0.0f;
            highest[half] = -INFINITY;
            total[half] = 0.0f;
            if constexpr (!SHARES_QUERY) {
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
#pragma unroll
                    for (int part = 0; part < 2; ++part) {
                        const int column = step * 16 + part * 8 + (lane % 4) * 2;
                        query[step][half + 2 * part] =
                            is_row && column < a.head_dim ? *reinterpret_cast<const uint32_t*>(q + row * a.head_dim + column) : 0u;
                    }
                }
            }
        }
        if constexpr (SHARES_QUERY) {
            for (int at = threadIdx.x; at < TILE_ROWS * Lines::CHUNKS; at += THREADS) {
                const int row = at / Lines::CHUNKS, chunk = at % Lines::CHUNKS;
                const bool is_there = row < rows && chunk * 8 < a.head_dim;
                *reinterpret_cast<uint4*>(shared_query + Lines::at(row, chunk)) =
                    is_there ? *reinterpret_cast<const uint4*>(q + row * a.head_dim + chunk * 8) : make_uint4(0, 0, 0, 0);
            }
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < 2 * STEPS; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
        }
    }

    // Takes in the page of this warp.
    __device__ __forceinline__ void attend(const Place& place, int stage) {
        const int page = place.page(warp);
        if (!place.has(page, a.window)) return;
        const uint32_t keys = ring + stage * STAGE_BYTES, values = keys + PAGE_BYTES;
        const int matrix = lane / 8, within = lane % 8;
        float scores[2][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t b[4];
            load_matrices(b, keys + Lines::at((matrix / 2) * 8 + within, step * 2 + (matrix & 1)));
            constexpr int kept = SHARES_QUERY ? 0 : 1;
            uint32_t(&q)[4] = query[kept * step];
            if constexpr (SHARES_QUERY) {
                load_matrices(q, shared_address(shared_query) + Lines::at((matrix & 1) * 8 + within, step * 2 + matrix / 2));
            }
            multiply<T>(scores[0], q, b[0], b[1]);
            multiply<T>(scores[1], q, b[2], b[3]);
        }
        const bool is_plain = a.soft_cap == 0.0f && a.alibi_heads == 0;
        const float factor = a.scale * LOG2_E;
        const int last = place.context - 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = highest[half];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& score = scores[i / 2][2 * half + i % 2];
                const int key = page * PAGE_KEYS + (i / 2) * 8 + (lane % 4) * 2 + i % 2;
                const bool is_seen = key <= last && (a.window == 0 || key > last - a.window);
                score = is_plain ? score * factor : score_log2(a, score, slope[half], last - key);
                score = is_seen ? score : -INFINITY;
                most = fmaxf(most, score);
            }
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            if (__any_sync(0xffffffffu, most > highest[half])) {
                const float rescale = exp2_fast(highest[half] - most);
                highest[half] = most;
                total[half] *= rescale;
#pragma unroll
                for (int i = 0; i < 2 * STEPS; ++i) {
                    sums[i][2 * half] *= rescale;
                    sums[i][2 * half + 1] *= rescale;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& score = scores[i / 2][2 * half + i % 2];
                score = exp2_fast(score - most);
                total[half] += score;
            }
        }
        const uint32_t weights[4] = {pack<T>(scores[0][0], scores[0][1]), pack<T>(scores[0][2], scores[0][3]),
                                     pack<T>(scores[1][0], scores[1][1]), pack<T>(scores[1][2], scores[1][3])};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint32_t b[4];
            load_matrices_transposed(b, values + Lines::at((matrix & 1) * 8 + within, step * 2 + matrix / 2));
            multiply<T>(sums[2 * step], weights, b[0], b[1]);
            multiply<T>(sums[2 * step + 1], weights, b[2], b[3]);
        }
    }

    __device__ __forceinline__ void put(float* to) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row >= rows) continue;
#pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) {
                *reinterpret_cast<float2*>(to + row * TREE_ROW + i * 8 + (lane % 4) * 2) =
                    make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
            }
        }
    }
    __device__ __forceinline__ void add(const float* from) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row >= rows) continue;
#pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) {
                const float2 x = *reinterpret_cast<const float2*>(from + row * TREE_ROW + i * 8 + (lane % 4) * 2);
                sums[i][2 * half] += x.x;
                sums[i][2 * half + 1] += x.y;
            }
        }
    }

    // Adds up the warps' parts, in warp 0.
    __device__ __forceinline__ void gather(int tree_rows) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
            if (lane % 4 == 0) shared_weights[warp * TILE_ROWS + lane / 4 + 8 * half] = make_float2(highest[half], total[half]);
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            float most = -INFINITY, all = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared_weights[w * TILE_ROWS + row].x);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float2 weight = shared_weights[w * TILE_ROWS + row];
                all += weight.y * exp2_fast(weight.x - most);
            }
            const float factor = exp2_fast(highest[half] - most);
            highest[half] = most;
            total[half] = all;
#pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) {
                sums[i][2 * half] *= factor;
                sums[i][2 * half + 1] *= factor;
            }
        }
        float* const mine = tree + (warp & 1) * tree_rows * TREE_ROW;
        if (warp >= 2) put(mine);
        __syncthreads();
        if (warp < 2) add(mine);
        if (warp == 1) put(mine);
        __syncthreads();
        if (warp == 0) add(tree + tree_rows * TREE_ROW);
    }

    // Ends an item, or this block's part of it: `begins` and `ends` say whether the part does so with the item.
    __device__ __forceinline__ void end(const Line& line, const Place& place, bool begins, bool ends, int tree_rows) {
        gather(tree_rows);
        const int kv_head = place.item / tiles_per_head, first = place.item % tiles_per_head * TILE_ROWS;
        const int token = a.cu_seqlens_q[decode_seqs[place.index]];
        T* const out = static_cast<T*>(a.out) +
                       (static_cast<size_t>(token) * a.num_heads + kv_head * group + first) * a.head_dim;
        if (begins && ends) {
            if (warp == 0) write(out);
            return;
        }
        const int slot = 2 * blockIdx.x + (begins ? 1 : 0);
        if (warp == 0) leave(slot);
        const int units_before = line.first_unit[place.index] * line.items + place.item * place.units;
        const int first_block = line.owner_of(units_before), last_block = line.owner_of(units_before + place.units - 1);
        if (warp == 0) {
            __threadfence();
            __syncwarp();
            if (lane == 0) *flag = atomicAdd(parts.finished + first_block, 1) == last_block - first_block;
        }
        __syncthreads();
        if (*flag) {
            __threadfence();
            merge<T, DIM>(a, parts, out, rows, first_block, last_block - first_block + 1);
            if (threadIdx.x == 0) parts.finished[first_block] = 0;
        }
    }

    __device__ __forceinline__ void write(T* out) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row >= rows) continue;
            const float inverse = 1.0f / total[half];
#pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) {
                const int column = i * 8 + (lane % 4) * 2;
                if (column >= a.head_dim) continue;
                *reinterpret_cast<uint32_t*>(out + row * a.head_dim + column) =
                    pack<T>(sums[i][2 * half] * inverse, sums[i][2 * half + 1] * inverse);
            }
        }
    }
    __device__ __forceinline__ void leave(int slot) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4 + 8 * half;
            if (row >= rows) continue;
            const size_t to = static_cast<size_t>(slot) * TILE_ROWS + row;
            if (lane % 4 == 0) parts.weights[to] = make_float2(highest[half], total[half]);
#pragma unroll
            for (int i = 0; i < 2 * STEPS; ++i) {
                *reinterpret_cast<float2*>(parts.sums + to * DIM + i * 8 + (lane % 4) * 2) =
                    make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
            }
        }
    }

    __device__ __forceinline__ void run(const Line& line, int tree_rows) {
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
                end(line, now, begins, ends, tree_rows);
                if (place + 1 == end_place) break;
                now.advance(line);
                begin(now);
                begins = true;
            } else {
                ++now.unit;
            }
        }
        cp_async_wait<0>();
    }
};

template <typename T, int DIM>
__device__ __forceinline__ void attend_decode(const Attention& a, const Parts& parts, const int* decode_seqs) {
    using Work = Decode<T, DIM>;
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float2 weights[WARPS * TILE_ROWS];
    __shared__ int scratch[WARPS];
    const int n = a.header[NUM_DECODE_SEQS];
    Work work(a, parts, decode_seqs);
    work.group = a.num_heads / a.num_kv_heads;
    work.tiles_per_head = (work.group + TILE_ROWS - 1) / TILE_ROWS;
    work.warp = threadIdx.x / 32;
    work.lane = threadIdx.x % 32;
    const int tree_rows = min(work.group, TILE_ROWS);
    work.shared_query = shared + WARPS * parts.stages * Work::STAGE_BYTES;
    float* const tree = reinterpret_cast<float*>(work.shared_query + Work::QUERY_BYTES);
    int* const first_unit = reinterpret_cast<int*>(tree + 2 * tree_rows * Work::TREE_ROW);
    int* const contexts = first_unit + n + 1;
    count_units(a, decode_seqs, n, first_unit, contexts, scratch);
    Line line{first_unit, contexts, n, a.num_kv_heads * work.tiles_per_head, 0, 0, a.window};
    line.total = first_unit[n] * line.items;
    line.blocks = min(static_cast<int>(gridDim.x), line.total);
    if (static_cast<int>(blockIdx.x) >= line.blocks) {
        pdl_launch();
        pdl_wait();
        return;
    }
    work.ring = shared_address(shared) + work.warp * parts.stages * Work::STAGE_BYTES;
    work.tree = tree;
    work.shared_weights = weights;
    work.flag = scratch;
    work.run(line, tree_rows);
}

// Blocks that a multiprocessor runs at a time.
#define ATTENTION_DECODE(T, DIM, BLOCKS)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_decode_##DIM##_##T(                      \
        const __grid_constant__ Attention attention, const __grid_constant__ Parts parts, const int* decode_seqs) { \
        attend_decode<T, DIM>(attention, parts, decode_seqs);                                                \
    }
#define ATTENTION_DECODE_EACH_DIM(T)  \
    ATTENTION_DECODE(T, 64, 2)     \
    ATTENTION_DECODE(T, 96, 2)     \
    ATTENTION_DECODE(T, 128, 2)    \
    ATTENTION_DECODE(T, 192, 1)    \
    ATTENTION_DECODE(T, 256, 1)
ATTENTION_DECODE_EACH_DIM(bf16)
ATTENTION_DECODE_EACH_DIM(f16)
