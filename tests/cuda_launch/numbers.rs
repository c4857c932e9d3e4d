//! Arguments that are no tensors, and tensors whose shapes do not go together: refused with what was got and what is expected.

use super::calls::{self, tensor};
use dflash_rs::device::Mask;
use dflash_rs::device::cuda::launch::{BlockAttention, DeltaRule, PrepareBlock, TreeBuild, scratch_bytes};
use dflash_rs::device::cuda::tensor::Dtype::{self, Bf16, F32, I32, I64, U8};
use dflash_rs::error::Result;

/// The message of a call that is changed by `change`.
fn message<C: Clone, P: std::fmt::Debug>(
    call: &C,
    check: impl Fn(&C) -> Result<P>,
    change: impl FnOnce(&mut C),
) -> String {
    assert!(check(call).is_ok());
    let mut call = call.clone();
    change(&mut call);
    check(&call).unwrap_err().to_string()
}

#[track_caller]
fn attention(change: impl FnOnce(&mut BlockAttention), expected: &str) {
    let got = message(&calls::attention(3), BlockAttention::check, change);
    assert!(got.contains(expected), "{got}");
}

#[test]
fn an_attention_whose_numbers_do_not_fit_is_refused() {
    attention(
        |a| a.q = tensor(0, Bf16, &[24, 16, 80]),
        "head_dim: got 80, expected 64, 128 or 256",
    );
    attention(
        |a| a.k = tensor(1, Bf16, &[24, 3, 128]),
        "q: got 16 heads over 3 key heads, expected 1..64 query heads",
    );
    attention(
        |a| a.k = tensor(1, Bf16, &[24, 0, 128]),
        "q: got 16 heads over 0 key heads",
    );
    attention(
        |a| a.q = tensor(0, Bf16, &[24, 260, 128]),
        "q: got 260 heads over 4 key heads",
    );
    attention(
        |a| a.query_starts = tensor(6, I32, &[0]),
        "query_starts: got shape [0], expected [R + 1]",
    );
    for scale in [f32::NAN, f32::INFINITY] {
        attention(|a| a.params.scale = scale, "expected a finite number");
    }
    attention(
        |a| a.params.window = Some(0),
        "window: got 0, expected at least 1, or None",
    );
    for cap in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        attention(|a| a.params.softcap = Some(cap), "expected a positive number, or None");
    }
    attention(
        |a| a.params.window = Some(1 << 31),
        "window: got 2147483648, expected at most 2^31 - 1",
    );
    attention(
        |a| a.max_block_len = 25,
        "max_block_len: got 25, expected at most 24, the rows of q",
    );
    attention(|a| a.pages.page_size = 0, "page_size: got 0, expected at least 1");
    attention(
        |a| a.pages.page_size = 1 << 31,
        "page_size: got 2147483648, expected at most 2^31 - 1",
    );
}

#[test]
fn splits_cover_the_longest_request_and_fit_a_grid() {
    attention(|a| a.split_keys = 0, "split_keys: got 0, expected a multiple of 64");
    attention(|a| a.split_keys = 100, "split_keys: got 100, expected a multiple of 64");
    attention(
        |a| a.num_splits = 2,
        "num_splits: got 2, expected 3..65528: 512 keys each for requests of up to 1500 keys",
    );
    attention(|a| a.max_keys = 1537, "num_splits: got 3, expected 4..65528");
    attention(
        |a| (a.num_splits, a.max_keys) = (0, 0),
        "num_splits: got 0, expected 1..65528",
    );
    attention(|a| a.num_splits = 65529, "num_splits: got 65529");
    attention(
        |a| a.partial_out = None,
        "partial_out, partial_stats: got None, expected workspaces for 3 parts",
    );
    attention(|a| a.partial_stats = None, "partial_out, partial_stats: got None");
}

