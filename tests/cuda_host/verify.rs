//! The arithmetic of weights is private to the crate: its own source, compiled here as well.
#![allow(dead_code)]

#[path = "../../src/verify/math.rs"]
pub mod math;
#[path = "../../src/verify/wide.rs"]
pub mod wide;
