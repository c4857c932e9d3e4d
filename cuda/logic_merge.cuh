// What the blocks of an attention found, and how it becomes one result: splits of the keys are merged in order, ATTENTION_MERGED of them
// to a group, then the groups. A cluster of blocks merges its group on the chip, the combining kernel all that lies in memory; both by
// the same arithmetic.
#pragma once

#include "logic_attention.cuh"

// Whether this code can be run by a cluster of blocks.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define DFLASH_CLUSTERS 0
#else
#define DFLASH_CLUSTERS 1
#endif

namespace dflash {

struct Stats {
    float largest, sum;
};

DFLASH_HD Stats load_stats(const float* at) {
#if DFLASH_ON_DEVICE
    float2 x = *reinterpret_cast<const float2*>(at);
    return {x.x, x.y};
#else
    return {at[0], at[1]};
#endif
}

// N neighbouring floats, N even, in accesses as wide as they allow.
template <int N>
DFLASH_HD void load_floats(const float* at, float* out) {
#if DFLASH_ON_DEVICE
    if constexpr (N % 4 == 0) {
        DFLASH_UNROLL
        for (int32_t i = 0; i < N; i += 4) {
            float4 x = *reinterpret_cast<const float4*>(at + i);
            out[i] = x.x;
            out[i + 1] = x.y;
            out[i + 2] = x.z;
            out[i + 3] = x.w;
        }
        return;
    }
    DFLASH_UNROLL
    for (int32_t i = 0; i < N; i += 2) {
        float2 x = *reinterpret_cast<const float2*>(at + i);
        out[i] = x.x;
        out[i + 1] = x.y;
    }
#else
    memcpy(out, at, N * sizeof(float));
#endif
}

DFLASH_HD void store2(uint16_t* at, float low, float high) {
    uint32_t x = pack2(low, high);
#if DFLASH_ON_DEVICE
    *reinterpret_cast<uint32_t*>(at) = x;
#else
    memcpy(at, &x, 4);
#endif
}

DFLASH_HD void store_pair(float* at, float first, float second) {
#if DFLASH_ON_DEVICE
    *reinterpret_cast<float2*>(at) = make_float2(first, second);
#else
    at[0] = first;
    at[1] = second;
#endif
}

// What a block leaves its cluster, in its shared memory: rows, with a gap that keeps the lanes of a store in banks of their own,
// and behind them the statistics of each.
template <int D, int ROWS>
struct LeftPart {
    static constexpr int32_t STRIDE = D + 8, FLOATS = ROWS * (STRIDE + 2);
    float* start;

