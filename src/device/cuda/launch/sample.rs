//! `sample_{scan,mass,pick,finish}_{f32,bf16}`: the target's own token of every row of logits.

use super::{Call, Checked, Entry, aligned, at_most, geometry, logit_type, requests};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::{Launch, SampleRowsParams, SamplingRow};
use crate::device::cuda::tensor::Extent::{Any, AtLeast, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, VECTOR, bad, int32};
use crate::error::Result;

/// scan, mass, pick, finish; each for float32 and bfloat16 logits.
static SAMPLE: [[Kernel; 2]; 4] = [
    [Kernel::new(c"sample_scan_f32"), Kernel::new(c"sample_scan_bf16")],
    [Kernel::new(c"sample_mass_f32"), Kernel::new(c"sample_mass_bf16")],
    [Kernel::new(c"sample_pick_f32"), Kernel::new(c"sample_pick_bf16")],
    [Kernel::new(c"sample_finish_f32"), Kernel::new(c"sample_finish_bf16")],
];

const MAX_VOCAB: usize = 1 << 20;
const CHUNK: u64 = 4096;
/// Chunks of a block at most; more than one only where so many blocks are left.
const PARTS: u64 = 8;
const FILLED: u64 = 2048;
const BLOCK: u64 = 64;
const BINS: u64 = 1024;
const CANDIDATES: u64 = 2048;
const CHUNK_BYTES: u64 = 32;

/// `N` rows of logits over `V` tokens, of `R` requests with `T` packed tokens.
#[derive(Clone, Debug)]
pub struct SampleRows {
    /// float32 or bfloat16 `[N, V]`.
    pub logits: Tensor,
    /// uint8 `[R, bytes of SamplingRow]`: how every request draws; 8-byte aligned.
    pub sampling: Tensor,
    /// int32 `[R + 1]`: first token of every request.
    pub query_starts: Tensor,
    /// int32 `[N]`: the packed token whose logits a row is; without, row `n` is that of token `n`.
    pub row_tokens: Option<Tensor>,
    /// int64 `[T]`.
    pub token_ids: Tensor,
    /// int64 `[T]`.
    pub positions: Tensor,
    /// int32 `[T]`: the node each one follows; chains without.
    pub parents: Option<Tensor>,
    /// int32 `[any]`: tokens of the requests' histories.
    pub history_tokens: Tensor,
    /// int32, as many: how often each one was emitted.
    pub history_counts: Tensor,
    /// int32 `[any]`: tokens with a bias.
    pub bias_tokens: Tensor,
    /// float32, as many.
    pub bias_values: Tensor,
    /// int64 `[N]`, written: the tokens, -1 for a row that failed.
    pub tokens: Tensor,
    /// float32 `[N]`, written.
    pub logprobs: Option<Tensor>,
    /// int32 `[N]`, written: 0, or why a row failed.
    pub status: Tensor,
    /// uint8, [`scratch_bytes`] or more, written; 16-byte aligned.
    pub scratch: Tensor,
    /// Whether any request filters (top-k, top-p, min-p); without, the kernels that find thresholds are left out.
    pub filters: bool,
}

