// What happens around a step's big kernels: its inputs (prepare_block), and what it keeps (accept).
#pragma once

#include "common.cuh"

namespace dflash {

// ---- prepare_block --------------------------------------------------------------------------------------------------

DFLASH_HD void prepare_token(const PrepareBlockParams& p, int32_t request, int32_t token, int32_t node) {
    int64_t id = node == 0 ? p.anchors[request]
        : p.drafts         ? p.drafts[int64_t(request) * p.draft_stride + node - 1]
                           : p.mask_token;
    int32_t context = p.context_lens[request];
    p.token_ids[token] = id;
    p.positions[token] = int64_t(context) + (p.depths ? p.depths[token] : node);
    if (p.slots) p.slots[token] = slot_of(p.table, request, context + node);
}

// Block `block` of num_requests + 1.
DFLASH_HD void prepare_block_body(const PrepareBlockParams& p, int32_t block, int32_t thread, int32_t threads) {
    if (block < p.num_requests) {
        int32_t first = p.query_starts[block];
        int32_t end = min_of(p.query_starts[block + 1], p.padded_tokens);
        for (int32_t token = first + thread; token < end; token += threads) prepare_token(p, block, token, token - first);
        return;
    }
    int32_t first = p.num_requests > 0 ? p.query_starts[p.num_requests] : 0;
    for (int32_t token = first + thread; token < p.padded_tokens; token += threads) {
        p.token_ids[token] = 0;
        p.positions[token] = 0;
        if (p.slots) p.slots[token] = -1;
    }
}

// ---- accept ---------------------------------------------------------------------------------------------------------
// A draft is hit when it carries the token drawn at its parent; of several hit siblings the first counts. So every node has at
// most one successor, all of them are found in parallel, and the walk follows them from the anchor.

struct AcceptBlock {
    int32_t first;   // packed token of node 0
    int32_t before;  // tokens kept ahead of it
    int32_t nodes;   // drawn rows
    int32_t live;    // nodes that take part in the walk
    int32_t row;     // logit row of node 0
    int32_t context; // keys before the step
    int32_t accepted;
    int32_t* next; // [max_nodes]
    int32_t* path; // [max_nodes]
};

DFLASH_HD void accept_open(const AcceptParams& p, AcceptBlock& b, int32_t request, int32_t* shared) {
    int32_t start = p.query_starts[request], len = p.query_starts[request + 1] - start;
    b.nodes = p.logit_starts ? p.logit_starts[request + 1] - p.logit_starts[request] : len;
    b.nodes = min_of(b.nodes, len);
    b.before = len - b.nodes;
    b.first = start + b.before;
    // Nodes beyond the room for them take no part, and what takes no part is not kept.
    b.live = min_of(p.node_counts ? min_of(p.node_counts[request], b.nodes) : b.nodes, p.max_nodes);
    b.row = p.logit_starts ? p.logit_starts[request] : b.first;
    b.context = p.context_lens[request];
    b.accepted = 0;
    b.next = shared;
    b.path = shared + p.max_nodes;
}

DFLASH_HD void accept_clear(const AcceptBlock& b, int32_t thread, int32_t threads) {
    // The walk looks at the anchor's even if not even that takes part.
    for (int32_t i = thread; i == 0 || i < b.live; i += threads) b.next[i] = INT32_MAX;
}

DFLASH_HD void accept_match(const AcceptParams& p, const AcceptBlock& b, int32_t thread, int32_t threads) {
    for (int32_t i = 1 + thread; i < b.live; i += threads) {
        int32_t parent = p.parents ? p.parents[b.first + i] : i - 1;
        if (parent < 0 || parent >= i) continue;
        int64_t token = p.token_ids[b.first + i];
        if (token >= 0 && token == p.sampled[b.row + parent]) atomic_min(&b.next[parent], i);
    }
}

DFLASH_HD void accept_walk(AcceptBlock& b) {
    if (b.nodes == 0) return;
    int32_t node = 0, accepted = 0;
    b.path[0] = 0;
    while (b.next[node] != INT32_MAX) {
        node = b.next[node];
        b.path[++accepted] = node;
    }
    b.accepted = accepted;
}

DFLASH_HD void accept_write(const AcceptParams& p, const AcceptBlock& b, int32_t request, int32_t thread, int32_t threads) {
    int32_t start = b.first - b.before, len = b.before + b.nodes;
    int32_t kept_nodes = b.nodes > 0 ? b.accepted + 1 : 0;
    int64_t bonus = b.nodes > 0 ? p.sampled[b.row + b.path[b.accepted]] : -1;
    int32_t out = bonus >= 0 ? kept_nodes : b.accepted;
    if (thread == 0) {
        p.accepted[request] = b.accepted;
        p.out_lens[request] = out;
        p.new_context_lens[request] = b.context + b.before + kept_nodes;
        p.next_anchors[request] = bonus;
    }
    for (int64_t i = thread; i < p.out_stride; i += threads) {
        int64_t token = -1;
        if (i < b.accepted) token = p.token_ids[b.first + b.path[i + 1]];
        else if (i < out) token = bonus;
        p.out_tokens[request * p.out_stride + i] = token;
    }
    if (p.path) {
        for (int64_t i = thread; i < p.path_stride; i += threads)
            p.path[request * p.path_stride + i] = i < kept_nodes ? b.path[i] : -1;
    }
    for (int32_t i = thread; i < len; i += threads) {
        bool kept = i < b.before + kept_nodes;
        int32_t row = i < b.before ? start + i : kept ? b.first + b.path[i - b.before] : -1;
        if (p.commit_rows) p.commit_rows[start + i] = row;
        if (p.commit_positions) p.commit_positions[start + i] = kept ? int64_t(b.context) + i : -1;
        if (p.commit_slots) p.commit_slots[start + i] = kept ? slot_of(p.table, request, b.context + i) : -1;
    }
}

} // namespace dflash
