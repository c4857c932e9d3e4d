// The launch geometry of params.h behind C names.
#include "params.h"

extern "C" {
void dflash_geometry_prepare_block(const PrepareBlockParams* p, Launch* out) { *out = prepare_block_launch(*p); }
void dflash_geometry_kv_inject(const KvInjectParams* p, int32_t head_dim, Launch* out) { *out = kv_inject_launch(*p, head_dim); }
void dflash_geometry_block_attention(const BlockAttentionParams* p, int32_t head_dim, Launch* out) {
    *out = block_attention_launch(*p, head_dim);
}
void dflash_geometry_combine(const BlockAttentionParams* p, Launch* out) { *out = block_attention_combine_launch(*p); }
void dflash_geometry_sample_chunk(const SampleRowsParams* p, Launch* out) { *out = sample_chunk_launch(*p); }
void dflash_geometry_sample_finish(const SampleRowsParams* p, Launch* out) { *out = sample_finish_launch(*p); }
uint64_t dflash_geometry_sample_scratch(int64_t rows, int64_t vocab) { return sample_scratch_bytes(rows, vocab); }
void dflash_geometry_accept(const AcceptParams* p, Launch* out) { *out = accept_launch(*p); }
void dflash_geometry_tree_top_k(const TreeTopKParams* p, Launch* out) { *out = tree_top_k_launch(*p); }
void dflash_geometry_tree_build(const TreeBuildParams* p, Launch* out) { *out = tree_build_launch(*p); }
void dflash_geometry_compact_kv(const CompactKvParams* p, Launch* out) { *out = compact_kv_launch(*p); }
void dflash_geometry_delta_inputs(const DeltaRuleParams* p, Launch* out) { *out = delta_inputs_launch(*p); }
void dflash_geometry_delta_rule(const DeltaRuleParams* p, Launch* out) { *out = delta_rule_launch(*p); }
int32_t dflash_limit(int32_t which) {
    const int32_t limits[] = {ACCEPT_MAX_NODES, TREE_MAX_NODES, TREE_MAX_K, DELTA_MAX_TAPS};
    return limits[which];
}
}
