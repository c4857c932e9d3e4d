// The target transform and the keyed draw of one row, in pieces that many threads share: same tokens as
// verify::Sampler::draw_row, whose module documents the arithmetic.
//
// Nothing is sorted and no probabilities are written down. What top-k and top-p keep is a prefix of the order (t falling, id
// rising), and weights are integers, so its end can be found by counting:
//
//   scan    largest logit and its column; maxima of 64-column blocks for rows with filters; the whole draw of those without
//   mass    counts and weights of 1024 bins of t - top, each 1/32 nat wide, and the one where the prefix ends; weight of the raw row
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

// exp(x) * 2^SCALE for x between -40 and 0, an even SCALE.
template <int32_t SCALE>
DFLASH_HD float scaled_exp(float x) {
    // As large as this a number has no fraction: adding rounds, and the lowest bits say to which integer.
    const float round = 12582912.0f + float(SCALE);
    float rounded = add(mul(x, 1.44269504089f), round);
    float n = sub(rounded, round);
    float r = sub(add_product(n, -0.6933594f, x), mul(n, -2.1219444e-4f));
    float p = 0.00139505f;
    p = add(mul(p, r), 0.008368896f);
    p = add(mul(p, r), 0.041666206f);
    p = add(mul(p, r), 0.16666518f);
    p = add(mul(p, r), 0.5f);
    float y = add(add(mul(mul(r, r), p), r), 1.0f);
    // Of the bits of `rounded` the shift leaves n + SCALE.
    return float_of(bits_of(y) + (bits_of(rounded) << 23));
}

// exp(x) for x <= 0; below -40 that of -40.
DFLASH_HD float exp_nonpositive(float x) { return scaled_exp<0>(x > -40.0f ? x : -40.0f); }

