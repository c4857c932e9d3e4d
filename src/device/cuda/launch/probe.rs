//! `probe`: which of the fatbin's codes the driver picked.

use super::{Call, Checked, Entry, geometry};
use crate::device::cuda::Kernel;
use crate::device::cuda::params::Address;
use crate::device::cuda::tensor::Extent::Is;
use crate::device::cuda::tensor::{Dtype, Tensor};
use crate::error::Result;

static PROBE: Kernel = Kernel::new(c"probe");

/// Writes the `__CUDA_ARCH__` of the code that runs.
#[derive(Clone, Debug)]
pub struct Probe {
    /// int32 `[1]`.
    pub out: Tensor,
}

impl Probe {
    /// Checks the argument.
    ///
    /// # Errors
    /// What `out` is and should be.
    pub fn check(&self) -> Result<Checked<Address>> {
        let mut call = Call::default();
        let out = call.write("out", &self.out, Dtype::I32, &[Is(1)])?;
        call.finish(out, [(&PROBE, geometry([1; 3], 1, 0))])
    }
}

pub(super) fn kernels() -> Vec<Entry> {
    vec![(&PROBE, size_of::<Address>(), 0)]
}
