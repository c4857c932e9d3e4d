//! Kernels on the CPU, on rows that somebody else owns.
//!
//! A step's indices are checked once, into an [`AttentionBatch`]; after that a layer is one call.
//!
//! ```text
//! decoder   layers and heads in one call
//! attention, linear, experts, delta, rowwise   one operation each, written once for any vectors
//! simd <- view                 vectors of every instruction set; rows and chunks of keys in memory
//! team                         threads that wait close by
//! ```

#[allow(
    unsafe_code,
    reason = "tiles of one layer write rows of one array from several threads"
)]
mod attention;
pub(crate) mod batch;
pub mod decoder;
#[allow(unsafe_code, reason = "heads of one array of states are moved by several threads")]
mod delta;
mod experts;
mod linear;
#[cfg(test)]
mod made_up;
mod rowwise;
#[allow(unsafe_code, reason = "intrinsics, once the processor said that it has them")]
mod simd;
#[allow(unsafe_code, reason = "helper threads run a borrowed closure")]
mod team;
#[allow(unsafe_code, reason = "strided rows over somebody else's memory")]
mod view;

pub use batch::{AttentionBatch, BatchArrays};
pub use delta::{DeltaRule, DeltaTensors, Span};
pub use experts::{Activation, Between, Choice, ExpertWeights, Experts, SharedExpert};
pub use linear::{PackedWeight, Precision, Stored};
pub use simd::Isa;
pub use view::{Bf16, Element, Layout, Rows, RowsMut};

use super::AttentionParams;
use crate::error::{Error, Result};

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

/// The CPU as a device.
#[derive(Clone, Copy, Debug)]
pub struct HostKernels {
    isa: Isa,
    threads: usize,
}

impl Default for HostKernels {
    /// # Panics
    /// Where [`HostKernels::new`] is an error.
    fn default() -> Self {
        Self::new().unwrap_or_else(|error| panic!("{error}"))
    }
}

impl HostKernels {
    /// Kernels with the instruction set of this process, [`Isa::chosen`], and one thread.
    ///
    /// # Errors
    /// Those of [`Isa::chosen`].
    pub fn new() -> Result<Self> {
        Ok(Self {
            isa: Isa::chosen()?,
            threads: 1,
        })
    }

    /// At most `threads` threads, the caller's included; a call uses them only when its work is worth starting them.
    pub fn with_threads(self, threads: usize) -> Self {
        Self {
            threads: threads.max(1),
            ..self
        }
    }

    /// An instruction set other than the best one, for tests and comparisons. Results are the same bits.
    ///
    /// # Panics
    /// When this processor lacks it.
    pub fn with_isa(self, isa: Isa) -> Self {
        assert!(
            Isa::available().contains(&isa),
            "{isa:?} is not available on this processor"
        );
        Self { isa, ..self }
    }
}

/// Elements that are worth a helper.
const SWIGLU_PART: usize = 1 << 13;

impl HostKernels {
    /// `out = silu(gate) * up`. `gate_up` is `[T, 1, 2 I]`, gate first; `out` is `[T, 1, I]`.
    ///
    /// # Errors
    /// `InvalidArgument` for arrays whose shapes do not fit each other.
    pub fn swiglu(&self, gate_up: Rows<'_, f32>, out: RowsMut<'_, f32>) -> Result<()> {
        let (from, to) = (*gate_up.layout(), *out.layout());
        if (to.rows, to.heads, to.dim * 2) != (from.rows, 1, from.dim) || from.heads != 1 {
            return Err(Error::InvalidArgument {
                name: "out",
                got: format!("[{}, {}, {}]", to.rows, to.heads, to.dim),
                expected: format!("half of [{}, {}, {}]", from.rows, from.heads, from.dim),
            });
        }
        if to.dim == 0 {
            return Ok(()); // however many rows of nothing there are
        }
        let rows = (SWIGLU_PART / to.dim).max(1);
        let parts = (0..).step_by(rows).zip(out.split_rows(rows)).collect();
        team::each(self.threads, parts, |(first, mut part): (usize, RowsMut<'_, f32>)| {
            for row in 0..part.layout().rows {
                let gate_up = gate_up.row(first + row, 0);
                let (width, inner) = (to.dim, part.row_mut(row, 0));
                simd::dispatch(self.isa, rowwise::SwiGlu { gate_up, width, inner });
            }
        });
        Ok(())
    }

    /// Writes this step's K and V to the batch's slots, if it has any, and attends: for every token and head
    /// `softmax(scale * q . K^T) V` over the keys that [`Mask`](crate::device::Mask) and window leave visible, with soft cap and sinks where there are any.
    ///
    /// A row's result depends on its own query and its visible keys and values in order, bit for bit: not on the other requests, on the
    /// length of its block, on where a key lives, or on the number of threads.
    ///
    /// # Errors
    /// Shapes that do not fit the batch or each other.
    pub fn block_attention<E: Element>(
        &self,
        batch: &AttentionBatch,
        params: &AttentionParams,
        tensors: AttentionTensors<'_, E>,
    ) -> Result<()> {
        attention::run(self.isa, self.threads, batch, params, tensors)
    }
}