// round(exp(x) * 2^40), ties to even. On the host in integers, as the reference has it.
DFLASH_HD uint64_t weight(float x) {
#if DFLASH_ON_DEVICE
    return __float2ull_rn(scaled_exp<40>(x > -40.0f ? x : -40.0f));
#else
    uint32_t bits = bits_of(exp_nonpositive(x));
    // Where a GPU would round another number, tests are to notice.
    if (bits_of(scaled_exp<40>(x > -40.0f ? x : -40.0f)) != bits + (40u << 23)) __builtin_trap();
    int32_t exponent = int32_t(bits >> 23); // the value is positive and normal
    uint32_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    int32_t up = exponent - 110;
    if (up >= 0) return uint64_t(mantissa) << up;
    int32_t down = -up;
    if (down >= 25) return 0;
    uint32_t quotient = mantissa >> down, rest = mantissa & ((1u << down) - 1), half = 1u << (down - 1);
    return quotient + (rest > half || (rest == half && (quotient & 1)) ? 1 : 0);
#endif
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
    DFLASH_ROLLED
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
    uint32_t* listed;     // [rows, 4]: candidates; blocks that are done with `mass`; the bin of the edge
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

// Whether every row starts at a multiple of so many bytes.
template <typename E>
DFLASH_HD bool rows_aligned(const SampleRowsParams& p, uint32_t bytes) {
    return ((uint64_t(p.logits) | uint64_t(p.row_stride) * sizeof(E)) & (bytes - 1)) == 0;
}

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

// Columns of 16 bytes.
template <typename E>
constexpr int32_t WIDTH = 16 / int32_t(sizeof(E));

// N words of memory at once.
template <int N>
DFLASH_HD void load_words(const void* from, uint32_t* out) {
#if DFLASH_ON_DEVICE
    if constexpr (N == 4) {
        uint4 x = *static_cast<const uint4*>(from);
        out[0] = x.x;
        out[1] = x.y;
        out[2] = x.z;
        out[3] = x.w;
    } else {
        uint2 x = *static_cast<const uint2*>(from);
        out[0] = x.x;
        out[1] = x.y;
    }
#else
    if (uint64_t(from) % (4 * N) != 0) __builtin_trap();
    memcpy(out, from, 4 * N);
#endif
}

// Four raw logits to edited ones, in place.
DFLASH_HD void edit4(const SampleRowsParams& p, const OpenRow& row, const int32_t* path, const uint32_t* bits, int32_t first,
                     int32_t column, float* x) {
    uint32_t flags = bits[(column - first) / 32] >> ((column - first) % 32) & 15;
    DFLASH_ROLLED
    for (; flags != 0; flags &= flags - 1) {
        int32_t mine = lowest_bit(flags);
        if (column + mine >= p.vocab) break;
        float raw = x[0];
        DFLASH_UNROLL
        for (int32_t i = 1; i < 4; ++i) raw = mine == i ? x[i] : raw;
        float value = edited(p, row, path, column + mine, raw);
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) x[i] = mine == i ? value : x[i];
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

// Larger for a larger t, and among equal ones for a lower column; 0 is below all.
DFLASH_HD uint64_t candidate_of(float t, uint32_t id) { return uint64_t(order_key(t)) << 32 | uint64_t(~id); }
DFLASH_HD float candidate_value(uint64_t c) { return value_of_key(uint32_t(c >> 32)); }
DFLASH_HD uint32_t candidate_id(uint64_t c) { return ~uint32_t(c); }

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

// What none of four columns scores more than, the largest logit among them given: as if it had the largest word. That is a fourth of the work of a
// bound for each, and lets few more groups through, whose columns draw4 then looks at one by one. Of -inf and the largest words it
// would be NaN: fmaxf drops it.
DFLASH_HD float bound4(float largest, float scale, const Words& words) {
    uint32_t word = words.w[0];
    DFLASH_UNROLL
    for (int32_t i = 1; i < 4; ++i) word = words.w[i] > word ? words.w[i] : word;
    return fmaxf(-infinity(), gumbel_bound(mul(largest, scale), word));
}

// Offers the draw's scores of those of four columns that may reach `bar`, which somebody reached already. The likeliest first: what
// it reaches mostly is out of reach for the others.
DFLASH_HD void draw4(const Stream& stream, int32_t column, const float* t, const bool* kept, float bar, Best& best) {
    Words words = stream.words(uint32_t(column));
    float bounds[4];
    DFLASH_UNROLL
    for (int32_t i = 0; i < 4; ++i) bounds[i] = kept[i] && t[i] > -infinity() ? gumbel_bound(t[i], words.w[i]) : -infinity();
    DFLASH_ROLLED
    for (int32_t turn = 0; turn < 4; ++turn) {
        float bound = bounds[0], x = t[0];
        uint32_t word = words.w[0], id = uint32_t(column);
        DFLASH_UNROLL
        for (int32_t i = 1; i < 4; ++i) {
            if (bounds[i] > bound) {
                bound = bounds[i];
                x = t[i];
                word = words.w[i];
                id = uint32_t(column + i);
            }
        }
        // Strictly below, so that a tie with a lower id is still seen.
        if (bound == -infinity() || bound < bar) return;
        float score = add(x, gumbel_of_word(word));
        best.offer(score, id);
        bar = score > bar ? score : bar;
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) bounds[i] = id == uint32_t(column + i) ? -infinity() : bounds[i];
    }
}

// ---- scan -------------------------------------------------------------------------------------------------------------
// A thread of 256 has 16 columns of a chunk: WIDTH neighbouring ones of each of its parts, so that a 64-column block belongs to
// neighbouring threads. Four neighbouring columns, which share a counter of the generator, are a group.

constexpr int32_t SAMPLE_THREADS = 256;
constexpr int32_t SAMPLE_COLUMNS = SAMPLE_CHUNK / SAMPLE_THREADS;
constexpr int32_t SAMPLE_GROUPS = SAMPLE_COLUMNS / 4;

// First column of the thread's group.
template <typename E>
DFLASH_HD int32_t group_column(int32_t first, int32_t thread, int32_t group) {
    constexpr int32_t OF_PART = WIDTH<E> / 4;
    return first + group / OF_PART * (WIDTH<E> * SAMPLE_THREADS) + WIDTH<E> * thread + 4 * (group % OF_PART);
}

// A thread's columns of a chunk as they lie in memory.
template <typename E>
struct Columns {
    uint32_t w[SAMPLE_COLUMNS * sizeof(E) / 4];
};

// WIDTH neighbouring columns where they cannot be loaded at once: the end of a row, or rows that are not aligned.
template <typename E>
DFLASH_HD void load_apart(const E* row, int32_t column, int32_t vocab, bool aligned, uint32_t* out) {
    constexpr int32_t PER_WORD = 4 / int32_t(sizeof(E)), WORDS = 4 / PER_WORD; // of four columns
    DFLASH_UNROLL
    for (int32_t at = 0; at < WIDTH<E>; at += 4) {
        uint32_t* words = out + at / PER_WORD;
        if (aligned && column + at + 4 <= vocab) {
            load_words<WORDS>(row + column + at, words);
            continue;
        }
        DFLASH_UNROLL
        for (int32_t i = 0; i < WORDS; ++i) {
            int32_t first = column + at + i * PER_WORD;
            if constexpr (sizeof(E) == 4) {
                words[i] = bits_of(first < vocab ? row[first] : -infinity());
            } else {
                uint32_t low = first < vocab ? row[first] : 0xff80u, high = first + 1 < vocab ? row[first + 1] : 0xff80u;
                words[i] = low | high << 16;
            }
        }
    }
}

template <typename E>
DFLASH_HD const E* row_logits(const SampleRowsParams& p, int32_t row) {
    return static_cast<const E*>(p.logits) + int64_t(row) * p.row_stride;
}

// The thread's columns of a row, -inf beyond the vocabulary. Nothing is done with them yet: all loads are under way together.
template <typename E>
DFLASH_HD Columns<E> load_columns(const SampleRowsParams& p, const E* logits, int32_t first, int32_t thread) {
    Columns<E> c;
    if (rows_aligned<E>(p, 16) && first + SAMPLE_CHUNK <= p.vocab) {
        const E* at = logits + group_column<E>(first, thread, 0);
        DFLASH_UNROLL
        for (int32_t part = 0; part < SAMPLE_COLUMNS / WIDTH<E>; ++part)
            load_words<4>(at + group_column<E>(0, 0, part * WIDTH<E> / 4), c.w + 4 * part);
    } else {
        bool aligned = rows_aligned<E>(p, 4 * sizeof(E));
        thread = seldom(thread);
        DFLASH_UNROLL
        for (int32_t part = 0; part < SAMPLE_COLUMNS / WIDTH<E>; ++part)
            load_apart(logits, group_column<E>(first, thread, part * WIDTH<E> / 4), p.vocab, aligned, c.w + 4 * part);
    }
    return c;
}

DFLASH_HD void unpack(const Columns<float>& c, float* x) {
    DFLASH_UNROLL
    for (int32_t i = 0; i < SAMPLE_COLUMNS; ++i) x[i] = float_of(c.w[i]);
}

DFLASH_HD void unpack(const Columns<uint16_t>& c, float* x) {
    DFLASH_UNROLL
    for (int32_t i = 0; i < SAMPLE_COLUMNS; i += 2) {
        x[i] = float_of(c.w[i / 2] << 16);
        x[i + 1] = float_of(c.w[i / 2] & 0xffff0000u);
    }
}

// Which of the thread's columns are edited, a bit each.
template <typename E>
DFLASH_HD uint32_t edited_flags(const uint32_t* bits, int32_t thread) {
    uint32_t flags = 0;
    thread = seldom(thread);
    DFLASH_UNROLL
    for (int32_t g = 0; g < SAMPLE_GROUPS; ++g) {
        int32_t at = group_column<E>(0, thread, g);
        flags |= (bits[at / 32] >> (at % 32) & 15) << (4 * g);
    }
    return flags;
}

// The thread's raw logits to edited ones, in place. One after the other: there are few.
template <typename E>
DFLASH_HD void edit_columns(const SampleRowsParams& p, const OpenRow& row, const int32_t* path, const uint32_t* bits,
                            int32_t first, int32_t thread, float* x) {
    DFLASH_ROLLED
    for (uint32_t flags = edited_flags<E>(bits, thread); flags != 0; flags &= flags - 1) {
        int32_t mine = lowest_bit(flags), column = group_column<E>(first, thread, mine / 4) + mine % 4;
        if (column >= p.vocab) break;
        float raw = x[0];
        DFLASH_UNROLL
        for (int32_t i = 1; i < SAMPLE_COLUMNS; ++i) raw = mine == i ? x[i] : raw;
        float value = edited(p, row, path, column, raw);
        DFLASH_UNROLL
        for (int32_t i = 0; i < SAMPLE_COLUMNS; ++i) x[i] = mine == i ? value : x[i];
    }
}

// Largest of the threads of a 64-column block; the first of them writes it. All lanes of a warp call it.
template <typename E>
DFLASH_HD void put_maximum(float* at, float x, int32_t thread) {
    constexpr int32_t THREADS = SAMPLE_BLOCK / WIDTH<E>;
#if DFLASH_ON_DEVICE
    for (int offset = THREADS / 2; offset > 0; offset /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, offset));
    if (thread % THREADS == 0) *at = x;
#else
    if (thread % THREADS == 0 || x > *at) *at = x;
#endif
}

