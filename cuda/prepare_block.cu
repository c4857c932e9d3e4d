// prepare_block: see params.h. Bound by the latency of a launch; logic in logic_step.cuh.
#include "logic_step.cuh"

extern "C" __global__ void __launch_bounds__(64) prepare_block(const __grid_constant__ PrepareBlockParams p) {
    dflash::prepare_block_body(p, int32_t(blockIdx.x), int32_t(threadIdx.x), int32_t(blockDim.x));
}
