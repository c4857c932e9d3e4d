// The target transform and the keyed draw of one row, in pieces that many threads share: same tokens as
// verify::Sampler::draw_row, whose module documents the arithmetic.
//
// Nothing is sorted and no probabilities are written down. What top-k and top-p keep is a prefix of the order (t falling, id
// rising), and weights are integers, so its end can be found by counting:
//
//   scan    maxima of 64-column blocks, largest logit; argmax; the whole draw of rows without filters
//   mass    counts and weights of 1024 bins of t - top, each 1/32 nat wide; weight of the raw row
//   pick    draws among the bins before the one where the prefix ends; lists the columns of that bin
//   finish  finds the end within the list by radix selection on (t, id), draws there; log-probability
//
// In one file because each piece reads what the one before it left in the scratch, whose layout stands here.
#pragma once

#include <math.h>

#include "common.cuh"
#include "logic_rng.cuh"

namespace dflash {

constexpr float NEGLIGIBLE = -29.0f;
constexpr uint32_t NO_COLUMN = 0xffffffffu;

// ---- arithmetic of src/verify/math.rs ---------------------------------------------------------------------------------

// exp(x) for x <= 0; below -40 that of -40.
DFLASH_HD float exp_nonpositive(float x) {
    const float round = 12582912.0f;
    x = x > -40.0f ? x : -40.0f;
    float n = sub(add(mul(x, 1.44269504089f), round), round);
    float r = sub(sub(x, mul(n, 0.6933594f)), mul(n, -2.1219444e-4f));
    float p = 0.00139505f;
    p = add(mul(p, r), 0.008368896f);
    p = add(mul(p, r), 0.041666206f);
    p = add(mul(p, r), 0.16666518f);
    p = add(mul(p, r), 0.5f);
    float y = add(add(mul(mul(r, r), p), r), 1.0f);
    uint32_t shift = bits_of(add(n, round)) - bits_of(round);
    return float_of(bits_of(y) + (shift << 23));
}

// round(exp(x) * 2^40), ties to even. In integers: binary64 is slow on many devices, and this is the same number.
DFLASH_HD uint64_t weight(float x) {
    uint32_t bits = bits_of(exp_nonpositive(x));
    int32_t exponent = int32_t(bits >> 23); // the value is positive and normal
    uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    int32_t up = exponent - 110;
    if (up >= 0) return uint64_t(mantissa) << up;
    int32_t down = -up;
    if (down >= 25) return 0;
    uint32_t quotient = mantissa >> down, rest = mantissa & ((1u << down) - 1), half = 1u << (down - 1);
    return quotient + (rest > half || (rest == half && (quotient & 1)) ? 1 : 0);
}

// An integer of the same order; both zeros are one.
DFLASH_HD uint32_t order_key(float x) {
    uint32_t bits = bits_of(add(x, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DFLASH_HD float value_of_key(uint32_t key) { return float_of(key >> 31 ? key & 0x7fffffffu : ~key); }

DFLASH_HD bool is_bad(float x) { return !(x < infinity()); }

// ---- what a row asks for ----------------------------------------------------------------------------------------------

DFLASH_HD bool penalises(const SamplingRow& s) {
    return s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f;
}
DFLASH_HD bool edits(const SamplingRow& s) { return penalises(s) || s.mask_end > s.bias_start; }
DFLASH_HD bool is_greedy(const SamplingRow& s) { return s.temperature == 0.0f; }
// top-k or top-p.
DFLASH_HD bool selects(const SamplingRow& s) { return !is_greedy(s) && (s.top_k > 0 || s.top_p < 1.0f); }
DFLASH_HD bool has_floor(const SamplingRow& s) { return !is_greedy(s) && s.min_p > 0.0f; }
// The scan can draw it: no filter needs the row's largest logit.
DFLASH_HD bool is_plain(const SamplingRow& s) { return !is_greedy(s) && !selects(s) && !has_floor(s); }

// One row, open. Lives in shared memory.
struct OpenRow {
    SamplingRow s;
    uint64_t position; // of the token drawn
    float scale;       // 1 / temperature
    float floor;       // kept: t - top >= floor
    int32_t request;   // -1: padding
    int32_t node;      // node of the row within its request
    int32_t path_len;  // drafts above and at `node`
};

DFLASH_HD int32_t row_token(const SampleRowsParams& p, int32_t row) { return p.row_tokens ? p.row_tokens[row] : row; }

// All threads: whoever finds the row's request says so. `request` was -1.
DFLASH_HD void find_request(const SampleRowsParams& p, int32_t row, int32_t* request, int32_t thread, int32_t threads) {
    int32_t token = row_token(p, row);
    if (token < 0) return;
    for (int32_t r = thread; r < p.num_requests; r += threads) {
        if (p.query_starts[r] <= token && token < p.query_starts[r + 1]) *request = r;
    }
}

// One thread, after find_request; `row.request` is set.
DFLASH_HD void open_row(const SampleRowsParams& p, OpenRow& row, int32_t index) {
    if (row.request < 0) return;
    int32_t token = row_token(p, index);
    row.s = p.sampling[row.request];
    row.position = uint64_t(p.positions[token] + 1);
    // From here on a row whose mask does not apply has none.
    if (row.position >= uint64_t(row.s.mask_before)) row.s.mask_end = row.s.bias_end;
    row.node = token - p.query_starts[row.request];
    row.path_len = 0;
    row.scale = is_greedy(row.s) ? 1.0f : div(1.0f, row.s.temperature);
    // Columns of -inf are never drawn: nothing is kept below the smallest finite number.
    float lowest = -3.40282347e38f;
    float floor = has_floor(row.s) ? ln(row.s.min_p) : lowest;
    row.floor = floor > lowest ? floor : lowest;
}

// One thread: the drafts of a tree's row, from its node up. A chain's are token_ids[first + anchor + 1 ..= first + node].
DFLASH_HD void open_path(const SampleRowsParams& p, OpenRow& row, int32_t* path, int32_t capacity) {
    int32_t first = p.query_starts[row.request];
    int32_t node = row.node, len = 0;
    while (node > row.s.anchor && len < capacity) {
        path[len++] = int32_t(p.token_ids[first + node]);
        int32_t parent = p.parents ? p.parents[first + node] : node - 1;
        if (parent >= node) break;
        node = parent;
    }
    row.path_len = len;
}

// Index of `token` in the ascending tokens[start .. end], or -1.
DFLASH_HD int32_t find_token(const int32_t* tokens, int32_t start, int32_t end, int32_t token) {
    int32_t low = start, high = end;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (tokens[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low < end && tokens[low] == token ? low : -1;
}

// First index of tokens[start .. end] that is not below `token`.
DFLASH_HD int32_t lower_bound(const int32_t* tokens, int32_t start, int32_t end, int32_t token) {
    int32_t low = start, high = end;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (tokens[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low;
}

// The logit of `token` after penalties, bias and mask. Each operation is rounded on its own, in this order; of -inf all of them make
// -inf, so the mask may as well come first.
DFLASH_HD float edited(const SampleRowsParams& p, const OpenRow& row, const int32_t* path, int32_t token, float raw) {
    const SamplingRow& s = row.s;
    float l = raw;
    if (penalises(s)) {
        int32_t at = find_token(p.history_tokens, s.history_start, s.history_end, token);
        int32_t here = 0;
        for (int32_t i = 0; i < row.path_len; ++i) here += path[i] == token;
        if (at >= 0 || here > 0) {
            int32_t output = (at >= 0 ? p.history_counts[at] : 0) + here;
            if (s.repetition_penalty != 1.0f) l = l > 0.0f ? div(l, s.repetition_penalty) : mul(l, s.repetition_penalty);
            if (output > 0) {
                l = sub(l, mul(s.frequency_penalty, float(uint32_t(output))));
                l = sub(l, s.presence_penalty);
            }
        }
    }
    int32_t at = find_token(p.bias_tokens, s.bias_start, s.bias_end, token);
    if (at >= 0) l = add(l, p.bias_values[at]);
    if (find_token(p.bias_tokens, s.bias_end, s.mask_end, token) >= 0) l = add(l, -infinity());
    return l;
}

DFLASH_HD void set_bit(uint32_t* bits, int32_t column) {
#if DFLASH_ON_DEVICE
    atomicOr(&bits[column / 32], 1u << (column % 32));
#else
    bits[column / 32] |= 1u << (column % 32);
#endif
}

// Those of the ascending tokens[start .. end] that are among first .. first + SAMPLE_CHUNK.
DFLASH_HD void mark_tokens(const int32_t* tokens, int32_t start, int32_t end, int32_t first, uint32_t* bits, int32_t thread,
                           int32_t threads) {
    for (int32_t i = lower_bound(tokens, start, end, first) + thread; i < end; i += threads) {
        if (tokens[i] >= first + SAMPLE_CHUNK) break;
        set_bit(bits, tokens[i] - first);
    }
}

// Sets the bit of every edited column of first .. first + SAMPLE_CHUNK. All threads; `bits` were zero.
DFLASH_HD void mark_edits(const SampleRowsParams& p, const OpenRow& row, const int32_t* path, int32_t first, uint32_t* bits,
                          int32_t thread, int32_t threads) {
    const SamplingRow& s = row.s;
    if (penalises(s)) {
        mark_tokens(p.history_tokens, s.history_start, s.history_end, first, bits, thread, threads);
        for (int32_t i = thread; i < row.path_len; i += threads) {
            if (path[i] >= first && path[i] < first + SAMPLE_CHUNK) set_bit(bits, path[i] - first);
        }
    }
    mark_tokens(p.bias_tokens, s.bias_start, s.bias_end, first, bits, thread, threads);
    mark_tokens(p.bias_tokens, s.bias_end, s.mask_end, first, bits, thread, threads);
}

// ---- scratch ----------------------------------------------------------------------------------------------------------

struct SampleScratch {
    SampleChunk* chunks;  // [rows, num_chunks]
    uint64_t* masses;     // [rows, SAMPLE_BINS]
    uint64_t* candidates; // [rows, SAMPLE_CANDIDATES]
    uint32_t* counts;     // [rows, SAMPLE_BINS]
    uint32_t* listed;     // [rows, 4], the first is used
    float* maxima;        // [rows, num_chunks * SAMPLE_CHUNK / SAMPLE_BLOCK]
    int32_t num_chunks;

    DFLASH_HD explicit SampleScratch(const SampleRowsParams& p) {
        int64_t rows = p.num_rows;
        num_chunks = int32_t(ceil_div(p.vocab, SAMPLE_CHUNK));
        chunks = static_cast<SampleChunk*>(p.scratch);
        masses = reinterpret_cast<uint64_t*>(chunks + rows * num_chunks);
        candidates = masses + rows * SAMPLE_BINS;
        counts = reinterpret_cast<uint32_t*>(candidates + rows * SAMPLE_CANDIDATES);
        listed = counts + rows * SAMPLE_BINS;
        maxima = reinterpret_cast<float*>(listed + rows * 4);
    }

    DFLASH_HD int64_t block(int32_t row, int32_t column) const {
        return int64_t(row) * num_chunks * (SAMPLE_CHUNK / SAMPLE_BLOCK) + column / SAMPLE_BLOCK;
    }
};

DFLASH_HD float widen(float x) { return x; }
DFLASH_HD float widen(uint16_t x) { return float_of_bf16(x); }

// Four neighbouring logits; -inf beyond the vocabulary. `aligned`: every row starts at a multiple of four elements' size.
template <typename E>
DFLASH_HD void load4(const E* row, int32_t column, int32_t vocab, bool aligned, float* out) {
#if DFLASH_ON_DEVICE
    if (aligned && column + 4 <= vocab) {
        if constexpr (sizeof(E) == 4) {
            float4 x = *reinterpret_cast<const float4*>(row + column);
            out[0] = x.x;
            out[1] = x.y;
            out[2] = x.z;
            out[3] = x.w;
        } else {
            uint2 x = *reinterpret_cast<const uint2*>(row + column);
            out[0] = float_of(x.x << 16);
            out[1] = float_of(x.x & 0xffff0000u);
            out[2] = float_of(x.y << 16);
            out[3] = float_of(x.y & 0xffff0000u);
        }
        return;
    }
#else
    // Where a GPU could not load them at once, tests are to notice.
    if (aligned && column + 4 <= vocab && (uint64_t(row + column) & (4 * sizeof(E) - 1)) != 0) __builtin_trap();
#endif
    DFLASH_UNROLL
    for (int32_t i = 0; i < 4; ++i) out[i] = column + i < vocab ? widen(row[column + i]) : -infinity();
}

template <typename E>
DFLASH_HD bool rows_aligned(const SampleRowsParams& p) {
    return ((uint64_t(p.logits) | uint64_t(p.row_stride) * sizeof(E)) & (4 * sizeof(E) - 1)) == 0;
}

// Raw logits to edited ones, in place.
DFLASH_HD void edit4(const SampleRowsParams& p, const OpenRow& row, const int32_t* path, const uint32_t* bits, int32_t first,
                     int32_t column, float* x) {
    uint32_t flags = bits[(column - first) / 32] >> ((column - first) % 32) & 15;
    if (flags == 0) return;
    DFLASH_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
        if (flags >> i & 1 && column + i < p.vocab) x[i] = edited(p, row, path, column + i, x[i]);
    }
}

// ---- partial results, merged in any order -----------------------------------------------------------------------------

struct Best {
    float score;
    uint32_t id;

    DFLASH_HD void offer(float other, uint32_t other_id) {
        if (other > score || (other == score && other_id < id)) {
            score = other;
            id = other_id;
        }
    }
};

DFLASH_HD Best nothing() { return {-infinity(), NO_COLUMN}; }

struct ScanState {
    Best top, draw;
    float raw_top;
    uint32_t bad;
};

DFLASH_HD ScanState scan_start() { return {nothing(), nothing(), -infinity(), 0}; }

DFLASH_HD void merge(ScanState& a, const ScanState& b) {
    a.top.offer(b.top.score, b.top.id);
    a.draw.offer(b.draw.score, b.draw.id);
    a.raw_top = b.raw_top > a.raw_top ? b.raw_top : a.raw_top;
    a.bad |= b.bad;
}

// Largest of a block's sixteen threads; the first of them writes it.
DFLASH_HD void put_maximum(float* at, float x, int32_t thread) {
#if DFLASH_ON_DEVICE
    for (int offset = 8; offset > 0; offset /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, offset);
        x = other > x ? other : x;
    }
    if (thread % 16 == 0) *at = x;
#else
    if (thread % 16 == 0 || x > *at) *at = x;
#endif
}

// Offers the draw's scores of four columns. `bar`: a score that somebody reached already.
DFLASH_HD void draw4(const Stream& stream, int32_t column, const float* t, const bool* kept, float bar, Best& best) {
    float largest = -infinity();
    DFLASH_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
        if (kept[i] && t[i] > largest) largest = t[i];
    }
    if (largest == -infinity()) return;
    Words words = stream.words(uint32_t(column));
    uint32_t word = words.w[0];
    DFLASH_UNROLL
    for (int32_t i = 1; i < 4; ++i) word = words.w[i] > word ? words.w[i] : word;
    // Strictly below, so that a tie with a lower id is still seen. Rounding is monotone, so the bound is exact.
    if (add(largest, gumbel_bound(word)) < bar) return;
    DFLASH_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
        if (kept[i] && t[i] > -infinity()) best.offer(add(t[i], gumbel_of_word(words.w[i])), uint32_t(column + i));
    }
}

// Raises `bar` to what any thread of the warp has reached: less work, same result.
DFLASH_HD float raise_bar(float bar) {
#if DFLASH_ON_DEVICE
    for (int offset = 16; offset > 0; offset /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, bar, offset);
        bar = other > bar ? other : bar;
    }
#endif
    return bar;
}

// ---- scan -------------------------------------------------------------------------------------------------------------
// Thread `thread` of 256 has columns first + part * 1024 + 4 * thread .. + 4, part = 0 .. 4, so that a 64-column block belongs to
// sixteen neighbouring threads.

constexpr int32_t SAMPLE_THREADS = 256;
constexpr int32_t SAMPLE_PARTS = SAMPLE_CHUNK / (4 * SAMPLE_THREADS);

template <typename E>
DFLASH_HD void load_parts(const SampleRowsParams& p, int32_t row, int32_t first, int32_t thread, float (*x)[4]) {
    const E* logits = static_cast<const E*>(p.logits) + int64_t(row) * p.row_stride;
    bool aligned = rows_aligned<E>(p);
    DFLASH_UNROLL
    for (int32_t part = 0; part < SAMPLE_PARTS; ++part)
        load4(logits, first + part * 4 * SAMPLE_THREADS + 4 * thread, p.vocab, aligned, x[part]);
}

// `x`: what load_parts gave. All lanes of a warp call it.
DFLASH_HD ScanState scan_thread(const SampleRowsParams& p, const SampleScratch& scratch, const OpenRow& row, int32_t index,
                                const int32_t* path, const uint32_t* bits, int32_t first, int32_t thread, float (*x)[4]) {
    ScanState state = scan_start();
    Stream stream(row.s.seed, row.position, DOMAIN_DRAW);
    bool edit = edits(row.s), plain = is_plain(row.s);
    float bar = -infinity();
    DFLASH_UNROLL
    for (int32_t part = 0; part < SAMPLE_PARTS; ++part) {
        int32_t column = first + part * 4 * SAMPLE_THREADS + 4 * thread;
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) state.raw_top = x[part][i] > state.raw_top ? x[part][i] : state.raw_top;
        if (edit) edit4(p, row, path, bits, first, column, x[part]);
        float largest = -infinity();
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
            state.bad |= is_bad(x[part][i]);
            if (x[part][i] > largest) largest = x[part][i];
            if (x[part][i] > state.top.score) state.top = {x[part][i], uint32_t(column + i)};
        }
        put_maximum(&scratch.maxima[scratch.block(index, column)], largest, thread);
        if (plain) {
            float t[4];
            bool kept[4];
            DFLASH_UNROLL
            for (int32_t i = 0; i < 4; ++i) {
                t[i] = mul(x[part][i], row.scale);
                kept[i] = true;
            }
            draw4(stream, column, t, kept, bar, state.draw);
            bar = raise_bar(state.draw.score > bar ? state.draw.score : bar);
        }
    }
    return state;
}

// ---- what the chunks say together ---------------------------------------------------------------------------------------

struct RowTop {
    float raw_top;
    float top; // largest t
    uint32_t top_id;
    int32_t status;
};

DFLASH_HD RowTop row_top(const OpenRow& row, const ScanState& all) {
    RowTop r;
    r.raw_top = all.raw_top;
    r.top = mul(all.top.score, row.scale);
    r.top_id = all.top.id;
    r.status = all.bad                                                      ? ROW_BAD_LOGIT
        : all.top.score == -infinity()                                      ? ROW_EMPTY
        : !is_greedy(row.s) && !(r.top > -infinity() && r.top < infinity()) ? ROW_OVERFLOW
                                                                            : ROW_OK;
    return r;
}

DFLASH_HD ScanState scan_of(const SampleChunk& c) { return {{c.top, c.top_id}, {c.best, c.best_id}, c.raw_top, c.bad}; }

// ---- mass -------------------------------------------------------------------------------------------------------------

// Bin of d = t - top: rises as d falls.
DFLASH_HD int32_t bin_of(float d) {
    float x = mul(d, -32.0f);
    return x < float(SAMPLE_BINS - 1) ? int32_t(x) : SAMPLE_BINS - 1;
}

// Adds the thread's columns to the block's bins and returns their raw mass.
DFLASH_HD uint64_t mass_thread(const SampleRowsParams& p, const OpenRow& row, const RowTop& top, const int32_t* path,
                               const uint32_t* bits, int32_t first, int32_t thread, float (*x)[4], uint32_t* counts,
                               uint64_t* masses) {
    uint64_t raw = 0;
    bool edit = edits(row.s), select = selects(row.s), nucleus = row.s.top_p < 1.0f;
    DFLASH_UNROLL
    for (int32_t part = 0; part < SAMPLE_PARTS; ++part) {
        int32_t column = first + part * 4 * SAMPLE_THREADS + 4 * thread;
        if (p.logprobs) {
            DFLASH_UNROLL
            for (int32_t i = 0; i < 4; ++i) {
                float d = sub(x[part][i], top.raw_top);
                if (d >= NEGLIGIBLE) raw += weight(d);
            }
        }
        if (!select) continue;
        if (edit) edit4(p, row, path, bits, first, column, x[part]);
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
            if (column + i >= p.vocab) continue;
            float d = sub(mul(x[part][i], row.scale), top.top);
            // Lighter columns change no sum; only top-k has to count them.
            if (d < NEGLIGIBLE && row.s.top_k <= 0) continue;
            int32_t bin = bin_of(d);
            atomic_add(&counts[bin], 1u);
            if (nucleus && d >= NEGLIGIBLE) atomic_add(&masses[bin], weight(d));
        }
    }
    return raw;
}