// The larger of what is there and the threads' keys. All lanes of a warp call it.
DFLASH_HD void raise_key(uint32_t* at, uint32_t key, int32_t thread) {
#if DFLASH_ON_DEVICE
    key = __reduce_max_sync(0xffffffffu, key);
    if (thread % 32 == 0) atomic_max(at, key);
#else
    (void)thread;
    atomic_max(at, key);
#endif
}

// What a thread knows of its columns.
struct ThreadScan {
    float top;                   // largest logit after the edits; NaN if there is one
    uint32_t base;               // WIDTH columns from here on have it, those before do not
    float bounds[SAMPLE_GROUPS]; // of what a group's columns of the last chunk can score, where the scan draws
};

DFLASH_HD ThreadScan thread_scan() { return {-infinity(), NO_COLUMN, {}}; }

// What a row asks of the scan.
struct ScanAsks {
    bool edits, maxima;

    DFLASH_HD explicit ScanAsks(const SamplingRow& s) : edits(dflash::edits(s)), maxima(selects(s) || has_floor(s)) {}

    // is_plain.
    DFLASH_HD bool draw(const SamplingRow& s) const { return !maxima && !is_greedy(s); }
};

// A chunk behind those before. `x`: its logits; `maxima`: of the row's 64-column blocks; `raw_top`: the key of the largest logit before the edits, if
// the row has any, to which all threads add theirs. All lanes of a warp call it.
template <typename E>
DFLASH_HD void scan_thread(const SampleRowsParams& p, const OpenRow& row, const ScanAsks& asks, float* maxima, uint32_t* raw_top,
                           const int32_t* path, const uint32_t* bits, int32_t first, int32_t thread, float* x, ThreadScan& s) {
    if (asks.edits) {
        float largest = x[0];
        DFLASH_UNROLL
        for (int32_t i = 1; i < SAMPLE_COLUMNS; ++i) largest = larger(largest, x[i]);
        raise_key(raw_top, order_key(largest), thread);
        edit_columns<E>(p, row, path, bits, first, thread, x);
    }
    float largest[SAMPLE_GROUPS];
    DFLASH_UNROLL
    for (int32_t g = 0; g < SAMPLE_GROUPS; ++g) {
        const float* of = x + 4 * g;
        largest[g] = larger(larger(of[0], of[1]), larger(of[2], of[3]));
    }
    DFLASH_UNROLL
    for (int32_t g = 0; g < SAMPLE_GROUPS; g += WIDTH<E> / 4) {
        int32_t column = group_column<E>(first, thread, g);
        float of_part = largest[g];
        DFLASH_UNROLL
        for (int32_t i = 1; i < WIDTH<E> / 4; ++i) of_part = larger(of_part, largest[g + i]);
        if (asks.maxima) put_maximum<E>(maxima + column / SAMPLE_BLOCK, of_part, thread);
        if (of_part > s.top) s.base = uint32_t(column); // of a row with a NaN nobody asks
        s.top = larger(s.top, of_part);
    }
    if (asks.draw(row.s)) {
        Stream stream(row.s.seed, row.position, DOMAIN_DRAW);
        // Two at once: the registers of four would not do.
        DFLASH_UNROLL
        for (int32_t g = 0; g < SAMPLE_GROUPS; g += 2) {
            Words words[2];
            DFLASH_UNROLL
            for (int32_t i = 0; i < 2; ++i) words[i] = stream.counter(uint32_t(group_column<E>(first, thread, g + i)));
            philox4x32_10(words, stream.key0, stream.key1);
            DFLASH_UNROLL
            for (int32_t i = 0; i < 2; ++i) s.bounds[g + i] = bound4(largest[g + i], row.scale, words[i]);
        }
    }
}

