// compact_kv: see params.h. No shared memory and no barrier: a thread owns what it moves (logic_kv.cuh).
#include "logic_kv.cuh"

extern "C" __global__ void __launch_bounds__(128) compact_kv(const __grid_constant__ CompactKvParams p) {
    dflash::compact_thread(p, int32_t(blockIdx.x), int32_t(blockIdx.y / 2), blockIdx.y % 2 == 1,
                           int32_t(blockIdx.z * blockDim.x + threadIdx.x));
}
