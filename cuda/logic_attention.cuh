// Block attention in pieces: which keys a tile looks at, who sees what, and the arithmetic of one warp on one tile of keys.
//
// A tile has ATTENTION_ROWS or ATTENTION_WIDE_ROWS rows: row = query * group + head of the group, so that a key is loaded once for all query heads
// that share it. A warp has sixteen rows. Keys come in tiles that begin at multiples of the tile's width, counted from key 0,
// and a masked key weighs exactly 0: what a row sums, and in which order, depends on its own keys alone.
#pragma once

#include "common.cuh"
#include "logic_kv.cuh"
#include "logic_warp.cuh"

namespace dflash {

// ---- what a block of threads looks at ---------------------------------------------------------------------------------

struct AttentionTile {
    int32_t request, kv_head, group;
    int32_t first_token; // packed token of the request's node 0
    int32_t len;         // tokens of the request
    int32_t context;     // keys in the cache
    int32_t valid_from;
    int32_t first_query, num_queries;
    int32_t begin, end;    // keys of this block; begin is a multiple of the key tile's width
    int32_t unmasked_from; // every row sees the context's keys from here on
    int32_t split;
    int32_t splits; // of the request
    bool live;
};

DFLASH_HD int32_t window_start(int32_t position, int32_t window) { return window > 0 ? max_of(position + 1 - window, 0) : 0; }

DFLASH_HD AttentionTile attention_tile(const BlockAttentionParams& p, int32_t x, int32_t y, int32_t z, int32_t keys,
                                       int32_t rows) {
    AttentionTile t;
    t.request = x / p.kv_heads;
    t.kv_head = x - t.request * p.kv_heads;
    t.group = p.q_heads / p.kv_heads;
    t.first_token = p.query_starts[t.request];
    t.len = p.query_starts[t.request + 1] - t.first_token;
    t.context = p.context_lens[t.request];
    t.valid_from = p.valid_from ? p.valid_from[t.request] : 0;
    int32_t queries = attention_queries(p.q_heads, p.kv_heads, rows);
    t.first_query = y * queries;
    t.num_queries = min_of(queries, t.len - t.first_query);
    t.split = z;
    int32_t total = t.context + t.len;
    t.splits = int32_t(ceil_div(total, p.split_keys));
    t.live = t.num_queries > 0 && z < t.splits;
    int32_t last_position = t.context + t.first_query + t.num_queries - 1;
    // A tree's node has a depth of at most its index.
    int32_t first_position = t.context + (p.mask == MASK_ANCESTORS ? 0 : t.first_query);
    int32_t start = max_of(t.valid_from, window_start(first_position, p.window));
    int64_t end = last_position + 1;
    if (p.mask == MASK_BLOCK) end = p.window > 0 && p.window < total - last_position ? last_position + p.window : total;
    int64_t split_begin = int64_t(z) * p.split_keys, split_end = split_begin + p.split_keys;
    t.unmasked_from = max_of(t.valid_from, window_start(last_position, p.window));
    t.begin = split_begin > start ? int32_t(split_begin) : start / keys * keys;
    t.end = int32_t(end < split_end ? end : split_end);
    return t;
}

// What a row of the tile is. Found out where it is asked for: kept, it would take ten registers through every tile.
struct AttentionRow {
    int32_t query; // node of the request; -1: no row
    int32_t head;  // query head
    int32_t start; // first context key it sees
    const uint64_t* ancestors;
};

DFLASH_HD AttentionRow attention_row(const BlockAttentionParams& p, const AttentionTile& t, int32_t row) {
    AttentionRow r = {-1, 0, 0, nullptr};
    int32_t local = row / t.group;
    if (local >= t.num_queries) return r;
    r.query = t.first_query + local;
    r.head = t.kv_head * t.group + (row - local * t.group);
    int32_t depth = r.query;
    if (p.mask == MASK_ANCESTORS) {
        r.ancestors = p.ancestors + int64_t(t.first_token + r.query) * p.mask_words;
        if (p.window > 0) {
            depth = -1;
            for (int32_t w = 0; w < p.mask_words; ++w) {
#if DFLASH_ON_DEVICE
                depth += __popcll(r.ancestors[w]);
#else
                depth += __builtin_popcountll(r.ancestors[w]);
#endif
            }
        }
    }
    r.start = max_of(t.valid_from, window_start(t.context + depth, p.window));
    return r;
}

// Depth of ancestor `node`: how many of the row's ancestors come before it.
DFLASH_HD int32_t ancestor_depth(const uint64_t* ancestors, int32_t node) {
    int32_t depth = 0;
    for (int32_t w = 0; w <= node / 64; ++w) {
        uint64_t bits = ancestors[w];
        if (w == node / 64) bits &= (uint64_t(1) << (node % 64)) - 1;
#if DFLASH_ON_DEVICE
        depth += __popcll(bits);
#else
        depth += __builtin_popcountll(bits);
#endif
    }
    return depth;
}

// Whether the row sees a key of the request; the window counts positions, so a tree's nodes by their depth.
DFLASH_HD bool sees(const BlockAttentionParams& p, const AttentionTile& t, const AttentionRow& r, int32_t key) {
    if (r.query < 0) return false;
    if (key < t.context) return key >= r.start;
    int32_t node = key - t.context;
    if (node >= t.len) return false;
    if (p.mask == MASK_CAUSAL) return node <= r.query && key >= r.start;
    if (p.mask == MASK_BLOCK) return p.window <= 0 || (node - r.query < p.window && r.query - node < p.window);
    if (!(r.ancestors[node / 64] >> (node % 64) & 1)) return false;
    return p.window <= 0 || t.context + ancestor_depth(r.ancestors, node) >= r.start;
}

// ---- moving data ------------------------------------------------------------------------------------------------------

// Where key `key` lies: a slot of the cache, -2 - packed token, or -1 for nowhere. What lies before `valid_from` was never
// written and may be NaN, which a weight of 0 does not silence: it is not read.
DFLASH_HD int64_t key_source(const BlockAttentionParams& p, const AttentionTile& t, int32_t key) {
    if (key < t.valid_from || key >= t.context + t.len) return -1;
    if (key >= t.context) return -2 - int64_t(t.first_token + key - t.context);
    return slot_of(p.table, t.request, key);
}

// Where a key and its value lie, this head's: addresses, or 0 for zeros.
struct alignas(16) KeyPlace {
    uint64_t key, value;
};

DFLASH_HD KeyPlace key_place(const BlockAttentionParams& p, const AttentionTile& t, int64_t source) {
    if (source == -1) return {0, 0};
    bool cached = source >= 0;
    int64_t row = cached ? source : -2 - source;
    const uint16_t* key = cached ? p.k_cache : p.k;
    const uint16_t* value = cached ? p.v_cache : p.v;
    const int64_t* key_stride = cached ? p.k_cache_stride : p.k_stride;
    const int64_t* value_stride = cached ? p.v_cache_stride : p.v_stride;
    return {uint64_t(key + row * key_stride[0] + t.kv_head * key_stride[1]),
            uint64_t(value + row * value_stride[0] + t.kv_head * value_stride[1])};
}

DFLASH_HD KeyPlace load_place(const KeyPlace* at) {
#if DFLASH_ON_DEVICE
    ulonglong2 x = *reinterpret_cast<const ulonglong2*>(at);
    return {x.x, x.y};
#else
    return *at;
#endif
}

// Element of row `row`, sixteen-byte chunk `chunk` of a tile: chunks are permuted within a row so that eight neighbouring rows
// meet all banks. For a tile that begins at a multiple of its row's size, and chunks a and b without a common bit, chunk a + b is
// at the address of chunk a with the bits of 16 b flipped: `other_chunk` of a warp.
template <int D>
DFLASH_HD int32_t swizzled(int32_t row, int32_t chunk) {
    return row * D + (chunk ^ (row & 7)) * 8;
}

// Sixteen bytes to shared memory, zeros if there are none. On the device they arrive at the next wait.
DFLASH_HD void copy16(uint16_t* to, const uint16_t* from, bool exists) {
#if DFLASH_ON_DEVICE
    uint32_t at = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(exists ? 16 : 0) : "memory");
#else
    if (exists) memcpy(to, from, 16);
    else memset(to, 0, 16);
#endif
}

