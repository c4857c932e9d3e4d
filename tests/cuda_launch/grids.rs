//! Grids at their edges: no requests, one, more than 65535, and contexts of any length.

use super::calls::{self, Call, tensor};
use dflash_rs::device::Mask;
use dflash_rs::device::cuda::launch::{Accept, BlockAttention, PrepareBlock, SampleRows, scratch_bytes};
use dflash_rs::device::cuda::params::ACCEPT_MAX_NODES;
use dflash_rs::device::cuda::tensor::Dtype::{Bf16, F32, I32, I64, U8};
use proptest::prelude::*;

#[test]
fn a_batch_of_nobody_launches_nothing() {
    let mut nobody = calls::prepare(0);
    nobody.token_ids = tensor(7, I64, &[0]);
    nobody.positions = tensor(8, I64, &[0]);
    (nobody.depths, nobody.slots) = (None, None);
    assert_eq!(nobody.plan().unwrap(), []);
    assert_eq!(calls::inject(0).plan().unwrap(), []);
    assert_eq!(calls::attention(0).plan().unwrap(), []);
    assert_eq!(calls::sample(0).plan().unwrap(), []);
    assert_eq!(calls::accept(0).plan().unwrap(), []);
    assert_eq!(
        Accept {
            max_nodes: 0,
            ..calls::accept(0)
        }
        .plan()
        .unwrap(),
        []
    );
    assert_eq!(calls::top_k(0).plan().unwrap(), []);
    assert_eq!(calls::tree(0).plan().unwrap(), []);
    assert_eq!(calls::compact(0).plan().unwrap(), []);
    assert_eq!(calls::delta(0).plan().unwrap(), []);
    assert_eq!(calls::delta_copies(0).plan().unwrap(), []);
}

#[test]
fn the_padding_of_a_graph_is_written_even_for_nobody() {
    assert_eq!(calls::prepare(0).plan().unwrap(), [("prepare_block", [1, 1, 1])]);
}

#[test]
fn a_batch_that_only_stores_keys_has_no_queries_and_launches_nothing() {
    let idle = BlockAttention {
        max_block_len: 0,
        ..calls::attention(3)
    };
    assert_eq!(
        idle.plan().unwrap(),
        [("block_attention_combine_128", [24 * 16 / 4, 1, 1])]
    );
}

#[test]
fn one_request_and_more_than_65535_are_grids_of_the_first_extent() {
    assert_eq!(calls::prepare(1).plan().unwrap(), [("prepare_block", [2, 1, 1])]);
    let many = 70_000;
    assert_eq!(
        calls::prepare(many).plan().unwrap(),
        [("prepare_block", [70_001, 1, 1])]
    );
    assert_eq!(calls::accept(1).plan().unwrap(), [("accept", [1, 1, 1])]);
    assert_eq!(calls::accept(many).plan().unwrap(), [("accept", [70_000, 1, 1])]);
    assert_eq!(
        calls::top_k(many).plan().unwrap(),
        [("tree_top_k_bf16", [70_000, 1, 1])]
    );
    assert_eq!(calls::tree(many).plan().unwrap(), [("tree_build", [70_000, 1, 1])]);
    assert_eq!(calls::compact(many).plan().unwrap(), [("compact_kv", [70_000, 10, 1])]);
    // 16 vectors of 128 elements to a block of threads, 5 layers, K and V of 4 heads.
    assert_eq!(calls::inject(1).plan().unwrap(), [("kv_inject_128", [3, 1, 1])]);
    assert_eq!(
        calls::inject(many).plan().unwrap(),
        [("kv_inject_128", [175_000, 1, 1])]
    );
    let rows = calls::sample(many).plan().unwrap();
    assert_eq!(rows[0], ("sample_scan_f32", [70_000, 1, 1])); // all three chunks of a row
    assert_eq!(rows[3], ("sample_finish_f32", [70_000, 1, 1]));
}

