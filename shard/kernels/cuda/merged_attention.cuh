// A part of `merged::Step`: attention of one query a sequence within the step's one launch.
//
// The pages of all sequences and KV heads are one line, cut evenly into a run of pages for each block, whose warps take every
// eighth page of it. Keys and values go from memory straight into the operands of tensor cores: which dimension an element stands
// for does not matter as long as both operands agree, so that a lane takes 8 neighbours at once. The first pages are on their way
// before the queries are there. The newest key and value are turned and stored by whoever has their page.

    struct Place {
        int seq, head, page, pages;
    };
    __device__ __forceinline__ Place place_of(int at) const {
        Place place;
        place.seq = 0;
        while (place.seq + 1 < ROWS && shared.first_page[place.seq + 1] * m.num_kv_heads <= at) ++place.seq;
        place.pages = shared.first_page[place.seq + 1] - shared.first_page[place.seq];
        const int within = at - shared.first_page[place.seq] * m.num_kv_heads;
        place.head = within / place.pages;
        place.page = within % place.pages;
        return place;
    }
    // Of a page's first element in the cache.
    __device__ __forceinline__ size_t offset_of(const Place& place, int page) const {
        const int* const table = m.block_tables + static_cast<size_t>(place.seq) * m.header[BLOCK_TABLE_STRIDE];
        const int block = __ldg(table + page / m.pages_per_block), within = page % m.pages_per_block;
        return ((static_cast<size_t>(block) * m.num_kv_heads + place.head) * m.pages_per_block + within) * (PAGE_KEYS * DIM);
    }

    // A page as a lane has it: of keys `group` and 8 after it the dimensions 32 i + 8 quad and following; of the values of keys
    // 2 quad, the next one and 8 after these the dimensions 64 i + 8 group and following.
    struct Page {
        uint4 keys[2][CHUNKS], values[4][SETS];
    };
    __device__ __forceinline__ int value_key(int i) const { return quad * 2 + i % 2 + i / 2 * 8; }

    __device__ __forceinline__ void read_keys(Page& p, const MergedLayer& layer, size_t offset) const {
        const T* const from = static_cast<const T*>(layer.keys) + offset + quad * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) p.keys[half][i] = read_l2(from + (group + 8 * half) * DIM + i * 32);
    }
    // Of keys that are not there yet zeros: what a weight of zero is multiplied with must be a number.
    __device__ __forceinline__ void read_values(Page& p, const MergedLayer& layer, size_t offset, int count) const {
        const T* const from = static_cast<const T*>(layer.values) + offset + group * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = value_key(i);
#pragma unroll
            for (int set = 0; set < SETS; ++set)
                p.values[i][set] = key < count ? read_l2(from + key * DIM + set * 64) : make_uint4(0, 0, 0, 0);
        }
    }

    // A head of a row of queries or keys, turned by its position.
    __device__ __forceinline__ void read_turned(uint4 (&v)[CHUNKS], int seq, int head) const {
        const int width = (m.num_heads + 2 * m.num_kv_heads) * DIM;
        const T* const from = static_cast<const T*>(m.qkv) + seq * width + head * DIM + quad * 8;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) v[i] = read_l2(from + i * 32);
#pragma unroll
        for (int i = 0; i < SETS; ++i) {
            const float4* const turns = reinterpret_cast<const float4*>(&shared.turns[seq][i * 32 + quad * 8]);
            uint32_t* const low = reinterpret_cast<uint32_t*>(&v[i]);
            uint32_t* const high = reinterpret_cast<uint32_t*>(&v[i + SETS]);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float4 turn = turns[k];
                const Vec<T, 2> a = *reinterpret_cast<const Vec<T, 2>*>(&low[k]), b = *reinterpret_cast<const Vec<T, 2>*>(&high[k]);
                const float a0 = to_float(a.at[0]), a1 = to_float(a.at[1]), b0 = to_float(b.at[0]), b1 = to_float(b.at[1]);
                low[k] = pack<T>(a0 * turn.x - b0 * turn.y, a1 * turn.z - b1 * turn.w);
                high[k] = pack<T>(b0 * turn.x + a0 * turn.y, b1 * turn.z + a1 * turn.w);
            }
        }
    }

    // Puts the newest key and value into the page's registers and the cache.
    __device__ __forceinline__ void add_newest(Page& p, const MergedLayer& layer, const Place& place, size_t offset) const {
        const int newest = (shared.contexts[place.seq] - 1) % PAGE_KEYS;
        uint4 key[CHUNKS];
        read_turned(key, place.seq, m.num_heads + place.head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (group + 8 * half != newest) continue;
            T* const to = static_cast<T*>(layer.keys) + offset + newest * DIM + quad * 8;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                p.keys[half][i] = key[i];
                *reinterpret_cast<uint4*>(to + i * 32) = key[i];
            }
        }
        const int width = (m.num_heads + 2 * m.num_kv_heads) * DIM;
        const T* const from =
            static_cast<const T*>(m.qkv) + place.seq * width + (m.num_heads + m.num_kv_heads + place.head) * DIM + group * 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (value_key(i) != newest) continue;
            T* const to = static_cast<T*>(layer.values) + offset + newest * DIM + group * 8;
