//! The CUDA device: arguments that are checked here, then one structure for one kernel on the caller's stream.
//!
//! ```text
//! tensors ──> launch::{prepare, attention, ..}: check ──> params: what the kernel takes ──> driver: the launch
//!             shapes, types, strides, aliasing                grid, block, shared memory       (or a stand-in, in tests)
//! ```
//!
//! The host's kernels ([`super::host`]) take slices and are done when they return; these take addresses and a stream, and are
//! done when the stream is. The two share what attention means ([`super::AttentionParams`]) and no trait: nothing could be
//! written once for both.

mod config;
#[allow(unsafe_code, reason = "functions of the driver are called through pointers")]
mod driver;
mod fatbin;
pub mod launch;
mod once;
pub mod params;
pub mod tensor;

pub use driver::{Cuda, Device, Driver, Kernel, Usage, devices, driver_version};
pub use fatbin::{ARCHITECTURES, NVCC, fatbin_bytes, runs_on};
pub use params::Launch;
