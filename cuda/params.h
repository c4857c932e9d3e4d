// Arguments of every kernel, and how each is launched. Plain data: the Rust side mirrors these structs field by field.
//
// Promises of every kernel:
// - It takes one parameter struct by value, runs on the caller's stream, allocates nothing and never synchronises with the
//   host, so it can be captured in a graph. All sizes that differ from step to step are read from device memory.
// - A launch whose `grid` holds a zero has nothing to do and must be skipped; that is a success.
// - Results do not depend on the order in which blocks or threads run.
// - Pointers are device pointers. "Nullable" ones may be 0. bfloat16 data are `uint16_t`. Strides count elements.
// - Pointers and strides of bfloat16 tensors are multiples of 16 bytes (8 elements); the head dimension is contiguous.
//
// Batch: `R` requests, packed to `T` tokens: request `r` owns tokens `query_starts[r] .. query_starts[r + 1]`, the anchor first.
// Its token `i` is "node `i`": position `context_lens[r] + i` in a chain, `context_lens[r] + depth(i)` in a tree; its KV lies in
// the slot of key `context_lens[r] + i` either way. slot(j) = page_table[row_ids[r]][j / page_size] * page_size + j % page_size.
#pragma once

#include <stdint.h>

// How to launch: `block` threads in one dimension, `shared` bytes of dynamic shared memory (above 48 KiB the kernel's
// attribute must be raised before the first launch).
struct Launch {
    uint32_t grid[3];
    uint32_t block;
    uint32_t shared;
    uint32_t cluster; // blocks along z that run together and read each other's shared memory; 1: each for itself
};

// Which keys of its own block a token sees (Rust: `device::Mask`).
enum MaskMode { MASK_CAUSAL = 0, MASK_BLOCK = 1, MASK_ANCESTORS = 2 };

// What stands in `logits`.
enum LogitType { LOGITS_F32 = 0, LOGITS_BF16 = 1 };

// Outcome of a sampled row. Anything but `ROW_OK` comes with token -1.
enum RowStatus {
    ROW_OK = 0,
    ROW_BAD_LOGIT = 1, // NaN or +inf
    ROW_EMPTY = 2,     // nothing but -inf
    ROW_OVERFLOW = 3,  // largest logit / temperature is not finite
};

// Where requests keep their KV: every family that touches a paged cache has one of these.
struct PageTable {
    const int32_t* pages;   // [rows, width]
    const int32_t* row_ids; // [R]
    int32_t width;
    int32_t page_size;
};

// ---------------------------------------------------------------------------------------------------------------------
// prepare_block: tokens, positions and slots of a step.
//   token of node 0 = anchors[r]; of node i = drafts[r * draft_stride + i - 1], or mask_token where `drafts` is 0.
//   position = context_lens[r] + (depths ? depths[token] : i); slot of key context_lens[r] + i, -1 beyond the table.
//   Tokens query_starts[R] .. padded_tokens (a graph's padding) get token 0, position 0, slot -1.
struct PrepareBlockParams {
    const int32_t* query_starts; // [R + 1]
    const int32_t* context_lens; // [R]
    const int64_t* anchors;      // [R]
    const int64_t* drafts;       // nullable, [R, draft_stride]
    const int32_t* depths;       // nullable, [T]; a chain without
    struct PageTable table;
    int64_t* token_ids; // [padded_tokens]
    int64_t* positions; // [padded_tokens]
    int64_t* slots;     // nullable, [padded_tokens]
    int64_t mask_token;
    int64_t draft_stride;
    int32_t num_requests;
    int32_t padded_tokens;
};

