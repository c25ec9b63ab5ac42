// Mixtures of experts: choosing experts, sorting what was chosen, and the projections of what was sent to each.
//
// A *pair* is a token's j-th expert: pair = token * chosen + j, a token's experts in the order of their indices. A *slot* is a
// place in the order of experts. All grids depend on numbers of rows alone; blocks past the work end at once.
#include "activation.cuh"
#include "common.cuh"
#include "tile.cuh"
#include "warpgroup.cuh"

// The numbers are the host's (experts.rs).
enum Scores { SOFTMAX = 0, SIGMOID = 1, SPARSE_MIXER = 2 };
enum Normalization { NONE = 0, SUM = 1, NORM = 2 };
struct Rule {
    int num_experts, num_chosen, scores, num_groups, chosen_groups, ranks_by_two, normalization;
    float jitter, power, scale;
};

constexpr unsigned ALL = 0xffffffffu;

// A value that is no number is the least of all.
__device__ __forceinline__ float ordered(float x) { return x == x ? x : -INFINITY; }

// The index of the largest value that is not taken, the first of equals, on all lanes.
__device__ __forceinline__ int largest(const float* values, const bool* is_taken, int count) {
    float best = -INFINITY;
    int index = 0x7fffffff;
    for (int i = threadIdx.x % 32; i < count; i += 32) {
        const float value = ordered(values[i]);
        if (!is_taken[i] && (value > best || index == 0x7fffffff)) {
            best = value;
            index = i;
        }
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const float other = __shfl_xor_sync(ALL, best, o);
        const int at = __shfl_xor_sync(ALL, index, o);
        if (at != 0x7fffffff && (index == 0x7fffffff || other > best || (other == best && at < index))) {
            best = other;
            index = at;
        }
    }
    return index;
}

// Makes the ranks of all but the best groups zero. `values` and `is_taken` have room for a value a group, and `is_taken` is
// clear before and after.
__device__ __forceinline__ void limit_to_groups(float* ranks, float* values, bool* is_taken, const Rule& rule) {
    const int lane = threadIdx.x % 32, size = rule.num_experts / rule.num_groups;
    for (int group = lane; group < rule.num_groups; group += 32) {
        float first = -INFINITY, second = -INFINITY;
        for (int i = 0; i < size; ++i) {
            const float rank = ranks[group * size + i];
            if (rank > first) {
                second = first;
                first = rank;
            } else if (rank > second) {
                second = rank;
            }
        }
        values[group] = rule.ranks_by_two ? first + second : first;
    }
    __syncwarp();
    for (int i = 0; i < rule.chosen_groups; ++i) {
        const int best = largest(values, is_taken, rule.num_groups);
        __syncwarp();
        if (lane == 0) is_taken[best] = true;
        __syncwarp();
    }
    for (int i = lane; i < rule.num_experts; i += 32) {
        if (!is_taken[i / size]) ranks[i] = 0.0f;
    }
    __syncwarp();
    for (int i = lane; i < rule.num_groups; i += 32) is_taken[i] = false;
    __syncwarp();
}