// A tile of `ROWS` rows, 2 `ROWS` threads.
template <int D, int ROWS>
DFLASH_HD void load_queries(const BlockAttentionParams& p, const AttentionTile& t, uint16_t* shared, int32_t thread) {
    constexpr int32_t CHUNKS = D / 8;
    for (int32_t i = thread; i < ROWS * CHUNKS; i += 2 * ROWS) {
        int32_t row = i / CHUNKS, chunk = i % CHUNKS, local = row / t.group;
        bool exists = local < t.num_queries;
        const uint16_t* from = p.q;
        if (exists)
            from += (t.first_token + t.first_query + local) * p.q_stride[0]
                + (t.kv_head * t.group + (row - local * t.group)) * p.q_stride[1] + 8 * chunk;
        copy16(shared + swizzled<D>(row, chunk), from, exists);
    }
}

// Keys and values that lie at `places`, to `keys` and `values` ([KEYS][D] each). A thread has the same chunk of every few rows.
template <int D, int KEYS, int ROWS>
DFLASH_HD void load_keys(const KeyPlace* places, uint16_t* keys, uint16_t* values, int32_t thread) {
    constexpr int32_t CHUNKS = D / 8, AT_ONCE = 2 * ROWS / CHUNKS;
    // Several places, then their copies: between a load and a copy that follows it the compiler puts instructions that only wait.
    constexpr int32_t GROUP = 4;
    int32_t row = thread / CHUNKS, chunk = thread % CHUNKS;
    DFLASH_UNROLL
    for (int32_t group = 0; group < KEYS; group += GROUP * AT_ONCE) {
        KeyPlace from[GROUP];
        DFLASH_UNROLL
        for (int32_t i = 0; i < GROUP; ++i) from[i] = load_place(places + row + group + i * AT_ONCE);
        DFLASH_UNROLL
        for (int32_t i = 0; i < GROUP; ++i) {
            bool exists = (uint32_t(from[i].key) | uint32_t(from[i].key >> 32)) != 0;
            int32_t first = group + i * AT_ONCE, to = swizzled<D>(row + first % 8, chunk) + first / 8 * 8 * D;
            copy16(keys + to, reinterpret_cast<const uint16_t*>(from[i].key + 16 * chunk), exists);
            copy16(values + to, reinterpret_cast<const uint16_t*>(from[i].value + 16 * chunk), exists);
        }
    }
}

