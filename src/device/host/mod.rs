//! Kernels on the CPU.

mod attention;
pub mod decoder;
mod linear;
mod rowwise;
mod simd;
mod team;
pub(super) mod view;

pub use linear::{PackedWeight, Precision};
pub use simd::Isa;

use super::{AttentionBatch, AttentionParams, AttentionTensors, Element, Kernels, Rows, RowsMut};
use crate::error::{Error, Result};

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
        let rows = (SWIGLU_PART / to.dim.max(1)).max(1);
        team::run(self.threads, to.rows.div_ceil(rows), |part| {
            for row in part * rows..((part + 1) * rows).min(to.rows) {
                // SAFETY: every row is in one part, and a part runs once.
                let inner = unsafe { out.part(row, 0, 0..to.dim) };
                let gate_up = gate_up.row(row, 0);
                let width = to.dim;
                simd::dispatch(self.isa, rowwise::SwiGlu { gate_up, width, inner });
            }
        });
        Ok(())
    }
}

impl Kernels for HostKernels {
    fn block_attention<E: Element>(
        &self,
        batch: &AttentionBatch,
        params: &AttentionParams,
        tensors: AttentionTensors<'_, E>,
    ) -> Result<()> {
        attention::run(self.isa, self.threads, batch, params, tensors)
    }
}