#pragma unroll
            for (int set = 0; set < SETS; ++set) {
                p.values[i][set] = read_l2(from + set * 64);
                *reinterpret_cast<uint4*>(to + set * 64) = p.values[i][set];
            }
        }
    }

    // What a warp has of an item. Of the heads 2 quad and the next: highest score and sum of weights; of head `group` sums of
    // values: dimensions 64 set + 16 quad + k and 8 after it.
    struct Sums {
        float values[SETS][8][2];
        float highest[2], total[2];
    };

    __device__ __forceinline__ void weigh(Sums& s, const Page& p, const uint4 (&query)[CHUNKS], uint32_t (&weights)[2], int first_key,
                                          int context) const {
        float scores[2][4] = {};
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
            const uint4 low = p.keys[0][i], high = p.keys[1][i];
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
            multiply<T>(scores[0], first, query[i].x, query[i].y);
            multiply<T>(scores[1], second, query[i].z, query[i].w);
        }
        float score[4], most[2] = {s.highest[0], s.highest[1]};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            score[i] = (scores[0][i] + scores[1][i]) * (m.attention_scale * LOG2_E);
            score[i] = first_key + group + i / 2 * 8 < context ? score[i] : -INFINITY;
            most[i % 2] = fmaxf(most[i % 2], score[i]);
        }
#pragma unroll
        for (int o = 4; o < 32; o *= 2) {
            most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], o));
            most[1] = fmaxf(most[1], __shfl_xor_sync(0xffffffffu, most[1], o));
        }
        float rescale[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            rescale[i] = exp2_fast(s.highest[i] - most[i]);
            s.highest[i] = most[i];
            s.total[i] *= rescale[i];
        }
        // Of head `group`.
        const float even = __shfl_sync(0xffffffffu, rescale[0], group / 2), odd = __shfl_sync(0xffffffffu, rescale[1], group / 2);
        const float factor = group % 2 ? odd : even;
#pragma unroll
        for (int set = 0; set < SETS; ++set)
#pragma unroll
            for (int k = 0; k < 8; ++k) s.values[set][k][0] *= factor, s.values[set][k][1] *= factor;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            score[i] = exp2_fast(score[i] - most[i % 2]);
            s.total[i % 2] += score[i];
        }
        const uint32_t low = pack<T>(score[0], score[1]), high = pack<T>(score[2], score[3]);
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(weights[0]) : "r"(low));
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(weights[1]) : "r"(high));
    }

    // c[8, 8] += a[8, 16] b[16, 8]: the lower eight rows of the product do not exist.
    static __device__ __forceinline__ void multiply_heads(float (&c)[2], const uint32_t (&a)[2], uint32_t b0, uint32_t b1) {
        float none[2];
        if constexpr (__is_same(T, bf16)) {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%9,%10,%11,%11};"
                : "=f"(c[0]), "=f"(c[1]), "=f"(none[0]), "=f"(none[1])
                : "r"(a[0]), "r"(0), "r"(a[1]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(0.0f));
        } else {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%9,%10,%11,%11};"
                : "=f"(c[0]), "=f"(c[1]), "=f"(none[0]), "=f"(none[1])
                : "r"(a[0]), "r"(0), "r"(a[1]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(0.0f));
        }
    }

    __device__ __forceinline__ void add_values(Sums& s, const Page& p, const uint32_t (&weights)[2]) const {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            const uint32_t* const a = reinterpret_cast<const uint32_t*>(&p.values[0][set]);
            const uint32_t* const b = reinterpret_cast<const uint32_t*>(&p.values[1][set]);
            const uint32_t* const c = reinterpret_cast<const uint32_t*>(&p.values[2][set]);
            const uint32_t* const d = reinterpret_cast<const uint32_t*>(&p.values[3][set]);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const uint32_t pick = k % 2 ? 0x7632u : 0x5410u;
                multiply_heads(s.values[set][k], weights, __byte_perm(a[k / 2], b[k / 2], pick), __byte_perm(c[k / 2], d[k / 2], pick));
            }
        }
    }

    // Leaves this warp's sums in shared memory.
    __device__ __forceinline__ void put(Sums& s, int heads) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int o = 4; o < 32; o *= 2) s.total[i] += __shfl_xor_sync(0xffffffffu, s.total[i], o);
            if (lane < 4) shared.weights[warp][lane * 2 + i] = make_float2(s.highest[i], s.total[i]);
        }
        if (group >= heads) return;
        float* const to = reinterpret_cast<float*>(x) + (warp * heads + group) * PARTS_STRIDE + quad * 16;
