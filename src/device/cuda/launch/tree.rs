//! `tree_top_k_{f32,bf16}` and `tree_build`: candidates of every depth, and the best-first trees over them.

use super::{Call, Checked, Entry, at_most, geometry, logit_type, mask_type};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::{Launch, TREE_MAX_K, TREE_MAX_NODES, TreeBuildParams, TreeTopKParams};
use crate::device::cuda::tensor::Extent::{Any, Is};
use crate::device::cuda::tensor::{Dtype, Tensor, bad, int32};
use crate::error::Result;

static TREE_TOP_K: [Kernel; 2] = [Kernel::new(c"tree_top_k_f32"), Kernel::new(c"tree_top_k_bf16")];
static TREE_BUILD: Kernel = Kernel::new(c"tree_build");

const MAX_DEPTH: usize = 255;
const MAX_COLUMNS: usize = 1023;

/// The `k` best columns of every row, with their log-probabilities.
#[derive(Clone, Debug)]
pub struct TreeTopK {
    /// float32 or bfloat16 `[N, V]`; `V` is at least `k`.
    pub values: Tensor,
    /// int64 `[N, k]`, written; `k` is at most [`TREE_MAX_K`].
    pub tokens: Tensor,
    /// float32 `[N, k]`, written.
    pub log_probs: Tensor,
    /// Whether values are logits that are still to be normalised.
    pub normalise: bool,
}

impl TreeTopK {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<TreeTopKParams>> {
        let (rows, vocab, k) = (self.values.extent(0), self.values.extent(1), self.tokens.extent(1));
        let instance = logit_type("values", self.values.dtype)?;
        let mut call = Call::default();
        let parameters = TreeTopKParams {
            values: call.rows("values", &self.values, k.max(1))?,
            tokens: call.write("tokens", &self.tokens, Dtype::I64, &[Is(rows), Any])?,
            log_probs: call.write("log_probs", &self.log_probs, Dtype::F32, &[Is(rows), Is(k)])?,
            row_stride: self.values.stride(0),
            num_rows: int32("values", rows)?,
            vocab: int32("values", vocab)?,
            k: at_most("tokens (columns)", k, TREE_MAX_K)?,
            normalise: i32::from(self.normalise),
        };
        call.finish(parameters, [(&TREE_TOP_K[instance], parameters.launch())])
    }
}

/// Best-first draft trees of `R` requests, in arrays of `n` nodes each, the anchor first.
#[derive(Clone, Debug)]
pub struct TreeBuild {
    /// int64 `[R]`.
    pub anchors: Tensor,
    /// int64 `[R, depths, k]`: candidates of every depth.
    pub top_tokens: Tensor,
    /// float32 `[R, depths, k]`, falling.
    pub top_log_probs: Tensor,
    /// int32 `[R]`: nodes of every tree, the anchor not counted; `n - 1` without.
    pub budgets: Option<Tensor>,
    /// int64 `[R, n]`, written; `n` is at least 1 and at most [`TREE_MAX_NODES`] and the anchor.
    pub tokens: Tensor,
    /// int32 `[R, n]`, written.
    pub parents: Tensor,
    /// int32 `[R, n]`, written.
    pub depths: Tensor,
    /// int32 `[R]`, written: nodes of every tree, the anchor counted.
    pub counts: Tensor,
    /// float32 `[R, n]`, written: log-probabilities of the paths.
    pub scores: Option<Tensor>,
    /// int32 `[R, n]`, written.
    pub first_child: Option<Tensor>,
    /// int32 `[R, n]`, written.
    pub next_sibling: Option<Tensor>,
    /// int64 or uint64 `[R, n, ceil(n / 64)]`, written: a bit for every node itself and whom it descends from.
    pub masks: Option<Tensor>,
}

impl TreeBuild {
    /// Checks the arguments.
    ///
    /// # Errors
    /// Names the argument, what it is and what it should be.
    pub fn check(&self) -> Result<Checked<TreeBuildParams>> {
        let r = self.anchors.extent(0);
        let (depth, k, nodes) = (
            self.top_tokens.extent(1),
            self.top_tokens.extent(2),
            self.tokens.extent(1),
        );
        let Some(drafts) = nodes.checked_sub(1) else {
            return Err(bad(
                "tokens",
                format!("shape {:?}", self.tokens.shape),
                "[R, max_nodes + 1]",
            ));
        };
        let shape = &[Is(r), Is(nodes)];
        let masks = &[Is(r), Is(nodes), Is(nodes.div_ceil(64))];
        let mut call = Call::default();
        let parameters = TreeBuildParams {
            anchors: call.read("anchors", &self.anchors, Dtype::I64, &[Any])?,
            top_tokens: call.read("top_tokens", &self.top_tokens, Dtype::I64, &[Is(r), Any, Any])?,
            top_log_probs: call.read(
                "top_log_probs",
                &self.top_log_probs,
                Dtype::F32,
                &[Is(r), Is(depth), Is(k)],
            )?,
            budgets: call.maybe_read("budgets", &self.budgets, Dtype::I32, &[Is(r)])?,
            tokens: call.write("tokens", &self.tokens, Dtype::I64, shape)?,
            parents: call.write("parents", &self.parents, Dtype::I32, shape)?,
            depths: call.write("depths", &self.depths, Dtype::I32, shape)?,
            scores: call.maybe_write("scores", &self.scores, Dtype::F32, shape)?,
            first_child: call.maybe_write("first_child", &self.first_child, Dtype::I32, shape)?,
            next_sibling: call.maybe_write("next_sibling", &self.next_sibling, Dtype::I32, shape)?,
            masks: call.maybe_write("masks", &self.masks, mask_type(&self.masks), masks)?,
            counts: call.write("counts", &self.counts, Dtype::I32, &[Is(r)])?,
            num_requests: int32("anchors", r)?,
            max_depth: at_most("top_tokens (depths)", depth, MAX_DEPTH)?,
            k: at_most("top_tokens (columns)", k, MAX_COLUMNS)?,
            max_nodes: at_most("tokens (nodes without the anchor)", drafts, TREE_MAX_NODES)?,
        };
        call.finish(parameters, [(&TREE_BUILD, parameters.launch())])
    }
}

impl TreeTopKParams {
    /// A block per row.
    pub fn launch(&self) -> Launch {
        let rows = if self.k > 0 { self.num_rows as u32 } else { 0 };
        geometry([rows, 1, 1], 512, 0)
    }
}

impl TreeBuildParams {
    /// A warp per request.
    pub fn launch(&self) -> Launch {
        let nodes = self.max_nodes as u32 + 1;
        geometry([self.num_requests as u32, 1, 1], 32, nodes * 48)
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    let top_k = TREE_TOP_K.iter().map(|kernel| (kernel, size_of::<TreeTopKParams>(), 0));
    let largest = TreeBuildParams {
        max_nodes: TREE_MAX_NODES as i32,
        ..Default::default()
    };
    let build = (&TREE_BUILD, size_of::<TreeBuildParams>(), largest.launch().shared);
    top_k.chain([build]).collect()
}