// ---- where the prefix ends ----------------------------------------------------------------------------------------------

// What is still allowed: columns, and mass before a column.
struct Budget {
    uint64_t count; // UINT64_MAX: no limit
    uint64_t mass;
};

DFLASH_HD Budget budget_of(const SamplingRow& s, uint64_t total_mass) {
    Budget b = {UINT64_MAX, UINT64_MAX};
    if (s.top_k > 0) b.count = uint64_t(s.top_k);
    if (s.top_p < 1.0f) {
#if DFLASH_ON_DEVICE
        b.mass = uint64_t(ceil(__dmul_rn(double(s.top_p), double(total_mass))));
#else
        b.mass = uint64_t(ceil(double(s.top_p) * double(total_mass)));
#endif
    }
    return b;
}

// Whether the prefix ends among columns of this count and mass.
DFLASH_HD bool ends_within(const Budget& b, uint64_t count, uint64_t mass) {
    return count > 0 && (count >= b.count || mass >= b.mass);
}

// The bin with the prefix's last column, and the budget left on entering it; SAMPLE_BINS if all columns are kept.
struct Edge {
    int32_t bin;
    Budget left;
};

// Looks for it among bins begin .. end, `left` being the budget on entering `begin`.
DFLASH_HD Edge edge_walk(const uint32_t* counts, const uint64_t* masses, int32_t begin, int32_t end, Budget left) {
    for (int32_t bin = begin; bin < end; ++bin) {
        if (ends_within(left, counts[bin], masses[bin])) return {bin, left};
        if (left.count != UINT64_MAX) left.count -= counts[bin];
        if (left.mass != UINT64_MAX) left.mass -= masses[bin];
    }
    return {SAMPLE_BINS, left};
}

