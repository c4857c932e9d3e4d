// sample_scan, sample_mass, sample_pick, sample_finish: see params.h for the contract and logic_sample.cuh for the method.
//
// The first three have a block per row and chunk of columns, so that few rows still fill the device, and for many rows one per up to eight
// chunks of a row, one after the other: much of what a block does is done once. A row that does not need one leaves it at once.
// Columns are read once by `scan`; `mass` reads them again where a filter or a log-probability asks (from the second-level cache
// for a batch that fits); `pick` reads blocks of columns that can matter. What is found is merged within warps, as integers of the same
// order, and then by the first warp.
#include "logic_tally.cuh"

namespace dflash {
namespace {

constexpr int32_t WARPS = SAMPLE_THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

struct RowShared {
    OpenRow row;
    int32_t path[ACCEPT_MAX_NODES];
};

// Words with a bit for each column of a chunk.
constexpr int32_t CHUNK_BITS = SAMPLE_CHUNK / 32;

// A block's draw: the best so far, as a candidate, and the key of its score, which threads look at meanwhile.
struct DrawShared {
    uint64_t best;
    uint32_t reached;
};

// Opens the row; false for padding.
__device__ bool open_shared(const SampleRowsParams& p, RowShared& s, int32_t index) {
    int32_t thread = int32_t(threadIdx.x);
    if (thread == 0) s.row.request = -1;
    __syncthreads();
    find_request(p, index, &s.row.request, thread, SAMPLE_THREADS);
    __syncthreads();
    if (s.row.request < 0) return false;
    if (thread == 0) {
        open_row(p, s.row, index);
        if (penalises(s.row.s)) open_path(p, s.row, s.path, ACCEPT_MAX_NODES);
    }
    __syncthreads();
    return true;
}

// Marks the edited columns of the chunk at `first`.
__device__ void mark_shared(const SampleRowsParams& p, const RowShared& s, int32_t first, uint32_t* bits) {
    int32_t thread = int32_t(threadIdx.x);
    __syncthreads(); // those of the chunk before have been looked at
    if (thread < CHUNK_BITS) bits[thread] = 0;
    __syncthreads();
    mark_edits(p, s.row, s.path, first, bits, thread, SAMPLE_THREADS);
    __syncthreads();
}

__device__ void offer(DrawShared& d, const Best& best) {
    if (best.id == NO_COLUMN) return;
    atomic_max(&d.best, candidate_of(best.score, best.id));
    atomic_max(&d.reached, order_key(best.score));
}

__device__ Best drawn(const DrawShared& d) {
    if (d.best == 0) return nothing();
    return {candidate_value(d.best), candidate_id(d.best)};
}

// Of logits and columns that have them, the largest and the first that has it; all lanes get them.
struct Top {
    uint32_t key, column;
};

__device__ Top merge_tops(const Top& t) {
    uint32_t key = __reduce_max_sync(ALL, t.key);
    return {key, __reduce_min_sync(ALL, t.key == key ? t.column : NO_COLUMN)};
}

// Key of infinity: what is above it is NaN.
constexpr uint32_t BAD_KEY = 0xff800000u;

// One warp: what the chunks say of the row, those of each block its first one.
__device__ RowTop top_of_chunks(const SampleScratch& scratch, const OpenRow& row, int32_t index) {
    uint32_t key = 0, raw = 0;
    DFLASH_ROLLED
    for (int32_t c = int32_t(threadIdx.x % 32); c < int32_t(gridDim.y); c += 32) {
        const SampleChunk& chunk = scratch.chunks[int64_t(index) * scratch.num_chunks + c];
        uint32_t other = order_key(chunk.top), other_raw = order_key(chunk.raw_top);
        key = other > key ? other : key;
        raw = other_raw > raw ? other_raw : raw;
    }
    key = __reduce_max_sync(ALL, key);
    ScanState all = scan_start();
    all.top.score = value_of_key(key);
    all.raw_top = value_of_key(__reduce_max_sync(ALL, raw));
    all.bad = key >= BAD_KEY;
    return row_top(row, all);
}

__device__ Best shuffle(const Best& b, int offset) {
    return {__shfl_xor_sync(ALL, b.score, offset), __shfl_xor_sync(ALL, b.id, offset)};
}

// One warp: the chunks' results together; `draw` holds the best draw so far.
__device__ ScanState merge_chunks(const SampleScratch& scratch, int32_t index) {
    ScanState state = scan_start();
    DFLASH_ROLLED
    for (int32_t c = int32_t(threadIdx.x % 32); c < scratch.num_chunks; c += 32)
        merge(state, scan_of(scratch.chunks[int64_t(index) * scratch.num_chunks + c]));
    DFLASH_ROLLED
    for (int offset = 16; offset > 0; offset /= 2) {
        ScanState other = {shuffle(state.top, offset), shuffle(state.draw, offset), __shfl_xor_sync(ALL, state.raw_top, offset),
                           __shfl_xor_sync(ALL, state.bad, offset)};
        merge(state, other);
    }
    return state;
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
        count += fresh(&counts[thread * PER_THREAD + i]);
        mass += fresh(&masses[thread * PER_THREAD + i]);
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
        if (group >= 0)
            bin = group * 32 + edge_lane(fresh(&counts[group * 32 + thread]), fresh(&masses[group * 32 + thread]), budget);
        if (thread == 0) e.edge = {bin, budget};
    }
    __syncthreads();
    return e.edge;
}

// One warp: choose_digit, a lane for eight digits and then for one of the eight where the prefix ends.
__device__ int32_t edge_digit(const Digits& digits, Budget& left) {
    constexpr int32_t PER_LANE = 256 / 32;
    int32_t lane = int32_t(threadIdx.x % 32);
    uint64_t count = 0, mass = 0;
    for (int32_t i = 0; i < PER_LANE; ++i) {
        count += digits.counts[255 - PER_LANE * lane - i];
        mass += digits.mass(255 - PER_LANE * lane - i);
    }
    int32_t group = edge_lane(count, mass, left);
    if (group < 0) return choose_digit(digits, left);
    int32_t digit = 255 - PER_LANE * group - lane;
    bool mine = lane < PER_LANE;
    return 255 - PER_LANE * group - edge_lane(mine ? digits.counts[digit] : 0, mine ? digits.mass(digit) : 0, left);
}

// Draws exactly what may score as much as is reached among the columns of a chunk. All threads; one of them has such a column.
template <typename E>
__device__ void draw_chunk(const SampleRowsParams& p, const RowShared& s, const E* logits, const uint32_t* bits, int32_t first,
                           const ThreadScan& mine, float reached, DrawShared& draw, uint32_t& bound) {
    int32_t thread = int32_t(threadIdx.x);
    if (thread == 0) bound = 0;
    __syncthreads();
    raise_key(&bound, order_key(best_bound(mine)), thread);
    __syncthreads();
    // First where most can come of it: what is reached there is mostly out of reach for all others.
    float least = value_of_key(bound);
    uint32_t done = 0;
    DFLASH_ROLLED
    for (int32_t turn = 0; turn < 2; ++turn) {
        uint32_t groups = groups_above(mine, least) & ~done;
        if (groups) offer(draw, draw_groups(p, s.row, logits, s.path, bits, first, thread, groups, reached));
        done = groups;
        __syncthreads();
        least = reached = value_of_key(draw.reached);
        __syncthreads(); // all have read it
    }
}

template <typename E>
__device__ void scan(const SampleRowsParams& p) {
    __shared__ RowShared s;
    __shared__ uint32_t bits[CHUNK_BITS];
    __shared__ DrawShared draw;
    __shared__ uint32_t bound, raw_top;
    __shared__ Top tops[WARPS];
    int32_t index = int32_t(blockIdx.x), thread = int32_t(threadIdx.x);
    int32_t first = int32_t(blockIdx.y) * SAMPLE_CHUNK;
    const E* logits = row_logits<E>(p, index);
    Columns<E> columns = load_columns(p, logits, first, thread); // under way while the row is looked up
    if (thread == 0) {
        draw = {0, 0};
        raw_top = 0;
    }
    if (!open_shared(p, s, index)) return;
    SampleScratch scratch(p);
    if (first == 0 && selects(s.row.s)) {
        for (int32_t bin = thread; bin < SAMPLE_BINS; bin += SAMPLE_THREADS) {
            scratch.counts[int64_t(index) * SAMPLE_BINS + bin] = 0;
            scratch.masses[int64_t(index) * SAMPLE_BINS + bin] = 0;
        }
        if (thread < 2) scratch.listed[int64_t(index) * 4 + thread] = 0;
    }
    ScanAsks asks(s.row.s);
    float* maxima = &scratch.maxima[scratch.block(index, 0)];
    ThreadScan mine = thread_scan();
    DFLASH_ROLLED
    for (;;) {
        if (asks.edits) mark_shared(p, s, first, bits);
        float x[SAMPLE_COLUMNS];
        unpack(columns, x);
        scan_thread<E>(p, s.row, asks, maxima, &raw_top, s.path, bits, first, thread, x, mine);
        if (asks.draw(s.row.s)) {
            float best = best_bound(mine), reached = draw.reached ? value_of_key(draw.reached) : -infinity();
            if (__syncthreads_or(best >= reached && best > -infinity()))
                draw_chunk(p, s, logits, bits, first, mine, reached, draw, bound);
        }
        first += int32_t(gridDim.y) * SAMPLE_CHUNK;
        if (first >= p.vocab) break;
        columns = load_columns(p, logits, first, thread);
    }
    Top top = merge_tops({order_key(mine.top), mine.base});
    int32_t lane = seldom(thread) % 32;
    if (lane == 0) tops[thread / 32] = top;
    __syncthreads();
    if (thread >= 32) return;
    top = lane < WARPS ? tops[lane] : Top{0, NO_COLUMN};
    top = merge_tops(top);
    // Which of the columns has it.
    float value = value_of_key(top.key), logit = 0.0f;
    int32_t column = int32_t(top.column) + lane;
    bool among = top.column != NO_COLUMN && lane < WIDTH<E>;
    if (among) logit = raw_of<E>(p, index, column);
    if (among && edits(s.row.s) && column < p.vocab) logit = edited(p, s.row, s.path, column, logit);
    unsigned having = __ballot_sync(ALL, among && logit == value);
    // The block's first chunk speaks for all of them.
    SampleChunk result = chunk_start();
    if (lane == 0) {
        Best best = drawn(draw);
        uint32_t id = having ? top.column + uint32_t(lowest_bit(having)) : NO_COLUMN;
        float raw = edits(s.row.s) ? value_of_key(raw_top) : value;
        result = {0, value, id, raw, top.key >= BAD_KEY, best.score, best.id};
    }
    int32_t chunk = int32_t(blockIdx.y) + lane * int32_t(gridDim.y);
    if (chunk < scratch.num_chunks) scratch.chunks[int64_t(index) * scratch.num_chunks + chunk] = result;
}

// Adds the block's bins to the row's.
__device__ void flush(const SampleScratch& scratch, const BlockBins& bins, int32_t index) {
    uint32_t* counts = scratch.counts + int64_t(index) * SAMPLE_BINS;
    uint64_t* masses = scratch.masses + int64_t(index) * SAMPLE_BINS;
    DFLASH_UNROLL
    for (int32_t at = 0; at < SAMPLE_BINS; at += SAMPLE_THREADS) {
        int32_t bin = at + int32_t(threadIdx.x);
        uint32_t count = bins.counts[bin];
        uint64_t mass = bins.mass(bin);
        if (count) atomic_add(&counts[bin], count);
        if (mass) atomic_add(&masses[bin], mass);
    }
}

// All threads: whether all other blocks of the row have come here before. What they added is there then.
__device__ bool is_last(const SampleScratch& scratch, uint32_t& before, int32_t index) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) before = atomic_add(&scratch.listed[int64_t(index) * 4 + 1], 1u);
    __syncthreads();
    bool last = before + 1 == gridDim.y;
    if (last) __threadfence();
    return last;
}