// ---------------------------------------------------------------------------------------------------------------------
// kv_inject_{64,128,256} (by head_dim): drafter K and V of committed tokens, all layers.
//   For m < max_rows with slots[m] >= 0: source row s = rows ? rows[m] : m of `kv` (rows[m] < 0 is skipped too)
//     K = RoPE_positions[m](RMSNorm(k) * k_norm[layer]) -> k_caches[layer][slots[m]];  V = v -> v_caches[layer][slots[m]]
//   k of head h at kv + s * row_stride + layer * layer_stride + h * D; v at the same place + v_offset.
//   cos_sin row p: cos of the rotary_dim / 2 frequencies, then their sin (f32); pairs are (d, d + rotary_dim / 2).
//   rotary_dim is a multiple of 16, at most D. Computed in f32, rounded once to bfloat16.
struct KvInjectParams {
    const uint16_t* kv;
    const uint16_t* k_norm;   // [layers, D]
    const float* cos_sin;     // [>= largest position + 1, rotary_dim]
    const int64_t* rows;      // nullable, [max_rows]
    const int64_t* positions; // [max_rows]
    const int64_t* slots;     // [max_rows]
    const uint64_t* k_caches; // [layers] device addresses of [num_slots, heads, D]
    const uint64_t* v_caches; // [layers]
    int64_t row_stride;
    int64_t layer_stride;
    int64_t v_offset;
    int64_t slot_stride; // of the caches
    int64_t head_stride; // of the caches
    int32_t max_rows;
    int32_t num_layers;
    int32_t num_heads; // KV heads
    int32_t rotary_dim;
    float eps;
    int32_t reserved;
};

// ---------------------------------------------------------------------------------------------------------------------
// block_attention_{64,128,256} or block_attention_wide_128 (attention_rows), then block_attention_combine_{64,128,256}.
//   out = softmax(scale * q . K^T) V over the keys that mask and window leave visible (HostKernels::block_attention), with
//   soft cap and sinks where they are given.
//   Keys below context_lens[r] come from the caches, the request's own from k and v; with `slots` those are stored as well.
//   Keys are cut at fixed multiples of split_keys (a multiple of 64). Splits are merged in order, ATTENTION_MERGED of them to a
//   group, then the groups: a row's bits do not depend on other requests, nor on num_splits, which only has to cover the longest
//   request, nor on `clusters`.
//   With `clusters` (what compute capability 9.0 and later can do) the blocks of a group form a cluster and merge it on the chip: a
//   partial result in memory is then a group, without it is a split. With one (attention_parts) the combine kernel has nothing to do.
struct BlockAttentionParams {
    const uint16_t* q; // [T, q_heads, D]
    const uint16_t* k; // [T, kv_heads, D]
    const uint16_t* v; // [T, kv_heads, D]
    uint16_t* k_cache; // [num_slots, kv_heads, D]
    uint16_t* v_cache;
    uint16_t* out;               // [T, q_heads, D]
    const int32_t* query_starts; // [R + 1]
    const int32_t* context_lens; // [R]
    const int32_t* valid_from;   // nullable, [R]
    const int64_t* slots;        // nullable, [T]; negative: not stored
    const uint64_t* ancestors;   // MASK_ANCESTORS: [T, mask_words]
    float* partial_out;          // parts > 1: [parts, max_tokens, q_heads, D], aligned to 16 bytes
    float* partial_stats;        // parts > 1: [parts, max_tokens, q_heads, 2], aligned to 8 bytes
    const float* sinks;          // nullable, [q_heads]: scores of one more key per head, without a value
    struct PageTable table;
    int64_t q_stride[2]; // token, head
    int64_t k_stride[2];
    int64_t v_stride[2];
    int64_t out_stride[2];
    int64_t k_cache_stride[2]; // slot, head
    int64_t v_cache_stride[2];
    int32_t num_requests;
    int32_t q_heads;
    int32_t kv_heads;
    int32_t max_tokens;    // T, or the padded number of rows in q
    int32_t max_block_len; // largest number of tokens of one request
    int32_t num_splits;    // >= ceil((context + tokens) / split_keys) of every request
    int32_t split_keys;
    int32_t mask; // MaskMode
    int32_t mask_words;
    int32_t window; // 0: none
    float scale;
    float softcap;    // scores become softcap * tanh(score / softcap); 0: they stay
    int32_t clusters; // 1: groups of splits are merged on the chip
    int32_t reserved;
};

