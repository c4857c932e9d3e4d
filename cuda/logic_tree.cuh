// Draft trees: the best columns of a row without sorting it, and best-first building in the total order of src/draft/build.rs.
#pragma once

#include "logic_sample.cuh"

namespace dflash {

// ---- tree_top_k -------------------------------------------------------------------------------------------------------
// Every thread finds the largest of its own columns. The k-th largest of these is no more than the k-th largest of the row, and
// hardly less: the columns from there up are few, are gathered and sorted. Should they not fit (ties, or the best columns
// belong to few threads), the k-th largest itself is found by radix selection first.

constexpr int32_t TOP_THREADS = 512;
constexpr int32_t TOP_LISTED = 2048;

// A column as a number of the order (value falling, id rising). NaN and +inf count as -inf.
DFLASH_HD uint64_t top_candidate(float x, int32_t column) { return candidate_of(is_bad(x) ? -infinity() : x, uint32_t(column)); }

template <typename E>
struct TopRow {
    const E* values;
    int32_t vocab;
    bool aligned;

    DFLASH_HD TopRow(const TreeTopKParams& p, int32_t row) {
        values = static_cast<const E*>(p.values) + int64_t(row) * p.row_stride;
        vocab = p.vocab;
        aligned = ((uint64_t(p.values) | uint64_t(p.row_stride) * sizeof(E)) & (4 * sizeof(E) - 1)) == 0;
    }
};

// Largest candidate of a thread's columns; 0 if it has none.
template <typename E>
DFLASH_HD uint64_t top_largest(const TopRow<E>& row, int32_t thread) {
    uint64_t largest = 0;
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (int32_t column = 4 * thread; column < row.vocab; column += 4 * TOP_THREADS) {
        float x[4];
        load4(row.values, column, row.vocab, row.aligned, x);
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
            uint64_t c = top_candidate(x[i], column + i);
            if (column + i < row.vocab && c > largest) largest = c;
        }
    }
    return largest;
}

// Lists the thread's candidates from `least` up, `count` going on beyond what the list holds. Returns the mass of its columns
// relative to `top` if `mass` asks for it.
template <typename E>
DFLASH_HD uint64_t top_gather(const TopRow<E>& row, uint64_t least, float top, bool mass, uint64_t* list, uint32_t* count,
                              int32_t thread) {
    uint64_t sum = 0;
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (int32_t column = 4 * thread; column < row.vocab; column += 4 * TOP_THREADS) {
        float x[4];
        load4(row.values, column, row.vocab, row.aligned, x);
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
            if (column + i >= row.vocab) continue;
            uint64_t c = top_candidate(x[i], column + i);
            if (c >= least) {
                uint32_t at = atomic_add(count, 1u);
                if (at < TOP_LISTED) list[at] = c;
            }
            float d = sub(x[i], top);
            if (mass && d >= NEGLIGIBLE && d <= 0.0f) sum += weight(d);
        }
    }
    return sum;
}

// Radix selection of the k-th largest: counts the thread's candidates that agree with `prefix` above shift + 8.
template <typename E>
DFLASH_HD void top_digits(const TopRow<E>& row, uint64_t prefix, int32_t shift, uint32_t* counts, int32_t thread) {
    for (int32_t column = thread; column < row.vocab; column += TOP_THREADS) {
        uint64_t c = top_candidate(widen(row.values[column]), column);
        if (shift < 56 && (c >> (shift + 8)) != (prefix >> (shift + 8))) continue;
        atomic_add(&counts[c >> shift & 255], 1u);
    }
}

// One thread: the digit of the `rank`-th largest (from 1), which becomes its rank within the digit.
DFLASH_HD int32_t top_choose(const uint32_t* counts, uint32_t& rank) {
    for (int32_t digit = 255; digit > 0; --digit) {
        if (counts[digit] >= rank) return digit;
        rank -= counts[digit];
    }
    return 0;
}

DFLASH_HD int32_t power_of_two(int32_t n) {
    int32_t p = 1;
    while (p < n) p *= 2;
    return p;
}

// One step of a bitonic sort of n = 2^m numbers, falling; size = 2, 4 .. n, stride = size / 2 .. 1.
DFLASH_HD void sort_step(uint64_t* a, int32_t n, int32_t size, int32_t stride, int32_t thread, int32_t threads) {
    for (int32_t i = thread; i < n / 2; i += threads) {
        int32_t low = 2 * i - (i & (stride - 1)), high = low + stride;
        bool falling = (low & size) == 0;
        if ((a[low] < a[high]) == falling) {
            uint64_t x = a[low];
            a[low] = a[high];
            a[high] = x;
        }
    }
}

template <typename E>
DFLASH_HD void top_write(const TreeTopKParams& p, const TopRow<E>& row, int32_t index, const uint64_t* sorted, int32_t count,
                         float top, uint64_t mass, int32_t thread, int32_t threads) {
    for (int32_t i = thread; i < p.k; i += threads) {
        int64_t at = int64_t(index) * p.k + i;
        bool exists = i < count;
        uint32_t id = exists ? candidate_id(sorted[i]) : 0;
        float x = exists ? widen(row.values[id]) : -infinity();
        if (is_bad(x)) x = -infinity();
        if (p.normalise && x > -infinity()) {
            x = logprob_of(x, top, mass);
            x = x < 0.0f ? x : 0.0f;
        }
        p.tokens[at] = id;
        p.log_probs[at] = x;
    }
}