template <typename E>
__device__ void mass(const SampleRowsParams& p) {
    constexpr bool COUNTED = sizeof(E) == 2;
    __shared__ RowShared s;
    __shared__ uint32_t bits[CHUNK_BITS];
    __shared__ BlockBins bins;
    __shared__ Tally<E> tally;
    __shared__ EdgeShared e;
    __shared__ RowTop top;
    __shared__ uint64_t raw_masses[WARPS];
    __shared__ uint32_t before;
    int32_t index = int32_t(blockIdx.x), thread = int32_t(threadIdx.x);
    if (!open_shared(p, s, index)) return;
    bool select = selects(s.row.s);
    if (!select && !p.logprobs) return;
    SampleScratch scratch(p);
    int32_t first = int32_t(blockIdx.y) * SAMPLE_CHUNK, step = int32_t(gridDim.y) * SAMPLE_CHUNK;
    const E* logits = row_logits<E>(p, index);
    Columns<E> columns = load_columns(p, logits, first, thread);
    if (thread < 32) {
        RowTop of_chunks = top_of_chunks(scratch, s.row, index);
        if (thread == 0) top = of_chunks;
    }
    if (select) {
        DFLASH_UNROLL
        for (int32_t at = 0; at < SAMPLE_BINS; at += SAMPLE_THREADS) bins.clear(at + thread);
        tally.clear(thread);
    }
    __syncthreads();
    if (top.status != ROW_OK) return;
    int32_t start = tally_start(s.row, top);
    bool edit = edits(s.row.s);
    uint64_t raw = 0;
    uint32_t rest = 0, looked_at = 0; // columns that no bin has
    DFLASH_ROLLED
    for (;;) {
        if (p.logprobs) {
            float x[SAMPLE_COLUMNS];
            unpack(columns, x);
            raw += raw_mass(x, top.raw_top);
        }
        if (select) {
            if (edit) mark_shared(p, s, first, bits);
            if constexpr (COUNTED) {
                if (edit) take_edited(p, s.row, index, top, s.path, bits, first, thread, columns, bins, rest);
                count_columns(columns, start, tally);
            } else {
                float x[SAMPLE_COLUMNS];
                unpack(columns, x);
                if (edit) edit_columns<E>(p, s.row, s.path, bits, first, thread, x);
                add_each(Weighing(s.row, top), x, bins, rest);
            }
        }
        looked_at += SAMPLE_CHUNK;
        first += step;
        if (first >= p.vocab) break;
        columns = load_columns(p, logits, first, thread);
    }
    if (thread == 0) rest += looked_at - uint32_t(max_of(0, first - step + SAMPLE_CHUNK - p.vocab));
    if (p.logprobs) {
        for (int offset = 16; offset > 0; offset /= 2) raw += __shfl_xor_sync(ALL, raw, offset);
        if (thread % 32 == 0) raw_masses[thread / 32] = raw;
    }
    if constexpr (COUNTED) {
        __syncthreads();
        if (select) {
            add_counted(Weighing(s.row, top), tally, start, thread, bins, rest);
            if (tally.counts[0]) {
                DFLASH_ROLLED
                for (first = int32_t(blockIdx.y) * SAMPLE_CHUNK; first < p.vocab; first += step) {
                    if (edit) mark_shared(p, s, first, bits);
                    add_small(p, s.row, index, top, bits, first, thread, start, bins, rest);
                }
            }
        }
    }
    if (select && s.row.s.top_k > 0) {
        rest = __reduce_add_sync(ALL, rest);
        if (thread % 32 == 0 && rest) atomic_add(&bins.counts[SAMPLE_BINS - 1], rest);
    }
    __syncthreads();
    if (p.logprobs && thread == 0) {
        for (int32_t w = 1; w < WARPS; ++w) raw += raw_masses[w];
        scratch.chunks[int64_t(index) * scratch.num_chunks + int32_t(blockIdx.y)].mass = raw;
    }
    if (!select) return;
    flush(scratch, bins, index);
    // The row's last block finds where the prefix ends, for all blocks of `pick`.
    if (!is_last(scratch, before, index)) return;
    Edge edge = find_edge(scratch, e, s.row, index);
    if (thread == 0) scratch.listed[int64_t(index) * 4 + 2] = uint32_t(edge.bin);
}

