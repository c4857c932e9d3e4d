//! A call that is in order, as a value: to look at, or to launch.
//!
//! # Safety, stated once
//! The parameters hold addresses and sizes of the same tensors, both checked. What no check can see is the promise of whoever calls
//! [`Checked::launch`]: tensors describe live device memory that outlives the launch, and indices that lie in device memory (lengths,
//! slots, page ids) are in range, as `cuda/params.h` states them.

use crate::device::cuda::params::Launch;
use crate::device::cuda::tensor::bad;
use crate::device::cuda::{Driver, Kernel};
use crate::error::Result;

/// Extents of a grid that every device runs.
const LARGEST_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];

/// A call in order: what its kernels get, and how they are launched.
#[derive(Clone, Debug)]
pub struct Checked<P> {
    /// Where all tensors are.
    device: Option<i32>,
    parameters: P,
    launches: Vec<(&'static Kernel, Launch)>,
}

impl<P> Checked<P> {
    /// A call whose tensors were checked; kernels that have nothing to do are dropped.
    ///
    /// # Errors
    /// A grid that no device runs.
    pub(super) fn new(
        device: Option<i32>,
        parameters: P,
        kernels: impl IntoIterator<Item = (&'static Kernel, Launch)>,
    ) -> Result<Self> {
        let mut launches = Vec::new();
        for (kernel, launch) in kernels {
            if launch.grid.contains(&0) {
                continue;
            }
            if launch.grid.iter().zip(LARGEST_GRID).any(|(&got, most)| got > most) {
                return Err(bad(
                    kernel.name(),
                    format!("a grid of {:?} blocks", launch.grid),
                    format!("at most {LARGEST_GRID:?}"),
                ));
            }
            launches.push((kernel, launch));
        }
        Ok(Self {
            device,
            parameters,
            launches,
        })
    }

    /// What every kernel of the call gets.
    pub fn parameters(&self) -> &P {
        &self.parameters
    }

    /// The kernels in the order of their launches; those without anything to do are not among them.
    pub fn launches(&self) -> &[(&'static Kernel, Launch)] {
        &self.launches
    }
}

impl<P: Copy + 'static> Checked<P> {
    /// Launches them on `stream`, a `CUstream` of the current device (0: the legacy default stream). Waits for nothing.
    ///
    /// # Safety
    /// Every tensor of the call is device memory as large as its shape and strides say, which lives until the stream has passed
    /// the launches; indices that lie in it are in range, as `cuda/params.h` states them.
    ///
    /// # Errors
    /// Tensors of another device than the current one; what [`Driver::launch`] refuses.
    pub unsafe fn launch(&self, driver: &impl Driver, stream: usize) -> Result<()> {
        if let Some(device) = self.device {
            let current = driver.current_device(device)?;
            if device != current {
                return Err(bad(
                    "device",
                    format!("tensors on cuda:{device} while cuda:{current} is current"),
                    "the tensors' device to be current (with torch.cuda.device(tensor.device))",
                ));
            }
        }
        for &(kernel, launch) in &self.launches {
            // SAFETY: the parameters are those of this call's kernels, made of tensors that were checked; the rest is the caller's.
            unsafe { driver.launch(kernel, launch, stream, &self.parameters)? };
        }
        Ok(())
    }
}
