// The kernels on the host: the same functions, a kernel's threads one after the other between its barriers. For tests.
#include <string.h>

#include <memory>
#include <vector>

#include "logic_attention.cuh"
#include "logic_delta.cuh"
#include "logic_kv.cuh"
#include "logic_merge.cuh"
#include "logic_rng.cuh"
#include "logic_sample.cuh"
#include "logic_step.cuh"
#include "logic_tree.cuh"

using namespace dflash;

// The kernel files themselves, under an emulation of a block's threads.
#ifdef __linux__
#define DFLASH_EMULATED
#include "emulate.h"

#include "accept.cu"
#include "block_attention.cu"
#include "compact_kv.cu"
#include "delta.cu"
#include "kv_inject.cu"
#include "prepare_block.cu"
#include "sample_rows.cu"
#include "tree_build.cu"

#undef accept
#undef dynamic_shared
#undef asm
#undef volatile
#endif

#include "host_delta.h"
#include "host_sample.h"

namespace host {

template <int D>
void inject(const KvInjectParams& p) {
    constexpr int32_t LANES = D / 8, UNITS = 256 / LANES;
    Launch launch = kv_inject_launch(p, D);
    for (int64_t unit = 0; unit < int64_t(launch.grid[0]) * UNITS; ++unit) {
        InjectUnit u = inject_unit(p, unit);
        Vec8 x[LANES];
        float sums[LANES], normed[LANES][8];
        for (int32_t lane = 0; lane < LANES; ++lane) {
            x[lane] = inject_load<D>(p, u, lane);
            sums[lane] = sum_of_squares(x[lane]);
        }
        for (int32_t offset = LANES / 2; offset > 0; offset /= 2) {
            float before[LANES];
            memcpy(before, sums, sizeof(sums));
            for (int32_t lane = 0; lane < LANES; ++lane) sums[lane] = add(before[lane], before[lane ^ offset]);
        }
        for (int32_t lane = 0; lane < LANES; ++lane) inject_norm<D>(p, u, x[lane], sums[lane], lane, normed[lane]);
        if (!u.active) continue;
        for (int32_t lane = 0; lane < LANES; ++lane) {
            const float* other = normed[inject_partner(p.rotary_dim, lane)];
            inject_store<D>(p, u, u.is_v ? x[lane] : inject_rotate(p, u, normed[lane], other, lane), lane);
        }
    }
}

// All lanes of a warp, as the PTX manual lays fragments out.
struct HostWarp : HostAddressing {
    template <typename T>
    struct Reg {
        T v[32];
        T& operator[](int32_t lane) { return v[lane]; }
        const T& operator[](int32_t lane) const { return v[lane]; }
    };

    static int32_t first_lane() { return 0; }
    static int32_t lanes() { return 32; }

    static void load_matrices(const Reg<Address>& rows, int32_t element, bool transposed, Reg<uint32_t>* out) {
        for (int32_t matrix = 0; matrix < 4; ++matrix) {
            for (int32_t lane = 0; lane < 32; ++lane) {
                auto at = [&](int32_t row, int32_t column) {
                    const Address& from = rows[matrix * 8 + row];
                    return uint32_t(from.start[from.element + element + column]);
                };
                int32_t g = lane / 4, t = 2 * (lane % 4);
                out[matrix][lane] = transposed ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
            }
        }
    }

    static void multiply(Reg<float>* c, const Reg<uint32_t>* a, const Reg<uint32_t>* b) {
        float x[16][16], y[16][8];
        for (int32_t lane = 0; lane < 32; ++lane) {
            int32_t g = lane / 4, t = 2 * (lane % 4);
            for (int32_t i = 0; i < 2; ++i) {
                auto half = [&](uint32_t bits) { return float_of_bf16(uint16_t(bits >> (16 * i))); };
                x[g][t + i] = half(a[0][lane]);
                x[g + 8][t + i] = half(a[1][lane]);
                x[g][t + 8 + i] = half(a[2][lane]);
                x[g + 8][t + 8 + i] = half(a[3][lane]);
                y[t + i][g] = half(b[0][lane]);
                y[t + 8 + i][g] = half(b[1][lane]);
            }
        }
        for (int32_t lane = 0; lane < 32; ++lane) {
            for (int32_t e = 0; e < 4; ++e) {
                int32_t row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
                float sum = c[e][lane];
                for (int32_t k = 0; k < 16; ++k) sum += x[row][k] * y[k][column];
                c[e][lane] = sum;
            }
        }
    }