// ---- pick -------------------------------------------------------------------------------------------------------------

DFLASH_HD uint64_t candidate_of(float t, uint32_t id) { return uint64_t(order_key(t)) << 32 | uint64_t(~id); }
DFLASH_HD float candidate_value(uint64_t c) { return value_of_key(uint32_t(c >> 32)); }
DFLASH_HD uint32_t candidate_id(uint64_t c) { return ~uint32_t(c); }

// Draws among kept columns ahead of the edge and lists those of the edge's bin. `edge` is SAMPLE_BINS without top-k and top-p.
template <typename E>
DFLASH_HD Best pick_thread(const SampleRowsParams& p, const SampleScratch& scratch, const OpenRow& row, int32_t index,
                           const RowTop& top, int32_t edge, const int32_t* path, const uint32_t* bits, int32_t first,
                           int32_t thread) {
    Best best = nothing();
    const E* logits = static_cast<const E*>(p.logits) + int64_t(index) * p.row_stride;
    Stream stream(row.s.seed, row.position, DOMAIN_DRAW);
    bool edit = edits(row.s), aligned = rows_aligned<E>(p);
    float bar = -infinity();
    DFLASH_UNROLL
    for (int32_t part = 0; part < SAMPLE_PARTS; ++part) {
        int32_t column = first + part * 4 * SAMPLE_THREADS + 4 * thread;
        float highest = sub(mul(scratch.maxima[scratch.block(index, column)], row.scale), top.top);
        // A column below the floor is never drawn, but it is listed if it counts towards where the prefix ends.
        bool seen = column < p.vocab && (edge < SAMPLE_BINS ? bin_of(highest) <= edge : highest >= row.floor);
        if (seen) {
            float x[4], t[4];
            bool kept[4];
            load4(logits, column, p.vocab, aligned, x);
            if (edit) edit4(p, row, path, bits, first, column, x);
            DFLASH_UNROLL
            for (int32_t i = 0; i < 4; ++i) {
                t[i] = mul(x[i], row.scale);
                float d = sub(t[i], top.top);
                int32_t bin = bin_of(d);
                kept[i] = column + i < p.vocab && bin < edge && d >= row.floor;
                if (column + i < p.vocab && bin == edge) {
                    uint32_t at = atomic_add(&scratch.listed[int64_t(index) * 4], 1u);
                    if (at < SAMPLE_CANDIDATES)
                        scratch.candidates[int64_t(index) * SAMPLE_CANDIDATES + at] = candidate_of(t[i], uint32_t(column + i));
                }
            }
            draw4(stream, column, t, kept, bar, best);
        }
        bar = raise_bar(best.score > bar ? best.score : bar);
    }
    return best;
}

