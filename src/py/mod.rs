//! The Python face: thin classes over the core, one crossing per stage, whole-batch NumPy arrays.

mod buffers;
mod engine;
mod errors;
mod host;
mod pool;

/// The compiled half of `dflash_rs`.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use super::engine::{Accepted, Engine, Events, StepPlan};
    #[pymodule_export]
    use super::host::{AttentionBatch, paged_attention};
    #[pymodule_export]
    use super::pool::PagePool;

    /// Version of the compiled core.
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