// Chooses the experts of each token, one warp (a block of its own) each: `experts` and `weights` are `[rows, chosen]`.
// Shared memory: three floats and a flag an expert, and a float and an int a choice.
extern "C" __global__ void choose_experts(const float* logits, const float* correction, const Rule rule, int* experts,
                                          float* weights) {
    extern __shared__ float shared[];
    float* const scores = shared;
    float* const ranks = scores + rule.num_experts;
    float* const groups = ranks + rule.num_experts;
    float* const chosen_weights = groups + rule.num_experts;
    int* const chosen = reinterpret_cast<int*>(chosen_weights + rule.num_chosen);
    bool* const is_taken = reinterpret_cast<bool*>(chosen + rule.num_chosen);
    const int lane = threadIdx.x;
    pdl_launch();
    pdl_wait();
    logits += static_cast<size_t>(blockIdx.x) * rule.num_experts;
    float highest = -INFINITY;
    for (int i = lane; i < rule.num_experts; i += 32) {
        is_taken[i] = false;
        scores[i] = logits[i];
        highest = fmaxf(highest, scores[i]);
    }
    highest = warp_max(highest);
    __syncwarp();
    if (rule.scores != SPARSE_MIXER) {
        float total = 0.0f;
        for (int i = lane; i < rule.num_experts; i += 32) {
            scores[i] = rule.scores == SIGMOID ? 1.0f / (1.0f + expf(-scores[i])) : expf(scores[i] - highest);
            total += scores[i];
        }
        total = warp_sum(total);
        for (int i = lane; i < rule.num_experts; i += 32) {
            if (rule.scores == SOFTMAX) scores[i] /= total;
            ranks[i] = correction == nullptr ? scores[i] : scores[i] + correction[i];
        }
        __syncwarp();
        if (rule.num_groups > 0) limit_to_groups(ranks, groups, is_taken, rule);
    }
    for (int j = 0; j < rule.num_chosen; ++j) {
        const bool is_sparse = rule.scores == SPARSE_MIXER;
        const int best = largest(is_sparse ? scores : ranks, is_taken, rule.num_experts);
        float weight = scores[best];
        if (is_sparse) {
            const float most = weight;
            float total = 0.0f;
            for (int i = lane; i < rule.num_experts; i += 32) {
                const float logit = scores[i];
                const bool is_far = (most - logit) / fmaxf(fabsf(logit), most) > 2.0f * rule.jitter;
                if (!is_taken[i] && !is_far) total += expf(logit - most);
            }
            weight = 1.0f / warp_sum(total);
        }
        __syncwarp();
        if (lane == 0) {
            is_taken[best] = true;
            chosen[j] = best;
            chosen_weights[j] = weight;
        }
        __syncwarp();
    }
    float divisor = 0.0f;
    for (int j = lane; j < rule.num_chosen; j += 32) {
        const float weight = chosen_weights[j];
        divisor += rule.normalization == NORM ? powf(fabsf(weight), rule.power) : weight;
    }
    divisor = warp_sum(divisor);
    // Logistic scores may all vanish.
    divisor = rule.normalization == NONE ? 1.0f : rule.normalization == SUM ? divisor + 1e-20f : powf(divisor, 1.0f / rule.power);
    // In the order of the experts: each one's place is the number of smaller ones.
    for (int j = lane; j < rule.num_chosen; j += 32) {
        int place = blockIdx.x * rule.num_chosen;
        for (int i = 0; i < rule.num_chosen; ++i) place += chosen[i] < chosen[j];
        experts[place] = chosen[j];
        weights[place] = chosen_weights[j] / divisor * rule.scale;
    }
}

// A tile of slots of one expert, and which tiles are its.
struct Tile {
    int expert, first, count, first_tile, num_tiles;
};

// The tile and the block of `columns` columns that this block computes; false where there is none. The blocks of an expert follow
// one another, and among them those with the same columns, so that weights are read from memory once and tokens stay in the L2.
__device__ __forceinline__ bool find_work(const Tile* tiles, int width, int columns, Tile& tile, int& column) {
    const int blocks = (width + columns - 1) / columns;
    const Tile any = tiles[blockIdx.x / blocks];
    if (any.count == 0) return false;
    const int within = blockIdx.x - any.first_tile * blocks;
    tile = tiles[any.first_tile + within % any.num_tiles];
    column = within / any.num_tiles * columns;
    return true;
}

// Runs `each(values[i], i)` for a block's threads, with several loads under way.
template <typename Each> __device__ __forceinline__ void for_batches(const int* values, int count, Each each) {
    constexpr int BATCH = 8;
    for (int base = threadIdx.x; base < count; base += BATCH * blockDim.x) {
        int batch[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int i = base + b * blockDim.x;
            batch[b] = i < count ? values[i] : 0;
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const int i = base + b * blockDim.x;
            if (i < count) each(batch[b], i);
        }
    }
}

