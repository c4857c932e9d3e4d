// What every kernel file needs: one spelling for host and device, single-rounding arithmetic, bfloat16.
//
// Where bits are a contract, arithmetic goes through add / sub / mul: one IEEE rounding each and never a fused
// multiply-add, whatever flags the file is compiled with. (The host build needs -ffp-contract=off.)
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "params.h"

#ifdef __CUDACC__
#define DFLASH_HD __host__ __device__ __forceinline__
#define DFLASH_UNROLL _Pragma("unroll")
#define DFLASH_ROLLED _Pragma("unroll 1")
// The one block of dynamic shared memory, whatever a kernel makes of it. (All kernels are one translation unit.)
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#else
#define DFLASH_HD inline
#define DFLASH_UNROLL
#define DFLASH_ROLLED
#endif

// Code that differs between a kernel and the same function on the host.
#ifdef __CUDA_ARCH__
#define DFLASH_ON_DEVICE 1
#else
#define DFLASH_ON_DEVICE 0
#endif

namespace dflash {

DFLASH_HD uint32_t bits_of(float x) {
#if DFLASH_ON_DEVICE
    return __float_as_uint(x);
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
#endif
}

DFLASH_HD float float_of(uint32_t bits) {
#if DFLASH_ON_DEVICE
    return __uint_as_float(bits);
#else
    float x;
    memcpy(&x, &bits, 4);
    return x;
#endif
}

DFLASH_HD float add(float a, float b) {
#if DFLASH_ON_DEVICE
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

DFLASH_HD float sub(float a, float b) {
#if DFLASH_ON_DEVICE
    return __fsub_rn(a, b);
#else
    return a - b;
#endif
}

DFLASH_HD float mul(float a, float b) {
#if DFLASH_ON_DEVICE
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

DFLASH_HD float div(float a, float b) {
#if DFLASH_ON_DEVICE
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// a * b + c for a product that has no more bits than a number holds: what add(mul(a, b), c) is, in one instruction.
DFLASH_HD float add_product(float a, float b, float c) {
#if DFLASH_ON_DEVICE
    return __fmaf_rn(a, b, c);
#else
    // Where a GPU would round once less, tests are to notice.
    if (double(a) * double(b) != double(a * b)) __builtin_trap();
    return add(mul(a, b), c);
#endif
}

// a * b + c, rounded once.
DFLASH_HD float fused(float a, float b, float c) {
#if DFLASH_ON_DEVICE
    return __fmaf_rn(a, b, c);
#else
    return fmaf(a, b, c);
#endif
}

// The larger one; what is not a number wins, as the one of positive sign.
DFLASH_HD float larger(float a, float b) {
#if DFLASH_ON_DEVICE
    float x;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
#else
    if (a != a || b != b) return float_of(0x7fffffffu);
    return a > b ? a : b;
#endif
}

DFLASH_HD float infinity() { return float_of(0x7f800000u); }

DFLASH_HD float float_of_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
DFLASH_HD uint16_t bf16_of_float(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Integer updates of memory that several threads of a block (or blocks) share: order-free, so results stay deterministic.
// The host runs threads one after the other.
template <typename T>
DFLASH_HD void atomic_min(T* at, T value) {
#if DFLASH_ON_DEVICE
    atomicMin(at, value);
#else
    if (value < *at) *at = value;
#endif
}

DFLASH_HD uint32_t atomic_add(uint32_t* at, uint32_t value) {
#if DFLASH_ON_DEVICE
    return atomicAdd(at, value);
#else
    uint32_t before = *at;
    *at += value;
    return before;
#endif
}

DFLASH_HD void atomic_add(uint64_t* at, uint64_t value) {
#if DFLASH_ON_DEVICE
    atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
#else
    *at += value;
#endif
}

template <typename T>
DFLASH_HD void atomic_max(T* at, T value) {
#if DFLASH_ON_DEVICE
    atomicMax(at, value);
#else
    if (value > *at) *at = value;
#endif
}

DFLASH_HD void atomic_max(uint64_t* at, uint64_t value) {
#if DFLASH_ON_DEVICE
    atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
#else
    if (value > *at) *at = value;
#endif
}

// What other blocks of the kernel wrote before a fence: from the cache that all share.
template <typename T>
DFLASH_HD T fresh(const T* at) {
#if DFLASH_ON_DEVICE
    if constexpr (sizeof(T) == 8) return T(__ldcg(reinterpret_cast<const unsigned long long*>(at)));
    else return __ldcg(at);
#else
    return *at;
#endif
}

// What other threads change meanwhile.
DFLASH_HD uint32_t peek(const uint32_t* at) { return *static_cast<const volatile uint32_t*>(at); }

// Of a number other than 0.
DFLASH_HD int32_t lowest_bit(uint32_t x) {
#if DFLASH_ON_DEVICE
    return __ffs(int(x)) - 1;
#else
    return __builtin_ctz(x);
#endif
}

// `x`, of which the compiler forgets how it came about: what few turns of a loop make of it is made there, and not ahead of the loop for all
// of them, where it would take registers.
DFLASH_HD int32_t seldom(int32_t x) {
#if DFLASH_ON_DEVICE
    asm volatile("" : "+r"(x));
#endif
    return x;
}

DFLASH_HD int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
DFLASH_HD int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }

// Slot of key `key` of request `request`; -1 outside the row of the table.
DFLASH_HD int64_t slot_of(const PageTable& table, int32_t request, int32_t key) {
    int32_t page = key / table.page_size;
    if (key < 0 || page >= table.width) return -1;
    int64_t id = table.pages[int64_t(table.row_ids[request]) * table.width + page];
    return id * table.page_size + (key - page * table.page_size);
}

// The request that owns packed token `token`: the last r with query_starts[r] <= token. -1 outside.
DFLASH_HD int32_t request_of(const int32_t* query_starts, int32_t num_requests, int32_t token) {
    if (token < 0 || num_requests <= 0 || token >= query_starts[num_requests]) return -1;
    int32_t low = 0, high = num_requests; // query_starts[low] <= token < query_starts[high]
    while (high - low > 1) {
        int32_t middle = low + (high - low) / 2;
        if (query_starts[middle] <= token) low = middle;
        else high = middle;
    }
    return low;
}

} // namespace dflash
