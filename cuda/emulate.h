// Runs a kernel's own code on the host, for tests: the threads of a block are fibers that switch at barriers and warp-wide
// operations, blocks follow each other, those of a cluster run together. What it shows: indices, shared memory, barriers that are
// missing or not reached by all (a fiber runs as far ahead as the barriers let it), shared memory of a block that has ended (it turns
// to NaN). What it does not: two threads at the same instant, or cp.async's delay. Blocks of a cluster have their own dynamic shared
// memory, and the same static one.
//
// Include it after the standard headers and the logic headers, then the kernel files.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <vector>

#include "logic_attention.cuh"

namespace emulation {

struct Index {
    uint32_t x, y, z;
};

enum State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, AT_CLUSTER_BARRIER, DONE };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
};

constexpr uint32_t CLUSTER = 8; // blocks of the largest one
constexpr size_t SHARED = 228 * 1024;

struct Machine {
    std::vector<Fiber> fibers; // of a cluster, block by block
    ucontext_t scheduler;
    uint32_t current = 0;
    Launch launch;
    uint64_t slots[64][32][4]; // what a lane shows its warp
    void (*body)(const void*);
    const void* argument;

    uint32_t block() const { return current / launch.block; }
};

alignas(16) inline unsigned char shared_memory[CLUSTER][SHARED];
inline Machine machine;
inline std::mutex only_one; // there is one machine, and one set of shared variables

inline void wait(State state) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.state = state;
    swapcontext(&fiber.context, &machine.scheduler);
}

inline void start() {
    machine.body(machine.argument);
    machine.fibers[machine.current].state = DONE;
}

// Fibers first .. first + count that wait at a barrier go on, if all of them do that have not ended.
inline bool pass(uint32_t first, uint32_t count, State barrier) {
    uint32_t alive = 0, here = 0;
    for (uint32_t i = first; i < first + count; ++i) {
        alive += machine.fibers[i].state != DONE;
        here += machine.fibers[i].state == barrier;
    }
    if (here == 0 || here < alive) return false;
    for (uint32_t i = first; i < first + count; ++i)
        if (machine.fibers[i].state == barrier) machine.fibers[i].state = READY;
    return true;
}

// Runs the blocks of a cluster, the first of them block (x, y, z).
inline void run_cluster(Index& index, uint32_t x, uint32_t y, uint32_t z) {
    constexpr size_t STACK = 128 * 1024;
    uint32_t threads = machine.launch.block, all = threads * machine.launch.cluster;
    if (machine.fibers.size() < all) machine.fibers.resize(all);
    for (uint32_t i = 0; i < all; ++i) {
        Fiber& fiber = machine.fibers[i];
        if (!fiber.stack) fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &machine.scheduler;
        makecontext(&fiber.context, start, 0);
        fiber.state = READY;
    }
    auto poison = [](uint32_t block) { memset(shared_memory[block], 0xff, machine.launch.shared); }; // NaN
    for (uint32_t block = 0; block < machine.launch.cluster; ++block) poison(block);
    uint32_t ended = 0;
    while (ended < all) {
        for (uint32_t i = 0; i < all; ++i) {
            if (machine.fibers[i].state != READY) continue;
            machine.current = i;
            index = {x, y, z + i / threads};
            swapcontext(&machine.scheduler, &machine.fibers[i].context);
            if (machine.fibers[i].state != DONE) continue;
            ++ended;
            uint32_t first = i / threads * threads, left = 0;
            for (uint32_t k = first; k < first + threads; ++k) left += machine.fibers[k].state != DONE;
            if (left == 0) poison(i / threads);
        }
        bool passed = ended == all;
        // A warp meets with all its lanes.
        for (uint32_t warp = 0; warp < all; warp += 32) {
            uint32_t here = 0;
            for (uint32_t i = warp; i < warp + 32; ++i) here += machine.fibers[i].state == AT_WARP_BARRIER;
            if (here == 32) passed = pass(warp, 32, AT_WARP_BARRIER) || passed;
        }
        for (uint32_t first = 0; first < all; first += threads) passed = pass(first, threads, AT_BLOCK_BARRIER) || passed;
        passed = pass(0, all, AT_CLUSTER_BARRIER) || passed;
        if (!passed) {
            fprintf(stderr, "a barrier that not all threads reach\n");
            abort();
        }
    }
}

// Shows `mine` to the warp and looks at lane `from`.
template <typename T>
T exchange(const T& mine, uint32_t from) {
    static_assert(sizeof(T) <= sizeof(machine.slots[0][0]), "room for it");
    uint32_t warp = machine.current / 32;
    memcpy(machine.slots[warp][machine.current % 32], &mine, sizeof(T));
    wait(AT_WARP_BARRIER);
    T other;
    memcpy(&other, machine.slots[warp][from % 32], sizeof(T));
    wait(AT_WARP_BARRIER);
    return other;
}

} // namespace emulation

// ---- CUDA's names -----------------------------------------------------------------------------------------------------

static emulation::Index blockIdx, blockDim, gridDim;
// A field that reads as the running fiber's index.
struct EmulatedThread {
    struct {
        operator uint32_t() const { return emulation::machine.current % emulation::machine.launch.block; }
    } x;
};
static EmulatedThread threadIdx;
#define dynamic_shared emulation::shared_memory[emulation::machine.block()]

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

inline void __syncthreads() { emulation::wait(emulation::AT_BLOCK_BARRIER); }
inline int __syncthreads_or(int x) {
    static int any;
    if (x) any = 1;
    __syncthreads();
    int result = any;
    __syncthreads();
    if (threadIdx.x == 0) any = 0;
    __syncthreads();
    return result;
}
inline void __threadfence() {}
inline void __syncwarp() { emulation::wait(emulation::AT_WARP_BARRIER); }

