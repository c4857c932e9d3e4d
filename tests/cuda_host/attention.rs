use dflash_host_check as _;
use dflash_rs::device::cuda::params::BlockAttentionParams;
use dflash_rs::device::host::{
    AttentionBatch, AttentionTensors, BatchArrays, Bf16, HostKernels, Layout, Rows, RowsMut,
};
use dflash_rs::device::{AttentionParams, Mask};
use dflash_rs::draft::DraftTree;
use dflash_rs::types::TokenId;

use super::numbers::{Numbers, Pages, address, address_mut, share, starts};

unsafe extern "C" {
    fn dflash_host_block_attention(p: *const BlockAttentionParams, head_dim: i32);
    fn dflash_emulated_block_attention(p: *const BlockAttentionParams, head_dim: i32);
    fn dflash_host_seen(p: *const BlockAttentionParams, head_dim: i32, width: i32, out: *mut i64);
}

const MASKS: [Mask; 3] = [Mask::Causal, Mask::Block, Mask::Ancestors];

/// A batch with everything but the numbers.
struct Case {
    mask: Mask,
    window: usize,
    dim: usize,
    q_heads: usize,
    kv_heads: usize,
    lens: Vec<usize>,
    query_starts: Vec<i32>,
    context: Vec<i32>,
    valid_from: Vec<i32>,
    pages: Pages,
    num_slots: usize,
    slots: Vec<i64>,
    /// The same, or -1 for what is not to be stored.
    stored: Vec<i64>,
    words: usize,
    ancestors: Vec<u64>,
    split_keys: usize,
    num_splits: usize,
    /// Whether groups of splits are merged on the chip.
    clusters: bool,
    /// In units of the usual one.
    scale: f32,
    softcap: f32,
    /// None, or one per query head.
    sinks: Vec<f32>,
}

impl Case {
    fn new(numbers: &mut Numbers, dims: &[usize], most_context: usize, most_len: usize) -> Self {
        Self::of_keys(numbers, dims, most_context, most_len, &[])
    }

    /// Requests of so many keys together with their own, if any numbers are given.
    fn of_keys(numbers: &mut Numbers, dims: &[usize], most_context: usize, most_len: usize, keys: &[usize]) -> Self {
        let requests = numbers.within(1, 3);
        let lens: Vec<usize> = (0..requests).map(|_| numbers.below(most_len + 1)).collect();
        let context: Vec<i32> = (0..requests)
            .map(|r| match keys {
                [] => numbers.below(most_context + 1) as i32,
                keys => (numbers.pick(keys) - lens[r]) as i32,
            })
            .collect();
        let valid_from = context
            .iter()
            .map(|&c| {
                if numbers.chance(0.3) {
                    numbers.below(c as usize + 1) as i32
                } else {
                    0
                }
            })
            .collect();
        let kv_heads = numbers.within(1, 2);
        let group = numbers.pick(&[1, 2, 3, 4, 7, 8, 16]);
        let pages = Pages::new(numbers, requests, most_context + most_len);
        let num_slots = pages.table.len() * pages.page_size;
        let slots: Vec<i64> = (0..requests)
            .flat_map(|r| {
                (0..lens[r])
                    .map(|i| pages.slot(r, context[r] as usize + i))
                    .collect::<Vec<_>>()
            })
            .collect();
        let forgotten = numbers.pick(&[0.0, 0.0, 0.3]);
        let stored = slots
            .iter()
            .map(|&slot| if numbers.chance(forgotten) { -1 } else { slot })
            .collect();
        let words = most_len.div_ceil(64).max(1);
        let mut ancestors = vec![];
        for &len in &lens {
            if len == 0 {
                continue;
            }
            // Deep and wide.
            let parent = |i: usize| if numbers.chance(0.5) { i.saturating_sub(1) } else { numbers.below(i.max(1)) } as u32;
            let parents: Vec<u32> = (0..len).map(parent).collect();
            let tree = DraftTree::from_parents(&vec![TokenId(0); len], &parents).unwrap();
            for row in tree.masks().chunks(tree.mask_words()) {
                ancestors.extend_from_slice(row);
                ancestors.extend(vec![0; words - row.len()]);
            }
        }
        let split_keys = 64 * numbers.within(1, 4);
        let longest = (0..requests).map(|r| context[r] as usize + lens[r]).max().unwrap();
        let mut case = Self {
            mask: numbers.pick(&MASKS),
            window: if numbers.chance(0.1) {
                1
            } else if numbers.chance(0.1) {
                context[0] as usize % 64 + 2 // the anchor sees one key of the tile before
            } else if numbers.chance(0.4) {
                numbers.within(1, most_context / 2 + 2)
            } else {
                0
            },
            dim: numbers.pick(dims),
            q_heads: kv_heads * group,
            kv_heads,
            query_starts: starts(&lens),
            lens,
            context,
            valid_from,
            pages,
            num_slots,
            slots,
            stored,
            words,
            ancestors,
            split_keys,
            scale: numbers.pick(&[1.0, 1.0, 1.0, 1.0, 100.0, -1.0, 0.0]),
            num_splits: longest.div_ceil(split_keys).max(1) + numbers.below(2),
            softcap: numbers.pick(&[0.0, 0.0, 0.7, 30.0]),
            sinks: if numbers.chance(0.4) {
                (0..kv_heads * group)
                    .map(|_| (numbers.unit() * 8.0 - 2.0) as f32)
                    .collect()
            } else {
                vec![]
            },
            clusters: numbers.chance(0.5),
        };
        if numbers.chance(0.3) {
            case.widen();
        }
        case
    }