// This step's K and V to the cache: the request's first block does it. Nobody reads those slots in this launch.
template <int D>
DFLASH_HD void store_keys(const BlockAttentionParams& p, const AttentionTile& t, int32_t thread, int32_t threads) {
    constexpr int32_t CHUNKS = D / 8;
    for (int32_t i = thread; i < t.len * CHUNKS; i += threads) {
        int64_t token = t.first_token + i / CHUNKS;
        int32_t chunk = i % CHUNKS;
        int64_t slot = p.slots[token];
        if (slot < 0) continue;
        store8(p.k_cache + slot * p.k_cache_stride[0] + t.kv_head * p.k_cache_stride[1] + 8 * chunk,
               load8(p.k + token * p.k_stride[0] + t.kv_head * p.k_stride[1] + 8 * chunk));
        store8(p.v_cache + slot * p.v_cache_stride[0] + t.kv_head * p.v_cache_stride[1] + 8 * chunk,
               load8(p.v + token * p.v_stride[0] + t.kv_head * p.v_stride[1] + 8 * chunk));
    }
}

// ---- a warp and a tile of keys ------------------------------------------------------------------------------------------
// Lane l has rows l / 4 and l / 4 + 8 of the warp's sixteen; of every eight columns it has 2 * (l % 4) and the next. Element e of
// an accumulator: row l / 4 + 8 * (e / 2), column + e % 2.

