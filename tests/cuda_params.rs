//! The Rust mirror of `cuda/params.h` against the header itself, compiled for the host.

use std::ffi::{CStr, c_char};

use dflash_host_check as _;
use dflash_rs::device::cuda::launch::scratch_bytes;
use dflash_rs::device::cuda::params::{
    ACCEPT_MAX_NODES, AcceptParams, BlockAttentionParams, CompactKvParams, DELTA_MAX_TAPS, DeltaRuleParams,
    KvInjectParams, LAYOUT, Launch, PrepareBlockParams, SIZES, SampleRowsParams, TREE_MAX_K, TREE_MAX_NODES,
    TreeBuildParams, TreeTopKParams,
};
use proptest::prelude::*;

#[repr(C)]
struct Field {
    structure: *const c_char,
    field: *const c_char,
    offset: usize,
    size: usize,
    whole: usize,
}

unsafe extern "C" {
    fn dflash_layout(count: *mut usize) -> *const Field;
    fn dflash_limit(which: i32) -> i32;
    fn dflash_geometry_prepare_block(p: *const PrepareBlockParams, out: *mut Launch);
    fn dflash_geometry_kv_inject(p: *const KvInjectParams, head_dim: i32, out: *mut Launch);
    fn dflash_geometry_block_attention(p: *const BlockAttentionParams, head_dim: i32, out: *mut Launch);
    fn dflash_geometry_combine(p: *const BlockAttentionParams, out: *mut Launch);
    fn dflash_geometry_sample_chunk(p: *const SampleRowsParams, out: *mut Launch);
    fn dflash_geometry_sample_finish(p: *const SampleRowsParams, out: *mut Launch);
    fn dflash_geometry_sample_scratch(rows: i64, vocab: i64) -> u64;
    fn dflash_geometry_accept(p: *const AcceptParams, out: *mut Launch);
    fn dflash_geometry_tree_top_k(p: *const TreeTopKParams, out: *mut Launch);
    fn dflash_geometry_tree_build(p: *const TreeBuildParams, out: *mut Launch);
    fn dflash_geometry_compact_kv(p: *const CompactKvParams, out: *mut Launch);
    fn dflash_geometry_delta_inputs(p: *const DeltaRuleParams, out: *mut Launch);
    fn dflash_geometry_delta_rule(p: *const DeltaRuleParams, out: *mut Launch);
}

fn launch(fill: impl FnOnce(*mut Launch)) -> Launch {
    let mut out = Launch::default();
    fill(&raw mut out);
    out
}

#[test]
fn every_field_lies_where_the_header_puts_it() {
    let mut count = 0;
    // SAFETY: a static array of `count` entries with static strings.
    let fields = unsafe { std::slice::from_raw_parts(dflash_layout(&raw mut count), count) };
    // SAFETY: as above.
    let text = |s: *const c_char| unsafe { CStr::from_ptr(s) }.to_str().unwrap();
    let header: Vec<_> = fields
        .iter()
        .map(|f| (text(f.structure), text(f.field), f.offset, f.size))
        .collect();
    for (index, (ours, theirs)) in LAYOUT.iter().zip(&header).enumerate() {
        assert_eq!(
            ours, theirs,
            "entry {index}: (structure, field, offset, size) in Rust, then in params.h"
        );
    }
    assert_eq!(LAYOUT.len(), header.len());
    for field in fields {
        let name = text(field.structure);
        let ours = SIZES.iter().find(|(structure, _)| *structure == name);
        assert_eq!(ours, Some(&(name, field.whole)));
    }
}

#[test]
fn limits_are_those_of_the_header() {
    for (which, ours) in [ACCEPT_MAX_NODES, TREE_MAX_NODES, TREE_MAX_K, DELTA_MAX_TAPS]
        .into_iter()
        .enumerate()
    {
        // SAFETY: a table of four numbers.
        assert_eq!(unsafe { dflash_limit(which as i32) }, ours as i32);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    // SAFETY of all blocks below: the functions read plain structures and write one.
    #[test]
    fn launches_are_those_of_the_header(a in 0..2000i32, b in 1..300i32, c in 1..9i32, d in 0..3u32, vocab in 0..1_000_000i32) {
        let head_dim = 64i32 << d;
        let prepare = PrepareBlockParams { num_requests: a, padded_tokens: a * (b - 1), ..Default::default() };
        prop_assert_eq!(prepare.launch(), launch(|out| unsafe { dflash_geometry_prepare_block(&raw const prepare, out) }));
        let inject = KvInjectParams { max_rows: a, num_layers: b, num_heads: c, ..Default::default() };
        prop_assert_eq!(
            inject.launch(head_dim as u32),
            launch(|out| unsafe { dflash_geometry_kv_inject(&raw const inject, head_dim, out) })
        );
        let attention = BlockAttentionParams {
            num_requests: a, max_block_len: b, max_tokens: a * b, kv_heads: c, q_heads: c * (1 + b % 70), num_splits: 1 + a % 20,
            clusters: b % 2, ..Default::default()
        };
        prop_assert_eq!(
            attention.launch(head_dim as u32),
            launch(|out| unsafe { dflash_geometry_block_attention(&raw const attention, head_dim, out) })
        );
        prop_assert_eq!(attention.combine_launch(), launch(|out| unsafe { dflash_geometry_combine(&raw const attention, out) }));
        let sample = SampleRowsParams { num_rows: a, vocab, ..Default::default() };
        prop_assert_eq!(sample.chunk_launch(), launch(|out| unsafe { dflash_geometry_sample_chunk(&raw const sample, out) }));
        prop_assert_eq!(sample.finish_launch(), launch(|out| unsafe { dflash_geometry_sample_finish(&raw const sample, out) }));
        prop_assert_eq!(
            scratch_bytes(a as u64, vocab as u64),
            unsafe { dflash_geometry_sample_scratch(a.into(), vocab.into()) }
        );
        let accept = AcceptParams { num_requests: a, max_nodes: b, ..Default::default() };
        prop_assert_eq!(accept.launch(), launch(|out| unsafe { dflash_geometry_accept(&raw const accept, out) }));
        let top_k = TreeTopKParams { num_rows: a, k: b - 1, ..Default::default() };
        prop_assert_eq!(top_k.launch(), launch(|out| unsafe { dflash_geometry_tree_top_k(&raw const top_k, out) }));
        let tree = TreeBuildParams { num_requests: a, max_nodes: b, ..Default::default() };
        prop_assert_eq!(tree.launch(), launch(|out| unsafe { dflash_geometry_tree_build(&raw const tree, out) }));
        let compact = CompactKvParams { num_requests: a, num_layers: b, num_heads: c, head_dim, ..Default::default() };
        prop_assert_eq!(compact.launch(), launch(|out| unsafe { dflash_geometry_compact_kv(&raw const compact, out) }));
        let delta = DeltaRuleParams {
            num_requests: a, longest: b, block: b % 40, taps: c, key_heads: c, value_heads: 2 * c, key_dim: head_dim, value_dim: b,
            ..Default::default()
        };
        prop_assert_eq!(delta.inputs_launch(), launch(|out| unsafe { dflash_geometry_delta_inputs(&raw const delta, out) }));
        prop_assert_eq!(delta.launch(), launch(|out| unsafe { dflash_geometry_delta_rule(&raw const delta, out) }));
    }
}
