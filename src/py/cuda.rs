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
use crate::device::cuda::tensor::{Dtype, Tensor};
use crate::device::cuda::{self, Cuda};
use crate::error::{Error, Result};
use crate::py::arrays::{Argument, Count, Flag, Given, Kind, named};
use crate::py::errors::invalid;
use crate::py::host::mask_named;

/// A torch tensor: address, dtype, device ordinal, shape, strides.
#[derive(FromPyObject)]
pub(super) struct Described(usize, String, i32, Vec<usize>, Vec<i64>);

impl Kind for Described {
    fn expected() -> String {
        "address, dtype, device, shape and strides of a tensor".into()
    }
}

/// An argument that is a tensor.
pub(super) struct Passed(Given<Described>);

impl FromPyObject<'_, '_> for Passed {
    type Error = PyErr;
    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        object.extract().map(Self)
    }
}

impl Argument for Passed {
    type Value = Tensor;
    fn named(self, name: &'static str) -> PyResult<Tensor> {
        let Described(address, dtype, device, shape, strides) = self.0.named(name)?;
        let dtype = dtype.parse::<Dtype>().map_err(|error| match error {
            Error::InvalidArgument { got, expected, .. } => invalid(name, got, expected),
            other => other.into(),
        })?;
        Ok(Tensor {
            address,
            dtype,
            device,
            shape,
            strides,
        })
    }
}

pub(super) fn launch<P: Copy + 'static>(call: Result<Checked<P>>, stream: usize) -> PyResult<()> {
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

/// Whether a device, the current one, runs the attention in clusters of blocks: what `cuda_block_attention` takes as `clusters`.
#[pyfunction]
pub(super) fn cuda_clusters(device: Given<usize>) -> PyResult<bool> {
    named!(device);
    let ordinal =
        i32::try_from(device).map_err(|_| invalid("device", device.to_string(), "the ordinal of a device"))?;
    Ok(launch::runs_clusters(&Cuda, ordinal)?)
}