template <typename W, int D>
struct WarpState {
    template <typename T>
    using Reg = typename W::template Reg<T>;
    Reg<float> largest[2]; // score so far, in units of log2
    Reg<float> sums[2];    // of the weights in this lane's columns
    Reg<float> out[D / 8][4];
};

template <typename W, int D>
DFLASH_HD void warp_open(const BlockAttentionParams& p, const AttentionTile& t, int32_t warp, WarpState<W, D>& s) {
    EACH_LANE(lane) {
        DFLASH_UNROLL
        for (int32_t half = 0; half < 2; ++half) {
            AttentionRow r = attention_row(p, t, warp * 16 + lane / 4 + 8 * half);
            s.largest[half][lane] = -infinity();
            s.sums[half][lane] = 0.0f;
            // A sink is a key of the first split, with a weight and no value: one lane of the row's four has it.
            if (p.sinks && t.split == 0 && r.query >= 0) {
                s.largest[half][lane] = mul(p.sinks[r.head], 1.44269504f);
                s.sums[half][lane] = lane % 4 == 0 ? 1.0f : 0.0f;
            }
        }
        DFLASH_UNROLL
        for (int32_t n = 0; n < D / 8; ++n) {
            DFLASH_UNROLL
            for (int32_t e = 0; e < 4; ++e) s.out[n][e][lane] = 0.0f;
        }
    }
}

// Scores of a warp: of its rows with every key of a tile, as `multiply` leaves them among the lanes.
template <typename W, int KEYS>
using WarpScores = typename W::template Reg<float>[KEYS / 8][4];

// What a lane reads of shared memory: where it begins in the queries and in stage 0 of keys and values; and the queries as
// `multiply` takes them, where there are registers for them.
template <typename W, int D>
struct WarpView {
    static constexpr bool HELD = D == 128;
    typename W::template Reg<typename W::Address> queries, keys, values;
    typename W::template Reg<uint32_t> held[HELD ? D / 16 : 1][4];
};

template <typename W, int D>
DFLASH_HD void warp_view(int32_t warp, const uint16_t* queries, const uint16_t* keys, const uint16_t* values,
                         WarpView<W, D>& view) {
    EACH_LANE(lane) {
        int32_t matrix = lane / 8, row = lane % 8, low = matrix & 1, high = matrix >> 1;
        // Matrices: rows 0-7 and 8-15, first eight columns, then the same rows, next eight.
        view.queries[lane] = W::address(queries, swizzled<D>(warp * 16 + low * 8 + row, high));
        // Keys 0-7, first and next eight columns, then keys 8-15.
        view.keys[lane] = W::address(keys, swizzled<D>(high * 8 + row, low));
        // Read transposed: keys 0-7 and 8-15 of eight columns, then of the next eight.
        view.values[lane] = W::address(values, swizzled<D>(low * 8 + row, high));
    }
}

template <typename W, int D>
DFLASH_HD void warp_load_queries(const WarpView<W, D>& view, int32_t step, typename W::template Reg<uint32_t>* out) {
    typename W::template Reg<typename W::Address> at;
    EACH_LANE(lane) at[lane] = W::other_chunk(view.queries[lane], 2 * step);
    W::load_matrices(at, 0, false, out);
}

template <typename W, int D>
DFLASH_HD void warp_hold_queries(WarpView<W, D>& view) {
    if (!WarpView<W, D>::HELD) return;
    DFLASH_UNROLL
    for (int32_t step = 0; step < D / 16; ++step) warp_load_queries(view, step, view.held[WarpView<W, D>::HELD ? step : 0]);
}