// ---- finish -----------------------------------------------------------------------------------------------------------

// The columns of the edge's bin: listed, or looked for in the row when they did not fit the list.
template <typename E>
struct EdgeColumns {
    const SampleRowsParams& p;
    const SampleScratch& scratch;
    const OpenRow& row;
    const RowTop& top;
    const int32_t* path;
    int32_t index;
    int32_t bin;

    DFLASH_HD bool in_list() const { return scratch.listed[int64_t(index) * 4] <= SAMPLE_CANDIDATES; }
    DFLASH_HD int32_t size() const { return in_list() ? int32_t(scratch.listed[int64_t(index) * 4]) : p.vocab; }

    // Candidate `i`; false: none there.
    DFLASH_HD bool get(int32_t i, bool listed, uint64_t* out) const {
        if (listed) {
            *out = scratch.candidates[int64_t(index) * SAMPLE_CANDIDATES + i];
            return true;
        }
        float x = widen((static_cast<const E*>(p.logits) + int64_t(index) * p.row_stride)[i]);
        if (edits(row.s)) x = edited(p, row, path, i, x);
        float t = mul(x, row.scale);
        *out = candidate_of(t, uint32_t(i));
        return bin_of(sub(t, top.top)) == bin;
    }
};

// Radix selection, one digit of 8 bits: adds the thread's candidates that agree with `prefix` above `shift + 8`.
template <typename E>
DFLASH_HD void digit_thread(const EdgeColumns<E>& columns, bool listed, int32_t size, uint64_t prefix, int32_t shift,
                            uint32_t* counts, uint64_t* masses, int32_t thread, int32_t threads) {
    for (int32_t i = thread; i < size; i += threads) {
        uint64_t c;
        if (!columns.get(i, listed, &c)) continue;
        if (shift < 56 && (c >> (shift + 8)) != (prefix >> (shift + 8))) continue;
        int32_t digit = int32_t(c >> shift & 255);
        atomic_add(&counts[digit], 1u);
        atomic_add(&masses[digit], weight(sub(candidate_value(c), columns.top.top)));
    }
}