// ---------------------------------------------------------------------------------------------------------------------
// sample_rows: sample_scan, sample_mass, sample_pick, sample_finish, each with _f32 or _bf16 (the type of `logits`).
//   The target transform and the keyed draw, same tokens as verify::Sampler::draw_row.
//   sample_mass is needed when a row has top_k or top_p or `logprobs` is wanted; sample_pick when a row has top_k, top_p or
//   min_p. Launching one that is not needed is harmless.
//   Row n belongs to packed token t = row_tokens ? row_tokens[n] : n; the token drawn has position positions[t] + 1; the path
//   for penalties are the drafts from the row's anchor (not counted: it is in the history) down to t.
//   Rows whose t is negative or not below query_starts[R] (a graph's padding) get token -1, status 0.
struct SamplingRow { // one per request
    uint64_t seed;
    float temperature;
    float top_p;
    float min_p;
    int32_t top_k;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    int32_t history_start, history_end; // into history_*: tokens of prompt and output, distinct and ascending
    int32_t bias_start, bias_end;       // into bias_*: distinct and ascending
    // bias_tokens[bias_end .. mask_end], distinct and ascending, cannot be drawn for positions below mask_before; their values are not read.
    int32_t mask_end, mask_before;
    // Node behind which its drafts begin: 0, or the last token of a chunk of prompt, whose tokens are no drafts.
    int32_t anchor;
};

struct SampleRowsParams {
    const void* logits;                 // [rows, row_stride]
    const struct SamplingRow* sampling; // [R]
    const int32_t* query_starts;        // [R + 1]
    const int32_t* row_tokens;          // nullable, [rows]
    const int64_t* token_ids;           // [T]
    const int64_t* positions;           // [T]
    const int32_t* parents;             // nullable (chain), [T] node index of the parent within the request
    const int32_t* history_tokens;
    const int32_t* history_counts; // occurrences in the output; 0: in the prompt alone
    const int32_t* bias_tokens;
    const float* bias_values;
    int64_t* tokens; // [rows]
    float* logprobs; // nullable, [rows] log-softmax of the raw logits, nats; NaN where the row failed
    int32_t* status; // [rows] RowStatus
    void* scratch;   // sample_scratch_bytes(rows, vocab), 16-byte aligned, any content
    int64_t row_stride;
    int32_t num_rows;
    int32_t num_requests;
    int32_t vocab; // at most 2^20
    int32_t reserved;
};

// ---------------------------------------------------------------------------------------------------------------------
// accept: walk, bonus, committed tokens, new lengths, next anchors.
//   Request r has n = logit_starts ? logit_starts[r + 1] - logit_starts[r] : its tokens, drawn rows for its last n tokens;
//   those before (a chunk of prompt) are kept anyway. n = 0: all are kept, no token comes out. Only the first node_counts[r] of
//   the n nodes take part in the walk. `sampled` is indexed by logit row (logit_starts[r] + node, or the packed token).
struct AcceptParams {
    const int32_t* query_starts; // [R + 1]
    const int32_t* logit_starts; // nullable, [R + 1]
    const int32_t* context_lens; // [R]
    const int32_t* node_counts;  // nullable, [R]
    const int64_t* token_ids;    // [T]
    const int32_t* parents;      // nullable (chain), [T] node index of the parent within the request
    const int64_t* sampled;      // drawn tokens; -1: the row failed
    struct PageTable table;      // read if commit_slots
    int32_t* accepted;           // [R] drafts accepted
    int64_t* out_tokens;         // [R, out_stride] accepted drafts, then the bonus, then -1
    int32_t* out_lens;           // [R] accepted + 1; without the bonus if its row failed or n = 0
    int32_t* new_context_lens;   // [R] keys that are valid now; may be context_lens itself
    int64_t* next_anchors;       // [R] the bonus, -1 if there is none
    int32_t* path;               // nullable, [R, path_stride] kept nodes of the n: 0, accepted nodes, then -1
    // nullable, [T]: entries of request r start at query_starts[r], one per kept token, then -1.
    int64_t* commit_rows;      // packed index
    int64_t* commit_positions; // final position
    int64_t* commit_slots;     // slot of that position
    int64_t out_stride;        // >= largest n
    int64_t path_stride;       // >= largest n
    int32_t num_requests;
    int32_t max_nodes; // largest number of tokens of one request, at most ACCEPT_MAX_NODES
};

