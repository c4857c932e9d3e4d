// sample_scan, sample_mass, sample_pick, sample_finish: see params.h for the contract and logic_sample.cuh for the method.
//
// The first three have a block per row and chunk of columns, so that few rows still fill the device; a row that does not need
// one leaves it at once. Columns are read once by `scan`; `mass` reads them again where a filter or a log-probability asks
// (from the second-level cache for a batch that fits); `pick` reads blocks of columns that can matter.
#include "logic_sample.cuh"

namespace dflash {
namespace {

constexpr int32_t WARPS = SAMPLE_THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

struct RowShared {
    OpenRow row;
    int32_t path[ACCEPT_MAX_NODES];
    uint32_t bits[SAMPLE_CHUNK / 32];
    ScanState states[WARPS];
    RowTop top;
};

// Opens the row; false for padding. `first`: the chunk whose edited columns are marked, or -1.
__device__ bool open_shared(const SampleRowsParams& p, RowShared& s, int32_t index, int32_t first) {
    int32_t thread = int32_t(threadIdx.x);
    if (thread == 0) s.row.request = -1;
    for (int32_t i = thread; i < SAMPLE_CHUNK / 32; i += SAMPLE_THREADS) s.bits[i] = 0;
    __syncthreads();
    find_request(p, index, &s.row.request, thread, SAMPLE_THREADS);
    __syncthreads();
    if (s.row.request < 0) return false;
    if (thread == 0) {
        open_row(p, s.row, index);
        if (penalises(s.row.s)) open_path(p, s.row, s.path, ACCEPT_MAX_NODES);
    }
    __syncthreads();
    if (first >= 0 && edits(s.row.s)) {
        mark_edits(p, s.row, s.path, first, s.bits, thread, SAMPLE_THREADS);
        __syncthreads();
    }
    return true;
}

__device__ Best shuffle(const Best& b, int offset) {
    return {__shfl_xor_sync(ALL, b.score, offset), __shfl_xor_sync(ALL, b.id, offset)};
}

// All threads get the merged state.
__device__ ScanState merge_block(RowShared& s, ScanState state) {
    for (int offset = 16; offset > 0; offset /= 2) {
        ScanState other = {shuffle(state.top, offset), shuffle(state.draw, offset), __shfl_xor_sync(ALL, state.raw_top, offset),
                           __shfl_xor_sync(ALL, state.bad, offset)};
        merge(state, other);
    }
    __syncthreads(); // earlier readers of s.states are done
    if (threadIdx.x % 32 == 0) s.states[threadIdx.x / 32] = state;
    __syncthreads();
    state = s.states[0];
    for (int32_t w = 1; w < WARPS; ++w) merge(state, s.states[w]);
    return state;
}

// The chunks' results together. `draw` holds the best draw so far.
__device__ ScanState merge_chunks(const SampleScratch& scratch, RowShared& s, int32_t index) {
    ScanState state = scan_start();
    for (int32_t c = int32_t(threadIdx.x); c < scratch.num_chunks; c += SAMPLE_THREADS)
        merge(state, scan_of(scratch.chunks[int64_t(index) * scratch.num_chunks + c]));
    return merge_block(s, state);
}

struct EdgeShared {
    uint64_t masses[SAMPLE_THREADS];
    uint32_t counts[SAMPLE_THREADS];
    Edge edge;
};

// A warp's lanes hold neighbouring groups of columns: which lane's group has the prefix's last column (-1: none), given the
// budget on entering the first. `budget` becomes the one on entering that group.
__device__ int32_t edge_lane(uint64_t count, uint64_t mass, Budget& budget) {
    int32_t lane = int32_t(threadIdx.x % 32);
    uint64_t count_to = count, mass_to = mass; // inclusive prefix sums
    for (int offset = 1; offset < 32; offset *= 2) {
        uint64_t c = __shfl_up_sync(ALL, count_to, offset), m = __shfl_up_sync(ALL, mass_to, offset);
        if (lane >= offset) {
            count_to += c;
            mass_to += m;
        }
    }
    unsigned ends = __ballot_sync(ALL, ends_within(budget, count_to, mass_to));
    if (ends == 0) return -1;
    int32_t found = __ffs(int(ends)) - 1;
    uint64_t count_before = __shfl_sync(ALL, count_to - count, found), mass_before = __shfl_sync(ALL, mass_to - mass, found);
    if (budget.count != UINT64_MAX) budget.count -= count_before;
    if (budget.mass != UINT64_MAX) budget.mass -= mass_before;
    return found;
}

// Where the row's prefix ends: a thread sums four bins, a warp finds 32 bins and then the one among them.
__device__ Edge find_edge(const SampleScratch& scratch, EdgeShared& e, const OpenRow& row, int32_t index) {
    constexpr int32_t PER_THREAD = SAMPLE_BINS / SAMPLE_THREADS, PER_LANE = SAMPLE_THREADS / 32;
    static_assert(PER_THREAD * PER_LANE == 32, "a lane's bins are as many as lanes");
    const uint32_t* counts = scratch.counts + int64_t(index) * SAMPLE_BINS;
    const uint64_t* masses = scratch.masses + int64_t(index) * SAMPLE_BINS;
    int32_t thread = int32_t(threadIdx.x);
    uint32_t count = 0;
    uint64_t mass = 0;
    DFLASH_UNROLL
    for (int32_t i = 0; i < PER_THREAD; ++i) {
        count += counts[thread * PER_THREAD + i];
        mass += masses[thread * PER_THREAD + i];
    }
    e.counts[thread] = count;
    e.masses[thread] = mass;
    __syncthreads();
    if (thread < 32) {
        uint64_t own_count = 0, own_mass = 0;
        for (int32_t i = 0; i < PER_LANE; ++i) {
            own_count += e.counts[thread * PER_LANE + i];
            own_mass += e.masses[thread * PER_LANE + i];
        }
        uint64_t total = own_mass;
        for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(ALL, total, offset);
        Budget budget = budget_of(row.s, total);
        int32_t bin = SAMPLE_BINS, group = edge_lane(own_count, own_mass, budget);
        if (group >= 0) bin = group * 32 + edge_lane(counts[group * 32 + thread], masses[group * 32 + thread], budget);
        if (thread == 0) e.edge = {bin, budget};
    }
    __syncthreads();
    return e.edge;
}

template <typename E>
__device__ void scan(const SampleRowsParams& p) {
    __shared__ RowShared s;
    int32_t index = int32_t(blockIdx.x), chunk = int32_t(blockIdx.y), thread = int32_t(threadIdx.x);
    int32_t first = chunk * SAMPLE_CHUNK;
    float x[SAMPLE_PARTS][4];
    load_parts<E>(p, index, first, thread, x); // under way while the row is looked up
    if (!open_shared(p, s, index, first)) return;
    SampleScratch scratch(p);
    if (chunk == 0 && selects(s.row.s)) {
        for (int32_t bin = thread; bin < SAMPLE_BINS; bin += SAMPLE_THREADS) {
            scratch.counts[int64_t(index) * SAMPLE_BINS + bin] = 0;
            scratch.masses[int64_t(index) * SAMPLE_BINS + bin] = 0;
        }
        if (thread == 0) scratch.listed[int64_t(index) * 4] = 0;
    }
    ScanState state = merge_block(s, scan_thread(p, scratch, s.row, index, s.path, s.bits, first, thread, x));
    if (thread == 0) {
        SampleChunk& c = scratch.chunks[int64_t(index) * scratch.num_chunks + chunk];
        c = {0, state.top.score, state.top.id, state.raw_top, state.bad, state.draw.score, state.draw.id};
    }
}

template <typename E>
__device__ void mass(const SampleRowsParams& p) {
    __shared__ RowShared s;
    __shared__ uint64_t masses[SAMPLE_BINS];
    __shared__ uint32_t counts[SAMPLE_BINS];
    __shared__ uint64_t raw_masses[WARPS];
    int32_t index = int32_t(blockIdx.x), chunk = int32_t(blockIdx.y), thread = int32_t(threadIdx.x);
    int32_t first = chunk * SAMPLE_CHUNK;
    if (!open_shared(p, s, index, first)) return;
    bool select = selects(s.row.s);
    if (!select && !p.logprobs) return;
    SampleScratch scratch(p);
    RowTop top = row_top(s.row, merge_chunks(scratch, s, index));
    if (top.status != ROW_OK) return;
    if (select) {
        for (int32_t bin = thread; bin < SAMPLE_BINS; bin += SAMPLE_THREADS) {
            counts[bin] = 0;
            masses[bin] = 0;
        }
        __syncthreads();
    }
    float x[SAMPLE_PARTS][4];
    load_parts<E>(p, index, first, thread, x);
    uint64_t raw = mass_thread(p, s.row, top, s.path, s.bits, first, thread, x, counts, masses);
    for (int offset = 16; offset > 0; offset /= 2) raw += __shfl_xor_sync(ALL, raw, offset);
    if (thread % 32 == 0) raw_masses[thread / 32] = raw;
    __syncthreads();
    if (thread == 0) {
        for (int32_t w = 1; w < WARPS; ++w) raw += raw_masses[w];
        scratch.chunks[int64_t(index) * scratch.num_chunks + chunk].mass = raw;
    }
    if (!select) return;
    for (int32_t bin = thread; bin < SAMPLE_BINS; bin += SAMPLE_THREADS) {
        if (counts[bin]) atomic_add(&scratch.counts[int64_t(index) * SAMPLE_BINS + bin], counts[bin]);
        if (masses[bin]) atomic_add(&scratch.masses[int64_t(index) * SAMPLE_BINS + bin], masses[bin]);
    }
}

template <typename E>
__device__ void pick(const SampleRowsParams& p) {
    __shared__ RowShared s;
    __shared__ EdgeShared e;
    int32_t index = int32_t(blockIdx.x), chunk = int32_t(blockIdx.y), thread = int32_t(threadIdx.x);
    int32_t first = chunk * SAMPLE_CHUNK;
    if (!open_shared(p, s, index, first)) return;
    bool select = selects(s.row.s);
    if (!select && !has_floor(s.row.s)) return;
    SampleScratch scratch(p);
    ScanState all = merge_chunks(scratch, s, index);
    RowTop top = row_top(s.row, all);
    if (top.status != ROW_OK) return;
    int32_t edge = select ? find_edge(scratch, e, s.row, index).bin : SAMPLE_BINS;
    ScanState state = scan_start();
    state.draw = pick_thread<E>(p, scratch, s.row, index, top, edge, s.path, s.bits, first, thread);
    state = merge_block(s, state);
    // Only `best` changes; blocks of other chunks read `top` and `bad` of this one, and ignore `best`.
    if (thread == 0) {
        SampleChunk& c = scratch.chunks[int64_t(index) * scratch.num_chunks + chunk];
        c.best = state.draw.score;
        c.best_id = state.draw.id;
    }
}

template <typename E>
__device__ void finish(const SampleRowsParams& p) {
    __shared__ RowShared s;
    __shared__ EdgeShared e;
    __shared__ uint64_t masses[256];
    __shared__ uint32_t counts[256];
    __shared__ uint64_t last;
    __shared__ uint64_t raw_masses[WARPS];
    int32_t index = int32_t(blockIdx.x), thread = int32_t(threadIdx.x);
    if (!open_shared(p, s, index, -1)) {
        if (thread == 0) {
            p.tokens[index] = -1;
            p.status[index] = ROW_OK;
            if (p.logprobs) p.logprobs[index] = float_of(0x7fc00000u);
        }
        return;
    }
    SampleScratch scratch(p);
    ScanState all = merge_chunks(scratch, s, index);
    RowTop top = row_top(s.row, all);
    Best best = is_greedy(s.row.s) ? all.top : all.draw;
    if (top.status == ROW_OK && selects(s.row.s)) {
        Edge edge = find_edge(scratch, e, s.row, index);
        if (edge.bin < SAMPLE_BINS) {
            EdgeColumns<E> columns = {p, scratch, s.row, top, s.path, index, edge.bin};
            bool listed = columns.in_list();
            int32_t size = columns.size();
            uint64_t prefix = 0;
            Budget left = edge.left;
            for (int32_t shift = 56; shift >= 0; shift -= 8) {
                counts[thread] = 0; // 256 threads, 256 digits
                masses[thread] = 0;
                __syncthreads();
                digit_thread(columns, listed, size, prefix, shift, counts, masses, thread, SAMPLE_THREADS);
                __syncthreads();
                if (thread == 0) last = prefix | uint64_t(choose_digit(counts, masses, left)) << shift;
                __syncthreads();
                prefix = last;
            }
            ScanState state = scan_start();
            state.draw = edge_draw_thread(columns, listed, size, prefix, thread, SAMPLE_THREADS);
            state = merge_block(s, state);
            best.offer(state.draw.score, state.draw.id);
        }
    }
    if (p.logprobs) {
        uint64_t raw = 0;
        for (int32_t c = thread; c < scratch.num_chunks; c += SAMPLE_THREADS)
            raw += scratch.chunks[int64_t(index) * scratch.num_chunks + c].mass;
        for (int offset = 16; offset > 0; offset /= 2) raw += __shfl_xor_sync(ALL, raw, offset);
        if (thread % 32 == 0) raw_masses[thread / 32] = raw;
        __syncthreads();
    }
    if (thread != 0) return;
    bool ok = top.status == ROW_OK && best.id != NO_COLUMN;
    p.tokens[index] = ok ? int64_t(best.id) : -1;
    p.status[index] = top.status;
    if (p.logprobs) {
        uint64_t raw = 0;
        for (int32_t w = 0; w < WARPS; ++w) raw += raw_masses[w];
        float logit = ok ? widen((static_cast<const E*>(p.logits) + int64_t(index) * p.row_stride)[best.id]) : 0.0f;
        p.logprobs[index] = ok ? logprob_of(logit, top.raw_top, raw) : float_of(0x7fc00000u);
    }
}

} // namespace
} // namespace dflash

#define SAMPLE_KERNEL(stage, suffix, type, blocks)                              \
    extern "C" __global__ void __launch_bounds__(256, blocks)                   \
        sample_##stage##_##suffix(const __grid_constant__ SampleRowsParams p) { \
        dflash::stage<type>(p);                                                 \
    }

SAMPLE_KERNEL(scan, f32, float, 4)
SAMPLE_KERNEL(scan, bf16, uint16_t, 4)
SAMPLE_KERNEL(mass, f32, float, 4)
SAMPLE_KERNEL(mass, bf16, uint16_t, 4)
SAMPLE_KERNEL(pick, f32, float, 4)
SAMPLE_KERNEL(pick, bf16, uint16_t, 4)
SAMPLE_KERNEL(finish, f32, float, 2)
SAMPLE_KERNEL(finish, bf16, uint16_t, 2)
