//! Lossless DFlash speculative decoding: scheduling, acceptance and KV-page bookkeeping.
//!
#![doc = include_str!("../docs/architecture.md")]
// Modules with unsafe code say so, and why, where they are declared.
#![deny(missing_docs, unsafe_code)]

pub mod device;
pub mod draft;
pub mod error;
pub mod kv;
pub mod plan;
#[cfg(feature = "python")]
mod py;
pub mod rng;
pub mod schedule;
pub mod stats;
pub mod step;
pub mod types;
pub mod verify;
pub mod width;

pub use device::host::HostKernels;
pub use draft::DraftTree;
pub use error::{Error, Result};
pub use plan::Planner;
pub use schedule::{Config, Params};
pub use step::{Accepted, Engine, Events, StepPlan};
pub use types::{RequestId, TokenId};
pub use verify::{Sampler, Sampling};