// ---------------------------------------------------------------------------------------------------------------------
// tree_top_k_{f32,bf16}, then tree_build.
//   tree_top_k: the k best columns of each row, falling, lowest id first among equals (draft::top_k). With `normalise` the rows
//   are logits and log_probs are min(0, x - logsumexp); otherwise they are log-probabilities as they stand. k <= TREE_MAX_K.
struct TreeTopKParams {
    const void* values; // [rows, row_stride]
    int64_t* tokens;    // [rows, k]
    float* log_probs;   // [rows, k]
    int64_t row_stride;
    int32_t num_rows;
    int32_t vocab;
    int32_t k;
    int32_t normalise;
};

//   tree_build: DraftTree::build per request on its max_depth rows of top-k. Node 0 is the anchor. Nodes from counts[r] on are
//   padding that verifies as one more (unlikely) child of the anchor: token = anchor, parent 0, depth 1.
struct TreeBuildParams {
    const int64_t* anchors;    // [R]
    const int64_t* top_tokens; // [R, max_depth, k]
    const float* top_log_probs;
    const int32_t* budgets; // nullable, [R] nodes without the anchor, at most max_nodes
    int64_t* tokens;        // [R, max_nodes + 1]
    int32_t* parents;       // [R, max_nodes + 1]; -1 for the anchor
    int32_t* depths;        // [R, max_nodes + 1]
    float* scores;          // nullable
    int32_t* first_child;   // nullable, -1: none
    int32_t* next_sibling;  // nullable, -1: none
    uint64_t* masks;        // nullable, [R, max_nodes + 1, ceil((max_nodes + 1) / 64)]
    int32_t* counts;        // [R] nodes, the anchor included
    int32_t num_requests;
    int32_t max_depth; // at most 255
    int32_t k;         // at most 1023
    int32_t max_nodes; // without the anchor, at most TREE_MAX_NODES
};

// ---------------------------------------------------------------------------------------------------------------------
// compact_kv: KV of the accepted path moves from key context_lens[r] + path[k] to key context_lens[r] + k, all layers.
//   context_lens: the lengths *before* the step (the key of node 0). path entries rise; those after the first -1 are ignored.
struct CompactKvParams {
    const int32_t* path;         // [R, path_stride]
    const int32_t* context_lens; // [R]
    const uint64_t* k_caches;    // [layers] device addresses of [num_slots, heads, D]
    const uint64_t* v_caches;    // [layers]
    struct PageTable table;
    int64_t path_stride;
    int64_t slot_stride;
    int64_t head_stride;
    int32_t num_requests;
    int32_t num_layers;
    int32_t num_heads;
    int32_t head_dim; // a multiple of 8
};

// ---------------------------------------------------------------------------------------------------------------------
// delta_inputs, then delta_rule_{32,64,96,128,192,256} (by key_dim): one layer of a pass of the gated delta rule behind a causal
// convolution (HostKernels::delta_rule), for states that stand at the committed length.
//   The state in slot s = slots[r] has seen stands[s] tokens. A request's context says how many of the tokens that its last pass kept
//   it has to fold in first: context_lens[r] - stands[s] of them, 0..block; a text that begins (context 0) starts from nothing. From there
//   the request's own tokens run on, without moving the state; up to `block` of them are kept, for the next pass to fold in.
//   A request of more tokens is kept whole or not at all: with ends[r] >= 0 the state after it goes to that place of end_*.
//   With `into` the state after the fold goes to slot into[r], and nothing of slot s changes; such a call has no tokens (T = 0).
//   A request without tokens is left alone but for that, and its slot is not looked at. Where a context is not within reach of its state, `out` is NaN and
//   nothing else changes. Slots are distinct.
//   Two launches: what the convolution makes of a token is needed by several blocks, each with columns of some head's state, and the
//   window that it is made of moves on, which none of them could do before all others have read it.
//   made and scales have place for all tokens of the pass, folded ones included, those of request r from query_starts[r] + r * block on.
struct DeltaRuleParams {
    const uint16_t* mixed; // [T, C] what the convolution gets: query, key, value; C = 2 key_heads key_dim + value_heads value_dim
    const uint16_t* gates; // [T, 2 value_heads] b, then a
    const float* weight;   // [taps, C]
    const float* decay;    // [value_heads]
    const float* dt_bias;  // [value_heads]
    const int32_t* query_starts; // [R + 1]
    const int32_t* context_lens; // [R]
    const int64_t* slots;        // [R]
    const int64_t* into;         // nullable, [R]
    const int32_t* ends;         // nullable, [R]; negative: none
    float* memory;               // [num_slots, value_heads, key_dim, value_dim]
    uint16_t* window;            // [num_slots, taps - 1, C]
    uint16_t* kept;              // [rows, block, C]
    uint16_t* kept_gates;        // [rows, block, 2 value_heads]
    int32_t* stands;             // [num_slots]
    float* end_memory;           // [ends, value_heads, key_dim, value_dim]
    uint16_t* end_window;        // [ends, taps - 1, C]
    uint16_t* out;               // [T, value_heads, value_dim]
    uint16_t* made;              // [T + R block, C] scratch
    float* scales;    // [T + R block, 2 key_heads + 2 value_heads] scratch: 1 / length of queries and keys, beta, exp(g)
    int32_t* pending; // [R] scratch: tokens to fold in, -1 where that cannot be
    int32_t num_requests;
    int32_t num_tokens; // T, or the padded number of rows in mixed
    int32_t longest;    // largest number of tokens of one request
    int32_t block;
    int32_t key_heads;
    int32_t value_heads;
    int32_t key_dim;
    int32_t value_dim;
    int32_t taps; // at most DELTA_MAX_TAPS
    float beta_scale;
};

