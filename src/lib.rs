//! Lossless DFlash speculative decoding: scheduling, acceptance and KV-page bookkeeping.
#![deny(missing_docs)]

pub mod device;
pub mod error;
pub mod types;