DFLASH_HD float best_bound(const ThreadScan& s) {
    float bound = s.bounds[0];
    DFLASH_UNROLL
    for (int32_t g = 1; g < SAMPLE_GROUPS; ++g) bound = fmaxf(bound, s.bounds[g]);
    return bound;
}

// The thread's groups that may reach `bar`, a bit each.
DFLASH_HD uint32_t groups_above(const ThreadScan& s, float bar) {
    uint32_t groups = 0;
    DFLASH_UNROLL
    for (int32_t g = 0; g < SAMPLE_GROUPS; ++g) groups |= uint32_t(s.bounds[g] >= bar && s.bounds[g] > -infinity()) << g;
    return groups;
}

// The exact draw among these groups of the thread.
template <typename E>
DFLASH_HD Best draw_groups(const SampleRowsParams& p, const OpenRow& row, const E* logits, const int32_t* path,
                           const uint32_t* bits, int32_t first, int32_t thread, uint32_t groups, float bar) {
    Stream stream(row.s.seed, row.position, DOMAIN_DRAW);
    Best best = nothing();
    DFLASH_ROLLED
    for (int32_t g = 0; g < SAMPLE_GROUPS; ++g) {
        if (!(groups >> g & 1)) continue;
        int32_t column = group_column<E>(first, thread, g);
        float t[4];
        bool kept[4];
        load4(logits, column, p.vocab, rows_aligned<E>(p, 4 * sizeof(E)), t);
        if (edits(row.s)) edit4(p, row, path, bits, first, column, t);
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
            t[i] = mul(t[i], row.scale);
            kept[i] = true;
        }
        draw4(stream, column, t, kept, best.score > bar ? best.score : bar, best);
    }
    return best;
}