template <typename T>
T __shfl_sync(unsigned, T x, int lane, int width = 32) {
    uint32_t own = threadIdx.x % 32;
    return emulation::exchange(x, own / width * width + lane % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask, int = 32) {
    return emulation::exchange(x, (threadIdx.x % 32) ^ uint32_t(mask));
}
template <typename T>
T __shfl_up_sync(unsigned, T x, int offset) {
    uint32_t own = threadIdx.x % 32;
    return emulation::exchange(x, own >= uint32_t(offset) ? own - offset : own);
}
inline unsigned __ballot_sync(unsigned, bool yes) {
    unsigned bits = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) bits |= unsigned(emulation::exchange(yes, lane)) << lane;
    return bits;
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    for (int offset = 16; offset > 0; offset /= 2) {
        unsigned other = __shfl_xor_sync(0, x, offset);
        x = other > x ? other : x;
    }
    return x;
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) { return ~__reduce_max_sync(0, ~x); }
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0, x, offset);
    return x;
}
inline int __ffs(int x) { return __builtin_ffs(x); }

namespace dflash {

// One lane of a warp that works as the PTX manual says.
struct DeviceWarp : HostAddressing {
    template <typename T>
    struct Reg {
        T v;
        T& operator[](int32_t) { return v; }
        const T& operator[](int32_t) const { return v; }
    };

    static int32_t first_lane() { return int32_t(threadIdx.x % 32); }
    static int32_t lanes() { return 1; }

    static void load_matrices(const Reg<Address>& rows, int32_t element, bool transposed, Reg<uint32_t>* out) {
        uint32_t lane = threadIdx.x % 32, g = lane / 4, t = 2 * (lane % 4);
        const uint16_t* mine = rows.v.start + rows.v.element + element;
        for (uint32_t matrix = 0; matrix < 4; ++matrix) {
            const uint16_t* first = emulation::exchange(mine, matrix * 8 + (transposed ? t : g));
            const uint16_t* second = emulation::exchange(mine, matrix * 8 + (transposed ? t + 1 : g));
            out[matrix].v =
                transposed ? uint32_t(first[g]) | uint32_t(second[g]) << 16 : uint32_t(first[t]) | uint32_t(second[t + 1]) << 16;
        }
    }

    static void multiply(Reg<float>* c, const Reg<uint32_t>* a, const Reg<uint32_t>* b) {
        struct Operands {
            uint32_t a[4], b[2];
        } mine = {{a[0].v, a[1].v, a[2].v, a[3].v}, {b[0].v, b[1].v}};
        uint32_t lane = threadIdx.x % 32;
        Operands row[4], columns[2][4];
        for (uint32_t k = 0; k < 4; ++k) {
            row[k] = emulation::exchange(mine, lane / 4 * 4 + k);
            for (uint32_t column = 0; column < 2; ++column)
                columns[column][k] = emulation::exchange(mine, (2 * (lane % 4) + column) * 4 + k);
        }
        for (uint32_t e = 0; e < 4; ++e) {
            float sum = c[e].v;
            for (uint32_t k = 0; k < 16; ++k) {
                uint32_t half = k / 8, quad = k % 8 / 2, shift = 16 * (k % 2);
                float x = float_of_bf16(uint16_t(row[quad].a[2 * half + e / 2] >> shift));
                float y = float_of_bf16(uint16_t(columns[e % 2][quad].b[half] >> shift));
                sum += x * y;
            }
            c[e].v = sum;
        }
    }

    static Reg<float> exchange(const Reg<float>& x, int32_t mask) { return {__shfl_xor_sync(0, x.v, mask)}; }
};

struct DeviceCluster {
    float* mine;

    static void meet() { emulation::wait(emulation::AT_CLUSTER_BARRIER); }

    float* of_block(int32_t rank) const {
        size_t offset = size_t(reinterpret_cast<unsigned char*>(mine) - dynamic_shared);
        if (uint32_t(rank) >= emulation::machine.launch.cluster || offset >= emulation::machine.launch.shared) {
            fprintf(stderr, "shared memory of no block of the cluster\n");
            abort();
        }
        return reinterpret_cast<float*>(emulation::shared_memory[rank] + offset);
    }
};

} // namespace dflash

namespace emulation {

template <typename P>
struct Call {
    void (*kernel)(P);
    const P* params;
};

template <typename P>
void run(void (*kernel)(P), const P& params, const Launch& launch) {
    std::lock_guard<std::mutex> hold(only_one);
    Call<P> call = {kernel, &params};
    machine.argument = &call;
    machine.body = [](const void* argument) {
        auto* c = static_cast<const Call<P>*>(argument);
        c->kernel(*c->params);
    };
    blockDim = {launch.block, 1, 1};
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    machine.launch = launch;
    if (launch.cluster == 0 || launch.cluster > CLUSTER || launch.grid[2] % launch.cluster || launch.shared > SHARED) {
        fprintf(stderr, "a launch that no device runs\n");
        abort();
    }
    for (uint32_t z = 0; z < launch.grid[2]; z += launch.cluster)
        for (uint32_t y = 0; y < launch.grid[1]; ++y)
            for (uint32_t x = 0; x < launch.grid[0]; ++x) run_cluster(blockIdx, x, y, z);
}

} // namespace emulation

// Inline PTX of the kernel files: copies have arrived at once, prefetches say nothing.
#define asm
#define volatile(...)
#define accept accept_kernel // accept(2) is taken