#[test]
fn masks_of_ancestors_come_with_their_mode_and_cover_the_longest_block() {
    let expected = "expected a tensor with mask='ancestors', None otherwise";
    attention(|a| a.ancestors = None, expected);
    attention(|a| a.params.mask = Mask::Causal, expected);
    attention(|a| a.params.mask = Mask::Block, expected);
    let wide = |tokens: usize| BlockAttention {
        max_block_len: tokens,
        ancestors: Some(tensor(12, I64, &[tokens, 1])),
        q: tensor(0, Bf16, &[tokens, 16, 128]),
        k: tensor(1, Bf16, &[tokens, 4, 128]),
        v: tensor(2, Bf16, &[tokens, 4, 128]),
        out: tensor(5, Bf16, &[tokens, 16, 128]),
        slots: None,
        partial_out: Some(tensor(13, F32, &[3, tokens, 16, 128])),
        partial_stats: Some(tensor(14, F32, &[3, tokens, 16, 2])),
        ..calls::attention(3)
    };
    assert!(wide(64).check().is_ok());
    let message = wide(65).check().unwrap_err().to_string();
    assert!(
        message.contains("ancestors: got 1 words per token, expected 2 for requests of up to 65 tokens"),
        "{message}"
    );
}

#[test]
fn a_block_of_more_tiles_than_a_grid_holds_is_refused() {
    // 64 heads over one: every token is a tile.
    let long = |tokens: usize| BlockAttention {
        max_block_len: tokens,
        ancestors: None,
        q: tensor(0, Bf16, &[tokens, 64, 64]),
        k: tensor(1, Bf16, &[tokens, 1, 64]),
        v: tensor(2, Bf16, &[tokens, 1, 64]),
        out: tensor(5, Bf16, &[tokens, 64, 64]),
        k_cache: tensor(3, Bf16, &[640, 1, 64]),
        v_cache: tensor(4, Bf16, &[640, 1, 64]),
        slots: None,
        partial_out: None,
        partial_stats: None,
        sinks: None,
        num_splits: 1,
        max_keys: 100,
        params: dflash_rs::device::AttentionParams {
            mask: Mask::Causal,
            ..calls::attention(3).params
        },
        ..calls::attention(3)
    };
    assert_eq!(long(65535).check().unwrap().launches()[0].1.grid, [3, 65535, 1]);
    let message = long(65536).check().unwrap_err().to_string();
    assert!(
        message.contains("max_block_len: got 65536, 65536 tiles of queries, expected at most 65535 tiles"),
        "{message}"
    );
}

#[test]
fn an_injection_whose_numbers_do_not_fit_is_refused() {
    let inject = |change: &dyn Fn(&mut dflash_rs::device::cuda::launch::KvInject), expected: &str| {
        let got = message(&calls::inject(12), |call| call.check(), change);
        assert!(got.contains(expected), "{got}");
    };
    for rotary in [0, 24, 144] {
        let expected =
            format!("cos_sin: got rows of {rotary}, expected rows of a multiple of 16, at most head_dim 128");
        inject(&|i| i.cos_sin = tensor(2, F32, &[9, rotary]), &expected);
    }
    inject(
        &|i| i.cos_sin = tensor(2, F32, &[0, 64]),
        "cos_sin: got shape [0, 64], expected shape [>= 1, 64]",
    );
    for eps in [-1e-6, f32::NAN, f32::INFINITY] {
        inject(&|i| i.eps = eps, "expected a finite number of at least 0");
    }
    inject(
        &|i| i.kv.strides = vec![5 * 2 * 8 * 128, 2 * 8 * 128, 8 * 128, 256, 1],
        "kv: got a stride of 256 from head to head, expected 128, heads next to each other",
    );
    inject(
        &|i| i.k_norm.address += 8,
        "k_norm: address 0x7f0100000008 is not aligned to 16 bytes",
    );
    inject(&|i| i.kv.shape[4] = 96, "head_dim: got 96");
}

