// delta_inputs and delta_rule: see params.h. Bytes: states in once and out once where anything is folded in; besides them a few
// elements a token. A column's rows stay in registers from the fold to the last token; keys and queries come out of shared memory, the
// same address for half a warp. Bound by additions where a pass has many tokens: four a row, column and token.
#include "logic_delta.cuh"

namespace dflash {
namespace {

__device__ void delta_inputs_block(const DeltaRuleParams& p) {
    int32_t request = int32_t(blockIdx.x), thread = int32_t(threadIdx.x), threads = int32_t(blockDim.x);
    int32_t pending = delta_pending(p, request);
    if (blockIdx.y == 0 && blockIdx.z == 0 && thread == 0) p.pending[request] = pending;
    DeltaWork w = delta_work(p, request, pending);
    if (!w.active || !w.sound) return;
    DeltaPart part = delta_part(p, int32_t(blockIdx.y));
    int32_t first = int32_t(blockIdx.z) * delta_tile(p), last = min_of(first + delta_tile(p), w.total);
    if (part.width == 0) {
        for (int32_t i = thread; i < (last - first) * p.value_heads; i += threads)
            delta_gate(p, w, first + i / p.value_heads, i % p.value_heads);
    } else {
        for (int32_t k = first + thread / 16; k - thread / 16 < last; k += threads / 16) {
            // All lanes of a warp take part in the exchanges.
            float sum = k < last ? delta_make(p, w, part, k, thread % 16) : 0.0f;
            for (int offset = 8; offset > 0; offset /= 2) sum = add(sum, __shfl_xor_sync(0xffffffffu, sum, offset, 16));
            if (k < last && part.scale >= 0 && thread % 16 == 0) delta_measure(p, w, part, k, sum);
        }
    }
    if (first > 0) return;
    __syncthreads();
    if (part.width == 0) delta_settle_gates(p, w, thread, threads);
    for (int32_t i = thread; i < part.width; i += threads) delta_settle(p, w, part.channel + i);
}

// A token, up to what its key reads next; `read` is what it reads itself.
template <int DK, bool READ>
__device__ __forceinline__ float delta_token(const DeltaStage<DK>& stage, int32_t t, int32_t half, int32_t column, float* s,
                                             float& read) {
    read = add(read, __shfl_xor_sync(0xffffffffu, read, 16));
    float delta = mul(sub(stage.value(t, column), read), stage.beta(t)), out = 0.0f;
    read = 0.0f;
    int32_t next = READ ? t + 1 : t;
    delta_walk<DK, true, READ>(s, stage.key(t, half), stage.query(t, half), delta, out, stage.key(next, half), stage.decay(next),
                               read);
    return add(out, __shfl_xor_sync(0xffffffffu, out, 16));
}

template <int DK>
__device__ void delta_rule_block(const DeltaRuleParams& p) {
    DeltaStage<DK> stage(reinterpret_cast<float*>(dynamic_shared));
    int32_t thread = int32_t(threadIdx.x), threads = int32_t(blockDim.x);
    int32_t request = int32_t(blockIdx.x) / p.value_heads, head = int32_t(blockIdx.x) % p.value_heads;
    int32_t half = thread % 32 / 16, own = thread / 32 * 16 + thread % 16;
    int32_t first = int32_t(blockIdx.y) * DELTA_COLUMNS, column = first + own;
    DeltaWork w = delta_work(p, request, p.pending[request]);
    if (!w.active) return;
    if (!w.sound) {
        for (int32_t t = 0; t < w.tokens; ++t)
            if (half == 0) delta_give(p, w, t, head, column, float_of(0x7fc00000u));
        return;
    }
    float s[DK / 2];
    int32_t step = 2 * p.value_dim;
    delta_load<DK>(p, w, head, column, half, step, s);
    for (int32_t done = 0;;) {
        if (done == w.pending && w.moves) {
            // Addresses are for here alone: kept through the loop they would take more registers than the state.
            asm volatile("" : "+r"(step));
            delta_store<DK>(p, p.memory, w.target, head, column, half, step, s);
        }
        if (done == w.total) break;
        int32_t count = delta_count(w, done);
        __syncthreads();
        delta_fetch<DK>(p, w, head, first, done, count, stage, thread, threads);
        __syncthreads();
        float read = 0.0f, none = 0.0f;
        delta_walk<DK, false, true>(s, nullptr, nullptr, 0.0f, none, stage.key(0, half), stage.decay(0), read);
        for (int32_t t = 0; t + 1 < count; ++t) {
            float out = delta_token<DK, true>(stage, t, half, own, s, read);
            if (half == 0) delta_give(p, w, done + t, head, column, out);
        }
        float out = delta_token<DK, false>(stage, count - 1, half, own, s, read);
        if (half == 0) delta_give(p, w, done + count - 1, head, column, out);
        done += count;
    }
    if (w.end >= 0) delta_store<DK>(p, p.end_memory, w.end, head, column, half, step, s);
    // Nobody of this launch reads it.
    if (head == 0 && first == 0 && thread == 0) p.stands[w.target] = p.context_lens[request];
}

} // namespace
} // namespace dflash

extern "C" __global__ void __launch_bounds__(128, 8) delta_inputs(const __grid_constant__ DeltaRuleParams p) {
    dflash::delta_inputs_block(p);
}

// Blocks of a multiprocessor: left to itself the compiler reads ahead until the registers are gone.
#define DELTA_KERNEL(dim, blocks)                                                                                           \
    extern "C" __global__ void __launch_bounds__(128, blocks) delta_rule_##dim(const __grid_constant__ DeltaRuleParams p) { \
        dflash::delta_rule_block<dim>(p);                                                                                   \
    }

DELTA_KERNEL(32, 5)
DELTA_KERNEL(64, 4)
DELTA_KERNEL(96, 4)
DELTA_KERNEL(128, 3)
DELTA_KERNEL(192, 3)
DELTA_KERNEL(256, 2)
