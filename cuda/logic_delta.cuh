// The gated delta rule behind a causal convolution: what is made of a token's inputs, and a state's walk over tokens.
//
// Same bits as src/device/host/delta: sums run in the same order, and what is fused there is fused here. The exponentials of the gates
// are the library's, in double precision and rounded once, so that another library's last bit all but never shows.
#pragma once

#include <math.h>

#include "common.cuh"

namespace dflash {

constexpr float DELTA_NORM_EPS = 1e-6f;

DFLASH_HD float rounded_bf16(float x) { return float_of_bf16(bf16_of_float(x)); }

// 2^x for x <= 0, to about one unit in the last place; exactly 0 below 2^-125.
DFLASH_HD float exp2_nonpositive(float x) {
    const float magic = 12582912.0f; // leaves round(x) in the low bits of a sum
    const float c[7] = {1.540353e-4f, 1.3333558e-3f, 9.618129e-3f, 5.550411e-2f, 2.402265e-1f, 0.69314718056f, 1.0f};
    float shifted = add(x, magic);
    float f = sub(x, sub(shifted, magic));
    float p = 1.5252734e-5f;
    DFLASH_UNROLL
    for (int i = 0; i < 7; ++i) p = fused(p, f, c[i]);
    return x < -125.0f ? 0.0f : float_of(bits_of(p) + (bits_of(shifted) << 23));
}

// x / (1 + exp(-x)).
DFLASH_HD float silu(float x) {
    float minus = sub(0.0f, x);
    float e = exp2_nonpositive(mul(sub(0.0f, x > minus ? x : minus), 1.44269504089f));
    float top = add(e, x < 0.0f ? 0.0f : sub(1.0f, e));
    return div(mul(x, top), add(1.0f, e));
}

// ---- a request in a pass ------------------------------------------------------------------------------------------------

struct DeltaWork {
    int64_t slot;    // where its state is
    int64_t target;  // where it goes
    int64_t made;    // its first row of made and scales
    int32_t start;   // its first packed token
    int32_t tokens;  // of its own
    int32_t pending; // to be folded in before
    int32_t total;
    int32_t end; // where the state after all of them goes, negative: nowhere
    bool active; // there is something to do
    bool sound;
    bool fresh; // its text begins here
    bool moves; // the state at `target` becomes another one
    bool keeps; // what it feeds in is kept
};

DFLASH_HD int32_t delta_channels(const DeltaRuleParams& p) { return 2 * p.key_heads * p.key_dim + p.value_heads * p.value_dim; }

DFLASH_HD int32_t delta_scales(const DeltaRuleParams& p) { return 2 * p.key_heads + 2 * p.value_heads; }

// Kept tokens that a request's state has yet to see, -1 where its context is out of reach. Nobody has a slot who has nothing to do.
DFLASH_HD int32_t delta_pending(const DeltaRuleParams& p, int32_t request) {
    int32_t context = p.context_lens[request];
    bool idle = p.query_starts[request] == p.query_starts[request + 1] && !p.into;
    if (context == 0 || idle) return 0;
    int32_t behind = context - p.stands[p.slots[request]];
    return behind >= 0 && behind <= p.block ? behind : -1;
}

// `pending`: what delta_pending said.
DFLASH_HD DeltaWork delta_work(const DeltaRuleParams& p, int32_t request, int32_t pending) {
    DeltaWork w;
    w.start = p.query_starts[request];
    w.tokens = p.query_starts[request + 1] - w.start;
    w.active = w.tokens > 0 || p.into != nullptr;
    w.sound = pending >= 0;
    w.pending = w.sound ? pending : 0;
    w.total = w.pending + w.tokens;
    w.made = w.start + int64_t(request) * p.block;
    w.slot = p.slots[request];
    w.target = p.into ? p.into[request] : w.slot;
    w.fresh = p.context_lens[request] == 0;
    w.moves = w.fresh || w.pending > 0 || p.into != nullptr;
    w.keeps = w.tokens <= p.block && p.into == nullptr;
    w.end = w.tokens > p.block && p.ends ? p.ends[request] : -1;
    return w;
}

// ---- delta_inputs -------------------------------------------------------------------------------------------------------
// A part is one head of query, key or value, or all gates. Sixteen lanes have one token of it, every sixteenth element each.

struct DeltaPart {
    int32_t channel; // first of the head
    int32_t width;   // 0: the gates
    int32_t scale;   // place of the head's scale, negative: it has none
};

DFLASH_HD DeltaPart delta_part(const DeltaRuleParams& p, int32_t index) {
    int32_t keys = 2 * p.key_heads;
    if (index < keys) return {index * p.key_dim, p.key_dim, index};
    index -= keys;
    if (index < p.value_heads) return {keys * p.key_dim + index * p.value_dim, p.value_dim, -1};
    return {0, 0, -1};
}

// Place `i` of what a request's convolution sees, its window first.
DFLASH_HD uint16_t delta_input(const DeltaRuleParams& p, const DeltaWork& w, int32_t i, int32_t channel) {
    int32_t before = p.taps - 1, k = i - before;
    int64_t channels = delta_channels(p);
    if (k < 0) return w.fresh ? uint16_t(0) : p.window[(w.slot * before + i) * channels + channel];
    if (k < w.pending) return p.kept[(w.slot * p.block + k) * channels + channel];
    return p.mixed[int64_t(w.start + k - w.pending) * channels + channel];
}

// What the convolution makes of token `k`.
DFLASH_HD uint16_t delta_made(const DeltaRuleParams& p, const DeltaWork& w, int32_t k, int32_t channel) {
    int32_t channels = delta_channels(p);
    float sum = 0.0f;
    for (int32_t tap = 0; tap < p.taps; ++tap)
        sum = fused(float_of_bf16(delta_input(p, w, k + tap, channel)), p.weight[int64_t(tap) * channels + channel], sum);
    return bf16_of_float(silu(rounded_bf16(sum)));
}

// Writes a lane's elements of token `k`; the sum of their squares.
DFLASH_HD float delta_make(const DeltaRuleParams& p, const DeltaWork& w, const DeltaPart& part, int32_t k, int32_t lane) {
    uint16_t* to = p.made + (w.made + k) * delta_channels(p) + part.channel;
    float sum = 0.0f;
    for (int32_t element = lane; element < part.width; element += 16) {
        uint16_t x = delta_made(p, w, k, part.channel + element);
        to[element] = x;
        sum = fused(float_of_bf16(x), float_of_bf16(x), sum);
    }
    return sum;
}

// `sum` of squares over a head.
DFLASH_HD void delta_measure(const DeltaRuleParams& p, const DeltaWork& w, const DeltaPart& part, int32_t k, float sum) {
    p.scales[(w.made + k) * delta_scales(p) + part.scale] = div(1.0f, sqrtf(add(sum, DELTA_NORM_EPS)));
}

// Beta and decay of a head at token `k`.
DFLASH_HD void delta_gate(const DeltaRuleParams& p, const DeltaWork& w, int32_t k, int32_t head) {
    int32_t width = 2 * p.value_heads;
    const uint16_t* given =
        k < w.pending ? p.kept_gates + (w.slot * p.block + k) * width : p.gates + int64_t(w.start + k - w.pending) * width;
    float* to = p.scales + (w.made + k) * delta_scales(p) + 2 * p.key_heads;
    double b = double(float_of_bf16(given[head]));
    to[head] = rounded_bf16(mul(rounded_bf16(float(1.0 / (1.0 + exp(-b)))), p.beta_scale));
    double x = double(add(float_of_bf16(given[p.value_heads + head]), p.dt_bias[head]));
    double softplus = x > 20.0 ? x : log1p(exp(x));
    to[p.value_heads + head] = float(exp(double(mul(p.decay[head], float(softplus)))));
}

// The window of a channel moves over what is folded in, and what came in is kept. The ends are read before anything changes; a place of
// the window is read by none after it.
DFLASH_HD void delta_settle(const DeltaRuleParams& p, const DeltaWork& w, int32_t channel) {
    int32_t before = p.taps - 1;
    int64_t channels = delta_channels(p);
    for (int32_t i = 0; w.end >= 0 && i < before; ++i)
        p.end_window[(int64_t(w.end) * before + i) * channels + channel] = delta_input(p, w, w.total + i, channel);
    for (int32_t i = 0; w.moves && i < before; ++i)
        p.window[(w.target * before + i) * channels + channel] = delta_input(p, w, w.pending + i, channel);
    for (int32_t k = 0; w.keeps && k < w.tokens; ++k)
        p.kept[(w.slot * p.block + k) * channels + channel] = p.mixed[int64_t(w.start + k) * channels + channel];
}

DFLASH_HD void delta_settle_gates(const DeltaRuleParams& p, const DeltaWork& w, int32_t thread, int32_t threads) {
    int32_t width = 2 * p.value_heads;
    if (!w.keeps) return;
    for (int32_t i = thread; i < w.tokens * width; i += threads)
        p.kept_gates[w.slot * p.block * width + i] = p.gates[int64_t(w.start) * width + i];
}

// ---- delta_rule ---------------------------------------------------------------------------------------------------------
// Two lanes of a warp have one column of a head's state: even and odd rows, whose sums the host keeps apart, too. Lane l and l + 16.

struct alignas(16) Four {
    float x[4];
};

DFLASH_HD Four load_four(const float* at) {
#if DFLASH_ON_DEVICE
    float4 x = *reinterpret_cast<const float4*>(at);
    return {{x.x, x.y, x.z, x.w}};
#else
    Four x;
    memcpy(&x, at, 16);
    return x;
#endif
}

// What some tokens bring along, as a block has it at hand.
template <int DK>
struct DeltaStage {
    static constexpr int32_t HALF = DK / 2 + 4, ROW = 2 * HALF;
    float* vectors; // [DELTA_STAGE, key and query, even and odd rows, HALF]
    float* values;  // [DELTA_STAGE, DELTA_COLUMNS]
    float* gates;   // [DELTA_STAGE, beta and decay]

