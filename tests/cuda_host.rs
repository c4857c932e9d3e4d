//! The CUDA kernels' logic, compiled for the host, against the Rust reference: same bits, same tokens, same walks.
//!
//! `cuda/host_check.cpp` runs each kernel in two ways: its functions, threads one after the other between barriers, which is fast; and
//! the kernel as it stands, its threads as fibers, which shows its barriers and warp-wide operations as well.
#![cfg(target_os = "linux")]

use dflash_rs::{error, rng}; // `verify` names them as the crate does
#[path = "cuda_host/verify.rs"]
mod verify;

mod cuda_host {
    mod arithmetic;
    mod attention;
    mod delta;
    mod kv;
    pub mod numbers;
    mod rng;
    mod sample;
    mod step;
    mod tree;
}