template <typename E>
__device__ void pick(const SampleRowsParams& p) {
    constexpr int32_t BLOCKS = SAMPLE_CHUNK / SAMPLE_BLOCK, TEAM = SAMPLE_BLOCK / 4; // a team takes a block of columns
    __shared__ RowShared s;
    __shared__ uint32_t bits[SAMPLE_PARTS * CHUNK_BITS];
    __shared__ RowTop top;
    __shared__ DrawShared draw;
    __shared__ uint32_t seen;
    __shared__ uint16_t blocks[BLOCKS * SAMPLE_PARTS];
    int32_t index = int32_t(blockIdx.x), thread = int32_t(threadIdx.x);
    if (!open_shared(p, s, index)) return;
    bool select = selects(s.row.s);
    if (!select && !has_floor(s.row.s)) return;
    SampleScratch scratch(p);
    // First column of each of the block's chunks; behind the vocabulary if there are fewer.
    auto first_of = [](int32_t part) { return (int32_t(blockIdx.y) + part * int32_t(gridDim.y)) * SAMPLE_CHUNK; };
    DFLASH_ROLLED
    for (int32_t part = 0; part < SAMPLE_PARTS && edits(s.row.s) && first_of(part) < p.vocab; ++part)
        mark_shared(p, s, first_of(part), bits + part * CHUNK_BITS);
    if (thread < 32) {
        RowTop of_chunks = top_of_chunks(scratch, s.row, index);
        if (thread == 0) {
            top = of_chunks;
            draw = {0, 0};
            seen = 0;
        }
    }
    __syncthreads();
    if (top.status != ROW_OK) return;
    int32_t edge = select ? int32_t(scratch.listed[int64_t(index) * 4 + 2]) : SAMPLE_BINS;
    DFLASH_UNROLL
    for (int32_t block = thread; block < BLOCKS * SAMPLE_PARTS; block += SAMPLE_THREADS) {
        int32_t column = first_of(block / BLOCKS) + block % BLOCKS * SAMPLE_BLOCK;
        if (is_seen(scratch, s.row, index, top, edge, column, p.vocab)) blocks[atomic_add(&seen, 1u)] = uint16_t(block);
    }
    __syncthreads();
    if (seen == 0) return; // `scan` has written that nothing is drawn here
    Best best = nothing();
    for (int32_t i = thread / TEAM; i < int32_t(seen); i += SAMPLE_THREADS / TEAM) {
        uint32_t reached = peek(&draw.reached);
        float bar = reached ? value_of_key(reached) : -infinity();
        int32_t part = blocks[i] / BLOCKS, first = first_of(part);
        int32_t column = first + blocks[i] % BLOCKS * SAMPLE_BLOCK + 4 * (thread % TEAM);
        Best here = nothing();
        pick4<E>(p, scratch, s.row, index, top, edge, s.path, bits + part * CHUNK_BITS, first, column, bar, here);
        if (here.id != NO_COLUMN) atomic_max(&draw.reached, order_key(here.score));
        best.offer(here.score, here.id);
    }
    offer(draw, best);
    __syncthreads();
    // Only `best` changes; blocks of other chunks read `top` and `raw_top` of this one, and ignore `best`.
    if (thread == 0) {
        Best all = drawn(draw);
        SampleChunk& c = scratch.chunks[int64_t(index) * scratch.num_chunks + int32_t(blockIdx.y)]; // for all of the block's
        c.best = all.score;
        c.best_id = all.id;
    }
}

