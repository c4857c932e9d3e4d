//! The Python face: thin classes over the core, one crossing per stage, whole-batch NumPy arrays.

mod arrays;
#[allow(unsafe_code, reason = "NumPy views of memory that Rust owns")]
mod buffers;
mod coupled;
#[allow(unsafe_code, reason = "addresses of torch tensors go to CUDA kernels")]
mod cuda;
mod decoder;
mod delta;
#[allow(unsafe_code, reason = "arrays of a step are shown in place, as `buffers` says")]
mod engine;
mod errors;
mod experts;
#[allow(unsafe_code, reason = "addresses of torch tensors become rows")]
mod host;
mod lookup;
#[allow(unsafe_code, reason = "arrays of a step are shown in place, as `buffers` says")]
mod params;
mod plan;
mod pool;
mod serving;
mod tree;
mod verify;

/// The compiled half of `dflash_rs`.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use super::coupled::couple;
    #[pymodule_export]
    use super::cuda::{
        cuda_accept, cuda_block_attention, cuda_clusters, cuda_compact_kv, cuda_info, cuda_kv_inject, cuda_load,
        cuda_prepare_block, cuda_probe, cuda_sample_rows, cuda_sample_scratch, cuda_tree_build, cuda_tree_top_k,
    };
    #[pymodule_export]
    use super::decoder::{HostConv, HostDecoder, HostInjector, HostSelector};
    #[pymodule_export]
    use super::delta::{DeltaRule, cuda_delta_rule};
    #[pymodule_export]
    use super::engine::{Accepted, Engine, Events, Record, StepPlan, read_records};
    #[pymodule_export]
    use super::experts::Experts;
    #[pymodule_export]
    use super::host::{
        AttentionBatch, PackedWeight, cpu_isa, cpu_isas, linear, multiplies_bf16, paged_attention, swiglu,
    };
    #[pymodule_export]
    use super::lookup::Lookup;
    #[pymodule_export]
    use super::params::{DeviceSampling, pack_sampling};
    #[pymodule_export]
    use super::plan::{Planner, WidthPlanner};
    #[pymodule_export]
    use super::pool::PagePool;
    #[pymodule_export]
    use super::serving::plan_decode;
    #[pymodule_export]
    use super::tree::DraftTree;
    #[pymodule_export]
    use super::verify::{gumbel, sample_rows, top_logprobs, verify_block, verify_token, walk};

    /// Version of the compiled core.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
