//! The CUDA kernels on torch tensors: what Python passes becomes the arguments of [`crate::device::cuda::launch`], which checks and
//! launches them.
//!
//! # Safety, stated once
//! A tensor arrives as `(address, dtype, device, shape, strides)`, read from a live torch tensor by `dflash_rs.cuda`. What no check
//! can see is left to that module: the tensor outlives the launch (torch's allocator keeps freed memory in stream order), and
//! indices that lie in device memory are in range, as `cuda/params.h` states them.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::device::AttentionParams;
use crate::device::cuda::launch::{
    self, Accept, BlockAttention, Checked, CompactKv, KvInject, Pages, PrepareBlock, Probe, SampleRows, TreeBuild,
    TreeTopK,
};
use crate::device::cuda::tensor::Tensor;
use crate::device::cuda::{self, Cuda};
use crate::error::Result;
use crate::py::arrays::{Count, maybe_number, maybe_size, number, size, whole};
use crate::py::host::mask_named;

/// A torch tensor: address, dtype, device ordinal, shape, strides.
#[derive(FromPyObject)]
struct Described(usize, String, i32, Vec<usize>, Vec<i64>);

impl FromPyObject<'_, '_> for Tensor {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let Described(address, dtype, device, shape, strides) = object.extract()?;
        Ok(Self {
            address,
            dtype: dtype.parse()?,
            device,
            shape,
            strides,
        })
    }
}

fn launch<P: Copy + 'static>(call: Result<Checked<P>>, stream: usize) -> PyResult<()> {
    // SAFETY: see the module.
    unsafe { call?.launch(&Cuda, stream)? };
    Ok(())
}

/// What was built and what this machine has. Opens the driver, creates no context, raises nothing.
#[pyfunction]
pub(super) fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    let built = cuda::ARCHITECTURES.split(',').filter(|code| !code.is_empty());
    info.set_item("architectures", PyList::new(py, built)?)?;
    info.set_item("nvcc", Some(cuda::NVCC).filter(|version| !version.is_empty()))?;
    info.set_item("fatbin_bytes", cuda::fatbin_bytes())?;
    // The first call runs the driver's initialisation.
    let (version, devices) = py.detach(|| (cuda::driver_version(), cuda::devices()));
    info.set_item("driver", version.as_ref().ok())?;
    let why = version
        .as_ref()
        .err()
        .or(devices.as_ref().err())
        .map(ToString::to_string);
    info.set_item("driver_error", why)?;
    let list = PyList::empty(py);
    for device in devices.unwrap_or_default() {
        let one = PyDict::new(py);
        one.set_item("name", &device.name)?;
        one.set_item("capability", (device.major, device.minor))?;
        one.set_item("multiprocessors", device.multiprocessors)?;
        one.set_item("supported", cuda::runs_on(device.major, device.minor))?;
        list.append(one)?;
    }
    info.set_item("devices", list)?;
    Ok(info)
}

/// Loads every kernel into the current context: `{name: (registers, local bytes, static shared bytes)}`.
#[pyfunction]
pub(super) fn cuda_load(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let found = PyDict::new(py);
    for (name, usage) in launch::load(&Cuda)? {
        found.set_item(name, (usage.registers, usage.local, usage.shared))?;
    }
    Ok(found)
}

/// Writes the `__CUDA_ARCH__` of the code that the driver picked to `out`, int32 `[1]`.
#[pyfunction]
pub(super) fn cuda_probe(out: Tensor, stream: usize) -> PyResult<()> {
    launch(Probe { out }.check(), stream)
}
/// Tokens, positions and slots of a step.
#[pyfunction]
#[pyo3(signature = (*, query_starts, context_lens, anchors, page_table, row_ids, page_size, token_ids, positions, stream, slots=None,
                    drafts=None, depths=None, mask_token=0))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_prepare_block(
    query_starts: Tensor,
    context_lens: Tensor,
    anchors: Tensor,
    page_table: Tensor,
    row_ids: Tensor,
    #[pyo3(from_py_with = size)] page_size: usize,
    token_ids: Tensor,
    positions: Tensor,
    #[pyo3(from_py_with = size)] stream: usize,
    slots: Option<Tensor>,
    drafts: Option<Tensor>,
    depths: Option<Tensor>,
    #[pyo3(from_py_with = whole)] mask_token: i64,
) -> PyResult<()> {
    let pages = Pages {
        page_table,
        row_ids,
        page_size,
    };
    let call = PrepareBlock {
        query_starts,
        context_lens,
        anchors,
        token_ids,
        positions,
        slots,
        drafts,
        depths,
        mask_token,
        pages,
    };
    launch(call.check(), stream)
}