impl SampleRows {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<SampleRowsParams>> {
        let r = requests(&self.query_starts)?;
        let (rows, vocab, packed) = (self.logits.extent(0), self.logits.extent(1), self.token_ids.extent(0));
        let instance = logit_type("logits", self.logits.dtype)?;
        let row_bytes = size_of::<SamplingRow>();
        let scratch = usize::try_from(scratch_bytes(rows as u64, vocab as u64)).unwrap_or(usize::MAX);
        let (histories, biases) = (self.history_tokens.extent(0), self.bias_tokens.extent(0));
        let mut call = Call::default();
        let parameters = SampleRowsParams {
            logits: call.rows("logits", &self.logits, 1)?,
            sampling: call.read("sampling", &self.sampling, Dtype::U8, &[Is(r), Is(row_bytes)])?,
            query_starts: call.read("query_starts", &self.query_starts, Dtype::I32, &[Is(r + 1)])?,
            row_tokens: call.maybe_read("row_tokens", &self.row_tokens, Dtype::I32, &[Is(rows)])?,
            token_ids: call.read("token_ids", &self.token_ids, Dtype::I64, &[Any])?,
            positions: call.read("positions", &self.positions, Dtype::I64, &[Is(packed)])?,
            parents: call.maybe_read("parents", &self.parents, Dtype::I32, &[Is(packed)])?,
            history_tokens: call.read("history_tokens", &self.history_tokens, Dtype::I32, &[Any])?,
            history_counts: call.read("history_counts", &self.history_counts, Dtype::I32, &[Is(histories)])?,
            bias_tokens: call.read("bias_tokens", &self.bias_tokens, Dtype::I32, &[Any])?,
            bias_values: call.read("bias_values", &self.bias_values, Dtype::F32, &[Is(biases)])?,
            tokens: call.write("tokens", &self.tokens, Dtype::I64, &[Is(rows)])?,
            logprobs: call.maybe_write("logprobs", &self.logprobs, Dtype::F32, &[Is(rows)])?,
            status: call.write("status", &self.status, Dtype::I32, &[Is(rows)])?,
            scratch: call.write("scratch", &self.scratch, Dtype::U8, &[AtLeast(scratch)])?,
            row_stride: self.logits.stride(0),
            num_rows: int32("logits", rows)?,
            num_requests: int32("query_starts", r)?,
            vocab: at_most("logits (columns)", vocab, MAX_VOCAB)?,
            reserved: 0,
        };
        aligned("scratch", &self.scratch, VECTOR)?;
        aligned("sampling", &self.sampling, align_of::<SamplingRow>())?;
        if self.row_tokens.is_none() && rows > packed {
            return Err(bad(
                "logits",
                format!("{rows} rows for {packed} packed tokens"),
                "row_tokens, which says whose row is whose, or no more rows than tokens",
            ));
        }
        let [scan, mass, pick, finish] = SAMPLE.each_ref().map(|kernels| &kernels[instance]);
        let chunks = parameters.chunk_launch();
        let stages = [
            (true, scan, chunks),
            (self.filters || self.logprobs.is_some(), mass, chunks),
            (self.filters, pick, chunks),
            (true, finish, parameters.finish_launch()),
        ];
        let needed = stages.into_iter().filter(|&(needed, ..)| needed);
        call.finish(parameters, needed.map(|(_, kernel, launch)| (kernel, launch)))
    }
}

/// Bytes of scratch for `rows` rows of `vocab` columns.
pub fn scratch_bytes(rows: u64, vocab: u64) -> u64 {
    let chunks = vocab.div_ceil(CHUNK);
    let per_row = chunks
        .saturating_mul(CHUNK_BYTES + CHUNK / BLOCK * 4)
        .saturating_add(BINS * 12 + CANDIDATES * 8 + 16);
    rows.saturating_mul(per_row)
}

impl SampleRowsParams {
    /// `sample_scan`, `sample_mass`, `sample_pick`: row, up to `PARTS` chunks of columns.
    pub fn chunk_launch(&self) -> Launch {
        let chunks = (self.vocab as u64).div_ceil(CHUNK);
        let parts = (self.num_rows as u64 * chunks / FILLED).clamp(1, PARTS);
        geometry([self.num_rows as u32, chunks.div_ceil(parts) as u32, 1], 256, 0)
    }

    /// `sample_finish`: a block per row.
    pub fn finish_launch(&self) -> Launch {
        let rows = if self.vocab > 0 { self.num_rows as u32 } else { 0 };
        geometry([rows, 1, 1], 256, 0)
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    let bytes = size_of::<SampleRowsParams>();
    SAMPLE.iter().flatten().map(|kernel| (kernel, bytes, 0)).collect()
}
