// block_attention, block_attention_combine: see params.h for the contract, logic_attention.cuh and logic_merge.cuh for the pieces.
//
// A block has 64 rows of queries, or 128, and a range of keys. Keys and values stream through two stages of shared memory (cp.async), 64
// keys at a time (32 for heads of 256); four warps, or eight, multiply on tensor cores (mma m16n8k16), each sixteen rows. Tensor core
// instructions of sm_80, so one source serves sm_80 to sm_120; shared memory stays below the 99 KiB of the smallest.
#include "logic_merge.cuh"

namespace dflash {
namespace {

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the latest `N` groups of copies have arrived (this thread's).
template <int N>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#if DFLASH_CLUSTERS
// What the blocks of a cluster have left becomes one part, each block merging some of the rows. Blocks that had nothing to do are gone:
// barriers of a cluster count only threads that are there, and nobody reads what those would have left.
template <int D, int ROWS>
__device__ void merge(const BlockAttentionParams& p, const AttentionTile& t, int32_t thread, const LeftPart<D, ROWS>& left) {
    int32_t blocks = splits_of_group(t), rank = t.split % ATTENTION_MERGED;
    DeviceCluster cluster = {left.start};
    DeviceCluster::meet();
    for (int32_t row = thread / 32 * blocks + rank; row < t.num_queries * t.group; row += ROWS / 16 * blocks)
        merge_row<D, ROWS>(p, t, cluster, row, thread % 32);
    DeviceCluster::meet(); // none leaves before all have read
}
#endif

template <int D, int ROWS>
__device__ void attend(const BlockAttentionParams& p) {
    constexpr int32_t KEYS = D > 128 ? 32 : 64;
    constexpr bool EARLY = D > 128; // fewer registers through the tile, but the page table is waited for
    int32_t thread = int32_t(threadIdx.x), warp = thread / 32;
    AttentionTile t = attention_tile(p, int32_t(blockIdx.x), int32_t(blockIdx.y), int32_t(blockIdx.z), KEYS, ROWS);
    if (!t.live) return;
    if (p.slots && blockIdx.y == 0 && blockIdx.z == 0) store_keys<D>(p, t, thread, 2 * ROWS);

    uint16_t* queries = reinterpret_cast<uint16_t*>(dynamic_shared);
    uint16_t* stages = queries + ROWS * D;                                 // [2][keys, values][KEYS][D]
    KeyPlace* places = reinterpret_cast<KeyPlace*>(stages + 4 * KEYS * D); // [2][KEYS]
    int32_t tiles = t.end > t.begin ? (t.end - t.begin + KEYS - 1) / KEYS : 0;

    DeviceWarp::expect_aligned(queries, D);
    WarpState<DeviceWarp, D> state;
    WarpView<DeviceWarp, D> view;
    warp_open(p, t, warp, state);
    warp_view<DeviceWarp, D>(warp, queries, stages, stages + KEYS * D, view);
    bool busy = warp * 16 < t.num_queries * t.group; // the warp has rows
    if (tiles > 0) {
        load_queries<D, ROWS>(p, t, queries, thread);
        commit_copies();
        if (thread < 2 * KEYS) places[thread] = key_place(p, t, key_source(p, t, t.begin + thread)); // tiles 0 and 1
        __syncthreads();
        load_keys<D, KEYS, ROWS>(places, stages, stages + KEYS * D, thread);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        warp_hold_queries(view);
    }
    for (int32_t i = 0; i < tiles; ++i) {
        int32_t now = i & 1, next = now ^ 1;
        if (i + 1 < tiles) {
            uint16_t* to = stages + next * 2 * KEYS * D;
            load_keys<D, KEYS, ROWS>(places + next * KEYS, to, to + KEYS * D, thread);
        }
        commit_copies();
        // Under way while this tile is multiplied: where the tile after the next one lies.
        int64_t source = thread < KEYS && i + 2 < tiles ? key_source(p, t, t.begin + (i + 2) * KEYS + thread) : -1;
        wait_copies<1>();
        __syncthreads();
        // places[now] were last read for tile i, before the barrier above.
        if (EARLY && thread < KEYS) places[now * KEYS + thread] = key_place(p, t, source);
        if (busy) warp_attend<DeviceWarp, D, KEYS>(p, t, warp, t.begin + i * KEYS, view, now * 2 * KEYS * D, state);
        if (!EARLY && thread < KEYS) places[now * KEYS + thread] = key_place(p, t, source);
        __syncthreads();
    }
    // In place of queries and stages: all are read, and no copy is under way.
    LeftPart<D, ROWS> left = {reinterpret_cast<float*>(dynamic_shared)};
    static_assert(4 * LeftPart<D, ROWS>::FLOATS <= 2 * D * (ROWS + 4 * KEYS), "room for it");
    if (busy) warp_write(p, t, warp, state, left);
#if DFLASH_CLUSTERS
    if (p.clusters && t.splits > 1) merge<D>(p, t, thread, left);
#endif
}

template <int D>
__device__ void combine(const BlockAttentionParams& p) {
    int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
    if (row >= int64_t(p.max_tokens) * p.q_heads) return;
    combine_lane<D>(p, row, int32_t(threadIdx.x % 32));
}

} // namespace
} // namespace dflash

// `blocks` of a multiprocessor at a time: as many as its shared memory holds, or registers allow.
#define ATTENTION_KERNELS(dim, blocks)                                                  \
    extern "C" __global__ void __launch_bounds__(128, blocks)                           \
        block_attention_##dim(const __grid_constant__ BlockAttentionParams p) {         \
        dflash::attend<dim, ATTENTION_ROWS>(p);                                         \
    }                                                                                   \
    extern "C" __global__ void __launch_bounds__(128)                                   \
        block_attention_combine_##dim(const __grid_constant__ BlockAttentionParams p) { \
        dflash::combine<dim>(p);                                                        \
    }

ATTENTION_KERNELS(64, 4)
ATTENTION_KERNELS(128, 2)
ATTENTION_KERNELS(256, 2)

extern "C" __global__ void __launch_bounds__(256) block_attention_wide_128(const __grid_constant__ BlockAttentionParams p) {
    dflash::attend<128, ATTENTION_WIDE_ROWS>(p);
}
