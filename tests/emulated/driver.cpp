// Launches on a machine without a GPU: what reaches the driver is run by the kernels' host-compiled logic, at once and in order.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>

#include "params.h"

extern "C" {
void dflash_host_prepare_block(const PrepareBlockParams*);
void dflash_host_accept(const AcceptParams*);
void dflash_host_sample_f32(const SampleRowsParams*);
void dflash_host_sample_bf16(const SampleRowsParams*);
void dflash_host_kv_inject(const KvInjectParams*, int32_t);
void dflash_host_compact_kv(const CompactKvParams*);
void dflash_host_block_attention(const BlockAttentionParams*, int32_t);
void dflash_host_tree_top_k_f32(const TreeTopKParams*);
void dflash_host_tree_top_k_bf16(const TreeTopKParams*);
void dflash_host_tree_build(const TreeBuildParams*);
void dflash_host_delta_inputs(const DeltaRuleParams*);
void dflash_host_delta_rule(const DeltaRuleParams*, int32_t);

int run_kernel(const char* name, const void* p, unsigned cluster);
int dflash_launches(const char* name);
}

namespace {

std::map<std::string, int> launches;

bool starts(const char* name, const char* with) { return strncmp(name, with, strlen(with)) == 0; }

template <typename P>
int run(void (*function)(const P*), const void* p) {
    function(static_cast<const P*>(p));
    return 0;
}

} // namespace

// Launches of a kernel so far.
int dflash_launches(const char* name) { return launches[name]; }

int run_kernel(const char* name, const void* p, unsigned cluster) {
    ++launches[name];
    int32_t dim = int32_t(atoi(strrchr(name, '_') ? strrchr(name, '_') + 1 : "0"));
    bool attends = starts(name, "block_attention") && !starts(name, "block_attention_combine");
    auto* attention = static_cast<const BlockAttentionParams*>(p);
    if (cluster != (attends ? block_attention_launch(*attention, dim).cluster : 1)) return 1;
    if (starts(name, "prepare_block")) return run(dflash_host_prepare_block, p);
    if (starts(name, "accept")) return run(dflash_host_accept, p);
    if (starts(name, "compact_kv")) return run(dflash_host_compact_kv, p);
    if (starts(name, "tree_build")) return run(dflash_host_tree_build, p);
    if (starts(name, "tree_top_k_f32")) return run(dflash_host_tree_top_k_f32, p);
    if (starts(name, "tree_top_k_bf16")) return run(dflash_host_tree_top_k_bf16, p);
    // The host's functions run a family's kernels together: with the last of the draws, with the first of the attention.
    if (starts(name, "sample_finish_f32")) return run(dflash_host_sample_f32, p);
    if (starts(name, "sample_finish_bf16")) return run(dflash_host_sample_bf16, p);
    if (starts(name, "sample_") || starts(name, "block_attention_combine")) return 0;
    if (starts(name, "kv_inject")) return dflash_host_kv_inject(static_cast<const KvInjectParams*>(p), dim), 0;
    if (attends) return dflash_host_block_attention(attention, dim), 0;
    if (starts(name, "delta_inputs")) return run(dflash_host_delta_inputs, p);
    if (starts(name, "delta_rule")) return dflash_host_delta_rule(static_cast<const DeltaRuleParams*>(p), dim), 0;
    if (starts(name, "probe")) return 0;
    fprintf(stderr, "no such kernel: %s\n", name);
    return 1;
}