template <typename E>
__device__ void finish(const SampleRowsParams& p) {
    __shared__ RowShared s;
    __shared__ EdgeShared e;
    __shared__ RowTop top;
    __shared__ DrawShared draw;
    __shared__ Digits digits;
    __shared__ uint64_t last;
    int32_t index = int32_t(blockIdx.x), thread = int32_t(threadIdx.x);
    if (!open_shared(p, s, index)) {
        if (thread == 0) {
            p.tokens[index] = -1;
            p.status[index] = ROW_OK;
            if (p.logprobs) p.logprobs[index] = float_of(0x7fc00000u);
        }
        return;
    }
    SampleScratch scratch(p);
    Best best = nothing(); // of the first warp
    if (thread < 32) {
        ScanState all = merge_chunks(scratch, index);
        best = is_greedy(s.row.s) ? all.top : all.draw;
        if (thread == 0) {
            top = row_top(s.row, all);
            draw = {0, 0};
        }
    }
    if (selects(s.row.s)) {
        __syncthreads();
        Edge edge = {SAMPLE_BINS, {0, 0}};
        if (top.status == ROW_OK) edge = find_edge(scratch, e, s.row, index);
        if (edge.bin < SAMPLE_BINS) {
            EdgeColumns<E> columns = {p, scratch, s.row, top, s.path, index, edge.bin};
            bool listed = columns.in_list();
            int32_t size = columns.size();
            uint64_t prefix = 0;
            Budget left = edge.left;
            for (int32_t shift = 56; shift >= 0; shift -= 8) {
                digits.clear(thread); // 256 threads, 256 digits
                __syncthreads();
                digit_thread(columns, listed, size, prefix, shift, digits, thread, SAMPLE_THREADS);
                __syncthreads();
                if (thread < 32) {
                    int32_t digit = edge_digit(digits, left);
                    if (thread == 0) last = prefix | uint64_t(digit) << shift;
                }
                __syncthreads();
                prefix = last;
            }
            offer(draw, edge_draw_thread(columns, listed, size, prefix, thread, SAMPLE_THREADS));
        }
        __syncthreads();
    }
    if (thread >= 32) return;
    uint64_t raw = 0;
    if (p.logprobs) {
        for (int32_t c = thread; c < scratch.num_chunks; c += 32)
            raw += scratch.chunks[int64_t(index) * scratch.num_chunks + c].mass;
        for (int offset = 16; offset > 0; offset /= 2) raw += __shfl_xor_sync(ALL, raw, offset);
    }
    if (thread != 0) return;
    Best of_edge = drawn(draw);
    best.offer(of_edge.score, of_edge.id);
    bool ok = top.status == ROW_OK && best.id != NO_COLUMN;
    p.tokens[index] = ok ? int64_t(best.id) : -1;
    p.status[index] = top.status;
    if (p.logprobs) {
        float logit = ok ? raw_of<E>(p, index, int32_t(best.id)) : 0.0f;
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

SAMPLE_KERNEL(scan, f32, float, 3) // its columns are 16 registers as they lie in memory: with four blocks it would spill
SAMPLE_KERNEL(scan, bf16, uint16_t, 4)
SAMPLE_KERNEL(mass, f32, float, 4)
SAMPLE_KERNEL(mass, bf16, uint16_t, 4)
SAMPLE_KERNEL(pick, f32, float, 4)
SAMPLE_KERNEL(pick, bf16, uint16_t, 4)
SAMPLE_KERNEL(finish, f32, float, 2)
SAMPLE_KERNEL(finish, bf16, uint16_t, 2)