// Sorts pairs by expert, and cuts each expert's slots into tiles of at most `tile_rows`: `slots[s]` is the pair in slot s; tiles
// past the last have no rows. One block. Shared memory: two ints an expert.
extern "C" __global__ void __launch_bounds__(1024) sort_by_expert(const int* experts, int pairs, int num_experts, int tile_rows,
                                                                  int max_tiles, int* slots, Tile* tiles) {
    extern __shared__ int counts[];
    int* const next = counts + num_experts;
    __shared__ int num_tiles;
    pdl_launch();
    pdl_wait();
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    for_batches(experts, pairs, [&](int expert, int) { atomicAdd(&counts[expert], 1); });
    __syncthreads();
    if (threadIdx.x < 32) {
        // Running sums of slots and of tiles.
        int slots_before = 0, tiles_before = 0;
        for (int base = 0; base < num_experts; base += 32) {
            const int e = base + threadIdx.x;
            const int own = e < num_experts ? counts[e] : 0;
            const int own_tiles = (own + tile_rows - 1) / tile_rows;
            int slot_end = own, tile_end = own_tiles;
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                const int s = __shfl_up_sync(ALL, slot_end, o), t = __shfl_up_sync(ALL, tile_end, o);
                if (threadIdx.x >= o) {
                    slot_end += s;
                    tile_end += t;
                }
            }
            const int first = slots_before + slot_end - own, first_tile = tiles_before + tile_end - own_tiles;
            if (e < num_experts) next[e] = first;
            for (int t = 0; t < own_tiles; ++t)
                tiles[first_tile + t] =
                    Tile{e, first + t * tile_rows, min(tile_rows, own - t * tile_rows), first_tile, own_tiles};
            slots_before += __shfl_sync(ALL, slot_end, 31);
            tiles_before += __shfl_sync(ALL, tile_end, 31);
        }
        if (threadIdx.x == 0) num_tiles = tiles_before;
    }
    __syncthreads();
    for (int t = num_tiles + threadIdx.x; t < max_tiles; t += blockDim.x) tiles[t] = Tile{0, 0, 0, 0, 0};
    // Which of an expert's slots a pair takes is chance, and changes no result.
    for_batches(experts, pairs, [&](int expert, int pair) { slots[atomicAdd(&next[expert], 1)] = pair; });
}

// `activated[s] = activation(gate(x)) * up(x)` of the token in each slot, tile by tile. `weights` are the addresses of each
// expert's gate and up, `[2 * width, hidden]`. See `find_work` for the blocks.
template <typename T, int BM>
__device__ __forceinline__ void project_in_tensor(const T* x, const void* const* weights, int pitch, const int* slots,
                                                  const Tile* tiles, int chosen, int hidden, int width, int activation,
                                                  T* activated_out) {
    using Product = tile::Tensor<T, BM>;
    extern __shared__ __align__(16) unsigned char tile_memory[];
    pdl_launch();
    pdl_wait();
    Tile tile;
    int column0;
    if (!find_work(tiles, width, 64, tile, column0)) return;
    const T* const weight = static_cast<const T*>(weights[tile.expert]);
    Product product;
    // Of the 32 weight rows of a warp 16 are gates, the next 16 the ups that belong to them.
    product.run(
        [&](int i) {
            return i < tile.count ? x + static_cast<size_t>(slots[tile.first + i] / chosen) * hidden : nullptr;
        },
        [&](int j) {
            const int column = column0 + j / 32 * 16 + j % 16;
            return column < width ? weight + static_cast<size_t>(column + (j / 16 % 2) * width) * pitch : nullptr;
        },
        hidden, tile_memory);
#pragma unroll
    for (int mi = 0; mi < Product::MI; ++mi)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = Product::row(mi, h);
            if (row >= tile.count) continue;
            T* const out = activated_out + static_cast<size_t>(tile.first + row) * width;
#pragma unroll
            for (int ni = 0; ni < 2; ++ni)
#pragma unroll
                for (int l = 0; l < 2; ++l) {
                    const int column = column0 + threadIdx.x / 32 % 4 * 16 + ni * 8 + threadIdx.x % 4 * 2 + l;
                    const float gate = product.sums[mi][ni][2 * h + l], up = product.sums[mi][ni + 2][2 * h + l];
                    if (column < width) out[column] = from_float<T>(activated<T>(gate, activation) * up);
                }
        }
}