/// Drafter K and V of committed tokens into the caches of all layers.
#[pyfunction]
#[pyo3(signature = (*, kv, k_norm, cos_sin, positions, slots, k_caches, v_caches, cache, eps, stream, rows=None))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_kv_inject(
    kv: Tensor,
    k_norm: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_caches: Tensor,
    v_caches: Tensor,
    cache: Tensor,
    #[pyo3(from_py_with = number)] eps: f32,
    #[pyo3(from_py_with = size)] stream: usize,
    rows: Option<Tensor>,
) -> PyResult<()> {
    let call = KvInject {
        kv,
        k_norm,
        cos_sin,
        positions,
        slots,
        k_caches,
        v_caches,
        cache,
        eps,
        rows,
    };
    launch(call.check(), stream)
}

/// Attention of one layer, with this step's K and V stored first where `slots` says.
#[pyfunction]
#[pyo3(signature = (*, q, k, v, k_cache, v_cache, out, query_starts, context_lens, page_table, row_ids, page_size, max_block_len, max_keys,
                    scale, stream, mask="causal", window=None, valid_from=None, slots=None, ancestors=None, partial_out=None,
                    partial_stats=None, num_splits=1, split_keys=512, softcap=None, sinks=None))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    page_table: Tensor,
    row_ids: Tensor,
    #[pyo3(from_py_with = size)] page_size: usize,
    #[pyo3(from_py_with = size)] max_block_len: usize,
    #[pyo3(from_py_with = size)] max_keys: usize,
    #[pyo3(from_py_with = number)] scale: f32,
    #[pyo3(from_py_with = size)] stream: usize,
    mask: &str,
    #[pyo3(from_py_with = maybe_size)] window: Option<usize>,
    valid_from: Option<Tensor>,
    slots: Option<Tensor>,
    ancestors: Option<Tensor>,
    partial_out: Option<Tensor>,
    partial_stats: Option<Tensor>,
    #[pyo3(from_py_with = size)] num_splits: usize,
    #[pyo3(from_py_with = size)] split_keys: usize,
    #[pyo3(from_py_with = maybe_number)] softcap: Option<f32>,
    sinks: Option<Tensor>,
) -> PyResult<()> {
    let pages = Pages {
        page_table,
        row_ids,
        page_size,
    };
    let params = AttentionParams {
        scale,
        mask: mask_named(mask)?,
        window,
        softcap,
    };
    let call = BlockAttention {
        q,
        k,
        v,
        k_cache,
        v_cache,
        out,
        query_starts,
        context_lens,
        max_block_len,
        max_keys,
        valid_from,
        slots,
        ancestors,
        partial_out,
        partial_stats,
        num_splits,
        split_keys,
        sinks,
        pages,
        params,
    };
    launch(call.check(), stream)
}

/// Bytes of scratch that `cuda_sample_rows` needs.
#[pyfunction]
pub(super) fn cuda_sample_scratch(rows: Count, vocab: Count) -> PyResult<u64> {
    let (rows, vocab): (u32, u32) = (rows.count("rows")?, vocab.count("vocab")?);
    Ok(launch::scratch_bytes(rows.into(), vocab.into()))
}

/// The target's own token of every row.
#[pyfunction]
#[pyo3(signature = (*, logits, sampling, query_starts, token_ids, positions, history_tokens, history_counts, bias_tokens, bias_values, tokens,
                    status, scratch, stream, row_tokens=None, parents=None, logprobs=None, filters=true))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_sample_rows(
    logits: Tensor,
    sampling: Tensor,
    query_starts: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    history_tokens: Tensor,
    history_counts: Tensor,
    bias_tokens: Tensor,
    bias_values: Tensor,
    tokens: Tensor,
    status: Tensor,
    scratch: Tensor,
    #[pyo3(from_py_with = size)] stream: usize,
    row_tokens: Option<Tensor>,
    parents: Option<Tensor>,
    logprobs: Option<Tensor>,
    filters: bool,
) -> PyResult<()> {
    let call = SampleRows {
        logits,
        sampling,
        query_starts,
        token_ids,
        positions,
        history_tokens,
        history_counts,
        bias_tokens,
        bias_values,
        tokens,
        status,
        scratch,
        row_tokens,
        parents,
        logprobs,
        filters,
    };
    launch(call.check(), stream)
}

