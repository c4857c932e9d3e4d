// Drawing on the host, a block's threads one after the other between its barriers: a part of host_check.cpp.
#pragma once

#include <string.h>

#include <memory>
#include <vector>

#include "logic_tally.cuh"

namespace host {

using namespace dflash;

struct HostRow {
    OpenRow row;
    std::vector<int32_t> path;

    bool open(const SampleRowsParams& p, int32_t index) {
        row.request = -1;
        for (int32_t thread = 0; thread < SAMPLE_THREADS; ++thread) find_request(p, index, &row.request, thread, SAMPLE_THREADS);
        if (row.request < 0) return false;
        path.assign(ACCEPT_MAX_NODES, 0);
        open_row(p, row, index);
        if (penalises(row.s)) open_path(p, row, path.data(), ACCEPT_MAX_NODES);
        return true;
    }

    void mark(const SampleRowsParams& p, int32_t first, std::vector<uint32_t>& bits) {
        // One word more on either side, which nobody may touch.
        bits.assign(SAMPLE_CHUNK / 32 + 2, 0);
        for (int32_t thread = 0; thread < SAMPLE_THREADS; ++thread)
            mark_edits(p, row, path.data(), first, bits.data() + 1, thread, SAMPLE_THREADS);
        if (bits.front() || bits.back()) __builtin_trap();
        bits.erase(bits.begin());
    }
};

// Threads of a chunk that have columns at all.
template <typename E>
int32_t busy(const SampleRowsParams& p, int32_t first) {
    return min_of(SAMPLE_THREADS, int32_t(ceil_div(p.vocab - first, WIDTH<E>)));
}

// sample_scan of a chunk.
template <typename E>
SampleChunk scan_chunk(const SampleRowsParams& p, const SampleScratch& scratch, const OpenRow& row, int32_t index,
                       const int32_t* path, const uint32_t* bits, int32_t first) {
    int32_t threads = busy<E>(p, first);
    std::vector<ThreadScan> scans(threads);
    float top = -infinity(), bound = -infinity();
    uint32_t raw = 0;
    for (int32_t thread = 0; thread < threads; ++thread) {
        float x[SAMPLE_COLUMNS];
        unpack(load_columns(p, row_logits<E>(p, index), first, thread), x);
        ThreadScan& s = scans[thread] = thread_scan();
        scan_thread<E>(p, row, ScanAsks(row.s), &scratch.maxima[scratch.block(index, 0)], &raw, path, bits, first, thread, x, s);
        top = larger(top, s.top);
        bound = fmaxf(bound, best_bound(s));
    }
    uint32_t base = NO_COLUMN, id = NO_COLUMN;
    for (const ThreadScan& s : scans)
        if (s.top == top && s.base < base) base = s.base;
    for (int32_t i = WIDTH<E> - 1; i >= 0 && base != NO_COLUMN; --i) {
        int32_t column = int32_t(base) + i;
        float x = raw_of<E>(p, index, column);
        if (column < p.vocab && edits(row.s)) x = edited(p, row, path, column, x);
        if (x == top) id = uint32_t(column);
    }
    Best draw = nothing();
    if (is_plain(row.s)) {
        std::vector<uint32_t> done(threads);
        float least = bound, reached = -infinity();
        for (int32_t turn = 0; turn < 2; ++turn) {
            Best now = draw;
            for (int32_t thread = threads - 1; thread >= 0; --thread) {
                uint32_t groups = groups_above(scans[thread], least) & ~done[thread];
                Best best = draw_groups(p, row, row_logits<E>(p, index), path, bits, first, thread, groups, reached);
                now.offer(best.score, best.id);
                done[thread] = groups;
            }
            draw = now;
            least = reached = draw.score;
        }
    }
    return {0, top, id, edits(row.s) ? value_of_key(raw) : top, !(top < infinity()), draw.score, draw.id};
}

ScanState merged(const SampleScratch& scratch, int32_t index) {
    ScanState all = scan_start();
    for (int32_t c = 0; c < scratch.num_chunks; ++c) merge(all, scan_of(scratch.chunks[int64_t(index) * scratch.num_chunks + c]));
    return all;
}

Edge host_edge(const SampleScratch& scratch, const OpenRow& row, int32_t index) {
    const uint32_t* counts = scratch.counts + int64_t(index) * SAMPLE_BINS;
    const uint64_t* masses = scratch.masses + int64_t(index) * SAMPLE_BINS;
    uint64_t total = 0;
    for (int32_t bin = 0; bin < SAMPLE_BINS; ++bin) total += masses[bin];
    return edge_walk(counts, masses, 0, SAMPLE_BINS, budget_of(row.s, total));
}

template <typename E>
void sample_row(const SampleRowsParams& p, int32_t index) {
    SampleScratch scratch(p);
    HostRow open;
    if (!open.open(p, index)) {
        p.tokens[index] = -1;
        p.status[index] = ROW_OK;
        return;
    }
    const OpenRow& row = open.row;
    const int32_t* path = open.path.data();
    std::vector<uint32_t> bits;
    for (int32_t bin = 0; bin < SAMPLE_BINS; ++bin) {
        scratch.counts[int64_t(index) * SAMPLE_BINS + bin] = 0;
        scratch.masses[int64_t(index) * SAMPLE_BINS + bin] = 0;
    }
    scratch.listed[int64_t(index) * 4] = 0;
    for (int32_t chunk = 0; chunk < scratch.num_chunks; ++chunk) { // sample_scan
        int32_t first = chunk * SAMPLE_CHUNK;
        open.mark(p, first, bits);
        scratch.chunks[int64_t(index) * scratch.num_chunks + chunk] =
            scan_chunk<E>(p, scratch, row, index, path, bits.data(), first);
    }
    RowTop top = row_top(row, merged(scratch, index));
    bool select = selects(row.s), ok = top.status == ROW_OK;
    if (ok && (select || p.logprobs)) { // sample_mass
        for (int32_t chunk = 0; chunk < scratch.num_chunks; ++chunk) {
            int32_t first = chunk * SAMPLE_CHUNK;
            open.mark(p, first, bits);
            auto bins = std::make_unique<BlockBins>();
            auto tally = std::make_unique<Tally<E>>();
            int32_t start = tally_start(row, top), threads = busy<E>(p, first);
            uint64_t raw = 0;
            uint32_t rest = uint32_t(min_of(SAMPLE_CHUNK, p.vocab - first));
            for (int32_t thread = 0; thread < threads; ++thread) {
                Columns<E> columns = load_columns(p, row_logits<E>(p, index), first, thread);
                float x[SAMPLE_COLUMNS];
                unpack(columns, x);
                if (p.logprobs) raw += raw_mass(x, top.raw_top);
                if (!select) continue;
                if constexpr (sizeof(E) == 2) {
                    if (edits(row.s)) take_edited(p, row, index, top, path, bits.data(), first, thread, columns, *bins, rest);
                    count_columns(columns, start, *tally);
                } else {
                    if (edits(row.s)) edit_columns<E>(p, row, path, bits.data(), first, thread, x);
                    add_each(Weighing(row, top), x, *bins, rest);
                }
            }
            scratch.chunks[int64_t(index) * scratch.num_chunks + chunk].mass = raw;
            if (!select) continue;
            if constexpr (sizeof(E) == 2) {
                for (int32_t thread = 0; thread < SAMPLE_THREADS; ++thread) {
                    add_counted(Weighing(row, top), *tally, start, thread, *bins, rest);
                    if (tally->counts[0]) add_small(p, row, index, top, bits.data(), first, thread, start, *bins, rest);
                }
            }
            if (row.s.top_k > 0) bins->counts[SAMPLE_BINS - 1] += rest;
            for (int32_t bin = 0; bin < SAMPLE_BINS; ++bin) {
                scratch.counts[int64_t(index) * SAMPLE_BINS + bin] += bins->counts[bin];
                scratch.masses[int64_t(index) * SAMPLE_BINS + bin] += bins->mass(bin);
            }
        }
    }
    if (ok && (select || has_floor(row.s))) { // sample_pick
        int32_t edge = select ? host_edge(scratch, row, index).bin : SAMPLE_BINS;
        const uint64_t* behind = scratch.candidates + (int64_t(index) + 1) * SAMPLE_CANDIDATES;
        uint64_t before = *behind;
        for (int32_t chunk = scratch.num_chunks - 1; chunk >= 0; --chunk) {
            int32_t first = chunk * SAMPLE_CHUNK;
            open.mark(p, first, bits);
            Best best = nothing();
            for (int32_t block = SAMPLE_CHUNK / SAMPLE_BLOCK - 1; block >= 0; --block) {
                int32_t start = first + block * SAMPLE_BLOCK;
                if (!is_seen(scratch, row, index, top, edge, start, p.vocab)) continue;
                float bar = best.score;
                for (int32_t column = start + SAMPLE_BLOCK - 4; column >= start; column -= 4)
                    pick4<E>(p, scratch, row, index, top, edge, path, bits.data(), first, column, bar, best);
            }
            scratch.chunks[int64_t(index) * scratch.num_chunks + chunk].best = best.score;
            scratch.chunks[int64_t(index) * scratch.num_chunks + chunk].best_id = best.id;
        }
        if (*behind != before) __builtin_trap();
    }
    ScanState all = merged(scratch, index); // sample_finish
    Best best = is_greedy(row.s) ? all.top : all.draw;
    if (ok && select) {
        Edge edge = host_edge(scratch, row, index);
        if (edge.bin < SAMPLE_BINS) {
            EdgeColumns<E> columns = {p, scratch, row, top, path, index, edge.bin};
            bool listed = columns.in_list();
            uint64_t last = 0;
            Budget left = edge.left;
            for (int32_t shift = 56; shift >= 0; shift -= 8) {
                Digits digits = {};
                for (int32_t thread = 0; thread < SAMPLE_THREADS; ++thread)
                    digit_thread(columns, listed, columns.size(), last, shift, digits, thread, SAMPLE_THREADS);
                last |= uint64_t(choose_digit(digits, left)) << shift;
            }
            for (int32_t thread = 0; thread < SAMPLE_THREADS; ++thread) {
                Best mine = edge_draw_thread(columns, listed, columns.size(), last, thread, SAMPLE_THREADS);
                best.offer(mine.score, mine.id);
            }
        }
    }
    ok = ok && best.id != NO_COLUMN;
    p.tokens[index] = ok ? int64_t(best.id) : -1;
    p.status[index] = top.status;
    if (p.logprobs && ok) {
        uint64_t raw = 0;
        for (int32_t c = 0; c < scratch.num_chunks; ++c) raw += scratch.chunks[int64_t(index) * scratch.num_chunks + c].mass;
        float logit = widen((static_cast<const E*>(p.logits) + int64_t(index) * p.row_stride)[best.id]);
        p.logprobs[index] = logprob_of(logit, top.raw_top, raw);
    }
}

} // namespace host