// `products[pair] = down(activated[slot])`, tile by tile; `weights` are the addresses of each expert's `[hidden, width]`.
template <typename T, int BM>
__device__ __forceinline__ void project_out_tensor(const T* activated_in, const void* const* weights, int pitch,
                                                   const int* slots, const Tile* tiles, int hidden, int width,
                                                   T* products) {
    using Product = tile::Tensor<T, BM>;
    extern __shared__ __align__(16) unsigned char tile_memory[];
    pdl_launch();
    pdl_wait();
    Tile tile;
    int column0;
    if (!find_work(tiles, hidden, Product::N, tile, column0)) return;
    const T* const weight = static_cast<const T*>(weights[tile.expert]);
    Product product;
    product.run(
        [&](int i) { return i < tile.count ? activated_in + static_cast<size_t>(tile.first + i) * width : nullptr; },
        [&](int j) { return column0 + j < hidden ? weight + static_cast<size_t>(column0 + j) * pitch : nullptr; },
        width, tile_memory);
#pragma unroll
    for (int mi = 0; mi < Product::MI; ++mi)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = Product::row(mi, h);
            if (row >= tile.count) continue;
            T* const out = products + static_cast<size_t>(slots[tile.first + row]) * hidden;
#pragma unroll
            for (int ni = 0; ni < Product::NI; ++ni) {
                const int column = column0 + Product::column(ni, 0);
                // Hidden is a multiple of 8 here.
                const float pair[2] = {product.sums[mi][ni][2 * h], product.sums[mi][ni][2 * h + 1]};
                if (column < hidden) store_floats<T, 2>(out + column, pair);
            }
        }
}

// The same two by warpgroups of Hopper, which take weights as rows and tokens as columns: tiles have TOKENS tokens.
template <typename T, int TOKENS>
__device__ __forceinline__ void project_in_warpgroups(const T* x, const void* const* weights, int pitch, const int* slots,
                                                      const Tile* tiles, int chosen, int hidden, int width, int activation,
                                                      T* activated_out) {
    using Product = warpgroup::Tile<T, TOKENS>;
    extern __shared__ __align__(16) unsigned char tile_memory[];
    pdl_launch();
    pdl_wait();
    Tile tile;
    int column0;
    if (!find_work(tiles, width, 64, tile, column0)) return;
    const T* const weight = static_cast<const T*>(weights[tile.expert]);
    Product product;
    // Of 16 weight rows eight are gates, the next eight the ups that belong to them: a thread has both.
    product.run(
        [&](int j) {
            const int column = column0 + j / 16 * 8 + j % 8;
            return column < width ? weight + static_cast<size_t>(column + (j / 8 % 2) * width) * pitch : nullptr;
        },
        [&](int i) {
            return i < tile.count ? x + static_cast<size_t>(slots[tile.first + i] / chosen) * hidden : nullptr;
        },
        hidden, tile.count, tile_memory);
    // Width is a multiple of 8, so that eight columns are there or not. All lanes take part in exchanging rows and columns.
    const int column = column0 + threadIdx.x / 32 * 8;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
        float values[2];
#pragma unroll
        for (int l = 0; l < 2; ++l) values[l] = activated<T>(product.pair(j, 0)[l], activation) * product.pair(j, 1)[l];
        const uint32_t pair = transposed<T>(values);
        const int token = j * 8 + threadIdx.x % 32 / 4;
        if (token < tile.count && column < width) {
            T* const out = activated_out + static_cast<size_t>(tile.first + token) * width + column;
            reinterpret_cast<uint32_t*>(out)[threadIdx.x % 4] = pair;
        }
    }
}
template <typename T, int TOKENS>
__device__ __forceinline__ void project_out_warpgroups(const T* activated_in, const void* const* weights, int pitch,
                                                       const int* slots, const Tile* tiles, int hidden, int width,
                                                       T* products) {
    using Product = warpgroup::Tile<T, TOKENS>;
    extern __shared__ __align__(16) unsigned char tile_memory[];
    pdl_launch();
    pdl_wait();
    Tile tile;
    int column0;
    if (!find_work(tiles, hidden, Product::ROWS, tile, column0)) return;
    const T* const weight = static_cast<const T*>(weights[tile.expert]);
    Product product;
    product.run(
        [&](int j) { return column0 + j < hidden ? weight + static_cast<size_t>(column0 + j) * pitch : nullptr; },
        [&](int i) { return i < tile.count ? activated_in + static_cast<size_t>(tile.first + i) * width : nullptr; },
        width, tile.count, tile_memory);
    const int column = column0 + threadIdx.x / 32 * 16;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) {
        const int token = j * 8 + threadIdx.x % 32 / 4;
        T* const out = token < tile.count ? products + static_cast<size_t>(slots[tile.first + token]) * hidden : nullptr;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t pair = transposed<T>(product.pair(j, h));
            const int first = column + 8 * h;
            if (out != nullptr && first < hidden) reinterpret_cast<uint32_t*>(out + first)[threadIdx.x % 4] = pair;
        }
    }
}

