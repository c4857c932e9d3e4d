// kv_inject: see params.h. Bytes: every committed row's K and V once in, once out. Reads are contiguous over heads, K and V and
// layers of a row; a store fills a head vector.
#include "logic_kv.cuh"

namespace dflash {
namespace {

template <int D>
__device__ void inject(const KvInjectParams& p) {
    constexpr int32_t LANES = D / 8, UNITS = 256 / LANES;
    int32_t lane = int32_t(threadIdx.x) % LANES;
    InjectUnit u = inject_unit(p, int64_t(blockIdx.x) * UNITS + int32_t(threadIdx.x) / LANES);
    Vec8 x = inject_load<D>(p, u, lane);
    // Lanes of a warp belong to different units: all of them take part in the exchanges.
    float sum = sum_of_squares(x);
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum = add(sum, __shfl_xor_sync(0xffffffffu, sum, offset, LANES));
    float normed[8], other[8];
    inject_norm<D>(p, u, x, sum, lane, normed);
    int32_t partner = inject_partner(p.rotary_dim, lane);
    DFLASH_UNROLL
    for (int32_t i = 0; i < 8; ++i) other[i] = __shfl_sync(0xffffffffu, normed[i], partner, LANES);
    if (!u.active) return;
    inject_store<D>(p, u, u.is_v ? x : inject_rotate(p, u, normed, other, lane), lane);
}

} // namespace
} // namespace dflash

#define INJECT_KERNEL(dim)                                                                                        \
    extern "C" __global__ void __launch_bounds__(256) kv_inject_##dim(const __grid_constant__ KvInjectParams p) { \
        dflash::inject<dim>(p);                                                                                   \
    }

INJECT_KERNEL(64)
INJECT_KERNEL(128)
INJECT_KERNEL(256)