// scores = queries keys^T; the keys lie `element` behind stage 0.
template <typename W, int D, int KEYS>
DFLASH_HD void warp_scores(const WarpView<W, D>& view, int32_t element, WarpScores<W, KEYS>& scores) {
    using Bits = typename W::template Reg<uint32_t>;
    typename W::template Reg<typename W::Address> first, at;
    EACH_LANE(lane) {
        DFLASH_UNROLL
        for (int32_t n = 0; n < KEYS / 8; ++n) {
            DFLASH_UNROLL
            for (int32_t e = 0; e < 4; ++e) scores[n][e][lane] = 0.0f;
        }
        first[lane] = W::behind(view.keys[lane], element);
    }
    DFLASH_UNROLL
    for (int32_t step = 0; step < D / 16; ++step) {
        Bits loaded[4], b[4];
        if (!WarpView<W, D>::HELD) warp_load_queries(view, step, loaded);
        const Bits* a = WarpView<W, D>::HELD ? view.held[WarpView<W, D>::HELD ? step : 0] : loaded;
        EACH_LANE(lane) at[lane] = W::other_chunk(first[lane], 2 * step);
        DFLASH_UNROLL
        for (int32_t n = 0; n < KEYS / 16; ++n) {
            W::load_matrices(at, n * 16 * D, false, b);
            W::multiply(scores[2 * n], a, b);
            W::multiply(scores[2 * n + 1], a, b + 2);
        }
    }
}

// Where there is a soft cap, scores become capped ones in units of log2. Returns what they still have to be multiplied by, which is
// positive: the largest of a row is so before as after.
template <typename W, int KEYS>
DFLASH_HD float warp_cap(const BlockAttentionParams& p, WarpScores<W, KEYS>& scores) {
    float scale = mul(p.scale, 1.44269504f);
    if (p.softcap > 0.0f) {
        float down = div(mul(-2.0f, scale), p.softcap), up = mul(p.softcap, 1.44269504f);
        EACH_LANE(lane) {
            DFLASH_UNROLL
            for (int32_t n = 0; n < KEYS / 8; ++n) {
                DFLASH_UNROLL
                for (int32_t e = 0; e < 4; ++e) scores[n][e][lane] = capped(scores[n][e][lane], down, up);
            }
        }
        scale = 1.0f;
    } else if (!(scale > 0.0f)) {
        EACH_LANE(lane) {
            DFLASH_UNROLL
            for (int32_t n = 0; n < KEYS / 8; ++n) {
                DFLASH_UNROLL
                for (int32_t e = 0; e < 4; ++e) scores[n][e][lane] = mul(scores[n][e][lane], scale);
            }
        }
        scale = 1.0f;
    }
    return scale;
}

// Scores of keys that a row does not see become -inf.
template <typename W, int KEYS>
DFLASH_HD void warp_mask(const BlockAttentionParams& p, const AttentionTile& t, int32_t warp, int32_t first_key,
                         WarpScores<W, KEYS>& scores) {
    EACH_LANE(lane) {
        DFLASH_UNROLL
        for (int32_t half = 0; half < 2; ++half) {
            AttentionRow row = attention_row(p, t, warp * 16 + lane / 4 + 8 * half);
            // Bit 2 n + e: the lane's key. A loop, not unrolled: few tiles come here.
            uint32_t seen = 0;
            DFLASH_ROLLED
            for (int32_t i = 0; i < KEYS / 4; ++i) {
                int32_t key = first_key + i / 2 * 8 + 2 * (lane % 4) + (i & 1);
                seen |= uint32_t(sees(p, t, row, key)) << i;
            }
            DFLASH_UNROLL
            for (int32_t i = 0; i < KEYS / 4; ++i) {
                if (!(seen >> i & 1)) scores[i / 2][2 * half + (i & 1)][lane] = -infinity();
            }
        }
    }
}