// One thread: the digit at which the prefix ends (largest digits first); `left` becomes the budget within it.
DFLASH_HD int32_t choose_digit(const uint32_t* counts, const uint64_t* masses, Budget& left) {
    int32_t last = 0;
    for (int32_t digit = 255; digit >= 0; --digit) {
        if (counts[digit] == 0) continue;
        last = digit;
        if (ends_within(left, counts[digit], masses[digit])) return digit;
        if (left.count != UINT64_MAX) left.count -= counts[digit];
        if (left.mass != UINT64_MAX) left.mass -= masses[digit];
    }
    return last; // all are kept: the smallest one ends the prefix
}

template <typename E>
DFLASH_HD Best edge_draw_thread(const EdgeColumns<E>& columns, bool listed, int32_t size, uint64_t last, int32_t thread,
                                int32_t threads) {
    Best best = nothing();
    Stream stream(columns.row.s.seed, columns.row.position, DOMAIN_DRAW);
    for (int32_t i = thread; i < size; i += threads) {
        uint64_t c;
        if (!columns.get(i, listed, &c) || c < last) continue;
        float t = candidate_value(c);
        if (!(sub(t, columns.top.top) >= columns.row.floor)) continue;
        uint32_t id = candidate_id(c);
        best.offer(add(t, gumbel_of_word(stream.word(id))), id);
    }
    return best;
}

DFLASH_HD float logprob_of(float logit, float raw_top, uint64_t mass) {
    return float(double(logit) - (double(raw_top) + log(double(mass) / 1099511627776.0)));
}

} // namespace dflash