#pragma unroll
        for (int set = 0; set < SETS; ++set)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int k = 0; k < 8; k += 4)
                    *reinterpret_cast<float4*>(to + set * 64 + i * 8 + k) = make_float4(
                        s.values[set][k][i], s.values[set][k + 1][i], s.values[set][k + 2][i], s.values[set][k + 3][i]);
    }

    // Merges the parts that `count` blocks from `first` on left of a head.
    __device__ __forceinline__ void merge_parts(T* out, int heads, int first, int count) const {
        for (int at = threadIdx.x; at < heads * (DIM / 4); at += THREADS) {
            const int head = at / (DIM / 4), column = at % (DIM / 4) * 4;
            // The first block left the part it ended with, the others those they began with.
            const auto row = [&](int part) { return (part == 0 ? 2 * first + 1 : 2 * (first + part)) * 8 + head; };
            float highest = -INFINITY, all = 0.0f, sum[4] = {};
#pragma unroll 16
            for (int part = 0; part < count; ++part) highest = fmaxf(highest, __ldcg(&m.part_weights[row(part)].x));
#pragma unroll 8
            for (int part = 0; part < count; ++part) {
                const float2 weight = __ldcg(&m.part_weights[row(part)]);
                const float4 v = __ldcg(reinterpret_cast<const float4*>(m.part_sums + static_cast<size_t>(row(part)) * DIM + column));
                const float factor = exp2_fast(weight.x - highest);
                all += weight.y * factor;
                sum[0] += v.x * factor, sum[1] += v.y * factor, sum[2] += v.z * factor, sum[3] += v.w * factor;
            }
            const float inverse = 1.0f / all;
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] *= inverse;
            store_floats<T, 4>(out + head * DIM + column, sum);
        }
    }

    // Ends this block's pages of an item. `run`: pages of a block.
    __device__ __forceinline__ void end_item(const Place& place, int count, int heads, int run) {
        meet();
        T* const out = static_cast<T*>(m.heads) + (place.seq * m.num_heads + place.head * heads) * DIM;
        const bool begins = place.page == 0, is_whole = begins && count == place.pages;
        const int slot = 2 * block + (begins ? 1 : 0);
        for (int at = threadIdx.x; at < heads * (DIM / 4); at += THREADS) {
            const int head = at / (DIM / 4), column = at % (DIM / 4) * 4;
            float most = -INFINITY, all = 0.0f, sum[4] = {};
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared.weights[w][head].x);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float2 weight = shared.weights[w][head];
                const float factor = exp2_fast(weight.x - most);
                const float4 v = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(x) + (w * heads + head) * PARTS_STRIDE + column);
                all += weight.y * factor;
                sum[0] += v.x * factor, sum[1] += v.y * factor, sum[2] += v.z * factor, sum[3] += v.w * factor;
            }
            if (is_whole) {
                const float inverse = 1.0f / all;
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[i] *= inverse;
                store_floats<T, 4>(out + head * DIM + column, sum);
            } else {
                if (column == 0) m.part_weights[slot * 8 + head] = make_float2(most, all);
                *reinterpret_cast<float4*>(m.part_sums + static_cast<size_t>(slot * 8 + head) * DIM + column) =
                    make_float4(sum[0], sum[1], sum[2], sum[3]);
            }
        }
        if (!is_whole) {
            const int begin = shared.first_page[place.seq] * m.num_kv_heads + place.head * place.pages;
            const int first = begin / run, last = (begin + place.pages - 1) / run;
            meet();
            if (threadIdx.x == 0) {
                int before;
                asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(m.finished + first) : "memory");
                shared.is_last = before == last - first;
            }
            meet();
            if (shared.is_last) {
                merge_parts(out, heads, first, last - first + 1);
                if (threadIdx.x == 0) m.finished[first] = 0;
            }
        }
        // The next item's sums may not come before these are read.
        meet();
    }

    __device__ __forceinline__ void attend(const MergedLayer& layer) {
        const int heads = m.num_heads / m.num_kv_heads;
        const int total = shared.first_page[ROWS] * m.num_kv_heads, run = (total + blocks - 1) / blocks;
        const int begin = block * run, end = min(total, begin + run);
        bool has_waited = false;
        for (int at = begin; at < end;) {
            const Place place = place_of(at);
            const int count = min(end - at, place.pages - place.page), context = shared.contexts[place.seq];
            int page = place.page + warp;
            const int last = place.page + count;
            Page p;
            size_t offset = 0;
            if (page < last) {
                offset = offset_of(place, page);
                read_keys(p, layer, offset);
                read_values(p, layer, offset, context - page * PAGE_KEYS);
            }
            if (!has_waited) await();
            has_waited = true;
            Sums s = {};
            s.highest[0] = s.highest[1] = -INFINITY;
            if (page < last) {
                uint4 query[CHUNKS];
                read_turned(query, place.seq, place.head * heads + min(group, heads - 1));
                // Highest scores of a warp are numbers from its first page on: every page has a key.
                for (; page < last; page += WARPS) {
                    if (page + 1 == place.pages) add_newest(p, layer, place, offset);
                    const bool has_next = page + WARPS < last;
                    if (has_next) offset = offset_of(place, page + WARPS);
                    uint32_t weights[2];
                    weigh(s, p, query, weights, page * PAGE_KEYS, context);
                    if (has_next) read_keys(p, layer, offset);
                    add_values(s, p, weights);
                    if (has_next) read_values(p, layer, offset, context - (page + WARPS) * PAGE_KEYS);
                }
            }
            put(s, heads);
            end_item(place, count, heads, run);
            at += count;
        }
        if (!has_waited) {
            await();
        }
    }
