//! The per-token work of a step, behind one trait: attention over the paged cache, and the drafter's K/V injection.
//!
//! [`host`] is both the engine's implementation on a CPU and the reference that device kernels are tested against. A step's indices
//! are checked once, into an [`AttentionBatch`]; after that a layer is one call.

pub mod batch;
pub mod cuda;
pub mod host;

pub use batch::{AttentionBatch, BatchArrays};
pub use host::view::{Bf16, Element, Layout, Rows, RowsMut};

use crate::error::Result;

/// Which keys of its own block a token sees. Every mode sees the context `valid_from..context_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Tokens before it and itself: verification of a chain, prefill, plain decoding. In a batch with [`BatchArrays::ancestors`] the
    /// tokens before it are those of its path.
    Causal,
    /// All tokens of the block: the drafter's denoising pass.
    Block,
    /// The same for a batch that must have ancestors: verification of a tree.
    Ancestors,
}

/// Everything of a layer's attention that is not an array.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Factor on `q . k`; usually `head_dim^-1/2`.
    pub scale: f32,
    /// Visibility inside the block.
    pub mask: Mask,
    /// Sliding window `W`: a token at position `p` sees key `j` only if `p - j < W`, and for [`Mask::Block`] also `j - p < W`.
    pub window: Option<usize>,
    /// Bound `c` on scores: `c * tanh(scale * q . k / c)` takes the place of `scale * q . k`.
    pub softcap: Option<f32>,
}

/// The arrays of one layer. `T` packed tokens, `Hq` query heads in groups over `Hkv` key heads, `D` elements per head.
#[derive(Debug)]
pub struct AttentionTensors<'a, E> {
    /// `[T, Hq, D]` queries, positions already rotated in.
    pub q: Rows<'a, E>,
    /// `[T, Hkv, D]` keys of this step.
    pub k: Rows<'a, E>,
    /// `[T, Hkv, D]` values of this step.
    pub v: Rows<'a, E>,
    /// `[num_slots, Hkv, D]`; this step's keys are written to the batch's slots.
    pub k_cache: RowsMut<'a, E>,
    /// `[num_slots, Hkv, D]`; this step's values are written to the batch's slots.
    pub v_cache: RowsMut<'a, E>,
    /// `[T, Hq, D]` result.
    pub out: RowsMut<'a, E>,
    /// `[Hq]` scores of one more key per head, which every token sees and whose value is zero. Neither scaled nor capped.
    pub sinks: Option<&'a [f32]>,
}

/// The kernels of a device.
pub trait Kernels {
    /// Writes this step's K and V to the batch's slots, if it has any, and attends: for every token and head
    /// `softmax(scale * q . K^T) V` over the keys that [`Mask`] and window leave visible, with soft cap and sinks where there are any.
    ///
    /// A row's result depends on its own query and its visible keys and values in order, bit for bit: not on the other requests, on the
    /// length of its block, on where a key lives, or on the number of threads.
    ///
    /// # Errors
    /// Shapes that do not fit the batch or each other.
    fn block_attention<E: Element>(
        &self,
        batch: &AttentionBatch,
        params: &AttentionParams,
        tensors: AttentionTensors<'_, E>,
    ) -> Result<()>;
}
