// delta_inputs and delta_rule on the host, a block's threads one after the other between its barriers: a part of host_check.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "logic_delta.cuh"

namespace host {

using namespace dflash;

void delta_inputs(const DeltaRuleParams& p) {
    Launch launch = delta_inputs_launch(p);
    int32_t threads = int32_t(launch.block);
    for (uint32_t request = 0; request < launch.grid[0]; ++request) {
        int32_t pending = delta_pending(p, int32_t(request));
        p.pending[request] = pending;
        DeltaWork w = delta_work(p, int32_t(request), pending);
        if (!w.active || !w.sound) continue;
        // Later tiles first: they may not hang on what the first one writes.
        for (uint32_t index = 0; index < launch.grid[1] * launch.grid[2]; ++index) {
            DeltaPart part = delta_part(p, int32_t(index % launch.grid[1]));
            int32_t first = int32_t(launch.grid[2] - 1 - index / launch.grid[1]) * delta_tile(p);
            int32_t last = min_of(first + delta_tile(p), w.total);
            for (int32_t k = first; k < last; ++k) {
                if (part.width == 0)
                    for (int32_t head = 0; head < p.value_heads; ++head) delta_gate(p, w, k, head);
                float sums[16];
                for (int32_t lane = 0; lane < 16; ++lane) sums[lane] = delta_make(p, w, part, k, lane);
                for (int32_t offset = 8; offset > 0; offset /= 2)
                    for (int32_t lane = 0; lane < offset; ++lane) sums[lane] = add(sums[lane], sums[lane + offset]);
                if (part.scale >= 0) delta_measure(p, w, part, k, sums[0]);
            }
            if (first > 0) continue;
            for (int32_t thread = 0; part.width == 0 && thread < threads; ++thread) delta_settle_gates(p, w, thread, threads);
            for (int32_t i = 0; i < part.width; ++i) delta_settle(p, w, part.channel + i);
        }
    }
}

// Both halves of one column.
template <int DK>
struct HostColumn {
    float s[2][DK / 2], read[2], out[2];

    template <bool WRITE, bool READ>
    void walk(const DeltaStage<DK>& stage, int32_t t, int32_t next, float delta) {
        for (int32_t half = 0; half < 2; ++half) {
            out[half] = read[half] = 0.0f;
            delta_walk<DK, WRITE, READ>(s[half], stage.key(t, half), stage.query(t, half), delta, out[half],
                                        stage.key(next, half), stage.decay(next), read[half]);
        }
    }

    void store(const DeltaRuleParams& p, float* memory, int64_t slot, int32_t head, int32_t column) const {
        for (int32_t half = 0; half < 2; ++half) delta_store<DK>(p, memory, slot, head, column, half, 2 * p.value_dim, s[half]);
    }
};

template <int DK>
void delta_rule(const DeltaRuleParams& p) {
    Launch launch = delta_rule_launch(p);
    std::vector<float> shared(launch.shared / 4 + 4);
    DeltaStage<DK> stage(shared.data());
    std::vector<HostColumn<DK>> columns(DELTA_COLUMNS);
    for (uint32_t index = 0; index < launch.grid[0] * launch.grid[1]; ++index) {
        int32_t x = int32_t(index / launch.grid[1]), first = int32_t(index % launch.grid[1]) * DELTA_COLUMNS;
        int32_t request = x / p.value_heads, head = x % p.value_heads;
        DeltaWork w = delta_work(p, request, p.pending[request]);
        if (!w.active) continue;
        int32_t count = min_of(DELTA_COLUMNS, p.value_dim - first);
        if (!w.sound) {
            for (int32_t t = 0; t < w.tokens; ++t)
                for (int32_t i = 0; i < count; ++i) delta_give(p, w, t, head, first + i, float_of(0x7fc00000u));
            continue;
        }
        for (int32_t i = 0; i < count; ++i)
            for (int32_t half = 0; half < 2; ++half)
                delta_load<DK>(p, w, head, first + i, half, 2 * p.value_dim, columns[i].s[half]);
        for (int32_t done = 0;;) {
            for (int32_t i = 0; done == w.pending && w.moves && i < count; ++i)
                columns[i].store(p, p.memory, w.target, head, first + i);
            if (done == w.total) break;
            int32_t tokens = delta_count(w, done);
            std::fill(shared.begin(), shared.end(), float_of(0x7fc00000u));
            delta_fetch<DK>(p, w, head, first, done, tokens, stage, 0, 1);
            for (int32_t i = 0; i < count; ++i) {
                HostColumn<DK>& column = columns[i];
                column.template walk<false, true>(stage, 0, 0, 0.0f);
                for (int32_t t = 0; t < tokens; ++t) {
                    float delta = mul(sub(stage.value(t, i), add(column.read[0], column.read[1])), stage.beta(t));
                    if (t + 1 < tokens) column.template walk<true, true>(stage, t, t + 1, delta);
                    else column.template walk<true, false>(stage, t, t, delta);
                    delta_give(p, w, done + t, head, first + i, add(column.out[0], column.out[1]));
                }
            }
            done += tokens;
        }
        for (int32_t i = 0; w.end >= 0 && i < count; ++i) columns[i].store(p, p.end_memory, w.end, head, first + i);
        if (head == 0 && first == 0) p.stands[w.target] = p.context_lens[request];
    }
}

} // namespace host