#[test]
fn a_grid_that_no_device_runs_is_refused_instead_of_cut() {
    let mut inject = calls::inject(1);
    let many = i32::MAX as usize;
    // 16 units to a block: 2^31 tokens of 5 layers, 2 x 4 heads. Rows of the projection may be one row, shown again and again.
    (inject.positions, inject.slots) = (tensor(4, I64, &[many]), tensor(5 + 64, I64, &[many]));
    inject.rows = Some(tensor(3 + 128, I64, &[many]));
    let message = inject.check().unwrap_err().to_string();
    assert!(
        message.contains("kv_inject_128: got a grid of [4294967295, 1, 1] blocks, expected at most [2147483647"),
        "{message}"
    );
    let mut compact = calls::compact(3);
    let layers = 32768;
    (compact.k_caches, compact.v_caches) = (tensor(2, I64, &[layers]), tensor(3, I64, &[layers]));
    let message = compact.check().unwrap_err().to_string();
    assert!(
        message.contains("compact_kv: got a grid of [3, 65536, 1] blocks"),
        "{message}"
    );
}

#[test]
fn rows_to_sample_that_do_not_fit_are_refused() {
    let sample = |change: &dyn Fn(&mut dflash_rs::device::cuda::launch::SampleRows), expected: &str| {
        let got = message(&calls::sample(6), |call| call.check(), change);
        assert!(got.contains(expected), "{got}");
    };
    sample(
        &|s| {
            s.logits = tensor(0, F32, &[6, (1 << 20) + 1]);
            s.scratch = tensor(14, U8, &[scratch_bytes(6, (1 << 20) + 1) as usize]);
        },
        "logits (columns): got 1048577, expected at most 1048576",
    );
    sample(
        &|s| s.logits = tensor(0, I64, &[6, 10_000]),
        "logits: got int64, expected float32 or bfloat16",
    );
    sample(
        &|s| s.logits = tensor(0, F32, &[6, 0]),
        "logits: got shape [6, 0], expected shape [any, >= 1]",
    );
    sample(&|s| s.scratch.address += 8, "scratch: address");
    sample(&|s| s.sampling.address += 4, "sampling: address");
    sample(
        &|s| {
            (s.row_tokens, s.parents) = (None, None);
            (s.token_ids, s.positions) = (tensor(4, I64, &[5]), tensor(5, I64, &[5]));
        },
        "logits: got 6 rows for 5 packed tokens, expected row_tokens, which says whose row is whose",
    );
    let mut fewer = calls::sample(6);
    (fewer.token_ids, fewer.positions) = (tensor(4, I64, &[5]), tensor(5, I64, &[5]));
    fewer.parents = None;
    assert!(fewer.check().is_ok(), "row_tokens says whose row is whose");
}

#[test]
fn walks_prepared_blocks_and_trees_stay_within_what_their_kernels_hold() {
    let got = message(&calls::accept(3), |call| call.check(), |a| a.max_nodes = 1025);
    assert!(got.contains("max_nodes: got 1025, expected at most 1024"), "{got}");
    let got = message(&calls::accept(3), |call| call.check(), |a| a.max_nodes = 0);
    assert!(
        got.contains("max_nodes: got 0, expected the largest number of tokens of one request"),
        "{got}"
    );
    let got = message(&calls::accept(3), |call| call.check(), |a| a.max_nodes = 9);
    assert!(
        got.contains("out_tokens: got shape [3, 8], expected shape [3, >= 9]"),
        "{got}"
    );

    let got = message(&calls::prepare(3), PrepareBlock::check, |p| p.mask_token = -1);
    assert!(
        got.contains("mask_token: got -1, expected a token id, at least 0"),
        "{got}"
    );

    let got = message(
        &calls::top_k(6),
        |call| call.check(),
        |t| {
            (t.values, t.tokens, t.log_probs) = (
                tensor(0, F32, &[6, 512]),
                tensor(1, I64, &[6, 257]),
                tensor(2, F32, &[6, 257]),
            );
        },
    );
    assert!(got.contains("tokens (columns): got 257, expected at most 256"), "{got}");
    let got = message(
        &calls::top_k(6),
        |call| call.check(),
        |t| t.values = tensor(0, F32, &[6, 3]),
    );
    assert!(
        got.contains("values: got shape [6, 3], expected shape [any, >= 4]"),
        "{got}"
    );
    let got = message(
        &calls::top_k(6),
        |call| call.check(),
        |t| t.values = tensor(0, I32, &[6, 100]),
    );
    assert!(got.contains("values: got int32, expected float32 or bfloat16"), "{got}");

    let deep = |depth: usize, k: usize, nodes: usize| TreeBuild {
        top_tokens: tensor(1, I64, &[3, depth, k]),
        top_log_probs: tensor(2, F32, &[3, depth, k]),
        tokens: tensor(4, I64, &[3, nodes]),
        parents: tensor(5, I32, &[3, nodes]),
        depths: tensor(6, I32, &[3, nodes]),
        scores: None,
        first_child: None,
        next_sibling: None,
        masks: Some(tensor(11, Dtype::U64, &[3, nodes, nodes.div_ceil(64)])),
        ..calls::tree(3)
    };
    assert!(deep(255, 1023, 1024).check().is_ok());
    for (tree, expected) in [
        (deep(256, 4, 70), "top_tokens (depths): got 256, expected at most 255"),
        (
            deep(7, 1024, 70),
            "top_tokens (columns): got 1024, expected at most 1023",
        ),
        (
            deep(7, 4, 1025),
            "tokens (nodes without the anchor): got 1024, expected at most 1023",
        ),
        (deep(7, 4, 0), "tokens: got shape [3, 0], expected [R, max_nodes + 1]"),
    ] {
        let got = tree.check().unwrap_err().to_string();
        assert!(got.contains(expected), "{got}");
    }

    let got = message(
        &calls::compact(3),
        |call| call.check(),
        |c| c.cache = tensor(4, Bf16, &[640, 4, 100]),
    );
    assert!(got.contains("head_dim: got 100, expected a multiple of 8"), "{got}");
}