#define ACCEPT_MAX_NODES 1024
#define TREE_MAX_NODES 1023
#define TREE_MAX_K 256
#define DELTA_MAX_TAPS 8

// ---------------------------------------------------------------------------------------------------------------------
// Geometry. The Rust side repeats these formulae; the tests compare.

// Columns of a chunk.
#define SAMPLE_CHUNK 4096
// So many chunks at most belong to a block of sample_scan, sample_mass and sample_pick,
#define SAMPLE_PARTS 8
// and more than one only where that leaves so many blocks.
#define SAMPLE_FILLED 2048
// Width of the skip list's blocks.
#define SAMPLE_BLOCK 64
// Bins of the coarse histogram over (t - top).
#define SAMPLE_BINS 1024
// Candidates of the boundary bin that are kept per row; more take a slower path.
#define SAMPLE_CANDIDATES 2048
// Rows of a tile of block_attention, and of one of block_attention_wide.
#define ATTENTION_ROWS 64
#define ATTENTION_WIDE_ROWS 128
// Blocks from which on they are wide: a device runs one on a multiprocessor where it runs two others, and is to be left idle for no
// more than a small part of the time when they end.
#define ATTENTION_WIDE_BLOCKS 1024
// Splits of a group, which are merged first: as many blocks as a cluster has on every device that runs clusters.
#define ATTENTION_MERGED 8
// Tokens that one block of delta_inputs makes, at least.
#define DELTA_TILE 64
// Columns of a state that one block of delta_rule takes, and tokens that it has at hand.
#define DELTA_COLUMNS 64
#define DELTA_STAGE 16

#ifdef __cplusplus
#ifdef __CUDACC__
#define DFLASH_GEOMETRY __host__ __device__ inline
#else
#define DFLASH_GEOMETRY inline
#endif

DFLASH_GEOMETRY int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// prepare_block: a block per request and one for the padding.
DFLASH_GEOMETRY Launch prepare_block_launch(const PrepareBlockParams& p) {
    return {{p.padded_tokens > 0 ? uint32_t(p.num_requests) + 1 : 0, 1, 1}, 64, 0, 1};
}

// kv_inject: D / 8 threads per head vector, 256 threads per block.
DFLASH_GEOMETRY Launch kv_inject_launch(const KvInjectParams& p, int32_t head_dim) {
    int64_t units = int64_t(p.max_rows) * p.num_layers * 2 * p.num_heads;
    return {{uint32_t(ceil_div(units, 256 / (head_dim / 8))), 1, 1}, 256, 0, 1};
}

