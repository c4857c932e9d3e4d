// The kernels on the host: the same functions, a kernel's threads one after the other between its barriers. For tests.
#include <vector>

#include "logic_rng.cuh"
#include "logic_sample.cuh"
#include "logic_step.cuh"

using namespace dflash;

namespace {

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
        bits.assign(SAMPLE_CHUNK / 32, 0);
        for (int32_t thread = 0; thread < SAMPLE_THREADS; ++thread)
            mark_edits(p, row, path.data(), first, bits.data(), thread, SAMPLE_THREADS);
    }
};

// Threads of a chunk that have columns at all.
int32_t busy(const SampleRowsParams& p, int32_t first) { return min_of(SAMPLE_THREADS, int32_t(ceil_div(p.vocab - first, 4))); }

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
    float x[SAMPLE_PARTS][4];
    for (int32_t chunk = 0; chunk < scratch.num_chunks; ++chunk) { // sample_scan
        int32_t first = chunk * SAMPLE_CHUNK;
        open.mark(p, first, bits);
        ScanState state = scan_start();
        for (int32_t thread = 0; thread < busy(p, first); ++thread) {
            load_parts<E>(p, index, first, thread, x);
            merge(state, scan_thread(p, scratch, row, index, path, bits.data(), first, thread, x));
        }
        scratch.chunks[int64_t(index) * scratch.num_chunks + chunk]
            = {0, state.top.score, state.top.id, state.raw_top, state.bad, state.draw.score, state.draw.id};
    }
    RowTop top = row_top(row, merged(scratch, index));
    bool select = selects(row.s), ok = top.status == ROW_OK;
    if (ok && (select || p.logprobs)) { // sample_mass
        for (int32_t chunk = 0; chunk < scratch.num_chunks; ++chunk) {
            int32_t first = chunk * SAMPLE_CHUNK;
            open.mark(p, first, bits);
            std::vector<uint32_t> counts(SAMPLE_BINS);
            std::vector<uint64_t> masses(SAMPLE_BINS);
            uint64_t raw = 0;
            for (int32_t thread = 0; thread < busy(p, first); ++thread) {
                load_parts<E>(p, index, first, thread, x);
                raw += mass_thread(p, row, top, path, bits.data(), first, thread, x, counts.data(), masses.data());
            }
            scratch.chunks[int64_t(index) * scratch.num_chunks + chunk].mass = raw;
            for (int32_t bin = 0; bin < SAMPLE_BINS; ++bin) {
                scratch.counts[int64_t(index) * SAMPLE_BINS + bin] += counts[bin];
                scratch.masses[int64_t(index) * SAMPLE_BINS + bin] += masses[bin];
            }
        }
    }
    if (ok && (select || has_floor(row.s))) { // sample_pick
        int32_t edge = select ? host_edge(scratch, row, index).bin : SAMPLE_BINS;
        for (int32_t chunk = scratch.num_chunks - 1; chunk >= 0; --chunk) {
            int32_t first = chunk * SAMPLE_CHUNK;
            open.mark(p, first, bits);
            Best best = nothing();
            for (int32_t thread = busy(p, first) - 1; thread >= 0; --thread) {
                Best mine = pick_thread<E>(p, scratch, row, index, top, edge, path, bits.data(), first, thread);
                best.offer(mine.score, mine.id);
            }
            scratch.chunks[int64_t(index) * scratch.num_chunks + chunk].best = best.score;
            scratch.chunks[int64_t(index) * scratch.num_chunks + chunk].best_id = best.id;
        }
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
                uint32_t counts[256] = {};
                uint64_t masses[256] = {};
                for (int32_t thread = 0; thread < SAMPLE_THREADS; ++thread)
                    digit_thread(columns, listed, columns.size(), last, shift, counts, masses, thread, SAMPLE_THREADS);
                last |= uint64_t(choose_digit(counts, masses, left)) << shift;
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

} // namespace

extern "C" {

void dflash_host_words(uint64_t seed, uint64_t position, uint32_t domain, uint32_t first, uint32_t count, uint32_t* out) {
    Stream stream(seed, position, Domain(domain));
    for (uint32_t i = 0; i < count; ++i) out[i] = stream.word(first + i);
}

double dflash_host_uniform(uint64_t seed, uint64_t position, uint32_t domain, uint32_t index) {
    return Stream(seed, position, Domain(domain)).uniform(index);
}

// Of each word: its Gumbel number and the bound used to skip.
void dflash_host_gumbel(const uint32_t* words, uint32_t count, float* numbers, float* bounds) {
    for (uint32_t i = 0; i < count; ++i) {
        numbers[i] = gumbel_of_word(words[i]);
        bounds[i] = gumbel_bound(words[i]);
    }
}

void dflash_host_ln(const float* x, uint32_t count, float* out) {
    for (uint32_t i = 0; i < count; ++i) out[i] = ln(x[i]);
}

void dflash_host_prepare_block(const PrepareBlockParams* p) {
    Launch launch = prepare_block_launch(*p);
    for (uint32_t block = 0; block < launch.grid[0]; ++block) {
        for (uint32_t thread = 0; thread < launch.block; ++thread)
            prepare_block_body(*p, int32_t(block), int32_t(thread), int32_t(launch.block));
    }
}

void dflash_host_accept(const AcceptParams* p) {
    Launch launch = accept_launch(*p);
    int32_t threads = int32_t(launch.block);
    for (uint32_t request = 0; request < launch.grid[0]; ++request) {
        std::vector<int32_t> shared(launch.shared / 4 + 1, -7);
        AcceptBlock block;
        accept_open(*p, block, int32_t(request), shared.data());
        for (int32_t thread = 0; thread < threads; ++thread) accept_clear(block, thread, threads);
        for (int32_t thread = threads - 1; thread >= 0; --thread) accept_match(*p, block, thread, threads);
        accept_walk(block);
        for (int32_t thread = threads - 1; thread >= 0; --thread) accept_write(*p, block, int32_t(request), thread, threads);
    }
}

void dflash_host_sample_f32(const SampleRowsParams* p) {
    for (int32_t row = 0; row < p->num_rows; ++row) sample_row<float>(*p, row);
}

void dflash_host_sample_bf16(const SampleRowsParams* p) {
    for (int32_t row = 0; row < p->num_rows; ++row) sample_row<uint16_t>(*p, row);
}
}