#[test]
fn a_recurrent_layer_whose_sizes_do_not_fit_is_refused() {
    let refused = |call: DeltaRule, change: &dyn Fn(&mut DeltaRule), expected: &str| {
        let got = message(&call, DeltaRule::check, change);
        assert!(got.contains(expected), "{got}");
    };
    let delta = |change: &dyn Fn(&mut DeltaRule), expected: &str| refused(calls::delta(3), change, expected);
    delta(
        &|d| d.memory = tensor(9, F32, &[9, 6, 80, 48]),
        "memory: got keys of 80 elements, expected 32, 64, 96, 128, 192 or 256",
    );
    delta(
        &|d| d.memory = tensor(9, F32, &[9, 6, 96, 49]),
        "weight: got 672 channels for 6 value heads of 49 elements",
    );
    // Four key heads do not divide six value heads.
    delta(
        &|d| d.weight = tensor(2, F32, &[4, 8 * 96 + 6 * 48]),
        "weight: got 1056 channels for 6 value heads of 48 elements",
    );
    delta(
        &|d| d.weight = tensor(2, F32, &[9, 672]),
        "weight: got 9 taps, expected 1..8",
    );
    delta(&|d| d.weight = tensor(2, F32, &[0, 672]), "weight: got 0 taps");
    delta(
        &|d| d.kept = tensor(11, Bf16, &[7, 0, 672]),
        "kept: got shape [7, 0, 672], expected room for at least 1 token",
    );
    delta(
        &|d| d.kept = tensor(11, Bf16, &[10, 4, 672]),
        "kept: got 10 rows, expected at most 9, the slots of memory",
    );
    delta(&|d| d.longest = 25, "longest: got 25, expected at most 24");
    delta(
        &|d| d.beta_scale = f32::NAN,
        "beta_scale: got NaN, expected a finite number",
    );
    delta(&|d| d.ends = None, "ends: got some of ends, end_memory and end_window");
    delta(
        &|d| d.end_window = None,
        "ends: got some of ends, end_memory and end_window",
    );
    delta(
        &|d| d.into = Some(tensor(20, I64, &[3])),
        "into: got a tensor with 24 tokens, expected None where a pass has tokens",
    );
    delta(
        &|d| d.query_starts = tensor(5, I32, &[0]),
        "query_starts: got shape [0]",
    );
    refused(
        calls::delta_copies(3),
        &|d| d.into = Some(tensor(20, I64, &[4])),
        "into: got shape [4], expected shape [3]",
    );
    refused(
        calls::delta_copies(3),
        &|d| d.made = tensor(17, Bf16, &[11, 672]),
        "made: got shape [11, 672], expected shape [>= 12, 672]",
    );
}
