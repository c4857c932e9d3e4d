//! `accept`: the walk of every request, its committed tokens, lengths and next anchor.

use super::{Call, Checked, Entry, Pages, at_most, geometry, requests};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::{ACCEPT_MAX_NODES, AcceptParams, Launch};
use crate::device::cuda::tensor::Extent::{Any, AtLeast, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, bad, int32};
use crate::error::Result;

static ACCEPT: Kernel = Kernel::new(c"accept");

/// `R` requests, `T` packed tokens.
#[derive(Clone, Debug)]
pub struct Accept {
    /// int32 `[R + 1]`: first token of every request.
    pub query_starts: Tensor,
    /// int32 `[R + 1]`: where each request's rows of `sampled` start; without, every token has one.
    pub logit_starts: Option<Tensor>,
    /// int32 `[R]`: tokens with KV.
    pub context_lens: Tensor,
    /// int32 `[R]`: nodes that are looked at; all without.
    pub node_counts: Option<Tensor>,
    /// int64 `[T]`.
    pub token_ids: Tensor,
    /// int32 `[T]`: the node each one follows; chains without.
    pub parents: Option<Tensor>,
    /// int64 `[T]`, or any number with `logit_starts`: the target's own tokens.
    pub sampled: Tensor,
    /// Where KV is.
    pub pages: Pages,
    /// int32 `[R]`, written: drafts kept.
    pub accepted: Tensor,
    /// int64 `[R, max_nodes or more]`, written.
    pub out_tokens: Tensor,
    /// int32 `[R]`, written.
    pub out_lens: Tensor,
    /// int32 `[R]`, written; may be `context_lens` itself, which are advanced in place then.
    pub new_context_lens: Tensor,
    /// int64 `[R]`, written.
    pub next_anchors: Tensor,
    /// int32 `[R, max_nodes or more]`, written: the nodes that were kept.
    pub path: Option<Tensor>,
    /// int64 `[T]`, written.
    pub commit_rows: Option<Tensor>,
    /// int64 `[T]`, written.
    pub commit_positions: Option<Tensor>,
    /// int64 `[T]`, written.
    pub commit_slots: Option<Tensor>,
    /// The largest number of tokens of one request; 1 to [`ACCEPT_MAX_NODES`].
    pub max_nodes: usize,
}

impl Accept {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<AcceptParams>> {
        let (r, packed) = (requests(&self.query_starts)?, self.token_ids.extent(0));
        let max_nodes = at_most("max_nodes", self.max_nodes, ACCEPT_MAX_NODES)?;
        if max_nodes == 0 && r > 0 {
            return Err(bad("max_nodes", "0", "the largest number of tokens of one request"));
        }
        let mut call = Call::default();
        let lens = &[Is(r)];
        let in_place = self.new_context_lens.address == self.context_lens.address;
        // Lengths that are advanced in place are one tensor; as two they would overlap.
        let context_lens = if in_place {
            Call::default().read("context_lens", &self.context_lens, Dtype::I32, lens)?
        } else {
            call.read("context_lens", &self.context_lens, Dtype::I32, lens)?
        };
        let sampled = if self.logit_starts.is_some() { Any } else { Is(packed) };
        let nodes = &[Is(r), AtLeast(self.max_nodes)];
        let tokens = &[Is(packed)];
        let parameters = AcceptParams {
            context_lens,
            query_starts: call.read("query_starts", &self.query_starts, Dtype::I32, &[Is(r + 1)])?,
            logit_starts: call.maybe_read("logit_starts", &self.logit_starts, Dtype::I32, &[Is(r + 1)])?,
            node_counts: call.maybe_read("node_counts", &self.node_counts, Dtype::I32, lens)?,
            token_ids: call.read("token_ids", &self.token_ids, Dtype::I64, &[Any])?,
            parents: call.maybe_read("parents", &self.parents, Dtype::I32, tokens)?,
            sampled: call.read("sampled", &self.sampled, Dtype::I64, &[sampled])?,
            table: call.table(&self.pages, r)?,
            accepted: call.write("accepted", &self.accepted, Dtype::I32, lens)?,
            out_tokens: call.write("out_tokens", &self.out_tokens, Dtype::I64, nodes)?,
            out_lens: call.write("out_lens", &self.out_lens, Dtype::I32, lens)?,
            new_context_lens: call.write("new_context_lens", &self.new_context_lens, Dtype::I32, lens)?,
            next_anchors: call.write("next_anchors", &self.next_anchors, Dtype::I64, lens)?,
            path: call.maybe_write("path", &self.path, Dtype::I32, nodes)?,
            commit_rows: call.maybe_write("commit_rows", &self.commit_rows, Dtype::I64, tokens)?,
            commit_positions: call.maybe_write("commit_positions", &self.commit_positions, Dtype::I64, tokens)?,
            commit_slots: call.maybe_write("commit_slots", &self.commit_slots, Dtype::I64, tokens)?,
            out_stride: self.out_tokens.extent(1) as i64,
            path_stride: self.path.as_ref().map_or(0, |path| path.extent(1) as i64),
            num_requests: int32("query_starts", r)?,
            max_nodes,
        };
        call.finish(parameters, [(&ACCEPT, parameters.launch())])
    }
}

impl AcceptParams {
    /// A block per request.
    pub fn launch(&self) -> Launch {
        geometry([self.num_requests as u32, 1, 1], 128, self.max_nodes as u32 * 8)
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    vec![(&ACCEPT, size_of::<AcceptParams>(), 0)]
}