// ---- tree_build -------------------------------------------------------------------------------------------------------
// Instead of a heap, slots: taking node n out of slot s leaves room for its next sibling there, and its first child opens slot n.
// So the slots are as many as the nodes, a warp looks through them all at once, and what it takes is the greatest in a total
// order, whatever the slots' order.

struct TreeNodes {
    // Candidates, one per slot: order_key of the score (0: none), and depth, parent and rank, least first.
    uint32_t* keys;
    uint32_t* ties;
    // Nodes.
    float* scores;
    int32_t* parents;
    int32_t* depths;
    int32_t* ranks;
    int32_t* first_child;
    int32_t* next_sibling;
    int32_t* last_child;

    DFLASH_HD TreeNodes(void* shared, int32_t nodes) {
        keys = static_cast<uint32_t*>(shared);
        ties = keys + nodes;
        scores = reinterpret_cast<float*>(ties + nodes);
        parents = reinterpret_cast<int32_t*>(scores + nodes);
        depths = parents + nodes;
        ranks = depths + nodes;
        first_child = ranks + nodes;
        next_sibling = first_child + nodes;
        last_child = next_sibling + nodes;
    }
};

struct TreeBest {
    uint32_t key, tie;
    int32_t slot;
};

// Greatest of a lane's slots.
DFLASH_HD TreeBest tree_best(const TreeNodes& t, int32_t slots, int32_t lane) {
    TreeBest best = {0, 0, -1};
    for (int32_t slot = lane; slot < slots; slot += 32) {
        uint32_t key = t.keys[slot];
        if (key == 0 || key < best.key) continue;
        uint32_t tie = t.ties[slot];
        if (key > best.key || tie > best.tie) best = {key, tie, slot};
    }
    return best;
}

DFLASH_HD void tree_offer(const TreeBuildParams& p, TreeNodes& t, const float* log_probs, int32_t slot, int32_t parent,
                          int32_t rank) {
    t.keys[slot] = 0;
    int32_t depth = t.depths[parent];
    if (rank >= p.k || depth >= p.max_depth) return;
    float log_prob = log_probs[depth * p.k + rank];
    if (!(log_prob > -infinity())) return;
    t.keys[slot] = order_key(add(t.scores[parent], log_prob));
    t.ties[slot] = ~(uint32_t(depth) << 20 | uint32_t(parent) << 10 | uint32_t(rank));
}

DFLASH_HD void tree_open(const TreeBuildParams& p, TreeNodes& t, const float* log_probs) {
    t.scores[0] = 0.0f;
    t.parents[0] = -1;
    t.depths[0] = 0;
    t.ranks[0] = 0;
    t.first_child[0] = t.next_sibling[0] = t.last_child[0] = -1;
    tree_offer(p, t, log_probs, 0, 0, 0);
}

// One lane: `best` becomes node `node`.
DFLASH_HD void tree_take(const TreeBuildParams& p, TreeNodes& t, const float* log_probs, const TreeBest& best, int32_t node) {
    uint32_t packed = ~best.tie;
    int32_t parent = int32_t(packed >> 10 & 1023), rank = int32_t(packed & 1023);
    t.scores[node] = value_of_key(best.key);
    t.parents[node] = parent;
    t.depths[node] = int32_t(packed >> 20) + 1;
    t.ranks[node] = rank;
    t.first_child[node] = t.next_sibling[node] = t.last_child[node] = -1;
    int32_t last = t.last_child[parent];
    if (last < 0) t.first_child[parent] = node;
    else t.next_sibling[last] = node;
    t.last_child[parent] = node;
    tree_offer(p, t, log_probs, best.slot, parent, rank + 1);
    tree_offer(p, t, log_probs, node, node, 0);
}

DFLASH_HD void tree_write(const TreeBuildParams& p, const TreeNodes& t, int32_t request, int32_t count, int32_t lane) {
    int32_t nodes = p.max_nodes + 1, words = (nodes + 63) / 64;
    if (lane == 0) p.counts[request] = count;
    for (int32_t i = lane; i < nodes; i += 32) {
        int64_t at = int64_t(request) * nodes + i;
        bool exists = i < count, drafted = exists && i > 0;
        int32_t parent = exists ? t.parents[i] : 0;
        p.tokens[at] =
            drafted ? p.top_tokens[(int64_t(request) * p.max_depth + t.depths[i] - 1) * p.k + t.ranks[i]] : p.anchors[request];
        p.parents[at] = parent;
        p.depths[at] = exists ? t.depths[i] : 1;
        if (p.scores) p.scores[at] = exists ? t.scores[i] : -infinity();
        if (p.first_child) p.first_child[at] = exists ? t.first_child[i] : -1;
        if (p.next_sibling) p.next_sibling[at] = exists ? t.next_sibling[i] : -1;
        if (!p.masks) continue;
        for (int32_t w = 0; w < words; ++w) {
            uint64_t bits = 0;
            for (int32_t node = i; node >= 0; node = node == i ? parent : t.parents[node]) {
                if (node / 64 == w) bits |= uint64_t(1) << (node % 64);
            }
            p.masks[at * words + w] = bits;
        }
    }
}

DFLASH_HD int32_t tree_budget(const TreeBuildParams& p, int32_t request) {
    return p.budgets ? max_of(min_of(p.budgets[request], p.max_nodes), 0) : p.max_nodes;
}

} // namespace dflash
