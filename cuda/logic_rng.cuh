// Keyed random numbers, bit for bit those of src/rng.rs; the arithmetic is documented there.
#pragma once

#include <math.h>

#include "common.cuh"

namespace dflash {

enum Domain : uint32_t { DOMAIN_DRAW = 0, DOMAIN_ACCEPT = 1, DOMAIN_RESIDUAL = 2, DOMAIN_DRAFT = 3 };

struct Words {
    uint32_t w[4];
};

// Philox 4x32, ten rounds, of N counters under one key: the keys of a round are made once.
template <int N>
DFLASH_HD void philox4x32_10(Words (&x)[N], uint32_t key0, uint32_t key1) {
    DFLASH_UNROLL
    for (int round = 0; round < 10; ++round) {
        if (round > 0) {
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        DFLASH_UNROLL
        for (int n = 0; n < N; ++n) {
            uint64_t a = uint64_t(0xD2511F53u) * x[n].w[0];
            uint64_t b = uint64_t(0xCD9E8D57u) * x[n].w[2];
            x[n] = {{uint32_t(b >> 32) ^ x[n].w[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ x[n].w[3] ^ key1, uint32_t(a)}};
        }
    }
}

// The numbers of one (seed, position, domain).
struct Stream {
    uint32_t key0, key1, position0, position1, domain;

    DFLASH_HD Stream(uint64_t seed, uint64_t position, Domain of)
        : key0(uint32_t(seed)),
          key1(uint32_t(seed >> 32)),
          position0(uint32_t(position)),
          position1(uint32_t(position >> 32)),
          domain(of) {}

    // Words of columns first .. first + 4, `first` a multiple of four.
    DFLASH_HD Words words(uint32_t first) const {
        Words x[1] = {counter(first)};
        philox4x32_10(x, key0, key1);
        return x[0];
    }

    // What `philox4x32_10` makes them from.
    DFLASH_HD Words counter(uint32_t first) const { return {{first >> 2, position0, position1, domain}}; }

    DFLASH_HD uint32_t word(uint32_t column) const {
        Words x = words(column & ~3u);
        uint32_t low = column & 1 ? x.w[1] : x.w[0];
        uint32_t high = column & 1 ? x.w[3] : x.w[2];
        return column & 2 ? high : low;
    }

    // A coin in [0, 1) with 53 bits, from columns 2 * index and 2 * index + 1.
    DFLASH_HD double uniform(uint32_t index) const {
        uint32_t column = 2 * index;
        Words x = words(column & ~3u);
        uint64_t bits = column & 2 ? uint64_t(x.w[2]) << 32 | x.w[3] : uint64_t(x.w[0]) << 32 | x.w[1];
        return double(bits >> 11) * (1.0 / 9007199254740992.0);
    }
};

// The constants are the f32 nearest to the decimals of src/rng.rs.
DFLASH_HD float log1p_reduced(float r) {
    const float c[9] = {-0.5f,       0.3333321f,   -0.24999507f, 0.20010792f, -0.1668955f,
                        0.14000371f, -0.12077453f, 0.14008936f,  -0.1331497f};
    float p = c[8];
    DFLASH_UNROLL
    for (int i = 7; i >= 0; --i) p = add(mul(p, r), c[i]);
    return add(r, mul(mul(r, r), p));
}

#define DFLASH_LN2 0.69314718056f
#define DFLASH_TWO_THIRDS 0x3f2aaaabu

// floor(x / 2^23) as the reference's arithmetic shift, without relying on signed shifts being arithmetic.
DFLASH_HD int32_t exponent_of(uint32_t bits) {
    uint32_t x = bits - DFLASH_TWO_THIRDS;
    return int32_t(x >> 23) - int32_t((x >> 31) << 9);
}

// Natural logarithm of a positive normal number.
DFLASH_HD float ln(float x) {
    uint32_t bits = bits_of(x);
    int32_t e = exponent_of(bits);
    float f = float_of(bits - (uint32_t(e) << 23));
    return add(mul(float(e), DFLASH_LN2), log1p_reduced(sub(f, 1.0f)));
}

// Gumbel(0, 1) number of a word.
DFLASH_HD float gumbel_of_word(uint32_t word) {
    uint32_t k = (word >> 1) | 1;
    float hi = float(int32_t(k >> 16));
    float lo = float(int32_t(k & 0xffff));
    int32_t e = exponent_of(bits_of(add(mul(hi, 65536.0f), lo)));
    float s = float_of(uint32_t(127 - e) << 23);
    float r = add(sub(mul(hi, mul(65536.0f, s)), 1.0f), mul(lo, s));
    float exponential = sub(0.0f, add(mul(float(e - 31), DFLASH_LN2), log1p_reduced(r)));
    return sub(0.0f, ln(exponential));
}

// x plus at least the Gumbel number of any word no larger than `word`, rounded as the sum of the two would be: as -ln(-ln u) <= -ln(1 - u),
// which for the numbers that win is hardly more. 1 - u is taken from the upper 23 bits, rounded down; what the factor has more than ln 2
// covers the errors of gumbel_of_word (3e-6) and of the logarithm (2^-22). Infinity above the last of those numbers.
DFLASH_HD float gumbel_bound(float x, uint32_t word) {
    float rest = sub(float_of(0x3fffffffu), float_of(0x3f800000u + (word >> 9))); // exact
#if DFLASH_ON_DEVICE
    float log;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(rest));
    return __fmaf_rn(log, -0.6931578f, x);
#else
    return add(mul(log2f(rest), -0.6931578f), x);
#endif
}

} // namespace dflash