    static Reg<float> exchange(const Reg<float>& x, int32_t mask) {
        Reg<float> out;
        for (int32_t lane = 0; lane < 32; ++lane) out[lane] = x[lane ^ mask];
        return out;
    }
};

// What the blocks of a cluster have left.
struct HostCluster {
    std::vector<float> left[ATTENTION_MERGED];
    float* of_block(int32_t rank) const { return const_cast<float*>(left[rank].data()); }
};

// What one block finds, and leaves to its cluster.
template <int D, int ROWS>
void attend_block(const BlockAttentionParams& p, const AttentionTile& t, const Launch& launch, bool stores,
                  std::vector<float>& left) {
    constexpr int32_t KEYS = D > 128 ? 32 : 64;
    int32_t threads = int32_t(launch.block);
    if (stores)
        for (int32_t thread = 0; thread < threads; ++thread) store_keys<D>(p, t, thread, threads);
    std::vector<uint16_t> shared(launch.shared / 2, 0x7fc1); // NaN
    uint16_t* keys = shared.data() + ROWS * D;
    for (int32_t thread = 0; thread < threads; ++thread) load_queries<D, ROWS>(p, t, shared.data(), thread);
    std::vector<WarpState<HostWarp, D>> states(ROWS / 16);
    memset(states.data(), 0xff, states.size() * sizeof(states[0])); // NaN
    std::vector<WarpView<HostWarp, D>> views(ROWS / 16);
    for (int32_t warp = 0; warp < ROWS / 16; ++warp) {
        warp_open(p, t, warp, states[warp]);
        warp_view<HostWarp, D>(warp, shared.data(), keys, keys + KEYS * D, views[warp]);
        warp_hold_queries(views[warp]);
    }
    for (int32_t key = t.begin; key < t.end; key += KEYS) {
        KeyPlace places[KEYS];
        for (int32_t i = 0; i < KEYS; ++i) places[i] = key_place(p, t, key_source(p, t, key + i));
        for (int32_t thread = 0; thread < threads; ++thread) load_keys<D, KEYS, ROWS>(places, keys, keys + KEYS * D, thread);
        for (int32_t warp = 0; warp * 16 < t.num_queries * t.group; ++warp)
            warp_attend<HostWarp, D, KEYS>(p, t, warp, key, views[warp], 0, states[warp]);
    }
    left.assign(LeftPart<D, ROWS>::FLOATS, NAN);
    for (int32_t warp = 0; warp * 16 < t.num_queries * t.group; ++warp)
        warp_write(p, t, warp, states[warp], LeftPart<D, ROWS>{left.data()});
}

template <int D, int ROWS>
void attend(const BlockAttentionParams& p) {
    Launch launch = block_attention_launch(p, D);
    for (uint32_t z = 0; z < launch.grid[2]; z += launch.cluster) {
        for (uint32_t y = 0; y < launch.grid[1]; ++y) {
            for (uint32_t x = 0; x < launch.grid[0]; ++x) {
                HostCluster cluster;
                AttentionTile t;
                for (int32_t rank = int32_t(launch.cluster) - 1; rank >= 0; --rank) {
                    t = attention_tile(p, int32_t(x), int32_t(y), int32_t(z) + rank, attention_keys(D), ROWS);
                    if (t.live) attend_block<D, ROWS>(p, t, launch, p.slots && y == 0 && z == 0 && rank == 0, cluster.left[rank]);
                }
                if (!t.live || !p.clusters || t.splits == 1) continue;
                for (int32_t row = 0; row < t.num_queries * t.group; ++row)
                    for (int32_t lane = 0; lane < 32; ++lane) merge_row<D, ROWS>(p, t, cluster, row, lane);
            }
        }
    }
    Launch combine = block_attention_combine_launch(p);
    for (int64_t row = 0; row < int64_t(combine.grid[0]) * 4; ++row) {
        if (row >= int64_t(p.max_tokens) * p.q_heads) break;
        for (int32_t lane = 0; lane < 32; ++lane) combine_lane<D>(p, row, lane);
    }
}

void sort_all(std::vector<uint64_t>& list, int32_t n) {
    for (int32_t size = 2; size <= n; size *= 2)
        for (int32_t stride = size / 2; stride > 0; stride /= 2)
            for (int32_t thread = 0; thread < TOP_THREADS; ++thread) sort_step(list.data(), n, size, stride, thread, TOP_THREADS);
}

template <typename E>
void top_k(const TreeTopKParams& p) {
    for (int32_t index = 0; index < int32_t(tree_top_k_launch(p).grid[0]); ++index) {
        TopRow<E> row(p, index);
        std::vector<uint64_t> list(TOP_LISTED + 1); // the last is nobody's
        for (int32_t thread = 0; thread < TOP_THREADS; ++thread) list[thread] = top_largest(row, thread);
        sort_all(list, TOP_THREADS);
        float top = candidate_value(list[0]);
        uint64_t least = list[p.k - 1], mass = 0;
        uint32_t count = 0;
        for (int32_t thread = TOP_THREADS - 1; thread >= 0; --thread)
            mass += top_gather(row, least, top, p.normalise != 0, list.data(), &count, thread);
        if (count > uint32_t(TOP_LISTED)) {
            uint64_t prefix = 0;
            uint32_t rank = uint32_t(p.k);
            for (int32_t shift = 56; shift >= 0; shift -= 8) {
                uint32_t counts[256] = {};
                for (int32_t thread = 0; thread < TOP_THREADS; ++thread) top_digits(row, prefix, shift, counts, thread);
                prefix |= uint64_t(top_choose(counts, rank)) << shift;
            }
            count = 0;
            for (int32_t thread = 0; thread < TOP_THREADS; ++thread)
                top_gather(row, prefix, top, false, list.data(), &count, thread);
        }
        int32_t n = power_of_two(int32_t(count));
        for (int32_t i = int32_t(count); i < n; ++i) list.at(i) = 0;
        sort_all(list, n);
        if (list.back()) __builtin_trap();
        for (int32_t thread = 0; thread < TOP_THREADS; ++thread)
            top_write(p, row, index, list.data(), int32_t(count), top, mass, thread, TOP_THREADS);
    }
}

} // namespace host