    /// Gives a launch room for so many splits that its tiles are wide; whether they are.
    fn widen(&mut self) -> bool {
        let (group, longest) = (self.q_heads / self.kv_heads, *self.lens.iter().max().unwrap());
        if self.dim != 128 || longest * group <= 64 {
            return false;
        }
        let blocks = self.lens.len() * self.kv_heads * longest.div_ceil(128 / group);
        self.num_splits = self.num_splits.max(1024_usize.div_ceil(blocks));
        true
    }

    /// Splits of the longest request.
    fn splits(&self) -> usize {
        let keys = (0..self.lens.len()).map(|r| self.context[r] as usize + self.lens[r]);
        keys.max().unwrap().div_ceil(self.split_keys)
    }

    fn tokens(&self) -> usize {
        self.slots.len()
    }

    fn params(&self) -> BlockAttentionParams {
        let strides = |heads: usize| [(heads * self.dim) as i64, self.dim as i64];
        BlockAttentionParams {
            query_starts: address(&self.query_starts),
            context_lens: address(&self.context),
            // Without, everything is valid.
            valid_from: if self.valid_from.iter().all(|&from| from == 0) {
                0
            } else {
                address(&self.valid_from)
            },
            slots: address(&self.stored),
            ancestors: address(&self.ancestors),
            table: self.pages.params(),
            q_stride: strides(self.q_heads),
            k_stride: strides(self.kv_heads),
            v_stride: strides(self.kv_heads),
            out_stride: strides(self.q_heads),
            k_cache_stride: strides(self.kv_heads),
            v_cache_stride: strides(self.kv_heads),
            num_requests: self.lens.len() as i32,
            q_heads: self.q_heads as i32,
            kv_heads: self.kv_heads as i32,
            max_tokens: self.tokens() as i32,
            max_block_len: *self.lens.iter().max().unwrap() as i32,
            num_splits: self.num_splits as i32,
            split_keys: self.split_keys as i32,
            mask: self.mask as i32,
            mask_words: self.words as i32,
            window: self.window as i32,
            scale: self.scale * (self.dim as f32).powf(-0.5),
            softcap: self.softcap,
            clusters: i32::from(self.clusters),
            sinks: if self.sinks.is_empty() { 0 } else { address(&self.sinks) },
            ..BlockAttentionParams::default()
        }
    }

    fn is_ancestor(&self, request: usize, ancestor: usize, node: usize) -> bool {
        let row = (self.query_starts[request] as usize + node) * self.words;
        self.ancestors[row + ancestor / 64] >> (ancestor % 64) & 1 == 1
    }