// Scores become weights, and what was gathered so far fades to the new maximum.
template <typename W, int D, int KEYS>
DFLASH_HD void warp_weights(const BlockAttentionParams& p, const AttentionTile& t, int32_t warp, int32_t first_key, float scale,
                            WarpScores<W, KEYS>& scores, WarpState<W, D>& s) {
    using Float = typename W::template Reg<float>;
    if (first_key + KEYS > t.context || first_key < t.unmasked_from) warp_mask<W, KEYS>(p, t, warp, first_key, scores);
    DFLASH_UNROLL
    for (int32_t half = 0; half < 2; ++half) {
        Float largest;
        EACH_LANE(lane) {
            float most = scores[0][2 * half][lane];
            DFLASH_UNROLL
            for (int32_t i = 1; i < KEYS / 4; ++i) most = fmaxf(most, scores[i / 2][2 * half + (i & 1)][lane]);
            largest[lane] = most;
        }
        DFLASH_UNROLL
        for (int32_t offset = 1; offset < 4; offset *= 2) {
            Float other = W::exchange(largest, offset);
            EACH_LANE(lane) largest[lane] = fmaxf(largest[lane], other[lane]);
        }
        EACH_LANE(lane) {
            float most = fmaxf(s.largest[half][lane], mul(largest[lane], scale));
            // Nothing seen yet: any finite number in place of -inf keeps the weights at exactly 0.
            float base = most == -infinity() ? 0.0f : most;
            float fade = exp2_of(sub(s.largest[half][lane], base));
            s.largest[half][lane] = most;
            float sum = mul(s.sums[half][lane], fade);
            DFLASH_UNROLL
            for (int32_t n = 0; n < KEYS / 8; ++n) {
                DFLASH_UNROLL
                for (int32_t e = 2 * half; e < 2 * half + 2; ++e) {
                    float w = exp2_of(fused(scores[n][e][lane], scale, -base));
                    scores[n][e][lane] = w;
                    sum = add(sum, w);
                }
            }
            s.sums[half][lane] = sum;
            DFLASH_UNROLL
            for (int32_t n = 0; n < D / 8; ++n) {
                DFLASH_UNROLL
                for (int32_t e = 2 * half; e < 2 * half + 2; ++e) s.out[n][e][lane] = mul(s.out[n][e][lane], fade);
            }
        }
    }
}

// out += weights values; those lie `element` behind stage 0.
template <typename W, int D, int KEYS>
DFLASH_HD void warp_values(const WarpView<W, D>& view, int32_t element, const WarpScores<W, KEYS>& scores, WarpState<W, D>& s) {
    typename W::template Reg<typename W::Address> first, at;
    EACH_LANE(lane) first[lane] = W::behind(view.values[lane], element);
    DFLASH_UNROLL
    for (int32_t step = 0; step < KEYS / 16; ++step) {
        typename W::template Reg<uint32_t> a[4], b[4];
        EACH_LANE(lane) {
            DFLASH_UNROLL
            for (int32_t i = 0; i < 4; ++i) {
                int32_t n = 2 * step + i / 2, e = 2 * (i & 1);
                a[i][lane] = pack2(scores[n][e][lane], scores[n][e + 1][lane]);
            }
        }
        DFLASH_UNROLL
        for (int32_t n = 0; n < D / 16; ++n) {
            EACH_LANE(lane) at[lane] = W::other_chunk(first[lane], 2 * n);
            W::load_matrices(at, step * 16 * D, true, b);
            W::multiply(s.out[2 * n], a, b);
            W::multiply(s.out[2 * n + 1], a, b + 2);
        }
    }
}

// The tile's keys and values lie `element` behind stage 0.
template <typename W, int D, int KEYS>
DFLASH_HD void warp_attend(const BlockAttentionParams& p, const AttentionTile& t, int32_t warp, int32_t first_key,
                           const WarpView<W, D>& view, int32_t element, WarpState<W, D>& s) {
    WarpScores<W, KEYS> scores;
    warp_scores<W, D, KEYS>(view, element, scores);
    float scale = warp_cap<W, KEYS>(p, scores);
    warp_weights<W, D, KEYS>(p, t, warp, first_key, scale, scores, s);
    warp_values<W, D, KEYS>(view, element, scores, s);
}

} // namespace dflash