/// The walk of every request: committed tokens, lengths and next anchors.
#[pyfunction]
#[pyo3(signature = (*, query_starts, context_lens, token_ids, sampled, page_table, row_ids, page_size, accepted, out_tokens, out_lens,
                    new_context_lens, next_anchors, max_nodes, stream, logit_starts=None, node_counts=None, parents=None, path=None,
                    commit_rows=None, commit_positions=None, commit_slots=None))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_accept(
    query_starts: Tensor,
    context_lens: Tensor,
    token_ids: Tensor,
    sampled: Tensor,
    page_table: Tensor,
    row_ids: Tensor,
    #[pyo3(from_py_with = size)] page_size: usize,
    accepted: Tensor,
    out_tokens: Tensor,
    out_lens: Tensor,
    new_context_lens: Tensor,
    next_anchors: Tensor,
    #[pyo3(from_py_with = size)] max_nodes: usize,
    #[pyo3(from_py_with = size)] stream: usize,
    logit_starts: Option<Tensor>,
    node_counts: Option<Tensor>,
    parents: Option<Tensor>,
    path: Option<Tensor>,
    commit_rows: Option<Tensor>,
    commit_positions: Option<Tensor>,
    commit_slots: Option<Tensor>,
) -> PyResult<()> {
    let pages = Pages {
        page_table,
        row_ids,
        page_size,
    };
    let call = Accept {
        query_starts,
        context_lens,
        token_ids,
        sampled,
        accepted,
        out_tokens,
        out_lens,
        new_context_lens,
        next_anchors,
        max_nodes,
        logit_starts,
        node_counts,
        parents,
        path,
        commit_rows,
        commit_positions,
        commit_slots,
        pages,
    };
    launch(call.check(), stream)
}

/// The `k` best columns of every row with their log-probabilities.
#[pyfunction]
#[pyo3(signature = (*, values, tokens, log_probs, stream, normalise=true))]
pub(super) fn cuda_tree_top_k(
    values: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
    #[pyo3(from_py_with = size)] stream: usize,
    normalise: bool,
) -> PyResult<()> {
    let call = TreeTopK {
        values,
        tokens,
        log_probs,
        normalise,
    };
    launch(call.check(), stream)
}

/// Best-first draft trees.
#[pyfunction]
#[pyo3(signature = (*, anchors, top_tokens, top_log_probs, tokens, parents, depths, counts, stream, budgets=None, scores=None,
                    first_child=None, next_sibling=None, masks=None))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_tree_build(
    anchors: Tensor,
    top_tokens: Tensor,
    top_log_probs: Tensor,
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    counts: Tensor,
    #[pyo3(from_py_with = size)] stream: usize,
    budgets: Option<Tensor>,
    scores: Option<Tensor>,
    first_child: Option<Tensor>,
    next_sibling: Option<Tensor>,
    masks: Option<Tensor>,
) -> PyResult<()> {
    let call = TreeBuild {
        anchors,
        top_tokens,
        top_log_probs,
        tokens,
        parents,
        depths,
        counts,
        budgets,
        scores,
        first_child,
        next_sibling,
        masks,
    };
    launch(call.check(), stream)
}

/// Moves the KV of an accepted path to its final slots, all layers.
#[pyfunction]
#[pyo3(signature = (*, path, context_lens, k_caches, v_caches, cache, page_table, row_ids, page_size, stream))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_compact_kv(
    path: Tensor,
    context_lens: Tensor,
    k_caches: Tensor,
    v_caches: Tensor,
    cache: Tensor,
    page_table: Tensor,
    row_ids: Tensor,
    #[pyo3(from_py_with = size)] page_size: usize,
    #[pyo3(from_py_with = size)] stream: usize,
) -> PyResult<()> {
    let pages = Pages {
        page_table,
        row_ids,
        page_size,
    };
    let call = CompactKv {
        path,
        context_lens,
        k_caches,
        v_caches,
        cache,
        pages,
    };
    launch(call.check(), stream)
}