    /// Written from the contract: does node `node` see key `key`?
    fn sees(&self, request: usize, node: usize, key: usize) -> bool {
        let context = self.context[request] as usize;
        let depth = |n: usize| match self.mask {
            Mask::Ancestors => (0..n).filter(|&a| self.is_ancestor(request, a, n)).count(),
            _ => n,
        };
        let (visible, at) = if key < context {
            (key >= self.valid_from[request] as usize, key)
        } else {
            let other = key - context;
            let visible = match self.mask {
                Mask::Causal => other <= node,
                Mask::Block => true,
                Mask::Ancestors => self.is_ancestor(request, other, node),
            };
            (visible, context + depth(other))
        };
        visible && (self.window == 0 || (context + depth(node)).abs_diff(at) < self.window)
    }
}

/// Holds what every query sees against the contract; how many pairs of a query and a key that were.
fn seen_as_it_should_be(case: &Case) -> usize {
    let (width, mut pairs) = (350, 0);
    let params = case.params();
    let mut seen = vec![i64::MIN; case.tokens() * case.q_heads * width];
    // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
    unsafe { dflash_host_seen(&raw const params, case.dim as i32, width as i32, seen.as_mut_ptr()) };
    for r in 0..case.lens.len() {
        let context = case.context[r] as usize;
        for node in 0..case.lens[r] {
            let token = case.query_starts[r] as usize + node;
            let expected: Vec<i64> = (0..width)
                .map(|key| {
                    if key >= context + case.lens[r] || !case.sees(r, node, key) {
                        i64::MIN
                    } else if key < context {
                        case.pages.slot(r, key)
                    } else {
                        -2 - (i64::from(case.query_starts[r]) + (key - context) as i64)
                    }
                })
                .collect();
            for head in 0..case.q_heads {
                let at = (token * case.q_heads + head) * width;
                assert_eq!(
                    seen[at..at + width],
                    expected,
                    "{:?}, window {}",
                    case.mask,
                    case.window
                );
                pairs += width;
            }
        }
    }
    pairs
}

#[test]
fn every_query_sees_the_keys_of_its_mask_once_and_where_they_lie() {
    let mut numbers = Numbers(10);
    let mut pairs = 0;
    while pairs < share(60_000_000) {
        let case = Case::new(&mut numbers, &[64, 128, 256], 200, 140);
        if case.tokens() > 0 {
            pairs += seen_as_it_should_be(&case);
        }
    }
}

/// Random trees are wide: none has a branch that is longer than the words of its masks.
#[test]
fn in_a_tree_that_is_one_long_branch_the_window_counts_ancestors() {
    let (len, context) = (140, 7);
    let parents: Vec<u32> = (0..len as u32).map(|i| i.saturating_sub(1)).collect();
    let tree = DraftTree::from_parents(&vec![TokenId(0); len], &parents).unwrap();
    for window in [1, 2, 5, 10, 11, 12, 63, 64, 65, 128, 129, 139, 140, 147] {
        let pages = Pages::new(&mut Numbers(11), 1, context + len);
        let slots: Vec<i64> = (0..len).map(|i| pages.slot(0, context + i)).collect();
        let case = Case {
            mask: Mask::Ancestors,
            window,
            dim: 64,
            q_heads: 1,
            kv_heads: 1,
            lens: vec![len],
            query_starts: starts(&[len]),
            context: vec![context as i32],
            valid_from: vec![0],
            num_slots: pages.table.len() * pages.page_size,
            pages,
            stored: slots.clone(),
            slots,
            words: tree.mask_words(),
            ancestors: tree.masks().to_vec(),
            split_keys: 64,
            num_splits: (context + len).div_ceil(64),
            clusters: false,
            scale: 1.0,
            softcap: 0.0,
            sinks: vec![],
        };
        seen_as_it_should_be(&case);
    }
}