// The raw logit of a column; -inf beyond the vocabulary.
template <typename E>
DFLASH_HD float raw_of(const SampleRowsParams& p, int32_t index, int32_t column) {
    if (column >= p.vocab) return -infinity();
    return widen((static_cast<const E*>(p.logits) + int64_t(index) * p.row_stride)[column]);
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

// Of a chunk without columns.
DFLASH_HD SampleChunk chunk_start() { return {0, -infinity(), NO_COLUMN, -infinity(), 0, -infinity(), NO_COLUMN}; }

DFLASH_HD ScanState scan_of(const SampleChunk& c) { return {{c.top, c.top_id}, {c.best, c.best_id}, c.raw_top, c.bad}; }

// ---- mass -------------------------------------------------------------------------------------------------------------

// Bin of d = t - top: rises as d falls.
DFLASH_HD int32_t bin_of(float d) {
    float x = mul(d, -32.0f);
    return x < float(SAMPLE_BINS - 1) ? int32_t(x) : SAMPLE_BINS - 1;
}

// Bins of one block. A mass is in two halves: in shared memory the hardware adds 32 bits at a time.
template <int32_t N>
struct Bins {
    uint32_t counts[N];
    uint32_t low[N];
    uint32_t high[N];

    DFLASH_HD void clear(int32_t bin) { counts[bin] = low[bin] = high[bin] = 0; }
    DFLASH_HD uint64_t mass(int32_t bin) const { return uint64_t(high[bin]) << 32 | low[bin]; }
};

using BlockBins = Bins<SAMPLE_BINS>;
using Digits = Bins<256>;

template <int32_t N>
DFLASH_HD void add_mass(Bins<N>& bins, int32_t bin, uint64_t mass) {
    uint32_t low = uint32_t(mass), before = atomic_add(&bins.low[bin], low);
    uint32_t high = uint32_t(mass >> 32) + (before + low < low ? 1 : 0);
    if (high) atomic_add(&bins.high[bin], high);
}

// What the thread's raw logits weigh. A function of its own: few rows ask.
DFLASH_HD uint64_t raw_mass(const float* x, float raw_top) {
    uint64_t mass = 0;
    DFLASH_UNROLL
    for (int32_t i = 0; i < SAMPLE_COLUMNS; ++i) {
        float d = sub(x[i], raw_top);
        if (d >= NEGLIGIBLE) mass += weight(d);
    }
    return mass;
}

// What a row with top-k or top-p asks of its bins: only top-k needs counts, and only top-p masses.
struct Weighing {
    float scale, top;
    float lightest; // d = t - top from there on goes into the bins: above the last bin, or whatever changes a sum
    bool count, weigh;

    DFLASH_HD Weighing(const OpenRow& row, const RowTop& top)
        : scale(row.scale),
          top(top.top),
          lightest(row.s.top_k > 0 ? float_of(0xc1ffbfffu) : NEGLIGIBLE),
          count(row.s.top_k > 0),
          weigh(row.s.top_p < 1.0f) {}

    DFLASH_HD float d(float x) const { return sub(mul(x, scale), top); }

    // Adds `number` columns of one d to the block's bins. `rest` becomes less by those that top-k counts.
    DFLASH_HD void add(float d, uint32_t number, BlockBins& bins, uint32_t& rest) const {
        if (!(d >= lightest)) return;
        int32_t bin = bin_of(d);
        if (count) {
            atomic_add(&bins.counts[bin], number);
            rest -= number;
        }
        if (weigh && d >= NEGLIGIBLE) add_mass(bins, bin, number * weight(d));
    }
};

// Adds the thread's columns, one by one.
DFLASH_HD void add_each(const Weighing& w, const float* x, BlockBins& bins, uint32_t& rest) {
    DFLASH_UNROLL
    for (int32_t at = 0; at < SAMPLE_COLUMNS; at += 4) {
        float largest = fmaxf(fmaxf(x[at], x[at + 1]), fmaxf(x[at + 2], x[at + 3]));
        if (!(w.d(largest) >= w.lightest)) continue;
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) w.add(w.d(x[at + i]), 1, bins, rest);
    }
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

// Whether the prefix ends among columns of this count and mass. A budget is never 0: what ends there has columns.
DFLASH_HD bool ends_within(const Budget& b, uint64_t count, uint64_t mass) { return count >= b.count || mass >= b.mass; }

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

// Whether `pick` has to look at a block of columns. `edge` is SAMPLE_BINS without top-k and top-p.
DFLASH_HD bool is_seen(const SampleScratch& scratch, const OpenRow& row, int32_t index, const RowTop& top, int32_t edge,
                       int32_t column, int32_t vocab) {
    if (column >= vocab) return false;
    float highest = sub(mul(scratch.maxima[scratch.block(index, column)], row.scale), top.top);
    // A column below the floor is never drawn, but it is listed if it counts towards where the prefix ends.
    return edge < SAMPLE_BINS ? bin_of(highest) <= edge : highest >= row.floor;
}

// Draws among those of four columns that are kept and ahead of the edge, and lists those of the edge's bin.
template <typename E>
DFLASH_HD void pick4(const SampleRowsParams& p, const SampleScratch& scratch, const OpenRow& row, int32_t index,
                     const RowTop& top, int32_t edge, const int32_t* path, const uint32_t* bits, int32_t first, int32_t column,
                     float bar, Best& best) {
    if (column >= p.vocab) return;
    const E* logits = static_cast<const E*>(p.logits) + int64_t(index) * p.row_stride;
    float t[4];
    bool kept[4], any = false;
    load4(logits, column, p.vocab, rows_aligned<E>(p, 4 * sizeof(E)), t);
    if (edits(row.s)) edit4(p, row, path, bits, first, column, t);
    DFLASH_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
        t[i] = mul(t[i], row.scale);
        float d = sub(t[i], top.top);
        int32_t bin = bin_of(d);
        kept[i] = column + i < p.vocab && bin < edge && d >= row.floor;
        any = any || kept[i];
        if (column + i < p.vocab && bin == edge) {
            uint32_t at = atomic_add(&scratch.listed[int64_t(index) * 4], 1u);
            if (at < SAMPLE_CANDIDATES)
                scratch.candidates[int64_t(index) * SAMPLE_CANDIDATES + at] = candidate_of(t[i], uint32_t(column + i));
        }
    }
    if (any) draw4(Stream(row.s.seed, row.position, DOMAIN_DRAW), column, t, kept, bar, best);
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
                            Digits& digits, int32_t thread, int32_t threads) {
    for (int32_t i = thread; i < size; i += threads) {
        uint64_t c;
        if (!columns.get(i, listed, &c)) continue;
        if (shift < 56 && (c >> (shift + 8)) != (prefix >> (shift + 8))) continue;
        int32_t digit = int32_t(c >> shift & 255);
        atomic_add(&digits.counts[digit], 1u);
        add_mass(digits, digit, weight(sub(candidate_value(c), columns.top.top)));
    }
}

// One thread: the digit at which the prefix ends (largest digits first); `left` becomes the budget within it.
DFLASH_HD int32_t choose_digit(const Digits& digits, Budget& left) {
    int32_t last = 0;
    for (int32_t digit = 255; digit >= 0; --digit) {
        if (digits.counts[digit] == 0) continue;
        last = digit;
        if (ends_within(left, digits.counts[digit], digits.mass(digit))) return digit;
        if (left.count != UINT64_MAX) left.count -= digits.counts[digit];
        if (left.mass != UINT64_MAX) left.mass -= digits.mass(digit);
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
