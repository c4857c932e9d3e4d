//! The CUDA kernels' logic, compiled for the host, against the Rust reference: same bits, same tokens, same walks.
//!
//! `cuda/host_check.cpp` runs each kernel's own functions, its threads one after the other between barriers.

mod cuda_host {
    mod attention;
    mod kv;
    pub mod numbers;
    mod rng;
    mod sample;
    mod step;
    mod tree;
}