// The same two for any type, width and alignment: tiles have at most 32 rows.
template <typename T>
__device__ __forceinline__ void project_in_plain(const T* x, const void* const* weights, int pitch, const int* slots,
                                                 const Tile* tiles, int chosen, int hidden, int width, int activation,
                                                 T* activated_out) {
    using Product = tile::Plain<T>;
    __shared__ typename Product::Shared shared;
    pdl_launch();
    pdl_wait();
    Tile tile;
    int column0;
    if (!find_work(tiles, width, Product::N, tile, column0)) return;
    const T* const weight = static_cast<const T*>(weights[tile.expert]);
    const int column = column0 + threadIdx.x % 32;
    auto a = [&](int i) {
        return i < tile.count ? x + static_cast<size_t>(slots[tile.first + i] / chosen) * hidden : nullptr;
    };
    Product gate, up;
    gate.run(
        a, [&](int j) { return column0 + j < width ? weight + static_cast<size_t>(column0 + j) * pitch : nullptr; },
        hidden, shared);
    up.run(
        a,
        [&](int j) { return column0 + j < width ? weight + static_cast<size_t>(width + column0 + j) * pitch : nullptr; },
        hidden, shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x / 32 + 8 * i;
        if (row < tile.count && column < width)
            activated_out[static_cast<size_t>(tile.first + row) * width + column] =
                from_float<T>(activated<T>(gate.sums[i], activation) * up.sums[i]);
    }
}
template <typename T>
__device__ __forceinline__ void project_out_plain(const T* activated_in, const void* const* weights, int pitch,
                                                  const int* slots, const Tile* tiles, int hidden, int width,
                                                  T* products) {
    using Product = tile::Plain<T>;
    __shared__ typename Product::Shared shared;
    pdl_launch();
    pdl_wait();
    Tile tile;
    int column0;
    if (!find_work(tiles, hidden, Product::N, tile, column0)) return;
    const T* const weight = static_cast<const T*>(weights[tile.expert]);
    const int column = column0 + threadIdx.x % 32;
    Product product;
    product.run(
        [&](int i) { return i < tile.count ? activated_in + static_cast<size_t>(tile.first + i) * width : nullptr; },
        [&](int j) { return column0 + j < hidden ? weight + static_cast<size_t>(column0 + j) * pitch : nullptr; },
        width, shared);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = threadIdx.x / 32 + 8 * i;
        if (row < tile.count && column < hidden)
            products[static_cast<size_t>(slots[tile.first + row]) * hidden + column] = from_float<T>(product.sums[i]);
    }
}

// `out[token] = sum over its pairs of weight * product`, in the order of the experts. One block a token.
template <typename T>
__device__ __forceinline__ void combine(const T* products, const float* weights, int chosen, int hidden, T* out) {
    constexpr int V = 16 / sizeof(T);
    pdl_launch();
    pdl_wait();
    products += static_cast<size_t>(blockIdx.x) * chosen * hidden;
    weights += blockIdx.x * chosen;
    out += static_cast<size_t>(blockIdx.x) * hidden;
    if (hidden % V == 0) {
        for (int i = threadIdx.x * V; i < hidden; i += blockDim.x * V) {
            float sum[V] = {};
#pragma unroll 4
            for (int j = 0; j < chosen; ++j) {
                float v[V];
                load_floats<T, V>(products + static_cast<size_t>(j) * hidden + i, v);
#pragma unroll
                for (int k = 0; k < V; ++k) sum[k] = fmaf(weights[j], v[k], sum[k]);
            }
            store_floats<T, V>(out + i, sum);
        }
    } else {
        for (int i = threadIdx.x; i < hidden; i += blockDim.x) {
            float sum = 0.0f;
            for (int j = 0; j < chosen; ++j)
                sum = fmaf(weights[j], to_float(products[static_cast<size_t>(j) * hidden + i]), sum);
            out[i] = from_float<T>(sum);
        }
    }
}

