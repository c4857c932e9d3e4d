// Moving K and V: injection of the drafter's (norm, RoPE, paged store) and compaction of an accepted path.
#pragma once

#include <math.h>

#include "common.cuh"

namespace dflash {

// Eight bfloat16 elements, one 16-byte access.
struct alignas(16) Vec8 {
    uint32_t w[4];
};

DFLASH_HD Vec8 load8(const uint16_t* at) {
#if DFLASH_ON_DEVICE
    uint4 x = *reinterpret_cast<const uint4*>(at);
    return {{x.x, x.y, x.z, x.w}};
#else
    Vec8 x;
    memcpy(&x, at, 16);
    return x;
#endif
}

DFLASH_HD void store8(uint16_t* at, const Vec8& x) {
#if DFLASH_ON_DEVICE
    *reinterpret_cast<uint4*>(at) = make_uint4(x.w[0], x.w[1], x.w[2], x.w[3]);
#else
    memcpy(at, &x, 16);
#endif
}

DFLASH_HD float element(const Vec8& x, int32_t i) { return float_of(i & 1 ? x.w[i / 2] & 0xffff0000u : x.w[i / 2] << 16); }

// What is not a number stays so; which one depends on the machine.
DFLASH_HD uint32_t pack2(float low, float high) {
#if DFLASH_ON_DEVICE
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
#else
    return uint32_t(bf16_of_float(low)) | uint32_t(bf16_of_float(high)) << 16;
#endif
}

// ---- kv_inject --------------------------------------------------------------------------------------------------------
// A unit is one head vector of K or V of one row and layer; D / 8 lanes of a warp have it, eight elements each. Units follow
// each other as the vectors do in memory: row, layer, K before V, head.

struct InjectUnit {
    int64_t row; // m
    int64_t source;
    int64_t slot;
    int32_t layer;
    int32_t head;
    bool is_v;
    bool active;
};

DFLASH_HD InjectUnit inject_unit(const KvInjectParams& p, int64_t unit) {
    InjectUnit u;
    int32_t per_row = p.num_layers * 2 * p.num_heads;
    u.row = unit / per_row;
    int32_t rest = int32_t(unit - u.row * per_row);
    u.layer = rest / (2 * p.num_heads);
    rest -= u.layer * 2 * p.num_heads;
    u.is_v = rest >= p.num_heads;
    u.head = rest - (u.is_v ? p.num_heads : 0);
    u.active = u.row < p.max_rows;
    u.source = u.slot = -1;
    if (u.active) {
        u.source = p.rows ? p.rows[u.row] : u.row;
        u.slot = p.slots[u.row];
        u.active = u.source >= 0 && u.slot >= 0;
    }
    return u;
}

template <int D>
DFLASH_HD Vec8 inject_load(const KvInjectParams& p, const InjectUnit& u, int32_t lane) {
    if (!u.active) return {{0, 0, 0, 0}};
    return load8(p.kv + u.source * p.row_stride + u.layer * p.layer_stride + (u.is_v ? p.v_offset : 0) + int64_t(u.head) * D
                 + 8 * lane);
}

DFLASH_HD float sum_of_squares(const Vec8& x) {
    float sum = 0.0f;
    DFLASH_UNROLL
    for (int32_t i = 0; i < 8; ++i) sum = add(sum, mul(element(x, i), element(x, i)));
    return sum;
}

// Normed elements of a lane. `sum`: of squares over the whole vector.
template <int D>
DFLASH_HD void inject_norm(const KvInjectParams& p, const InjectUnit& u, const Vec8& x, float sum, int32_t lane, float* out) {
    float mean = mul(sum, 1.0f / float(D));
    float factor = div(1.0f, sqrtf(add(mean, p.eps)));
    Vec8 weights = load8(p.k_norm + int64_t(u.layer) * D + 8 * lane);
    DFLASH_UNROLL
    for (int32_t i = 0; i < 8; ++i) out[i] = mul(mul(element(x, i), factor), element(weights, i));
}

// The lane that holds the other element of a lane's pairs; itself beyond the rotated part.
DFLASH_HD int32_t inject_partner(int32_t rotary_dim, int32_t lane) {
    int32_t half = rotary_dim / 16; // lanes in half the rotated part
    return lane < half ? lane + half : lane < 2 * half ? lane - half : lane;
}

// Rotates a lane's elements; `other` are its partner's.
DFLASH_HD Vec8 inject_rotate(const KvInjectParams& p, const InjectUnit& u, const float* x, const float* other, int32_t lane) {
    int32_t half = p.rotary_dim / 16;
    float out[8];
    if (lane >= 2 * half) {
        DFLASH_UNROLL
        for (int32_t i = 0; i < 8; ++i) out[i] = x[i];
    } else {
        bool first = lane < half;
        const float* cosines = p.cos_sin + p.positions[u.row] * p.rotary_dim + 8 * (first ? lane : lane - half);
        const float* sines = cosines + p.rotary_dim / 2;
        DFLASH_UNROLL
        for (int32_t i = 0; i < 8; ++i) {
            float turned = mul(other[i], sines[i]);
            out[i] = first ? sub(mul(x[i], cosines[i]), turned) : add(mul(x[i], cosines[i]), turned);
        }
    }
    Vec8 packed;
    DFLASH_UNROLL
    for (int32_t i = 0; i < 4; ++i) packed.w[i] = pack2(out[2 * i], out[2 * i + 1]);
    return packed;
}

template <int D>
DFLASH_HD void inject_store(const KvInjectParams& p, const InjectUnit& u, const Vec8& x, int32_t lane) {
    uint16_t* cache = reinterpret_cast<uint16_t*>((u.is_v ? p.v_caches : p.k_caches)[u.layer]);
    store8(cache + u.slot * p.slot_stride + u.head * p.head_stride + 8 * lane, x);
}

// ---- compact_kv -------------------------------------------------------------------------------------------------------
// A thread owns one vector (head and eight elements) of one layer's K or V and moves it for every key of the path, so only its
// own reads and writes can meet. path[k] >= k and entries rise: a batch of keys is read before it is written, and later
// batches read keys above all that were written.

constexpr int32_t COMPACT_BATCH = 8;

DFLASH_HD void compact_thread(const CompactKvParams& p, int32_t request, int32_t layer, bool is_v, int32_t vector) {
    int32_t per_head = p.head_dim / 8;
    if (vector >= p.num_heads * per_head) return;
    uint16_t* cache = reinterpret_cast<uint16_t*>((is_v ? p.v_caches : p.k_caches)[layer]);
    cache += (vector / per_head) * p.head_stride + 8 * (vector % per_head);
    const int32_t* path = p.path + request * p.path_stride;
    int32_t context = p.context_lens[request];
    bool more = true;
    for (int64_t k = 0; more && k < p.path_stride; k += COMPACT_BATCH) {
        Vec8 moved[COMPACT_BATCH];
        int64_t to[COMPACT_BATCH];
        DFLASH_UNROLL
        for (int32_t i = 0; i < COMPACT_BATCH; ++i) {
            int32_t from = more && k + i < p.path_stride ? path[k + i] : -1;
            more = from >= 0;
            to[i] = -1;
            if (!more || from == k + i) continue;
            int64_t source = slot_of(p.table, request, context + from);
            to[i] = slot_of(p.table, request, context + int32_t(k) + i);
            if (source < 0) to[i] = -1;
            else moved[i] = load8(cache + source * p.slot_stride);
        }
        DFLASH_UNROLL
        for (int32_t i = 0; i < COMPACT_BATCH; ++i) {
            if (to[i] >= 0) store8(cache + to[i] * p.slot_stride, moved[i]);
        }
    }
}

} // namespace dflash