    DFLASH_HD float* row(int32_t row) const { return start + row * STRIDE; }
    DFLASH_HD float* stats(int32_t row) const { return start + ROWS * STRIDE + 2 * row; }
};

// Results of a request with one split; otherwise what the split adds to them, to `left` or to memory.
template <typename W, int D, int ROWS>
DFLASH_HD void warp_write(const BlockAttentionParams& p, const AttentionTile& t, int32_t warp, WarpState<W, D>& s,
                          const LeftPart<D, ROWS>& left) {
    DFLASH_UNROLL
    for (int32_t half = 0; half < 2; ++half) {
        DFLASH_UNROLL
        for (int32_t offset = 1; offset < 4; offset *= 2) {
            typename W::template Reg<float> other = W::exchange(s.sums[half], offset);
            EACH_LANE(lane) s.sums[half][lane] = add(s.sums[half][lane], other[lane]);
        }
        EACH_LANE(lane) {
            int32_t row = warp * 16 + lane / 4 + 8 * half;
            AttentionRow r = attention_row(p, t, row);
            if (r.query < 0) continue;
            int64_t token = t.first_token + r.query;
            float sum = s.sums[half][lane];
            if (t.splits == 1) {
                uint16_t* out = p.out + token * p.out_stride[0] + r.head * p.out_stride[1] + 2 * (lane % 4);
                DFLASH_UNROLL
                for (int32_t n = 0; n < D / 8; ++n)
                    store2(out + 8 * n, div(s.out[n][2 * half][lane], sum), div(s.out[n][2 * half + 1][lane], sum));
                continue;
            }
            int64_t at = (int64_t(t.split) * p.max_tokens + token) * p.q_heads + r.head;
            bool leaves = DFLASH_CLUSTERS && p.clusters;
            float* stats = leaves ? left.stats(row) : p.partial_stats + 2 * at;
            float* out = (leaves ? left.row(row) : p.partial_out + at * D) + 2 * (lane % 4);
            if (lane % 4 == 0) store_pair(stats, s.largest[half][lane], sum);
            if (sum == 0.0f) continue; // nothing seen: not read
            DFLASH_UNROLL
            for (int32_t n = 0; n < D / 8; ++n) store_pair(out + 8 * n, s.out[n][2 * half][lane], s.out[n][2 * half + 1][lane]);
        }
    }
}

// Adds a part of a row, N elements of it, to those before it.
template <int N>
DFLASH_HD void add_part(const Stats& part, const float* values, float largest, float& sum, float* out) {
    if (part.sum == 0.0f) return; // nothing seen: what was loaded was never written
    float w = exp2_of(sub(part.largest, largest));
    sum = add(sum, mul(w, part.sum));
    DFLASH_UNROLL
    for (int32_t i = 0; i < N; ++i) out[i] = add(out[i], mul(w, values[i]));
}

// The group that the first `count` parts make, in order.
template <int N>
DFLASH_HD Stats merge_parts(const Stats* parts, const float (*values)[N], int32_t count, float* out) {
    Stats group = {-infinity(), 0.0f};
    DFLASH_UNROLL
    for (int32_t i = 0; i < ATTENTION_MERGED; ++i) {
        if (i < count) group.largest = fmaxf(group.largest, parts[i].largest);
    }
    DFLASH_UNROLL
    for (int32_t i = 0; i < N; ++i) out[i] = 0.0f;
    DFLASH_UNROLL
    for (int32_t i = 0; i < ATTENTION_MERGED; ++i) {
        if (i < count) add_part<N>(parts[i], values[i], group.largest, group.sum, out);
    }
    return group;
}

// A lane's N elements of a result.
template <int N>
DFLASH_HD void write_row(const BlockAttentionParams& p, int32_t token, int32_t head, int32_t lane, const float* out, float sum) {
    uint16_t* to = p.out + token * p.out_stride[0] + head * p.out_stride[1] + lane * N;
    DFLASH_UNROLL
    for (int32_t i = 0; i < N; i += 2) store2(to + i, div(out[i], sum), div(out[i + 1], sum));
}

// Splits of the tile's group, of which it has at least one.
DFLASH_HD int32_t splits_of_group(const AttentionTile& t) {
    return min_of(t.splits - t.split / ATTENTION_MERGED * ATTENTION_MERGED, ATTENTION_MERGED);
}

// A lane's D / 32 elements of one row: the group that a cluster's blocks have left, which is the result if there is no other.
template <int D, int ROWS, typename Cluster>
DFLASH_HD void merge_row(const BlockAttentionParams& p, const AttentionTile& t, const Cluster& cluster, int32_t row,
                         int32_t lane) {
    constexpr int32_t PER_LANE = D / 32;
    int32_t count = splits_of_group(t);
    Stats stats[ATTENTION_MERGED];
    float values[ATTENTION_MERGED][PER_LANE], out[PER_LANE];
    DFLASH_UNROLL
    for (int32_t i = 0; i < ATTENTION_MERGED; ++i) {
        LeftPart<D, ROWS> left = {cluster.of_block(min_of(i, count - 1))}; // the last one again, beyond it
        stats[i] = load_stats(left.stats(row));
        load_floats<PER_LANE>(left.row(row) + lane * PER_LANE, values[i]);
    }
    Stats group = merge_parts<PER_LANE>(stats, values, count, out);
    AttentionRow r = attention_row(p, t, row);
    int32_t token = t.first_token + r.query;
    if (t.splits <= ATTENTION_MERGED) return write_row<PER_LANE>(p, token, r.head, lane, out, group.sum);
    int64_t at = (int64_t(t.split / ATTENTION_MERGED) * p.max_tokens + token) * p.q_heads + r.head;
    if (lane == 0) store_pair(p.partial_stats + 2 * at, group.largest, group.sum);
    if (group.sum == 0.0f) return; // nothing seen: not read
    float* to = p.partial_out + at * D + lane * PER_LANE;
    DFLASH_UNROLL
    for (int32_t i = 0; i < PER_LANE; i += 2) store_pair(to + i, out[i], out[i + 1]);
}

// A lane's D / 32 elements of one token and head. Parts are loaded several at a time, none waiting for another, and added in order:
// splits, of which a group is made first, or groups that clusters made.
template <int D>
DFLASH_HD void combine_lane(const BlockAttentionParams& p, int64_t row, int32_t lane) {
    constexpr int32_t PER_LANE = D / 32, AT_ONCE = ATTENTION_MERGED;
    int32_t token = int32_t(row / p.q_heads), head = int32_t(row - int64_t(token) * p.q_heads);
    int32_t request = request_of(p.query_starts, p.num_requests, token);
    if (request < 0) return;
    int32_t keys = p.context_lens[request] + p.query_starts[request + 1] - p.query_starts[request];
    int32_t parts = int32_t(attention_parts(ceil_div(keys, p.split_keys), p.clusters));
    if (parts <= 1) return; // written already
    int64_t stride = int64_t(p.max_tokens) * p.q_heads;
    float largest = -infinity();
    for (int32_t first = 0; first < parts; first += AT_ONCE) {
        float found[AT_ONCE]; // the last part again, beyond the last
        DFLASH_UNROLL
        for (int32_t i = 0; i < AT_ONCE; ++i) found[i] = p.partial_stats[2 * (min_of(first + i, parts - 1) * stride + row)];
        DFLASH_UNROLL
        for (int32_t i = 0; i < AT_ONCE; ++i) largest = fmaxf(largest, found[i]);
    }
    float sum = 0.0f, out[PER_LANE];
    for (int32_t i = 0; i < PER_LANE; ++i) out[i] = 0.0f;
    for (int32_t first = 0; first < parts; first += AT_ONCE) {
        Stats stats[AT_ONCE];
        float values[AT_ONCE][PER_LANE], group[PER_LANE];
        DFLASH_UNROLL
        for (int32_t i = 0; i < AT_ONCE; ++i) {
            int64_t at = min_of(first + i, parts - 1) * stride + row;
            stats[i] = load_stats(p.partial_stats + 2 * at);
            load_floats<PER_LANE>(p.partial_out + at * D + lane * PER_LANE, values[i]);
        }
        if (!p.clusters) {
            Stats all = merge_parts<PER_LANE>(stats, values, parts - first, group);
            add_part<PER_LANE>(all, group, largest, sum, out);
            continue;
        }
        DFLASH_UNROLL
        for (int32_t i = 0; i < AT_ONCE; ++i) {
            if (first + i < parts) add_part<PER_LANE>(stats[i], values[i], largest, sum, out);
        }
    }
    write_row<PER_LANE>(p, token, head, lane, out, sum);
}

} // namespace dflash