// This lane's part of the product of a row of weights with x.
template <typename T> __device__ __forceinline__ float dot_part(const T* weight, const T* x, int count, bool is_wide) {
    constexpr int V = 16 / sizeof(T);
    float sum = 0.0f;
    if (is_wide) {
#pragma unroll 4
        for (int i = threadIdx.x % 32 * V; i < count; i += 32 * V) {
            const uint4 raw = ld_stream(weight + i);
            const T* const w = reinterpret_cast<const T*>(&raw);
            float v[V];
            load_floats<T, V>(x + i, v);
#pragma unroll
            for (int k = 0; k < V; ++k) sum = fmaf(to_float(w[k]), v[k], sum);
        }
    } else {
        for (int i = threadIdx.x % 32; i < count; i += 32) sum = fmaf(to_float(weight[i]), to_float(x[i]), sum);
    }
    return sum;
}

// Bytes that a warp fetches early: those of all warps that run at once have to fit into the L2.
constexpr int MOST_FETCHED = 4096;

// For few tokens: `activated[pair] = activation(gate(x)) * up(x)`, one warp a column. Blocks along the width, then the pairs.
template <typename T>
__device__ __forceinline__ void project_in_few(const T* x, const void* const* weights, int pitch, const int* experts,
                                               int chosen, int hidden, int width, int activation, T* activated_out) {
    pdl_wait();
    // What follows may read what was chosen, which is there by now, before this is done.
    pdl_launch();
    const int column = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, pair = blockIdx.y;
    if (column >= width) return;
    const T* const gate = static_cast<const T*>(weights[experts[pair]]) + static_cast<size_t>(column) * pitch;
    const T* const up = gate + static_cast<size_t>(width) * pitch;
    x += static_cast<size_t>(pair / chosen) * hidden;
    constexpr int V = 16 / sizeof(T);
    float g = 0.0f, u = 0.0f;
    if (hidden % V == 0) {
#pragma unroll 4
        for (int i = threadIdx.x % 32 * V; i < hidden; i += 32 * V) {
            const uint4 raw_gate = ld_stream(gate + i), raw_up = ld_stream(up + i);
            const T* const w_gate = reinterpret_cast<const T*>(&raw_gate);
            const T* const w_up = reinterpret_cast<const T*>(&raw_up);
            float v[V];
            load_floats<T, V>(x + i, v);
#pragma unroll
            for (int k = 0; k < V; ++k) {
                g = fmaf(to_float(w_gate[k]), v[k], g);
                u = fmaf(to_float(w_up[k]), v[k], u);
            }
        }
    } else {
        g = dot_part<T>(gate, x, hidden, false);
        u = dot_part<T>(up, x, hidden, false);
    }
    g = warp_sum(g);
    u = warp_sum(u);
    if (threadIdx.x % 32 == 0)
        activated_out[static_cast<size_t>(pair) * width + column] = from_float<T>(activated<T>(g, activation) * u);
}

// For few tokens: `out[token] = sum over its pairs of weight * down(activated[pair])`, one warp a column, in the order of the
// experts. Blocks along the columns, then the tokens.
template <typename T>
__device__ __forceinline__ void project_out_few(const T* activated_in, const void* const* weights, int pitch,
                                                const int* experts, const float* expert_weights, int chosen, int hidden,
                                                int width, T* out) {
    pdl_launch();
    const int column = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, token = blockIdx.y;
    const int row_bytes = column < hidden ? width * static_cast<int>(sizeof(T)) : 0;
    // Weights are fetched into the L2 while the projections in end.
    for (int j = 0; j < min(chosen, MOST_FETCHED / max(row_bytes, 1) + 1); ++j) {
        const void* const expert = weights[experts[token * chosen + j]];
        const char* const row = static_cast<const char*>(expert) + static_cast<size_t>(column) * pitch * sizeof(T);
        for (int at = threadIdx.x % 32 * 128; at < min(row_bytes, MOST_FETCHED); at += 32 * 128)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(row + at));
    }
    pdl_wait();
    if (column >= hidden) return;
    const bool is_wide = width % (16 / sizeof(T)) == 0;
    float sum = 0.0f;
    for (int j = 0; j < chosen; ++j) {
        const int pair = token * chosen + j;
        const T* const row = static_cast<const T*>(weights[experts[pair]]) + static_cast<size_t>(column) * pitch;
        const float part = dot_part<T>(row, activated_in + static_cast<size_t>(pair) * width, width, is_wide);
        sum = fmaf(expert_weights[pair], part, sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) out[static_cast<size_t>(token) * hidden + column] = from_float<T>(sum);
}