fn values(numbers: &mut Numbers, n: usize) -> Vec<u16> {
    (0..n)
        .map(|_| (((numbers.unit() * 4.0 - 2.0) as f32).to_bits() >> 16) as u16)
        .collect()
}

/// Tensors of a case; the cache is NaN where nothing may be read.
struct Tensors {
    q: Vec<u16>,
    k: Vec<u16>,
    v: Vec<u16>,
    k_cache: Vec<u16>,
    v_cache: Vec<u16>,
}

impl Tensors {
    fn new(numbers: &mut Numbers, case: &Case) -> Self {
        let (tokens, width) = (case.tokens(), case.kv_heads * case.dim);
        let mut cache = |_| {
            let mut cache = vec![0x7fc0; case.num_slots * width];
            for r in 0..case.lens.len() {
                for key in case.valid_from[r] as usize..case.context[r] as usize {
                    let at = case.pages.slot(r, key) as usize * width;
                    cache[at..at + width].copy_from_slice(&values(numbers, width));
                }
            }
            cache
        };
        let (k_cache, v_cache) = (cache(0), cache(1));
        Self {
            q: values(numbers, tokens * case.q_heads * case.dim),
            k: values(numbers, tokens * width),
            v: values(numbers, tokens * width),
            k_cache,
            v_cache,
        }
    }
}

/// What the kernels write: the result and both caches.
fn on_device(case: &Case, tensors: &Tensors, emulated: bool) -> (Vec<u16>, Vec<u16>, Vec<u16>) {
    let mut out = vec![0x7fc0; tensors.q.len()];
    let (mut k_cache, mut v_cache) = (tensors.k_cache.clone(), tensors.v_cache.clone());
    let parts = case.splits().div_ceil(if case.clusters { 8 } else { 1 });
    // None where one part is all there is, and behind the last one what nobody may touch.
    let rows = if parts > 1 {
        parts * case.tokens() * case.q_heads
    } else {
        0
    };
    let workspace = |width: usize| [vec![f32::NAN; rows * width], vec![-7.5; 256]].concat();
    let (mut partial_out, mut partial_stats) = (workspace(case.dim), workspace(2));
    let params = BlockAttentionParams {
        q: address(&tensors.q),
        k: address(&tensors.k),
        v: address(&tensors.v),
        k_cache: address_mut(&mut k_cache),
        v_cache: address_mut(&mut v_cache),
        out: address_mut(&mut out),
        partial_out: address_mut(&mut partial_out),
        partial_stats: address_mut(&mut partial_stats),
        ..case.params()
    };
    // SAFETY: the arrays outlive the call and have the lengths that params.h asks for.
    unsafe {
        if emulated {
            dflash_emulated_block_attention(&raw const params, case.dim as i32);
        } else {
            dflash_host_block_attention(&raw const params, case.dim as i32);
        }
    }
    for (partial, width) in [(&partial_out, case.dim), (&partial_stats, 2)] {
        assert!(
            partial[rows * width..].iter().all(|&x| x == -7.5),
            "written behind the last part"
        );
    }
    (out, k_cache, v_cache)
}