#[test]
fn a_walk_takes_shared_memory_for_the_longest_request() {
    let widest = Accept {
        max_nodes: ACCEPT_MAX_NODES,
        out_tokens: tensor(10, I64, &[3, ACCEPT_MAX_NODES]),
        path: None,
        ..calls::accept(3)
    };
    let call = widest.check().unwrap();
    assert_eq!(call.launches()[0].1.shared, 8 * 1024);
    assert_eq!(calls::accept(3).check().unwrap().launches()[0].1.shared, 64);
}

#[test]
fn a_long_context_is_cut_into_splits_up_to_what_a_grid_holds() {
    let long = |max_keys: usize, num_splits: usize| BlockAttention {
        max_keys,
        num_splits,
        split_keys: 64,
        partial_out: Some(tensor(13, F32, &[num_splits, 24, 16, 128])),
        // Far behind the other workspace, which is large.
        partial_stats: Some(tensor(64, F32, &[num_splits, 24, 16, 2])),
        sinks: None,
        ..calls::attention(3)
    };
    let most = long(65528 * 64, 65528).plan().unwrap();
    assert_eq!(most[0], ("block_attention_128", [12, 1, 65528]));
    assert_eq!(most[1], ("block_attention_combine_128", [96, 1, 1]));
    assert!(long(65528 * 64 + 1, 65528).plan().is_err());
    // More splits than needed are a graph's that was captured for longer contexts.
    assert_eq!(long(1, 7).plan().unwrap()[0].1, [12, 1, 7]);
    assert_eq!(long(0, 1).plan().unwrap().len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_query_of_every_request_and_every_key_has_a_block(
        requests in 0..600usize, block in 1..90usize, kv_heads in 1..9usize, group in 1..=64usize, width in 0..3usize,
        max_keys in 0..100_000usize, split in 1..40usize, more in 0..3usize, clusters: bool,
    ) {
        let (tokens, heads, dim, split_keys) = (requests * block, kv_heads * group, 64 << width, split * 64);
        let num_splits = max_keys.div_ceil(split_keys).max(1) + more;
        let mut call = BlockAttention {
            q: tensor(0, Bf16, &[tokens, heads, dim]),
            k: tensor(100, Bf16, &[tokens, kv_heads, dim]),
            v: tensor(200, Bf16, &[tokens, kv_heads, dim]),
            k_cache: tensor(300, Bf16, &[640, kv_heads, dim]),
            v_cache: tensor(400, Bf16, &[640, kv_heads, dim]),
            out: tensor(500, Bf16, &[tokens, heads, dim]),
            query_starts: tensor(600, I32, &[requests + 1]),
            context_lens: tensor(700, I32, &[requests]),
            max_block_len: block.min(tokens),
            max_keys,
            valid_from: None,
            slots: None,
            ancestors: None,
            partial_out: Some(tensor(1000, F32, &[num_splits, tokens, heads, dim])),
            partial_stats: Some(tensor(9000, F32, &[num_splits, tokens, heads, 2])),
            num_splits,
            split_keys,
            clusters,
            sinks: None,
            ..calls::attention(requests)
        };
        (call.pages.page_table.address, call.pages.row_ids.address) = (16, 1 << 24);
        call.params.mask = Mask::Causal;
        let plan = call.plan().unwrap();
        if requests == 0 {
            prop_assert_eq!(plan, []);
            return Ok(());
        }
        let [x, y, z] = plan[0].1.map(|extent| extent as usize);
        let wide = plan[0].0 == "block_attention_wide_128";
        let queries = (if wide { 128 } else { 64 } / group).max(1);
        let blocks = x * block.div_ceil((128 / group).max(1)) * num_splits;
        prop_assert_eq!(wide, dim == 128 && block * group > 64 && blocks >= 1024);
        let cluster = if clusters { num_splits.next_power_of_two().min(8) } else { 1 };
        prop_assert_eq!((x, z), (requests * kv_heads, num_splits.div_ceil(cluster) * cluster));
        prop_assert!(y * queries >= block && (y - 1) * queries < block, "{} tiles of {} for {}", y, queries, block);
        prop_assert!(z * split_keys >= max_keys);
        prop_assert_eq!(plan.len(), 1 + usize::from(num_splits > if clusters { 8 } else { 1 }));
        if let Some(combine) = plan.get(1) {
            let rows = combine.1[0] as usize * 4;
            prop_assert!(rows >= tokens * heads && rows < tokens * heads + 4);
        }
    }

    #[test]
    fn every_column_of_every_row_has_a_chunk_and_scratch_of_its_own(rows in 0..300usize, vocab in 1..=1usize << 20) {
        let call = SampleRows {
            logits: tensor(0, Bf16, &[rows, vocab]),
            scratch: tensor(100, U8, &[scratch_bytes(rows as u64, vocab as u64) as usize]),
            ..calls::sample(rows)
        };
        let call = SampleRows { scratch: tensor(1000, U8, &call.scratch.shape), ..call };
        let plan = call.plan().unwrap();
        if rows == 0 {
            prop_assert_eq!(plan, []);
            return Ok(());
        }
        let [x, y, _] = plan[0].1.map(|extent| extent as usize);
        prop_assert_eq!(x, rows);
        let chunks = vocab.div_ceil(4096);
        prop_assert!(y <= chunks && y * 8 >= chunks);
        // A block has one chunk unless enough blocks are left.
        let few = rows * chunks < 2 * 2048;
        prop_assert!(few == (y == chunks) && (few || rows * y >= 2048));
        let mut short = call.clone();
        short.scratch.shape[0] -= 1;
        prop_assert!(short.plan().is_err());
    }

    #[test]
    fn every_token_layer_and_head_is_injected_and_compacted(
        tokens in 0..5000usize, layers in 1..80usize, heads in 1..33usize, width in 0..3usize,
    ) {
        let dim = 64usize << width;
        let mut inject = calls::inject(tokens);
        inject.kv = tensor(100, Bf16, &[tokens, layers, 2, heads, dim]);
        inject.k_norm = tensor(1, Bf16, &[layers, dim]);
        inject.cache = tensor(500, Bf16, &[640, heads, dim]);
        (inject.k_caches, inject.v_caches) = (tensor(6, I64, &[layers]), tensor(7, I64, &[layers]));
        let vectors = tokens * layers * 2 * heads;
        let per_block = 256 / (dim / 8);
        let blocks = inject.plan().unwrap().first().map_or(0, |(_, grid)| grid[0] as usize);
        prop_assert!(blocks * per_block >= vectors && (blocks == 0 || (blocks - 1) * per_block < vectors));
        let mut compact = calls::compact(tokens);
        compact.cache = inject.cache.clone();
        (compact.k_caches, compact.v_caches) = (inject.k_caches.clone(), inject.v_caches.clone());
        let plan = compact.plan().unwrap();
        if let Some((_, [x, y, z])) = plan.first() {
            prop_assert_eq!((*x as usize, *y as usize), (tokens, 2 * layers));
            prop_assert_eq!(*z as usize, (heads * dim / 8).div_ceil(128));
        } else {
            prop_assert_eq!(tokens, 0);
        }
    }

    #[test]
    fn a_step_of_any_size_is_prepared_with_a_block_for_each_request_and_one_for_its_padding(r in 0..100_000usize, t in 0..9usize) {
        let tokens = r * t;
        let call = PrepareBlock {
            depths: None,
            token_ids: tensor(7, I64, &[tokens]),
            positions: tensor(8, I64, &[tokens]),
            slots: Some(tensor(9, I64, &[tokens])),
            ..calls::prepare(r)
        };
        let expected = if tokens > 0 { vec![("prepare_block", [r as u32 + 1, 1, 1])] } else { vec![] };
        prop_assert_eq!(call.plan().unwrap(), expected);
    }
}