// block_attention: x = request and KV head, y = tile of queries, z = split. Clusters are powers of two, and divide the splits.
DFLASH_GEOMETRY int32_t attention_queries(int32_t q_heads, int32_t kv_heads, int32_t rows) {
    int32_t group = q_heads / kv_heads;
    return group >= rows ? 1 : rows / group;
}
// Rows of its tiles: wide ones where a request has more rows than others hold, and there are blocks enough: keys are then loaded for
// twice as many rows. (Heads of 128 alone: on small devices wider ones have no shared memory for it.) No bit depends on it.
DFLASH_GEOMETRY int32_t attention_rows(const BlockAttentionParams& p, int32_t head_dim) {
    int64_t tiles = ceil_div(p.max_block_len, attention_queries(p.q_heads, p.kv_heads, ATTENTION_WIDE_ROWS));
    bool several = int64_t(p.max_block_len) * (p.q_heads / p.kv_heads) > ATTENTION_ROWS;
    bool many = int64_t(p.num_requests) * p.kv_heads * tiles * p.num_splits >= ATTENTION_WIDE_BLOCKS;
    return head_dim == 128 && several && many ? ATTENTION_WIDE_ROWS : ATTENTION_ROWS;
}
// Keys of a tile.
DFLASH_GEOMETRY int32_t attention_keys(int32_t head_dim) { return head_dim > 128 ? 32 : 64; }

// Partial results of a row in memory.
DFLASH_GEOMETRY int64_t attention_parts(int64_t splits, int32_t clusters) {
    return clusters ? ceil_div(splits, ATTENTION_MERGED) : splits;
}

// A group has at most ATTENTION_ROWS query heads.
DFLASH_GEOMETRY Launch block_attention_launch(const BlockAttentionParams& p, int32_t head_dim) {
    int32_t rows = attention_rows(p, head_dim);
    uint32_t tiles = uint32_t(ceil_div(p.max_block_len, attention_queries(p.q_heads, p.kv_heads, rows)));
    // Queries; two stages of keys and values; two rows of places, of a key and its value each.
    uint32_t keys = uint32_t(attention_keys(head_dim));
    uint32_t shared = 2 * uint32_t(head_dim) * (uint32_t(rows) + 4 * keys) + 2 * keys * 16;
    uint32_t cluster = 1;
    while (p.clusters && cluster < ATTENTION_MERGED && cluster < uint32_t(p.num_splits)) cluster *= 2;
    uint32_t splits = uint32_t(ceil_div(p.num_splits, cluster)) * cluster;
    return {{uint32_t(p.num_requests * p.kv_heads), tiles, splits}, 2 * uint32_t(rows), shared, cluster};
}

// block_attention_combine: a warp per token and head.
DFLASH_GEOMETRY Launch block_attention_combine_launch(const BlockAttentionParams& p) {
    uint32_t blocks =
        attention_parts(p.num_splits, p.clusters) > 1 ? uint32_t(ceil_div(int64_t(p.max_tokens) * p.q_heads, 4)) : 0;
    return {{blocks, 1, 1}, 128, 0, 1};
}

// sample_scan, sample_mass, sample_pick: x = row; of its chunks a block has number y and those a multiple of the grid's y behind it.
DFLASH_GEOMETRY Launch sample_chunk_launch(const SampleRowsParams& p) {
    int64_t chunks = ceil_div(p.vocab, SAMPLE_CHUNK), parts = p.num_rows * chunks / SAMPLE_FILLED;
    parts = parts < 1 ? 1 : parts > SAMPLE_PARTS ? SAMPLE_PARTS : parts;
    return {{uint32_t(p.num_rows), uint32_t(ceil_div(chunks, parts)), 1}, 256, 0, 1};
}
// sample_finish: a block per row.
DFLASH_GEOMETRY Launch sample_finish_launch(const SampleRowsParams& p) {
    return {{p.vocab > 0 ? uint32_t(p.num_rows) : 0, 1, 1}, 256, 0, 1};
}

// One per row and chunk; that of a block's first chunk is of all of them.
struct SampleChunk {
    uint64_t mass;    // of the raw row, units of 2^-40 of its likeliest token
    float top;        // largest logit after the edits
    uint32_t top_id;  // its lowest column
    float raw_top;    // largest logit before
    uint32_t bad;     // a NaN or +inf was seen
    float best;       // largest score of the draw
    uint32_t best_id; // its lowest column
};

