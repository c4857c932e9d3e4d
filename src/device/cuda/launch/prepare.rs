//! `prepare_block`: tokens, positions and slots of a step.

use super::{Call, Checked, Entry, Pages, geometry, requests};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::{Launch, PrepareBlockParams};
use crate::device::cuda::tensor::Extent::{Any, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, bad, int32};
use crate::error::Result;

static PREPARE_BLOCK: Kernel = Kernel::new(c"prepare_block");

/// Node 0 of request `r` is its anchor, node `i` its draft `i - 1`. `T` tokens, the padding of a graph counted.
#[derive(Clone, Debug)]
pub struct PrepareBlock {
    /// int32 `[R + 1]`: first token of every request.
    pub query_starts: Tensor,
    /// int32 `[R]`: tokens with KV.
    pub context_lens: Tensor,
    /// int64 `[R]`.
    pub anchors: Tensor,
    /// int64 `[R, any]`; the mask token without.
    pub drafts: Option<Tensor>,
    /// int32 `[T]`: distance from the anchor; a chain without.
    pub depths: Option<Tensor>,
    /// Where KV goes.
    pub pages: Pages,
    /// int64 `[T]`, written.
    pub token_ids: Tensor,
    /// int64 `[T]`, written.
    pub positions: Tensor,
    /// int64 `[T]`, written.
    pub slots: Option<Tensor>,
    /// What stands for a draft that is not there yet; at least 0.
    pub mask_token: i64,
}

impl PrepareBlock {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<PrepareBlockParams>> {
        let (r, tokens) = (requests(&self.query_starts)?, self.token_ids.extent(0));
        if self.mask_token < 0 {
            return Err(bad("mask_token", self.mask_token.to_string(), "a token id, at least 0"));
        }
        let mut call = Call::default();
        let parameters = PrepareBlockParams {
            query_starts: call.read("query_starts", &self.query_starts, Dtype::I32, &[Is(r + 1)])?,
            context_lens: call.read("context_lens", &self.context_lens, Dtype::I32, &[Is(r)])?,
            anchors: call.read("anchors", &self.anchors, Dtype::I64, &[Is(r)])?,
            drafts: call.maybe_read("drafts", &self.drafts, Dtype::I64, &[Is(r), Any])?,
            depths: call.maybe_read("depths", &self.depths, Dtype::I32, &[Is(tokens)])?,
            table: call.table(&self.pages, r)?,
            token_ids: call.write("token_ids", &self.token_ids, Dtype::I64, &[Any])?,
            positions: call.write("positions", &self.positions, Dtype::I64, &[Is(tokens)])?,
            slots: call.maybe_write("slots", &self.slots, Dtype::I64, &[Is(tokens)])?,
            mask_token: self.mask_token,
            draft_stride: self.drafts.as_ref().map_or(0, |drafts| drafts.extent(1) as i64),
            num_requests: int32("query_starts", r)?,
            padded_tokens: int32("token_ids", tokens)?,
        };
        call.finish(parameters, [(&PREPARE_BLOCK, parameters.launch())])
    }
}

impl PrepareBlockParams {
    /// A block per request and one for the padding.
    pub fn launch(&self) -> Launch {
        let blocks = if self.padded_tokens > 0 {
            self.num_requests as u32 + 1
        } else {
            0
        };
        geometry([blocks, 1, 1], 64, 0)
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    vec![(&PREPARE_BLOCK, size_of::<PrepareBlockParams>(), 0)]
}
