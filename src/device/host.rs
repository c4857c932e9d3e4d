//! Kernels on the CPU.

mod attention;
pub mod decoder;
mod linear;
mod rowwise;
mod simd;
mod team;
pub(super) mod view;

pub use linear::PackedWeight;
pub use simd::Isa;

use super::{AttentionBatch, AttentionParams, AttentionTensors, Element, Kernels};
use crate::error::Result;

/// The CPU as a device.
#[derive(Clone, Copy, Debug)]
pub struct HostKernels {
    isa: Isa,
    threads: usize,
}

impl Default for HostKernels {
    fn default() -> Self {
        Self {
            isa: Isa::detect(),
            threads: 1,
        }
    }
}

impl HostKernels {
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