#define IN_PARAMETERS(T)                                                                                                \
    const T *x, const void *const *weights, int pitch, const int *slots, const Tile *tiles, int chosen, int hidden,     \
        int width, int activation, T *out
#define OUT_PARAMETERS(T)                                                                                               \
    const T *x, const void *const *weights, int pitch, const int *slots, const Tile *tiles, int hidden, int width, T *out
#define TENSOR(T, BM)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(tile::THREADS) project_in_##BM##_##T(IN_PARAMETERS(T)) {               \
        project_in_tensor<T, BM>(x, weights, pitch, slots, tiles, chosen, hidden, width, activation, out);              \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(tile::THREADS) project_out_##BM##_##T(OUT_PARAMETERS(T)) {             \
        project_out_tensor<T, BM>(x, weights, pitch, slots, tiles, hidden, width, out);                                 \
    }
TENSOR(bf16, 32)
TENSOR(bf16, 64)
TENSOR(bf16, 128)
TENSOR(f16, 32)
TENSOR(f16, 64)
TENSOR(f16, 128)

// Empty where there are no warpgroups, and not launched there.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define IN_WARPGROUPS(T, TOKENS)                                                                                        \
    project_in_warpgroups<T, TOKENS>(x, weights, pitch, slots, tiles, chosen, hidden, width, activation, out);
#define OUT_WARPGROUPS(T, TOKENS)                                                                                       \
    project_out_warpgroups<T, TOKENS>(x, weights, pitch, slots, tiles, hidden, width, out);
#else
#define IN_WARPGROUPS(T, TOKENS)
#define OUT_WARPGROUPS(T, TOKENS)
#endif
#define WARPGROUPS(T, TOKENS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(tile::THREADS, 1)                                                      \
        project_in_warpgroups_##TOKENS##_##T(IN_PARAMETERS(T)) {                                                        \
        IN_WARPGROUPS(T, TOKENS)                                                                                        \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(tile::THREADS, 1)                                                      \
        project_out_warpgroups_##TOKENS##_##T(OUT_PARAMETERS(T)) {                                                      \
        OUT_WARPGROUPS(T, TOKENS)                                                                                       \
    }
#define ALL_WARPGROUPS(T) WARPGROUPS(T, 16) WARPGROUPS(T, 32) WARPGROUPS(T, 64) WARPGROUPS(T, 128) WARPGROUPS(T, 256)
ALL_WARPGROUPS(bf16)
ALL_WARPGROUPS(f16)

#define PLAIN(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(tile::THREADS) project_in_plain_##T(IN_PARAMETERS(T)) {                \
        project_in_plain<T>(x, weights, pitch, slots, tiles, chosen, hidden, width, activation, out);                   \
    }                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(tile::THREADS) project_out_plain_##T(OUT_PARAMETERS(T)) {              \
        project_out_plain<T>(x, weights, pitch, slots, tiles, hidden, width, out);                                      \
    }                                                                                                                   \
    extern "C" __global__ void combine_##T(const T* products, const float* weights, int chosen, int hidden, T* out) {    \
        combine<T>(products, weights, chosen, hidden, out);                                                             \
    }                                                                                                                   \
    extern "C" __global__ void project_in_few_##T(const T* x, const void* const* weights, int pitch,                    \
                                                  const int* experts, int chosen, int hidden, int width,                \
                                                  int activation, T* out) {                                             \
        project_in_few<T>(x, weights, pitch, experts, chosen, hidden, width, activation, out);                          \
    }                                                                                                                   \
    extern "C" __global__ void project_out_few_##T(const T* x, const void* const* weights, int pitch,                   \
                                                   const int* experts, const float* expert_weights, int chosen,         \
                                                   int hidden, int width, T* out) {                                     \
        project_out_few<T>(x, weights, pitch, experts, expert_weights, chosen, hidden, width, out);                     \
    }
FOR_EACH_TYPE(PLAIN)
