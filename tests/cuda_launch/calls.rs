//! One call of every kernel family that is in order, and its tensors by name, so that a test can spoil them one by one.

use dflash_rs::device::cuda::launch::{
    Accept, BlockAttention, CompactKv, DeltaRule, KvInject, Pages, PrepareBlock, Probe, SampleRows, TreeBuild,
    TreeTopK, scratch_bytes,
};
use dflash_rs::device::cuda::params::SamplingRow;
use dflash_rs::device::cuda::tensor::{Dtype, Tensor};
use dflash_rs::device::{AttentionParams, Mask};
use dflash_rs::error::Result;

/// A contiguous tensor on device 0, far away from those with other numbers.
pub fn tensor(number: usize, dtype: Dtype, shape: &[usize]) -> Tensor {
    Tensor {
        address: 0x7f00_0000_0000 + (number << 32),
        dtype,
        device: 0,
        shape: shape.into(),
        strides: dense(shape),
    }
}

pub fn dense(shape: &[usize]) -> Vec<i64> {
    (1..=shape.len())
        .map(|next| shape[next..].iter().product::<usize>() as i64)
        .collect()
}

/// A kernel family's arguments as a test sees them.
pub trait Call: Clone {
    /// As errors call the family.
    const NAME: &str;
    /// Tensors that a kernel writes.
    const WRITTEN: &[&str];
    /// Tensors that may have gaps between their rows.
    const STRIDED: &[&str];
    fn tensors(&mut self) -> Vec<(&'static str, &mut Tensor)>;
    /// Names and launches of the kernels, or the refusal.
    fn plan(&self) -> Result<Vec<(&'static str, [u32; 3])>>;
}

macro_rules! calls {
    ($($family:ident { $($field:ident)* $(; maybe $($optional:ident)*)? $(; pages $pages:ident)? } writes $written:expr, strided $strided:expr;)*) => {
        $(impl Call for $family {
            const NAME: &str = stringify!($family);
            const WRITTEN: &[&str] = $written;
            const STRIDED: &[&str] = $strided;

            fn tensors(&mut self) -> Vec<(&'static str, &mut Tensor)> {
                #[allow(unused_mut, reason = "not every family has more")]
                let mut all = vec![$((stringify!($field), &mut self.$field),)*];
                $($(all.extend(self.$optional.as_mut().map(|tensor| (stringify!($optional), tensor)));)*)?
                $(all.push(("page_table", &mut self.$pages.page_table)); all.push(("row_ids", &mut self.$pages.row_ids));)?
                all
            }

            fn plan(&self) -> Result<Vec<(&'static str, [u32; 3])>> {
                let checked = self.check()?;
                Ok(checked.launches().iter().map(|(kernel, launch)| (kernel.name(), launch.grid)).collect())
            }
        })*
    };
}

calls! {
    Probe { out } writes &["out"], strided &[];
    PrepareBlock { query_starts context_lens anchors token_ids positions; maybe drafts depths slots; pages pages }
        writes &["token_ids", "positions", "slots"], strided &[];
    KvInject { kv k_norm cos_sin positions slots k_caches v_caches cache; maybe rows }
        writes &["cache"], strided &["kv", "cache"];
    BlockAttention {
        q k v k_cache v_cache out query_starts context_lens;
        maybe valid_from slots ancestors partial_out partial_stats sinks;
        pages pages
    }
        writes &["k_cache", "v_cache", "out", "partial_out", "partial_stats"],
        strided &["q", "k", "v", "k_cache", "v_cache", "out"];
    SampleRows {
        logits sampling query_starts token_ids positions history_tokens history_counts bias_tokens bias_values tokens status scratch;
        maybe row_tokens parents logprobs
    }
        writes &["tokens", "logprobs", "status", "scratch"], strided &["logits"];
    Accept {
        query_starts context_lens token_ids sampled accepted out_tokens out_lens new_context_lens next_anchors;
        maybe logit_starts node_counts parents path commit_rows commit_positions commit_slots;
        pages pages
    }
        writes &["accepted", "out_tokens", "out_lens", "new_context_lens", "next_anchors", "path", "commit_rows",
                 "commit_positions", "commit_slots"],
        strided &[];
    TreeTopK { values tokens log_probs } writes &["tokens", "log_probs"], strided &["values"];
    TreeBuild {
        anchors top_tokens top_log_probs tokens parents depths counts;
        maybe budgets scores first_child next_sibling masks
    }
        writes &["tokens", "parents", "depths", "counts", "scores", "first_child", "next_sibling", "masks"], strided &[];
    CompactKv { path context_lens k_caches v_caches cache; pages pages } writes &["cache"], strided &["cache"];
    DeltaRule {
        mixed gates weight decay dt_bias query_starts context_lens slots memory window kept kept_gates stands out made scales pending;
        maybe into ends end_memory end_window
    }
        writes &["memory", "window", "kept", "kept_gates", "stands", "end_memory", "end_window", "out", "made", "scales", "pending"],
        strided &[];
}

use Dtype::{Bf16, F32, I32, I64, U8, U64};

fn pages(number: usize, requests: usize) -> Pages {
    Pages {
        page_table: tensor(number, I32, &[requests + 3, 40]),
        row_ids: tensor(number + 1, I32, &[requests]),
        page_size: 16,
    }
}

pub fn probe() -> Probe {
    Probe {
        out: tensor(0, I32, &[1]),
    }
}

/// `r` requests of 8 tokens each and as much padding as one more would be.
pub fn prepare(r: usize) -> PrepareBlock {
    let t = 8 * (r + 1);
    PrepareBlock {
        query_starts: tensor(0, I32, &[r + 1]),
        context_lens: tensor(1, I32, &[r]),
        anchors: tensor(2, I64, &[r]),
        drafts: Some(tensor(3, I64, &[r, 7])),
        depths: Some(tensor(4, I32, &[t])),
        pages: pages(5, r),
        token_ids: tensor(7, I64, &[t]),
        positions: tensor(8, I64, &[t]),
        slots: Some(tensor(9, I64, &[t])),
        mask_token: 5,
    }
}

/// `m` tokens, 5 layers with 4 heads of 128 elements, half of them rotated.
pub fn inject(m: usize) -> KvInject {
    KvInject {
        kv: tensor(0, Bf16, &[m + 4, 5, 2, 4, 128]),
        k_norm: tensor(1, Bf16, &[5, 128]),
        cos_sin: tensor(2, F32, &[4096, 64]),
        rows: Some(tensor(3, I64, &[m])),
        positions: tensor(4, I64, &[m]),
        slots: tensor(5, I64, &[m]),
        k_caches: tensor(6, I64, &[5]),
        v_caches: tensor(7, I64, &[5]),
        cache: tensor(8, Bf16, &[640, 4, 128]),
        eps: 1e-6,
    }
}

/// `r` requests with trees of 8 tokens, 16 heads over 4 of 128 elements, keys in 3 splits, everything that may be given.
pub fn attention(r: usize) -> BlockAttention {
    let t = 8 * r;
    BlockAttention {
        q: tensor(0, Bf16, &[t, 16, 128]),
        k: tensor(1, Bf16, &[t, 4, 128]),
        v: tensor(2, Bf16, &[t, 4, 128]),
        k_cache: tensor(3, Bf16, &[640, 4, 128]),
        v_cache: tensor(4, Bf16, &[640, 4, 128]),
        out: tensor(5, Bf16, &[t, 16, 128]),
        query_starts: tensor(6, I32, &[r + 1]),
        context_lens: tensor(7, I32, &[r]),
        pages: pages(8, r),
        max_block_len: t.min(8),
        max_keys: 1500,
        params: AttentionParams {
            scale: 0.125,
            mask: Mask::Ancestors,
            window: Some(9),
            softcap: Some(30.0),
        },
        valid_from: Some(tensor(10, I32, &[r])),
        slots: Some(tensor(11, I64, &[t])),
        ancestors: Some(tensor(12, U64, &[t, 1])),
        partial_out: Some(tensor(13, F32, &[3, t, 16, 128])),
        partial_stats: Some(tensor(14, F32, &[3, t, 16, 2])),
        num_splits: 3,
        split_keys: 512,
        clusters: false,
        sinks: Some(tensor(15, F32, &[16])),
    }
}

/// `n` rows of 10000 columns for 3 requests with as many packed tokens.
pub fn sample(n: usize) -> SampleRows {
    SampleRows {
        logits: tensor(0, F32, &[n, 10_000]),
        sampling: tensor(1, U8, &[3, size_of::<SamplingRow>()]),
        query_starts: tensor(2, I32, &[4]),
        row_tokens: Some(tensor(3, I32, &[n])),
        token_ids: tensor(4, I64, &[n]),
        positions: tensor(5, I64, &[n]),
        parents: Some(tensor(6, I32, &[n])),
        history_tokens: tensor(7, I32, &[11]),
        history_counts: tensor(8, I32, &[11]),
        bias_tokens: tensor(9, I32, &[6]),
        bias_values: tensor(10, F32, &[6]),
        tokens: tensor(11, I64, &[n]),
        logprobs: Some(tensor(12, F32, &[n])),
        status: tensor(13, I32, &[n]),
        scratch: tensor(14, U8, &[scratch_bytes(n as u64, 10_000) as usize]),
        filters: true,
    }
}

/// `r` requests of 8 tokens each.
pub fn accept(r: usize) -> Accept {
    let t = 8 * r;
    Accept {
        query_starts: tensor(0, I32, &[r + 1]),
        logit_starts: Some(tensor(1, I32, &[r + 1])),
        context_lens: tensor(2, I32, &[r]),
        node_counts: Some(tensor(3, I32, &[r])),
        token_ids: tensor(4, I64, &[t]),
        parents: Some(tensor(5, I32, &[t])),
        sampled: tensor(6, I64, &[t]),
        pages: pages(7, r),
        accepted: tensor(9, I32, &[r]),
        out_tokens: tensor(10, I64, &[r, 8]),
        out_lens: tensor(11, I32, &[r]),
        new_context_lens: tensor(12, I32, &[r]),
        next_anchors: tensor(13, I64, &[r]),
        path: Some(tensor(14, I32, &[r, 8])),
        commit_rows: Some(tensor(15, I64, &[t])),
        commit_positions: Some(tensor(16, I64, &[t])),
        commit_slots: Some(tensor(17, I64, &[t])),
        max_nodes: 8,
    }
}

/// The 4 best of `n` rows of 100.
pub fn top_k(n: usize) -> TreeTopK {
    TreeTopK {
        values: tensor(0, Bf16, &[n, 100]),
        tokens: tensor(1, I64, &[n, 4]),
        log_probs: tensor(2, F32, &[n, 4]),
        normalise: true,
    }
}

/// `r` trees of up to 69 drafts over 7 depths of 4 candidates.
pub fn tree(r: usize) -> TreeBuild {
    TreeBuild {
        anchors: tensor(0, I64, &[r]),
        top_tokens: tensor(1, I64, &[r, 7, 4]),
        top_log_probs: tensor(2, F32, &[r, 7, 4]),
        budgets: Some(tensor(3, I32, &[r])),
        tokens: tensor(4, I64, &[r, 70]),
        parents: tensor(5, I32, &[r, 70]),
        depths: tensor(6, I32, &[r, 70]),
        counts: tensor(7, I32, &[r]),
        scores: Some(tensor(8, F32, &[r, 70])),
        first_child: Some(tensor(9, I32, &[r, 70])),
        next_sibling: Some(tensor(10, I32, &[r, 70])),
        masks: Some(tensor(11, U64, &[r, 70, 2])),
    }
}

/// `r` requests, 5 layers with 4 heads of 128 elements.
pub fn compact(r: usize) -> CompactKv {
    CompactKv {
        path: tensor(0, I32, &[r, 8]),
        context_lens: tensor(1, I32, &[r]),
        k_caches: tensor(2, I64, &[5]),
        v_caches: tensor(3, I64, &[5]),
        cache: tensor(4, Bf16, &[640, 4, 128]),
        pages: pages(5, r),
    }
}

/// `r` requests of 8 tokens each, blocks of 4, 2 key heads of 96 and 6 value heads of 48 elements, 4 taps.
pub fn delta(r: usize) -> DeltaRule {
    let (t, channels) = (8 * r, 4 * 96 + 6 * 48);
    DeltaRule {
        mixed: tensor(0, Bf16, &[t, channels]),
        gates: tensor(1, Bf16, &[t, 12]),
        weight: tensor(2, F32, &[4, channels]),
        decay: tensor(3, F32, &[6]),
        dt_bias: tensor(4, F32, &[6]),
        query_starts: tensor(5, I32, &[r + 1]),
        context_lens: tensor(6, I32, &[r]),
        slots: tensor(7, I64, &[r]),
        into: None,
        ends: Some(tensor(8, I32, &[r])),
        memory: tensor(9, F32, &[9, 6, 96, 48]),
        window: tensor(10, Bf16, &[9, 3, channels]),
        kept: tensor(11, Bf16, &[7, 4, channels]),
        kept_gates: tensor(12, Bf16, &[7, 4, 12]),
        stands: tensor(13, I32, &[9]),
        end_memory: Some(tensor(14, F32, &[2, 6, 96, 48])),
        end_window: Some(tensor(15, Bf16, &[2, 3, channels])),
        out: tensor(16, Bf16, &[t, 6, 48]),
        made: tensor(17, Bf16, &[12 * r, channels]),
        scales: tensor(18, F32, &[12 * r, 16]),
        pending: tensor(19, I32, &[r]),
        longest: t.min(8),
        beta_scale: 2.0,
    }
}

/// `r` requests whose states are copied, without tokens.
pub fn delta_copies(r: usize) -> DeltaRule {
    let channels = 4 * 96 + 6 * 48;
    DeltaRule {
        mixed: tensor(0, Bf16, &[0, channels]),
        gates: tensor(1, Bf16, &[0, 12]),
        into: Some(tensor(20, I64, &[r])),
        ends: None,
        end_memory: None,
        end_window: None,
        out: tensor(16, Bf16, &[0, 6, 48]),
        made: tensor(17, Bf16, &[4 * r, channels]),
        scales: tensor(18, F32, &[4 * r, 16]),
        longest: 0,
        ..delta(r)
    }
}