fn wide(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

#[test]
fn results_are_those_of_the_host_kernels() {
    compare_with_host(&mut Numbers(11), 60, 220, false);
    // Splits make several groups.
    compare_with_host(&mut Numbers(13), 12, 1500, false);
}

#[test]
fn the_kernels_themselves_give_the_results_of_the_host_kernels() {
    compare_with_host(&mut Numbers(111), 6, 220, true);
}

fn compare_with_host(numbers: &mut Numbers, cases: usize, most_context: usize, emulated: bool) {
    for _ in 0..share(cases) {
        let case = Case::new(numbers, &[64, 64, 128, 256], most_context, 20);
        if case.tokens() == 0 {
            continue;
        }
        let tensors = Tensors::new(numbers, &case);
        let (out, k_cache, v_cache) = on_device(&case, &tensors, emulated);

        let halves = |x: &[u16]| -> Vec<Bf16> { x.iter().map(|&x| Bf16(x)).collect() };
        let (q, k, v) = (halves(&tensors.q), halves(&tensors.k), halves(&tensors.v));
        // The host multiplies masked keys too, where it may: zeros instead of NaN for it.
        let clean = |x: &[u16]| halves(&x.iter().map(|&x| if x == 0x7fc0 { 0 } else { x }).collect::<Vec<_>>());
        let (mut k_host, mut v_host) = (clean(&tensors.k_cache), clean(&tensors.v_cache));
        let mut expected = vec![Bf16(0); out.len()];
        let batch = AttentionBatch::new(BatchArrays {
            query_starts: &case.query_starts,
            context_lens: &case.context,
            page_table: &case.pages.table,
            table_width: case.pages.width,
            row_ids: &case.pages.row_ids,
            page_size: case.pages.page_size,
            num_slots: case.num_slots,
            slots: Some(&case.slots),
            valid_from: Some(&case.valid_from),
            ancestors: (case.mask == Mask::Ancestors).then_some((&case.ancestors, case.words)),
        })
        .unwrap();
        let layout = |rows: usize, heads: usize| Layout::contiguous(rows, heads, case.dim);
        let (tokens, slots) = (case.tokens(), case.num_slots);
        HostKernels::default()
            .block_attention(
                &batch,
                &AttentionParams {
                    scale: case.params().scale,
                    mask: case.mask,
                    window: (case.window > 0).then_some(case.window),
                    softcap: (case.softcap > 0.0).then_some(case.softcap),
                },
                AttentionTensors {
                    q: Rows::from_slice("q", &q, layout(tokens, case.q_heads)).unwrap(),
                    k: Rows::from_slice("k", &k, layout(tokens, case.kv_heads)).unwrap(),
                    v: Rows::from_slice("v", &v, layout(tokens, case.kv_heads)).unwrap(),
                    k_cache: RowsMut::from_slice("k_cache", &mut k_host, layout(slots, case.kv_heads)).unwrap(),
                    v_cache: RowsMut::from_slice("v_cache", &mut v_host, layout(slots, case.kv_heads)).unwrap(),
                    out: RowsMut::from_slice("out", &mut expected, layout(tokens, case.q_heads)).unwrap(),
                    sinks: (!case.sinks.is_empty()).then_some(&case.sinks),
                },
            )
            .unwrap();
        for (got, expected) in out.iter().zip(&expected) {
            let (got, expected) = (wide(*got), wide(expected.0));
            assert!(
                (got - expected).abs() <= 0.02,
                "{got} {expected}: {:?} dim {}",
                case.mask,
                case.dim
            );
        }
        let width = case.kv_heads * case.dim;
        for (&slot, _) in case.slots.iter().zip(&case.stored).filter(|(_, stored)| **stored < 0) {
            let at = slot as usize * width..(slot as usize + 1) * width;
            k_host[at.clone()].copy_from_slice(&clean(&tensors.k_cache[at.clone()]));
            v_host[at.clone()].copy_from_slice(&clean(&tensors.v_cache[at]));
        }
        assert!(
            clean(&k_cache) == k_host && clean(&v_cache) == v_host,
            "stored keys and values"
        );
    }
}

/// Splits that are whole groups and others, up to three.
const GROUPS: [usize; 6] = [500, 512, 513, 1024, 1025, 1499];

/// Requests of so many keys, in splits of 64.
fn long_case(numbers: &mut Numbers, dims: &[usize], keys: &[usize]) -> Case {
    let most = *keys.iter().max().unwrap();
    let mut case = Case::of_keys(numbers, dims, most + 1, 4, keys);
    case.split_keys = 64;
    case.num_splits = case.splits().max(1);
    case
}

fn merged_alike(numbers: &mut Numbers, dims: &[usize], keys: &[usize], mut cases: usize, emulated: bool) {
    while cases > 0 {
        let mut case = long_case(numbers, dims, keys);
        if case.tokens() == 0 {
            continue;
        }
        cases -= 1;
        let tensors = Tensors::new(numbers, &case);
        case.clusters = false;
        let expected = on_device(&case, &tensors, false);
        // As a graph that was captured for longer requests does.
        let least = case.num_splits;
        for (clusters, num_splits) in [(false, least), (true, least), (true, least + 9), (false, least + 9)] {
            if emulated && !clusters {
                continue; // slow, and no cluster in it
            }
            (case.clusters, case.num_splits) = (clusters, num_splits);
            let got = on_device(&case, &tensors, emulated);
            assert!(
                got == expected,
                "{clusters}, {least} splits of {num_splits}, heads of {}",
                case.dim
            );
        }
    }
}

#[test]
fn splits_merged_on_the_chip_have_the_bits_of_splits_merged_in_memory() {
    merged_alike(&mut Numbers(14), &[64, 128, 256], &GROUPS, share(12), false);
}

#[test]
fn a_cluster_of_the_kernels_themselves_merges_its_splits_to_the_same_bits() {
    merged_alike(&mut Numbers(15), &[64], &GROUPS, share(2), true);
}

#[test]
fn groups_of_a_cluster_that_are_more_than_are_loaded_at_once_are_merged_to_the_same_bits() {
    merged_alike(&mut Numbers(18), &[64], &[64 * 64 + 1], 1, false);
}

fn wide_alike(numbers: &mut Numbers, mut cases: usize, emulated: bool) {
    while cases > 0 {
        let mut case = Case::new(numbers, &[128], 700, 40);
        case.num_splits = case.splits().max(1);
        let tensors = Tensors::new(numbers, &case);
        let narrow = case.num_splits;
        if !case.widen() || case.num_splits == narrow {
            continue;
        }
        cases -= 1;
        let got = on_device(&case, &tensors, emulated);
        case.num_splits = narrow;
        assert!(
            got == on_device(&case, &tensors, false),
            "{:?}, groups of {}",
            case.lens,
            case.q_heads / case.kv_heads
        );
    }
}

#[test]
fn rows_have_the_same_bits_in_wide_tiles() {
    wide_alike(&mut Numbers(16), share(12), false);
}

#[test]
fn rows_have_the_same_bits_in_wide_tiles_of_the_kernel_itself() {
    wide_alike(&mut Numbers(17), 1, true);
}

#[test]
fn a_row_has_the_same_bits_alone_as_in_a_block_and_a_batch() {
    let mut numbers = Numbers(12);
    for _ in 0..share(12) {
        let mut case = Case::new(&mut numbers, &[64, 128], 200, 9);
        case.mask = Mask::Causal;
        case.stored = case.slots.clone();
        if case.tokens() == 0 {
            continue;
        }
        let tensors = Tensors::new(&mut numbers, &case);
        let (out, k_cache, v_cache) = on_device(&case, &tensors, false);
        for r in 0..case.lens.len() {
            for node in 0..case.lens[r] {
                let token = case.query_starts[r] as usize + node;
                let part =
                    |x: &[u16], heads: usize| x[token * heads * case.dim..(token + 1) * heads * case.dim].to_vec();
                let context = case.context[r] + node as i32;
                let alone = Case {
                    lens: vec![1],
                    query_starts: vec![0, 1],
                    context: vec![context],
                    valid_from: vec![case.valid_from[r]],
                    pages: Pages {
                        table: case.pages.table.clone(),
                        row_ids: vec![case.pages.row_ids[r]],
                        ..case.pages
                    },
                    slots: vec![case.slots[token]],
                    stored: vec![case.slots[token]],
                    ancestors: vec![1],
                    words: 1,
                    num_splits: (context as usize + 1).div_ceil(case.split_keys),
                    sinks: case.sinks.clone(),
                    ..case
                };
                let one = Tensors {
                    q: part(&tensors.q, case.q_heads),
                    k: part(&tensors.k, case.kv_heads),
                    v: part(&tensors.v, case.kv_heads),
                    k_cache: k_cache.clone(),
                    v_cache: v_cache.clone(),
                };
                assert!(
                    on_device(&alone, &one, false).0 == part(&out, case.q_heads),
                    "node {node} of {}",
                    case.lens[r]
                );
            }
        }
    }
}
