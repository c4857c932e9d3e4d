// Mass of bfloat16 logits by counting: what sample_mass does in place of weighing column after column.
//
// Logits that weigh anything have few values: from one power of two to the next there are 128 of either sign, and not many powers of two on
// the way from the one of largest magnitude to 0. So columns are counted by value, which takes one addition each, and what a value weighs is computed
// once for all that have it. What this does not cover is added by itself: columns that are edited, whose logits are bfloat16 no
// longer, and those so near to 0 that no counter is theirs.
#pragma once

#include "logic_sample.cuh"

namespace dflash {

constexpr int32_t TALLY_OCTAVES = 24;
constexpr int32_t TALLY = TALLY_OCTAVES * 256;

// Counters of a block, of float32 logits none. The bits of a value, turned left by one so that the sign is the lowest, less `tally_start` are
// the number of its counter. The first one has all that is nearer to 0, the last one all that is further away.
template <typename E>
constexpr int32_t COUNTERS = sizeof(E) == 2 ? TALLY : 4;

template <typename E>
struct alignas(16) Tally {
    uint32_t counts[COUNTERS<E>];

    DFLASH_HD void clear(int32_t thread) {
        DFLASH_UNROLL
        for (int32_t at = thread; at < COUNTERS<E>; at += SAMPLE_THREADS) counts[at] = 0;
    }
};

DFLASH_HD int32_t tally_start(const OpenRow& row, const RowTop& top) {
    // What weighs lies between top - 32 and top; one more, and a hundredth, for what is rounded. So nothing that weighs is among the
    // largest values of its power of two, and the last counter's weigh nothing.
    float furthest = fmaxf(top.top, sub(33.0f, top.top));
    uint32_t octave = bits_of(mul(furthest, mul(1.01f, row.s.temperature))) >> 23;
    return max_of(0, int32_t(octave) + 1 - TALLY_OCTAVES) * 256;
}

// Counter of a value; `turned`: its bits, turned.
DFLASH_HD int32_t counter_of(uint32_t turned, int32_t start) {
#if DFLASH_ON_DEVICE
    return __viaddmin_s32_relu(int32_t(turned), -start, TALLY - 1);
#else
    return max_of(0, min_of(int32_t(turned) - start, TALLY - 1));
#endif
}

// The value of a counter other than the first and the last.
DFLASH_HD float counted_value(int32_t counter, int32_t start) {
    uint32_t turned = uint32_t(start + counter);
    return float_of(turned >> 1 << 16 | turned << 31);
}

// Both halves of a word, turned.
DFLASH_HD uint32_t turned_halves(uint32_t w) {
    uint32_t signs = w >> 15;
    return signs ^ ((signs ^ w << 1) & 0xfffefffeu); // a choice of bits: one instruction
}

DFLASH_HD void count_columns(const Columns<uint16_t>& c, int32_t start, Tally<uint16_t>& tally) {
    DFLASH_UNROLL
    for (int32_t i = 0; i < SAMPLE_COLUMNS / 2; ++i) {
        uint32_t turned = turned_halves(c.w[i]);
        atomic_add(&tally.counts[counter_of(turned & 0xffff, start)], 1u);
        atomic_add(&tally.counts[counter_of(turned >> 16, start)], 1u);
    }
}

// Adds the thread's edited columns to the bins and makes -inf of them.
DFLASH_HD void take_edited(const SampleRowsParams& p, const OpenRow& row, int32_t index, const RowTop& top, const int32_t* path,
                           const uint32_t* bits, int32_t first, int32_t thread, Columns<uint16_t>& c, BlockBins& bins,
                           uint32_t& rest) {
    Weighing w(row, top);
    DFLASH_ROLLED
    for (uint32_t flags = edited_flags<uint16_t>(bits, thread); flags != 0; flags &= flags - 1) {
        int32_t mine = lowest_bit(flags), column = group_column<uint16_t>(first, thread, mine / 4) + mine % 4;
        if (column >= p.vocab) break;
        float x = edited(p, row, path, column, raw_of<uint16_t>(p, index, column));
        w.add(w.d(x), 1, bins, rest);
        DFLASH_UNROLL
        for (int32_t i = 0; i < SAMPLE_COLUMNS / 2; ++i) {
            uint32_t without = mine % 2 ? (c.w[i] & 0xffffu) | 0xff800000u : (c.w[i] & 0xffff0000u) | 0xff80u;
            c.w[i] = mine / 2 == i ? without : c.w[i];
        }
    }
}

// Adds what the thread's counters say.
DFLASH_HD void add_counted(const Weighing& w, const Tally<uint16_t>& tally, int32_t start, int32_t thread, BlockBins& bins,
                           uint32_t& rest) {
    DFLASH_ROLLED
    for (int32_t at = 4 * thread; at < TALLY; at += 4 * SAMPLE_THREADS) {
        uint32_t numbers[4];
        load_words<4>(tally.counts + at, numbers);
        if (at == 0) numbers[0] = 0;
        if ((numbers[0] | numbers[1] | numbers[2] | numbers[3]) == 0) continue;
        DFLASH_UNROLL
        for (int32_t i = 0; i < 4; ++i) {
            if (numbers[i] != 0) w.add(w.d(counted_value(at + i, start)), numbers[i], bins, rest);
        }
    }
}

// Adds the thread's columns of the first counter: few rows have any, mostly zeros.
DFLASH_HD void add_small(const SampleRowsParams& p, const OpenRow& row, int32_t index, const RowTop& top, const uint32_t* bits,
                         int32_t first, int32_t thread, int32_t start, BlockBins& bins, uint32_t& rest) {
    Weighing w(row, top);
    DFLASH_ROLLED
    for (int32_t at = thread; at < SAMPLE_CHUNK; at += SAMPLE_THREADS) {
        int32_t column = first + at;
        if (column >= p.vocab) break;
        if (edits(row.s) && (bits[at / 32] >> (at % 32) & 1)) continue;
        float x = raw_of<uint16_t>(p, index, column);
        if (counter_of(turned_halves(bits_of(x)) >> 16, start) > 0) continue;
        w.add(w.d(x), 1, bins, rest);
    }
}

} // namespace dflash
