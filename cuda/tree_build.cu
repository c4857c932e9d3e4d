// tree_top_k, tree_build: see params.h for the contract and logic_tree.cuh for the method.
//
// tree_top_k reads each row twice. tree_build is a chain of dependent choices: one warp takes a node after the other, each in two
// warp-wide maxima and a few accesses of shared memory.
#include "logic_tree.cuh"

namespace dflash {
namespace {

__device__ void sort_block(uint64_t* a, int32_t n) {
    for (int32_t size = 2; size <= n; size *= 2) {
        for (int32_t stride = size / 2; stride > 0; stride /= 2) {
            sort_step(a, n, size, stride, int32_t(threadIdx.x), TOP_THREADS);
            __syncthreads();
        }
    }
}

template <typename E>
__device__ void top_k(const TreeTopKParams& p) {
    __shared__ uint64_t list[TOP_LISTED];
    __shared__ uint64_t masses[TOP_THREADS / 32];
    __shared__ uint32_t counts[256];
    __shared__ uint32_t count;
    __shared__ uint64_t chosen;
    int32_t index = int32_t(blockIdx.x), thread = int32_t(threadIdx.x);
    TopRow<E> row(p, index);
    list[thread] = top_largest(row, thread);
    if (thread == 0) count = 0;
    __syncthreads();
    sort_block(list, TOP_THREADS);
    float top = candidate_value(list[0]);
    uint64_t least = list[p.k - 1]; // 0: some threads have no columns, then all columns fit the list
    __syncthreads();
    uint64_t mass = top_gather(row, least, top, p.normalise != 0, list, &count, thread);
    for (int offset = 16; offset > 0; offset /= 2) mass += __shfl_xor_sync(0xffffffffu, mass, offset);
    if (thread % 32 == 0) masses[thread / 32] = mass;
    __syncthreads();
    mass = 0;
    for (int32_t w = 0; w < TOP_THREADS / 32; ++w) mass += masses[w];
    int32_t listed = int32_t(count);
    if (listed > TOP_LISTED) {
        uint64_t prefix = 0;
        uint32_t rank = uint32_t(p.k);
        for (int32_t shift = 56; shift >= 0; shift -= 8) {
            if (thread < 256) counts[thread] = 0;
            __syncthreads();
            top_digits(row, prefix, shift, counts, thread);
            __syncthreads();
            if (thread == 0) chosen = prefix | uint64_t(top_choose(counts, rank)) << shift;
            __syncthreads();
            prefix = chosen;
        }
        if (thread == 0) count = 0;
        __syncthreads();
        top_gather(row, prefix, top, false, list, &count, thread);
        __syncthreads();
        listed = int32_t(count);
    }
    int32_t n = power_of_two(listed);
    for (int32_t i = listed + thread; i < n; i += TOP_THREADS) list[i] = 0;
    __syncthreads();
    sort_block(list, n);
    top_write(p, row, index, list, listed, top, mass, thread, TOP_THREADS);
}

__device__ void build(const TreeBuildParams& p) {
    constexpr unsigned ALL = 0xffffffffu;
    int32_t request = int32_t(blockIdx.x), lane = int32_t(threadIdx.x);
    int32_t size = p.max_depth * p.k;
    const float* log_probs = p.top_log_probs + int64_t(request) * size;
    // Every choice needs two of these: have them near.
    for (int32_t i = 32 * lane; i < size; i += 32 * 32) asm volatile("prefetch.global.L1 [%0];" ::"l"(log_probs + i));
    TreeNodes t(dynamic_shared, p.max_nodes + 1);
    if (lane == 0) tree_open(p, t, log_probs);
    __syncwarp();
    int32_t budget = tree_budget(p, request), count = 1;
    while (count <= budget) {
        TreeBest best = tree_best(t, count, lane);
        uint32_t key = __reduce_max_sync(ALL, best.key);
        if (key == 0) break;
        uint32_t tie = __reduce_max_sync(ALL, best.key == key ? best.tie : 0);
        // Depth, parent and rank name a candidate: exactly one lane has it. All have read their slots.
        if (best.key == key && best.tie == tie) tree_take(p, t, log_probs, best, count);
        ++count;
        __syncwarp();
    }
    tree_write(p, t, request, count, lane);
}

} // namespace
} // namespace dflash

// Three blocks of a multiprocessor: left to itself, the compiler for sm_100 goes for four and spills.
extern "C" __global__ void __launch_bounds__(512, 3) tree_top_k_f32(const __grid_constant__ TreeTopKParams p) {
    dflash::top_k<float>(p);
}
extern "C" __global__ void __launch_bounds__(512, 3) tree_top_k_bf16(const __grid_constant__ TreeTopKParams p) {
    dflash::top_k<uint16_t>(p);
}
extern "C" __global__ void __launch_bounds__(32) tree_build(const __grid_constant__ TreeBuildParams p) { dflash::build(p); }