    DFLASH_HD explicit DeltaStage(float* shared)
        : vectors(shared), values(shared + DELTA_STAGE * 2 * ROW), gates(values + DELTA_STAGE * DELTA_COLUMNS) {}

    DFLASH_HD const float* key(int32_t token, int32_t half) const { return vectors + token * 2 * ROW + half * HALF; }
    DFLASH_HD const float* query(int32_t token, int32_t half) const { return key(token, half) + ROW; }
    DFLASH_HD float value(int32_t token, int32_t column) const { return values[token * DELTA_COLUMNS + column]; }
    DFLASH_HD float beta(int32_t token) const { return gates[2 * token]; }
    DFLASH_HD float decay(int32_t token) const { return gates[2 * token + 1]; }
};

// Brings `count` tokens from `first` on, seen from a head and its columns from `column` on.
template <int DK>
DFLASH_HD void delta_fetch(const DeltaRuleParams& p, const DeltaWork& w, int32_t head, int32_t column, int32_t first,
                           int32_t count, const DeltaStage<DK>& stage, int32_t thread, int32_t threads) {
    int32_t keys = p.key_heads * DK, key_head = head / (p.value_heads / p.key_heads);
    const uint16_t* made = p.made + (w.made + first) * delta_channels(p);
    const float* scales = p.scales + (w.made + first) * delta_scales(p);
    float shrink = div(1.0f, sqrtf(float(DK)));
    for (int32_t i = thread; i < count * 2 * DK; i += threads) {
        int32_t token = i / (2 * DK), row = i % DK;
        bool query = i / DK % 2 != 0;
        float x = float_of_bf16(made[int64_t(token) * delta_channels(p) + (query ? 0 : keys) + key_head * DK + row]);
        x = mul(x, scales[int64_t(token) * delta_scales(p) + (query ? 0 : p.key_heads) + key_head]);
        int32_t place = row % 2 * stage.HALF + row / 2;
        stage.vectors[(2 * token + query) * stage.ROW + place] = query ? mul(x, shrink) : x;
    }
    for (int32_t i = thread; i < count * DELTA_COLUMNS; i += threads) {
        int32_t token = i / DELTA_COLUMNS, own = column + i % DELTA_COLUMNS;
        int64_t at = int64_t(token) * delta_channels(p) + 2 * keys + int64_t(head) * p.value_dim + own;
        stage.values[i] = own < p.value_dim ? float_of_bf16(made[at]) : 0.0f;
    }
    for (int32_t i = thread; i < count * 2; i += threads)
        stage.gates[i] = scales[int64_t(i / 2) * delta_scales(p) + 2 * p.key_heads + i % 2 * p.value_heads + head];
}

// Where a lane's rows of a column are; from one to the next there are `step` elements, twice a row of the state.
DFLASH_HD int64_t delta_column(const DeltaRuleParams& p, int64_t slot, int32_t head, int32_t column, int32_t half) {
    return ((slot * p.value_heads + head) * p.key_dim + half) * p.value_dim + column;
}

template <int DK>
DFLASH_HD void delta_load(const DeltaRuleParams& p, const DeltaWork& w, int32_t head, int32_t column, int32_t half, int32_t step,
                          float* s) {
    const float* from = p.memory + delta_column(p, w.slot, head, column, half);
    bool there = !w.fresh && column < p.value_dim;
    DFLASH_UNROLL
    for (int32_t j = 0; j < DK / 2; ++j, from += step) s[j] = there ? *from : 0.0f;
}

template <int DK>
DFLASH_HD void delta_store(const DeltaRuleParams& p, float* memory, int64_t slot, int32_t head, int32_t column, int32_t half,
                           int32_t step, const float* s) {
    if (column >= p.value_dim) return;
    float* to = memory + delta_column(p, slot, head, column, half);
    DFLASH_UNROLL
    for (int32_t j = 0; j < DK / 2; ++j, to += step) *to = s[j];
}

// One walk over a lane's rows. With WRITE a token's key is written, times `delta`, and what its query then reads is added to `out`; with
// READ the next token decays the state, and what its key then reads is added to `read`.
template <int DK, bool WRITE, bool READ>
DFLASH_HD void delta_walk(float* s, const float* key, const float* query, float delta, float& out, const float* next, float decay,
                          float& read) {
    DFLASH_UNROLL
    for (int32_t j = 0; j < DK / 2; j += 4) {
        Four k = {}, q = {}, n = {};
        if (WRITE) k = load_four(key + j), q = load_four(query + j);
        if (READ) n = load_four(next + j);
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
            float x = s[j + i];
            if (WRITE) {
                x = fused(k.x[i], delta, x);
                out = fused(x, q.x[i], out);
            }
            if (READ) {
                x = mul(x, decay);
                read = fused(x, n.x[i], read);
            }
            s[j + i] = x;
        }
    }
}

// Tokens that can be taken after `done` of them: no more than a stage has, and none beyond the fold with one before it.
DFLASH_HD int32_t delta_count(const DeltaWork& w, int32_t done) {
    return min_of(DELTA_STAGE, (done < w.pending ? w.pending : w.total) - done);
}

DFLASH_HD void delta_give(const DeltaRuleParams& p, const DeltaWork& w, int32_t token, int32_t head, int32_t column, float x) {
    if (token < w.pending || column >= p.value_dim) return;
    int64_t row = w.start + token - w.pending;
    p.out[(row * p.value_heads + head) * p.value_dim + column] = bf16_of_float(x);
}

} // namespace dflash