/// Writes the `__CUDA_ARCH__` of the code that the driver picked to `out`, int32 `[1]`.
#[pyfunction]
pub(super) fn cuda_probe(out: Passed, stream: Given<usize>) -> PyResult<()> {
    named!(out, stream);
    launch(Probe { out }.check(), stream)
}
/// Tokens, positions and slots of a step.
#[pyfunction]
#[pyo3(signature = (*, query_starts, context_lens, anchors, page_table, row_ids, page_size, token_ids, positions, stream, slots=None,
                    drafts=None, depths=None, mask_token=Given::new(0)),
       text_signature = "(*, query_starts, context_lens, anchors, page_table, row_ids, page_size, token_ids, positions, stream, \
                         slots=None, drafts=None, depths=None, mask_token=0)")]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_prepare_block(
    query_starts: Passed,
    context_lens: Passed,
    anchors: Passed,
    page_table: Passed,
    row_ids: Passed,
    page_size: Given<usize>,
    token_ids: Passed,
    positions: Passed,
    stream: Given<usize>,
    slots: Option<Passed>,
    drafts: Option<Passed>,
    depths: Option<Passed>,
    mask_token: Given<i64>,
) -> PyResult<()> {
    named!(
        query_starts,
        context_lens,
        anchors,
        page_table,
        row_ids,
        page_size,
        token_ids,
        positions,
        stream,
        slots,
        drafts,
        depths,
        mask_token
    );
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
    kv: Passed,
    k_norm: Passed,
    cos_sin: Passed,
    positions: Passed,
    slots: Passed,
    k_caches: Passed,
    v_caches: Passed,
    cache: Passed,
    eps: Given<f32>,
    stream: Given<usize>,
    rows: Option<Passed>,
) -> PyResult<()> {
    named!(
        kv, k_norm, cos_sin, positions, slots, k_caches, v_caches, cache, eps, stream, rows
    );
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
                    scale, stream, mask=Given::new("causal".into()), window=None, valid_from=None, slots=None, ancestors=None, partial_out=None,
                    partial_stats=None, num_splits=Given::new(1), split_keys=Given::new(512), softcap=None, sinks=None,
                    clusters=Flag::FALSE),
       text_signature = "(*, q, k, v, k_cache, v_cache, out, query_starts, context_lens, page_table, row_ids, page_size, max_block_len, \
                         max_keys, scale, stream, mask='causal', window=None, valid_from=None, slots=None, ancestors=None, \
                         partial_out=None, partial_stats=None, num_splits=1, split_keys=512, softcap=None, sinks=None, \
                         clusters=False)")]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_block_attention(
    q: Passed,
    k: Passed,
    v: Passed,
    k_cache: Passed,
    v_cache: Passed,
    out: Passed,
    query_starts: Passed,
    context_lens: Passed,
    page_table: Passed,
    row_ids: Passed,
    page_size: Given<usize>,
    max_block_len: Given<usize>,
    max_keys: Given<usize>,
    scale: Given<f32>,
    stream: Given<usize>,
    mask: Given<String>,
    window: Option<Given<usize>>,
    valid_from: Option<Passed>,
    slots: Option<Passed>,
    ancestors: Option<Passed>,
    partial_out: Option<Passed>,
    partial_stats: Option<Passed>,
    num_splits: Given<usize>,
    split_keys: Given<usize>,
    softcap: Option<Given<f32>>,
    sinks: Option<Passed>,
    clusters: Flag,
) -> PyResult<()> {
    named!(
        q,
        k,
        v,
        k_cache,
        v_cache,
        out,
        query_starts,
        context_lens,
        page_table,
        row_ids,
        page_size,
        max_block_len,
        max_keys,
        scale,
        stream,
        window,
        valid_from,
        slots,
        ancestors,
        partial_out,
        partial_stats,
        num_splits,
        split_keys,
        softcap,
        sinks,
        clusters
    );
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
        clusters,
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
                    status, scratch, stream, row_tokens=None, parents=None, logprobs=None, filters=Flag::TRUE),
       text_signature = "(*, logits, sampling, query_starts, token_ids, positions, history_tokens, history_counts, bias_tokens, \
                         bias_values, tokens, status, scratch, stream, row_tokens=None, parents=None, logprobs=None, filters=True)")]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_sample_rows(
    logits: Passed,
    sampling: Passed,
    query_starts: Passed,
    token_ids: Passed,
    positions: Passed,
    history_tokens: Passed,
    history_counts: Passed,
    bias_tokens: Passed,
    bias_values: Passed,
    tokens: Passed,
    status: Passed,
    scratch: Passed,
    stream: Given<usize>,
    row_tokens: Option<Passed>,
    parents: Option<Passed>,
    logprobs: Option<Passed>,
    filters: Flag,
) -> PyResult<()> {
    named!(
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
        stream,
        row_tokens,
        parents,
        logprobs,
        filters
    );
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
    query_starts: Passed,
    context_lens: Passed,
    token_ids: Passed,
    sampled: Passed,
    page_table: Passed,
    row_ids: Passed,
    page_size: Given<usize>,
    accepted: Passed,
    out_tokens: Passed,
    out_lens: Passed,
    new_context_lens: Passed,
    next_anchors: Passed,
    max_nodes: Given<usize>,
    stream: Given<usize>,
    logit_starts: Option<Passed>,
    node_counts: Option<Passed>,
    parents: Option<Passed>,
    path: Option<Passed>,
    commit_rows: Option<Passed>,
    commit_positions: Option<Passed>,
    commit_slots: Option<Passed>,
) -> PyResult<()> {
    named!(
        query_starts,
        context_lens,
        token_ids,
        sampled,
        page_table,
        row_ids,
        page_size,
        accepted,
        out_tokens,
        out_lens,
        new_context_lens,
        next_anchors,
        max_nodes,
        stream,
        logit_starts,
        node_counts,
        parents,
        path,
        commit_rows,
        commit_positions,
        commit_slots
    );
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
#[pyo3(signature = (*, values, tokens, log_probs, stream, normalise=Flag::TRUE),
       text_signature = "(*, values, tokens, log_probs, stream, normalise=True)")]
pub(super) fn cuda_tree_top_k(
    values: Passed,
    tokens: Passed,
    log_probs: Passed,
    stream: Given<usize>,
    normalise: Flag,
) -> PyResult<()> {
    named!(values, tokens, log_probs, stream, normalise);
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
    anchors: Passed,
    top_tokens: Passed,
    top_log_probs: Passed,
    tokens: Passed,
    parents: Passed,
    depths: Passed,
    counts: Passed,
    stream: Given<usize>,
    budgets: Option<Passed>,
    scores: Option<Passed>,
    first_child: Option<Passed>,
    next_sibling: Option<Passed>,
    masks: Option<Passed>,
) -> PyResult<()> {
    named!(
        anchors,
        top_tokens,
        top_log_probs,
        tokens,
        parents,
        depths,
        counts,
        stream,
        budgets,
        scores,
        first_child,
        next_sibling,
        masks
    );
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
    path: Passed,
    context_lens: Passed,
    k_caches: Passed,
    v_caches: Passed,
    cache: Passed,
    page_table: Passed,
    row_ids: Passed,
    page_size: Given<usize>,
    stream: Given<usize>,
) -> PyResult<()> {
    named!(
        path,
        context_lens,
        k_caches,
        v_caches,
        cache,
        page_table,
        row_ids,
        page_size,
        stream
    );
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
