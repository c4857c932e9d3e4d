//! The structures of `cuda/params.h` field by field. [`super::launch`] fills them in and knows their launch geometry;
//! `tests/cuda_params.rs` compares both with the header.

use std::mem::offset_of;

use crate::verify::Sampling;

/// A device address; 0 where the header says "nullable" and there is nothing.
pub type Address = u64;

macro_rules! mirrored {
    ($($name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            #[doc = concat!("`", stringify!($name), "` of cuda/params.h, which documents its fields.")]
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, PartialEq)]
            pub struct $name {
                $(#[doc = concat!("`", stringify!($field), "`")] pub $field: $type,)*
            }
        )*

        /// Every field of every structure: structure, field, offset and size in bytes.
        pub const LAYOUT: &[(&str, &str, usize, usize)] = &[
            $($((stringify!($name), stringify!($field), offset_of!($name, $field), size_of::<$type>()),)*)*
        ];

        /// Size of every structure in bytes.
        pub const SIZES: &[(&str, usize)] = &[$((stringify!($name), size_of::<$name>()),)*];
    };
}

mirrored! {
    Launch {
        grid: [u32; 3],
        block: u32,
        shared: u32,
        cluster: u32,
    }
    PageTable {
        pages: Address,
        row_ids: Address,
        width: i32,
        page_size: i32,
    }
    PrepareBlockParams {
        query_starts: Address,
        context_lens: Address,
        anchors: Address,
        drafts: Address,
        depths: Address,
        table: PageTable,
        token_ids: Address,
        positions: Address,
        slots: Address,
        mask_token: i64,
        draft_stride: i64,
        num_requests: i32,
        padded_tokens: i32,
    }
    KvInjectParams {
        kv: Address,
        k_norm: Address,
        cos_sin: Address,
        rows: Address,
        positions: Address,
        slots: Address,
        k_caches: Address,
        v_caches: Address,
        row_stride: i64,
        layer_stride: i64,
        v_offset: i64,
        slot_stride: i64,
        head_stride: i64,
        max_rows: i32,
        num_layers: i32,
        num_heads: i32,
        rotary_dim: i32,
        eps: f32,
        reserved: i32,
    }
    BlockAttentionParams {
        q: Address,
        k: Address,
        v: Address,
        k_cache: Address,
        v_cache: Address,
        out: Address,
        query_starts: Address,
        context_lens: Address,
        valid_from: Address,
        slots: Address,
        ancestors: Address,
        partial_out: Address,
        partial_stats: Address,
        sinks: Address,
        table: PageTable,
        q_stride: [i64; 2],
        k_stride: [i64; 2],
        v_stride: [i64; 2],
        out_stride: [i64; 2],
        k_cache_stride: [i64; 2],
        v_cache_stride: [i64; 2],
        num_requests: i32,
        q_heads: i32,
        kv_heads: i32,
        max_tokens: i32,
        max_block_len: i32,
        num_splits: i32,
        split_keys: i32,
        mask: i32,
        mask_words: i32,
        window: i32,
        scale: f32,
        softcap: f32,
        clusters: i32,
        reserved: i32,
    }
    SamplingRow {
        seed: u64,
        temperature: f32,
        top_p: f32,
        min_p: f32,
        top_k: i32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        history_start: i32,
        history_end: i32,
        bias_start: i32,
        bias_end: i32,
        mask_end: i32,
        mask_before: i32,
        anchor: i32,
    }
    SampleRowsParams {
        logits: Address,
        sampling: Address,
        query_starts: Address,
        row_tokens: Address,
        token_ids: Address,
        positions: Address,
        parents: Address,
        history_tokens: Address,
        history_counts: Address,
        bias_tokens: Address,
        bias_values: Address,
        tokens: Address,
        logprobs: Address,
        status: Address,
        scratch: Address,
        row_stride: i64,
        num_rows: i32,
        num_requests: i32,
        vocab: i32,
        reserved: i32,
    }
    AcceptParams {
        query_starts: Address,
        logit_starts: Address,
        context_lens: Address,
        node_counts: Address,
        token_ids: Address,
        parents: Address,
        sampled: Address,
        table: PageTable,
        accepted: Address,
        out_tokens: Address,
        out_lens: Address,
        new_context_lens: Address,
        next_anchors: Address,
        path: Address,
        commit_rows: Address,
        commit_positions: Address,
        commit_slots: Address,
        out_stride: i64,
        path_stride: i64,
        num_requests: i32,
        max_nodes: i32,
    }
    TreeTopKParams {
        values: Address,
        tokens: Address,
        log_probs: Address,
        row_stride: i64,
        num_rows: i32,
        vocab: i32,
        k: i32,
        normalise: i32,
    }
    TreeBuildParams {
        anchors: Address,
        top_tokens: Address,
        top_log_probs: Address,
        budgets: Address,
        tokens: Address,
        parents: Address,
        depths: Address,
        scores: Address,
        first_child: Address,
        next_sibling: Address,
        masks: Address,
        counts: Address,
        num_requests: i32,
        max_depth: i32,
        k: i32,
        max_nodes: i32,
    }
    CompactKvParams {
        path: Address,
        context_lens: Address,
        k_caches: Address,
        v_caches: Address,
        table: PageTable,
        path_stride: i64,
        slot_stride: i64,
        head_stride: i64,
        num_requests: i32,
        num_layers: i32,
        num_heads: i32,
        head_dim: i32,
    }
    DeltaRuleParams {
        mixed: Address,
        gates: Address,
        weight: Address,
        decay: Address,
        dt_bias: Address,
        query_starts: Address,
        context_lens: Address,
        slots: Address,
        into: Address,
        ends: Address,
        memory: Address,
        window: Address,
        kept: Address,
        kept_gates: Address,
        stands: Address,
        end_memory: Address,
        end_window: Address,
        out: Address,
        made: Address,
        scales: Address,
        pending: Address,
        num_requests: i32,
        num_tokens: i32,
        longest: i32,
        block: i32,
        key_heads: i32,
        value_heads: i32,
        key_dim: i32,
        value_dim: i32,
        taps: i32,
        beta_scale: f32,
    }
}

/// Most tokens of one request that `accept` takes.
pub const ACCEPT_MAX_NODES: usize = 1024;
/// Most nodes of a tree, the anchor not counted.
pub const TREE_MAX_NODES: usize = 1023;
/// Most columns that `tree_top_k` finds.
pub const TREE_MAX_K: usize = 256;
/// Most taps of the convolution before `delta_rule`.
pub const DELTA_MAX_TAPS: usize = 8;

impl From<&Sampling> for SamplingRow {
    /// What a request asks for in numbers; where its tokens lie in the arrays beside the rows is for who fills these.
    fn from(sampling: &Sampling) -> Self {
        // What does not fit is beyond every vocabulary and every text.
        let most = |number: u64| number.min(i32::MAX as u64) as i32;
        Self {
            seed: sampling.seed,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            top_k: most(u64::from(sampling.top_k)),
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            mask_before: most(sampling.masked_before),
            ..Self::default()
        }
    }
}