extern "C" {

void dflash_host_words(uint64_t seed, uint64_t position, uint32_t domain, uint32_t first, uint32_t count, uint32_t* out) {
    Stream stream(seed, position, Domain(domain));
    for (uint32_t i = 0; i < count; ++i) out[i] = stream.word(first + i);
}

double dflash_host_uniform(uint64_t seed, uint64_t position, uint32_t domain, uint32_t index) {
    return Stream(seed, position, Domain(domain)).uniform(index);
}

// Of each word: its Gumbel number and the bound used to skip.
void dflash_host_gumbel(const uint32_t* words, uint32_t count, float* numbers, float* bounds) {
    for (uint32_t i = 0; i < count; ++i) {
        numbers[i] = gumbel_of_word(words[i]);
        bounds[i] = gumbel_bound(0.0f, words[i]);
    }
}

void dflash_host_ln(const float* x, uint32_t count, float* out) {
    for (uint32_t i = 0; i < count; ++i) out[i] = ln(x[i]);
}

// exp(x), its weight and the order key of each x <= 0.
void dflash_host_weights(const float* x, uint32_t count, float* exps, uint64_t* weights, uint32_t* keys) {
    for (uint32_t i = 0; i < count; ++i) {
        exps[i] = exp_nonpositive(x[i]);
        weights[i] = weight(x[i]);
        keys[i] = order_key(x[i]);
    }
}

// bfloat16 bits of each number.
void dflash_host_bf16(const float* x, uint32_t count, uint16_t* out) {
    for (uint32_t i = 0; i < count; ++i) out[i] = bf16_of_float(x[i]);
}

// Eight elements of sixteen bytes.
void dflash_host_elements(const uint16_t* at, float* out) {
    for (int32_t i = 0; i < 8; ++i) out[i] = element(load8(at), i);
}

// Where each key of a request lies.
void dflash_host_slots(const PageTable* table, int32_t request, const int32_t* keys, uint32_t count, int64_t* out) {
    for (uint32_t i = 0; i < count; ++i) out[i] = slot_of(*table, request, keys[i]);
}

// Whose each packed token is.
void dflash_host_requests(const int32_t* query_starts, int32_t num_requests, const int32_t* tokens, uint32_t count,
                          int32_t* out) {
    for (uint32_t i = 0; i < count; ++i) out[i] = request_of(query_starts, num_requests, tokens[i]);
}

// Where the parts of the scratch begin, in bytes; the size of a chunk; the last block of the last row.
void dflash_host_scratch(const SampleRowsParams* p, uint64_t* out) {
    SampleScratch scratch(*p);
    const void* parts[] = {scratch.chunks, scratch.masses, scratch.candidates, scratch.counts, scratch.listed, scratch.maxima};
    for (int32_t i = 0; i < 6; ++i) out[i] = uint64_t(parts[i]) - uint64_t(p->scratch);
    out[6] = sizeof(SampleChunk);
    out[7] = uint64_t(scratch.block(p->num_rows - 1, scratch.num_chunks * SAMPLE_CHUNK - 1));
}

// What masses make together in one bin.
uint64_t dflash_host_sum_of_masses(const uint64_t* masses, uint32_t count) {
    Digits bins = {};
    for (uint32_t i = 0; i < count; ++i) add_mass(bins, 77, masses[i]);
    return bins.mass(77);
}

// The bin of each d <= 0.
void dflash_host_bins(const float* d, uint32_t count, int32_t* out) {
    for (uint32_t i = 0; i < count; ++i) out[i] = bin_of(d[i]);
}

void dflash_host_prepare_block(const PrepareBlockParams* p) {
    Launch launch = prepare_block_launch(*p);
    for (uint32_t block = 0; block < launch.grid[0]; ++block) {
        for (uint32_t thread = 0; thread < launch.block; ++thread)
            prepare_block_body(*p, int32_t(block), int32_t(thread), int32_t(launch.block));
    }
}

void dflash_host_accept(const AcceptParams* p) {
    Launch launch = accept_launch(*p);
    int32_t threads = int32_t(launch.block);
    for (uint32_t request = 0; request < launch.grid[0]; ++request) {
        std::vector<int32_t> shared(launch.shared / 4 + 1, 1); // as if node 1 followed, wherever nobody has written
        AcceptBlock block;
        accept_open(*p, block, int32_t(request), shared.data());
        for (int32_t thread = 0; thread < threads; ++thread) accept_clear(block, thread, threads);
        for (int32_t thread = threads - 1; thread >= 0; --thread) accept_match(*p, block, thread, threads);
        accept_walk(block);
        for (int32_t thread = threads - 1; thread >= 0; --thread) accept_write(*p, block, int32_t(request), thread, threads);
    }
}

void dflash_host_sample_f32(const SampleRowsParams* p) {
    for (int32_t row = 0; row < p->num_rows; ++row) host::sample_row<float>(*p, row);
}

void dflash_host_sample_bf16(const SampleRowsParams* p) {
    for (int32_t row = 0; row < p->num_rows; ++row) host::sample_row<uint16_t>(*p, row);
}

void dflash_host_kv_inject(const KvInjectParams* p, int32_t head_dim) {
    if (head_dim == 64) host::inject<64>(*p);
    else if (head_dim == 128) host::inject<128>(*p);
    else host::inject<256>(*p);
}

void dflash_host_compact_kv(const CompactKvParams* p) {
    Launch launch = compact_kv_launch(*p);
    for (uint32_t x = 0; x < launch.grid[0]; ++x)
        for (uint32_t y = 0; y < launch.grid[1]; ++y)
            for (uint32_t thread = launch.grid[2] * launch.block; thread-- > 0;)
                compact_thread(*p, int32_t(x), int32_t(y / 2), y % 2 == 1, int32_t(thread));
}

void dflash_host_block_attention(const BlockAttentionParams* p, int32_t head_dim) {
    if (attention_rows(*p, head_dim) == ATTENTION_WIDE_ROWS) host::attend<128, ATTENTION_WIDE_ROWS>(*p);
    else if (head_dim == 64) host::attend<64, ATTENTION_ROWS>(*p);
    else if (head_dim == 128) host::attend<128, ATTENTION_ROWS>(*p);
    else host::attend<256, ATTENTION_ROWS>(*p);
}

// For every token, query head and key < width: where it is read from if it is seen (see key_source), else INT64_MIN.
void dflash_host_seen(const BlockAttentionParams* p, int32_t head_dim, int32_t width, int64_t* out) {
    Launch launch = block_attention_launch(*p, head_dim);
    int32_t keys = attention_keys(head_dim), rows = attention_rows(*p, head_dim);
    for (uint32_t z = 0; z < launch.grid[2]; ++z) {
        for (uint32_t y = 0; y < launch.grid[1]; ++y) {
            for (uint32_t x = 0; x < launch.grid[0]; ++x) {
                AttentionTile t = attention_tile(*p, int32_t(x), int32_t(y), int32_t(z), keys, rows);
                if (!t.live) continue;
                for (int32_t row = 0; row < rows; ++row) {
                    AttentionRow r = attention_row(*p, t, row);
                    if (r.query < 0) continue;
                    int64_t* to = out + (int64_t(t.first_token + r.query) * p->q_heads + r.head) * width;
                    for (int32_t first = t.begin; first < t.end; first += keys) {
                        bool masked = first + keys > t.context || first < t.unmasked_from;
                        for (int32_t key = first; key < first + keys; ++key) {
                            if (masked && !sees(*p, t, r, key)) continue;
                            // Twice, or beyond the text: wrong.
                            if (key < width) to[key] = to[key] == INT64_MIN ? key_source(*p, t, key) : INT64_MAX;
                        }
                    }
                }
            }
        }
    }
}

void dflash_host_delta_inputs(const DeltaRuleParams* p) { host::delta_inputs(*p); }

void dflash_host_delta_rule(const DeltaRuleParams* p, int32_t key_dim) {
    if (key_dim == 32) host::delta_rule<32>(*p);
    else if (key_dim == 64) host::delta_rule<64>(*p);
    else if (key_dim == 96) host::delta_rule<96>(*p);
    else if (key_dim == 128) host::delta_rule<128>(*p);
    else if (key_dim == 192) host::delta_rule<192>(*p);
    else host::delta_rule<256>(*p);
}

void dflash_host_tree_top_k_f32(const TreeTopKParams* p) { host::top_k<float>(*p); }
void dflash_host_tree_top_k_bf16(const TreeTopKParams* p) { host::top_k<uint16_t>(*p); }

void dflash_host_tree_build(const TreeBuildParams* p) {
    Launch launch = tree_build_launch(*p);
    for (int32_t request = 0; request < int32_t(launch.grid[0]); ++request) {
        std::vector<uint64_t> shared(launch.shared / 8 + 1, 0x0000000100000001); // slots that look taken, an anchor with a child
        TreeNodes t(shared.data(), p->max_nodes + 1);
        const float* log_probs = p->top_log_probs + int64_t(request) * p->max_depth * p->k;
        tree_open(*p, t, log_probs);
        int32_t budget = tree_budget(*p, request), count = 1;
        while (count <= budget) {
            TreeBest best = {0, 0, -1};
            for (int32_t lane = 0; lane < 32; ++lane) {
                TreeBest other = tree_best(t, count, lane);
                if (other.key > best.key || (other.key == best.key && other.tie > best.tie)) best = other;
            }
            if (best.key == 0) break;
            tree_take(*p, t, log_probs, best, count++);
        }
        for (int32_t lane = 0; lane < 32; ++lane) tree_write(*p, t, request, count, lane);
    }
}

#ifdef DFLASH_EMULATED
void dflash_emulated_prepare_block(const PrepareBlockParams* p) { emulation::run(prepare_block, *p, prepare_block_launch(*p)); }
void dflash_emulated_accept(const AcceptParams* p) { emulation::run(accept_kernel, *p, accept_launch(*p)); }
void dflash_emulated_compact_kv(const CompactKvParams* p) { emulation::run(compact_kv, *p, compact_kv_launch(*p)); }
void dflash_emulated_tree_build(const TreeBuildParams* p) { emulation::run(tree_build, *p, tree_build_launch(*p)); }
void dflash_emulated_tree_top_k_f32(const TreeTopKParams* p) { emulation::run(tree_top_k_f32, *p, tree_top_k_launch(*p)); }
void dflash_emulated_tree_top_k_bf16(const TreeTopKParams* p) { emulation::run(tree_top_k_bf16, *p, tree_top_k_launch(*p)); }

void dflash_emulated_kv_inject(const KvInjectParams* p, int32_t head_dim) {
    auto kernel = head_dim == 64 ? kv_inject_64 : head_dim == 128 ? kv_inject_128 : kv_inject_256;
    emulation::run(kernel, *p, kv_inject_launch(*p, head_dim));
}

void dflash_emulated_block_attention(const BlockAttentionParams* p, int32_t head_dim) {
    bool wide = attention_rows(*p, head_dim) == ATTENTION_WIDE_ROWS;
    auto kernel = wide    ? block_attention_wide_128
        : head_dim == 64  ? block_attention_64
        : head_dim == 128 ? block_attention_128
                          : block_attention_256;
    auto combine = head_dim == 64 ? block_attention_combine_64
        : head_dim == 128         ? block_attention_combine_128
                                  : block_attention_combine_256;
    emulation::run(kernel, *p, block_attention_launch(*p, head_dim));
    emulation::run(combine, *p, block_attention_combine_launch(*p));
}

void dflash_emulated_delta_inputs(const DeltaRuleParams* p) { emulation::run(::delta_inputs, *p, delta_inputs_launch(*p)); }

void dflash_emulated_delta_rule(const DeltaRuleParams* p, int32_t key_dim) {
    auto kernel = key_dim == 32 ? delta_rule_32
        : key_dim == 64         ? delta_rule_64
        : key_dim == 96         ? delta_rule_96
        : key_dim == 128        ? delta_rule_128
        : key_dim == 192        ? delta_rule_192
                                : delta_rule_256;
    emulation::run(kernel, *p, delta_rule_launch(*p));
}

// `parts`: chunks of a block, 1 .. SAMPLE_PARTS, as if there were few rows or many.
void dflash_emulated_sample_f32(const SampleRowsParams* p, uint32_t parts) {
    Launch launch = sample_chunk_launch(*p);
    launch.grid[1] = uint32_t(ceil_div(ceil_div(p->vocab, SAMPLE_CHUNK), parts));
    for (auto kernel : {sample_scan_f32, sample_mass_f32, sample_pick_f32}) emulation::run(kernel, *p, launch);
    emulation::run(sample_finish_f32, *p, sample_finish_launch(*p));
}

void dflash_emulated_sample_bf16(const SampleRowsParams* p, uint32_t parts) {
    Launch launch = sample_chunk_launch(*p);
    launch.grid[1] = uint32_t(ceil_div(ceil_div(p->vocab, SAMPLE_CHUNK), parts));
    for (auto kernel : {sample_scan_bf16, sample_mass_bf16, sample_pick_bf16}) emulation::run(kernel, *p, launch);
    emulation::run(sample_finish_bf16, *p, sample_finish_launch(*p));
}
#endif
}
