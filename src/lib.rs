//! Lossless DFlash speculative decoding: scheduling, acceptance and KV-page bookkeeping.
//!
#![doc = include_str!("../docs/architecture.md")]
#![deny(missing_docs)]

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
