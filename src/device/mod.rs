//! The per-token work of a step: attention over the paged cache and the drafter's K/V injection; on a GPU also drawing, accepting,
//! trees and compaction.
//!
//! Two devices, each with a face of its own. [`host`] takes slices, is done when it returns, and is the reference that the other one is
//! tested against. [`cuda`] takes addresses and a stream. What attention means is said once, here, and is all they share: code
//! that is written once for both is above them, in the models.

pub mod cuda;
pub mod host;

/// Which keys of its own block a token sees. Every mode sees the context `valid_from..context_len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Tokens before it and itself: verification of a chain, prefill, plain decoding. In a batch with ancestors the
    /// tokens before it are those of its path.
    Causal,
    /// All tokens of the block: the drafter's denoising pass.
    Block,
    /// As [`Mask::Causal`] for a batch that must have ancestors: verification of a tree.
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