// Scratch, in this order: chunks, bin masses, candidates, bin counts, candidate counts, block maxima.
DFLASH_GEOMETRY uint64_t sample_scratch_bytes(int64_t rows, int64_t vocab) {
    uint64_t per_row = uint64_t(ceil_div(vocab, SAMPLE_CHUNK)) * sizeof(SampleChunk) + SAMPLE_BINS * 12 + SAMPLE_CANDIDATES * 8
        + 16 + uint64_t(ceil_div(vocab, SAMPLE_CHUNK)) * (SAMPLE_CHUNK / SAMPLE_BLOCK) * 4;
    return uint64_t(rows) * per_row;
}

// accept: a block per request; the next node of each node and the path in shared memory.
DFLASH_GEOMETRY Launch accept_launch(const AcceptParams& p) {
    return {{uint32_t(p.num_requests), 1, 1}, 128, uint32_t(p.max_nodes) * 8, 1};
}

// tree_top_k: a block per row.
DFLASH_GEOMETRY Launch tree_top_k_launch(const TreeTopKParams& p) {
    return {{p.k > 0 ? uint32_t(p.num_rows) : 0, 1, 1}, 512, 0, 1};
}
// tree_build: a warp per request; nodes in shared memory.
DFLASH_GEOMETRY Launch tree_build_launch(const TreeBuildParams& p) {
    uint32_t nodes = uint32_t(p.max_nodes) + 1;
    return {{uint32_t(p.num_requests), 1, 1}, 32, nodes * 48, 1};
}

// compact_kv: x = request, y = layer and K or V, z = 128 vectors of 8 elements.
DFLASH_GEOMETRY Launch compact_kv_launch(const CompactKvParams& p) {
    uint32_t vectors = uint32_t(p.num_heads) * uint32_t(p.head_dim / 8);
    return {{uint32_t(p.num_requests), uint32_t(p.num_layers) * 2, uint32_t(ceil_div(vectors, 128))}, 128, 0, 1};
}

// delta_inputs: x = request, y = head of query, key or value, then the gates, z = tile of tokens, of which the first one has all that the
// window and what was kept take part in.
DFLASH_GEOMETRY int32_t delta_tile(const DeltaRuleParams& p) {
    int32_t first = p.block + p.taps;
    return first > DELTA_TILE ? first : DELTA_TILE;
}
DFLASH_GEOMETRY Launch delta_inputs_launch(const DeltaRuleParams& p) {
    uint32_t parts = 2 * uint32_t(p.key_heads) + uint32_t(p.value_heads) + 1;
    uint32_t tiles = uint32_t(ceil_div(int64_t(p.longest) + p.block, delta_tile(p)));
    return {{uint32_t(p.num_requests), parts, tiles}, 128, 0, 1};
}
// delta_rule: x = request and value head, y = columns of the state; keys, queries and values of a stage of tokens in shared memory.
DFLASH_GEOMETRY Launch delta_rule_launch(const DeltaRuleParams& p) {
    // Even and odd rows lie apart, so that both halves of a warp read at once.
    uint32_t floats = DELTA_STAGE * (2 * uint32_t(p.key_dim + 8) + DELTA_COLUMNS + 2);
    return {{uint32_t(p.num_requests * p.value_heads), uint32_t(ceil_div(p.value_dim, DELTA_COLUMNS)), 1}, 128, 4 * floats, 1};
}

static_assert(sizeof(PageTable) == 24, "mirrored in Rust");
static_assert(sizeof(PrepareBlockParams) == 112, "mirrored in Rust");
static_assert(sizeof(KvInjectParams) == 128, "mirrored in Rust");
static_assert(sizeof(BlockAttentionParams) == 288, "mirrored in Rust");
static_assert(sizeof(SamplingRow) == 64, "mirrored in Rust");
static_assert(sizeof(SampleRowsParams) == 144, "mirrored in Rust");
static_assert(sizeof(AcceptParams) == 176, "mirrored in Rust");
static_assert(sizeof(TreeTopKParams) == 48, "mirrored in Rust");
static_assert(sizeof(TreeBuildParams) == 112, "mirrored in Rust");
static_assert(sizeof(CompactKvParams) == 96, "mirrored in Rust");
static_assert(sizeof(DeltaRuleParams) == 208, "mirrored in Rust");
#endif
