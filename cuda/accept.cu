// accept: see params.h. A block per request, so a batch costs what its longest path costs; logic in logic_step.cuh.
#include "logic_step.cuh"

extern "C" __global__ void __launch_bounds__(128) accept(const __grid_constant__ AcceptParams p) {
    int32_t* shared = reinterpret_cast<int32_t*>(dynamic_shared);
    __shared__ dflash::AcceptBlock block;
    int32_t request = int32_t(blockIdx.x), thread = int32_t(threadIdx.x), threads = int32_t(blockDim.x);
    if (thread == 0) dflash::accept_open(p, block, request, shared);
    __syncthreads();
    dflash::accept_clear(block, thread, threads);
    __syncthreads();
    dflash::accept_match(p, block, thread, threads);
    __syncthreads();
    if (thread == 0) dflash::accept_walk(block);
    __syncthreads();
    dflash::accept_write(p, block, request, thread, threads);
}
