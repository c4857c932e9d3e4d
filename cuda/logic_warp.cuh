// One warp of attention on either machine: its arithmetic is written once. On the device a `Reg` is this lane's register, on the host
// it is the registers of all 32 lanes, and EACH_LANE visits those there are.
#pragma once

#include "common.cuh"

namespace dflash {

#define EACH_LANE(lane) for (int32_t lane = W::first_lane(), lane##_end = lane + W::lanes(); lane < lane##_end; ++lane)

#ifdef __CUDACC__
struct DeviceWarp {
    template <typename T>
    struct Reg {
        T v;
        __device__ __forceinline__ T& operator[](int32_t) { return v; }
        __device__ __forceinline__ const T& operator[](int32_t) const { return v; }
    };

    static __device__ __forceinline__ int32_t first_lane() { return int32_t(threadIdx.x % 32); }
    static __device__ __forceinline__ constexpr int32_t lanes() { return 1; }

    // A place in shared memory, in bytes.
    using Address = uint32_t;

    static __device__ __forceinline__ Address address(const uint16_t* start, int32_t element) {
        return uint32_t(__cvta_generic_to_shared(start)) + 2 * uint32_t(element);
    }

    // What `other_chunk` needs of the place where tiles begin. A kernel without static shared memory has that at a multiple of a
    // KiB; an alignment in the declaration would round the static memory of every other kernel up.
    static __device__ __forceinline__ void expect_aligned(const uint16_t* start, int32_t elements) {
        if (address(start, 0) % (2 * uint32_t(elements)) != 0) __trap();
    }

    static __device__ __forceinline__ Address behind(Address at, int32_t element) { return at + 2 * uint32_t(element); }

    // See `swizzled`.
    static __device__ __forceinline__ Address other_chunk(Address at, int32_t chunks) { return at ^ 16 * uint32_t(chunks); }

    // Four 8 x 8 matrices, `element` behind `rows`; lane l names row l % 8 of matrix l / 8.
    static __device__ __forceinline__ void load_matrices(const Reg<Address>& rows, int32_t element, bool transposed,
                                                         Reg<uint32_t>* out) {
        uint32_t at = rows.v + 2 * uint32_t(element);
        if (transposed)
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(out[0].v), "=r"(out[1].v), "=r"(out[2].v), "=r"(out[3].v)
                         : "r"(at)
                         : "memory");
        else
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(out[0].v), "=r"(out[1].v), "=r"(out[2].v), "=r"(out[3].v)
                         : "r"(at)
                         : "memory");
    }

    // c += a b: a 16 x 16, b 16 x 8.
    static __device__ __forceinline__ void multiply(Reg<float>* c, const Reg<uint32_t>* a, const Reg<uint32_t>* b) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0].v), "+f"(c[1].v), "+f"(c[2].v), "+f"(c[3].v)
            : "r"(a[0].v), "r"(a[1].v), "r"(a[2].v), "r"(a[3].v), "r"(b[0].v), "r"(b[1].v));
    }

    static __device__ __forceinline__ Reg<float> exchange(const Reg<float>& x, int32_t mask) {
        return {__shfl_xor_sync(0xffffffffu, x.v, mask)};
    }
};

// The cluster of blocks along z that this one belongs to; `mine` lies in its shared memory. (Code for sm_90 and later.)
struct DeviceCluster {
    float* mine;

    // All threads that are still there have come here, and see what all wrote before.
    static __device__ __forceinline__ void meet() {
        asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    }

    // The same place in the shared memory of another block.
    __device__ __forceinline__ float* of_block(int32_t rank) const {
        float* there;
        asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(mine), "r"(rank));
        return there;
    }
};
#endif

// DeviceWarp's addresses for memory that is aligned to nothing: elements are counted from the start of a tile, which is.
struct HostWarpAddress {
    const uint16_t* start;
    int32_t element;
};

struct HostAddressing {
    using Address = HostWarpAddress;
    static Address address(const uint16_t* start, int32_t element) { return {start, element}; }
    static void expect_aligned(const uint16_t*, int32_t) {}
    static Address behind(Address at, int32_t element) { return {at.start + element, at.element}; }
    static Address other_chunk(Address at, int32_t chunks) { return {at.start, at.element ^ 8 * chunks}; }
};

// 2^x, 0 for -inf.
DFLASH_HD float exp2_of(float x) {
#if DFLASH_ON_DEVICE
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// up * tanh(-x * down * ln(2) / 2): with t = 2^(x * down) that is up * (1 - t) / (1 + t), and the bounds change nothing.
DFLASH_HD float capped(float x, float down, float up) {
    float t = exp2_of(fminf(fmaxf(mul(x, down), -29.0f), 29.0f));
    // What is not a number stays so: the bounds drop it.
    return add(mul(up, div(sub(1.0f, t), add(1.0f, t))), sub(x, x));
}

} // namespace dflash
