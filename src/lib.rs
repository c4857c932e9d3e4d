//! Lossless DFlash speculative decoding: scheduling, acceptance and KV-page bookkeeping.
#![deny(missing_docs)]

pub mod error;
pub mod kv;
pub mod types;
