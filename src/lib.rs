//! Lossless DFlash speculative decoding: scheduling, acceptance and KV-page bookkeeping.
#![deny(missing_docs)]

pub mod draft;
pub mod error;
pub mod rng;
pub mod stats;
pub mod types;
pub mod verify;
