//! The CUDA kernels on torch tensors: addresses, shapes and strides in, everything checked before anything is launched.
//!
//! # Safety, stated once
//! A tensor arrives as `(address, dtype, device, shape, strides)`, read from a live torch tensor by `dflash_rs.cuda`. [`Checks`] holds it
//! against what the kernel expects; the sizes that go into the parameters are those that were checked. What no check can see is
//! left to that module: the tensor outlives the launch (torch's allocator keeps freed memory in stream order), and indices that lie in
//! device memory are in range, as `cuda/params.h` states them.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::device::Mask;
use crate::device::cuda::params::{
    ACCEPT_MAX_NODES, AcceptParams, BlockAttentionParams, CompactKvParams, KvInjectParams, PageTable,
    PrepareBlockParams, SampleRowsParams, SamplingRow, TREE_MAX_K, TREE_MAX_NODES, TreeBuildParams, TreeTopKParams,
};
use crate::device::cuda::tensor::Access::{Read, Write};
use crate::device::cuda::tensor::Extent::{Any, AtLeast, Is};
use crate::device::cuda::tensor::{self, Checks, Dtype, VECTOR, int32};
use crate::device::cuda::{self, Kernel, Launch};
use crate::error::{Error, Result};
use crate::py::arrays::{Count, maybe_number, maybe_size, number, size, whole};
use crate::py::errors::invalid;

static PROBE: Kernel = Kernel::new(c"probe");
static PREPARE_BLOCK: Kernel = Kernel::new(c"prepare_block");
static KV_INJECT: [Kernel; 3] = [
    Kernel::new(c"kv_inject_64"),
    Kernel::new(c"kv_inject_128"),
    Kernel::new(c"kv_inject_256"),
];
static BLOCK_ATTENTION: [Kernel; 3] = [
    Kernel::new(c"block_attention_64"),
    Kernel::new(c"block_attention_128"),
    Kernel::new(c"block_attention_256"),
];
static COMBINE: [Kernel; 3] = [
    Kernel::new(c"block_attention_combine_64"),
    Kernel::new(c"block_attention_combine_128"),
    Kernel::new(c"block_attention_combine_256"),
];
/// scan, mass, pick, finish; each for float32 and bfloat16 logits.
static SAMPLE: [[Kernel; 2]; 4] = [
    [Kernel::new(c"sample_scan_f32"), Kernel::new(c"sample_scan_bf16")],
    [Kernel::new(c"sample_mass_f32"), Kernel::new(c"sample_mass_bf16")],
    [Kernel::new(c"sample_pick_f32"), Kernel::new(c"sample_pick_bf16")],
    [Kernel::new(c"sample_finish_f32"), Kernel::new(c"sample_finish_bf16")],
];
static ACCEPT: Kernel = Kernel::new(c"accept");
static TREE_TOP_K: [Kernel; 2] = [Kernel::new(c"tree_top_k_f32"), Kernel::new(c"tree_top_k_bf16")];
static TREE_BUILD: Kernel = Kernel::new(c"tree_build");
static COMPACT_KV: Kernel = Kernel::new(c"compact_kv");

/// A torch tensor: address, dtype, device ordinal, shape, strides.
#[derive(FromPyObject)]
pub(super) struct Tensor(usize, String, i32, Vec<usize>, Vec<i64>);

impl Tensor {
    fn get(&self) -> Result<tensor::Tensor> {
        Ok(tensor::Tensor {
            address: self.0,
            dtype: self.1.parse()?,
            device: self.2,
            shape: self.3.clone(),
            strides: self.4.clone(),
        })
    }

    fn extent(&self, dimension: usize) -> usize {
        self.3.get(dimension).copied().unwrap_or(0)
    }

    fn stride(&self, dimension: usize) -> i64 {
        self.4.get(dimension).copied().unwrap_or(0)
    }
}

/// The checks of one launch, on tensors as Python passes them.
#[derive(Default)]
struct Call(Checks);

impl Call {
    fn dense(&mut self, name: &'static str, tensor: &Tensor, dtype: Dtype, shape: &[tensor::Extent]) -> Result<u64> {
        self.0.dense(name, &tensor.get()?, dtype, shape, Read)
    }

    fn written(&mut self, name: &'static str, tensor: &Tensor, dtype: Dtype, shape: &[tensor::Extent]) -> Result<u64> {
        self.0.dense(name, &tensor.get()?, dtype, shape, Write)
    }

    fn optional(
        &mut self,
        name: &'static str,
        tensor: Option<&Tensor>,
        dtype: Dtype,
        shape: &[tensor::Extent],
        access: tensor::Access,
    ) -> Result<u64> {
        let tensor = tensor.map(Tensor::get).transpose()?;
        self.0.dense_or_null(name, tensor.as_ref(), dtype, shape, access)
    }

    /// bfloat16 `[rows, heads, dim]`, read 16 bytes at a time, with its row and head strides.
    fn heads(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        shape: [tensor::Extent; 3],
        access: tensor::Access,
    ) -> Result<(u64, [i64; 2])> {
        let address = self
            .0
            .strided(name, &tensor.get()?, Dtype::Bf16, &shape, VECTOR, access)?;
        Ok((address, [tensor.stride(0), tensor.stride(1)]))
    }

    fn table(&mut self, pages: &Tensor, row_ids: &Tensor, requests: usize, page_size: usize) -> Result<PageTable> {
        if page_size == 0 {
            return Err(tensor::bad("page_size", "0", "at least 1"));
        }
        Ok(PageTable {
            pages: self.dense("page_table", pages, Dtype::I32, &[Any, Any])?,
            row_ids: self.dense("row_ids", row_ids, Dtype::I32, &[Is(requests)])?,
            width: int32("page_table", pages.extent(1))?,
            page_size: int32("page_size", page_size)?,
        })
    }

    /// Refuses shared memory, and tensors of another device than the current one.
    fn finish(self) -> Result<()> {
        let Some(device) = self.0.finish()? else {
            return Ok(());
        };
        if cuda::fatbin_bytes() == 0 {
            return Err(Error::NoKernels);
        }
        let current = cuda::current_device()?;
        if device == current {
            Ok(())
        } else {
            Err(tensor::bad(
                "device",
                format!("tensors on cuda:{device} while cuda:{current} is current"),
                "the tensors' device to be current (with torch.cuda.device(tensor.device))",
            ))
        }
    }
}

/// Requests of a batch by its `query_starts`, `[R + 1]`.
fn requests(query_starts: &Tensor) -> Result<usize> {
    query_starts.extent(0).checked_sub(1).ok_or_else(|| {
        tensor::bad(
            "query_starts",
            format!("shape {:?}", query_starts.3),
            "[R + 1]: the first token of every request, and their number",
        )
    })
}

/// Index of the instance for a head width.
fn width(head_dim: usize) -> Result<usize> {
    [64, 128, 256].iter().position(|&dim| dim == head_dim).ok_or_else(|| {
        tensor::bad(
            "head_dim",
            head_dim.to_string(),
            "64, 128 or 256: what the kernels are compiled for",
        )
    })
}

/// Index of the instance for a type of logits.
fn logit_type(name: &'static str, dtype: Dtype) -> Result<usize> {
    match dtype {
        Dtype::F32 => Ok(0),
        Dtype::Bf16 => Ok(1),
        other => Err(tensor::bad(name, other.name(), "float32 or bfloat16")),
    }
}

fn at_most(name: &'static str, value: usize, limit: usize) -> Result<i32> {
    if value > limit {
        return Err(tensor::bad(name, value.to_string(), format!("at most {limit}")));
    }
    int32(name, value)
}

fn launch<P: Copy>(kernel: &Kernel, geometry: Launch, stream: usize, parameters: &P) -> Result<()> {
    // SAFETY: see the module.
    unsafe { kernel.launch(geometry, stream, parameters) }
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
    let add = |kernel: &Kernel, usage: Result<cuda::Usage>| -> PyResult<()> {
        let usage = usage?;
        found.set_item(kernel.name(), (usage.registers, usage.local, usage.shared))
    };
    add(&PROBE, PROBE.load::<u64>(0))?;
    add(&PREPARE_BLOCK, PREPARE_BLOCK.load::<PrepareBlockParams>(0))?;
    for (kernel, combine, inject, head_dim) in
        (0..3).map(|i| (&BLOCK_ATTENTION[i], &COMBINE[i], &KV_INJECT[i], 64 << i))
    {
        let one = BlockAttentionParams {
            q_heads: 1,
            kv_heads: 1,
            ..Default::default()
        };
        add(inject, inject.load::<KvInjectParams>(0))?;
        add(kernel, kernel.load::<BlockAttentionParams>(one.launch(head_dim).shared))?;
        add(combine, combine.load::<BlockAttentionParams>(0))?;
    }
    for kernel in SAMPLE.iter().flatten() {
        add(kernel, kernel.load::<SampleRowsParams>(0))?;
    }
    add(&ACCEPT, ACCEPT.load::<AcceptParams>(0))?;
    for kernel in &TREE_TOP_K {
        add(kernel, kernel.load::<TreeTopKParams>(0))?;
    }
    let largest = TreeBuildParams {
        max_nodes: TREE_MAX_NODES as i32,
        ..Default::default()
    };
    add(&TREE_BUILD, TREE_BUILD.load::<TreeBuildParams>(largest.launch().shared))?;
    add(&COMPACT_KV, COMPACT_KV.load::<CompactKvParams>(0))?;
    Ok(found)
}

/// Writes the `__CUDA_ARCH__` of the code that the driver picked to `out`, int32 `[1]`.
#[pyfunction]
pub(super) fn cuda_probe(out: Tensor, stream: usize) -> PyResult<()> {
    let mut call = Call::default();
    let address = call.written("out", &out, Dtype::I32, &[Is(1)])?;
    call.finish()?;
    let one = Launch {
        grid: [1; 3],
        block: 1,
        shared: 0,
    };
    Ok(launch(&PROBE, one, stream, &address)?)
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
    let (r, tokens) = (requests(&query_starts)?, token_ids.extent(0));
    if mask_token < 0 {
        return Err(invalid("mask_token", mask_token.to_string(), "a token id, at least 0"));
    }
    let mut call = Call::default();
    let parameters = PrepareBlockParams {
        query_starts: call.dense("query_starts", &query_starts, Dtype::I32, &[Is(r + 1)])?,
        context_lens: call.dense("context_lens", &context_lens, Dtype::I32, &[Is(r)])?,
        anchors: call.dense("anchors", &anchors, Dtype::I64, &[Is(r)])?,
        drafts: call.optional("drafts", drafts.as_ref(), Dtype::I64, &[Is(r), Any], Read)?,
        depths: call.optional("depths", depths.as_ref(), Dtype::I32, &[Is(tokens)], Read)?,
        table: call.table(&page_table, &row_ids, r, page_size)?,
        token_ids: call.written("token_ids", &token_ids, Dtype::I64, &[Any])?,
        positions: call.written("positions", &positions, Dtype::I64, &[Is(tokens)])?,
        slots: call.optional("slots", slots.as_ref(), Dtype::I64, &[Is(tokens)], Write)?,
        mask_token,
        draft_stride: drafts.as_ref().map_or(0, |drafts| drafts.extent(1) as i64),
        num_requests: int32("query_starts", r)?,
        padded_tokens: int32("token_ids", tokens)?,
    };
    call.finish()?;
    Ok(launch(&PREPARE_BLOCK, parameters.launch(), stream, &parameters)?)
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
    let (layers, heads, dim) = (kv.extent(1), kv.extent(3), kv.extent(4));
    let instance = width(dim)?;
    let count = positions.extent(0);
    let rotary = cos_sin.extent(1);
    if rotary == 0 || !rotary.is_multiple_of(16) || rotary > dim {
        return Err(invalid(
            "cos_sin",
            format!("rows of {rotary}"),
            format!("rows of a multiple of 16, at most head_dim {dim}"),
        ));
    }
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(invalid("eps", eps.to_string(), "a finite number of at least 0"));
    }
    let source_rows = if rows.is_some() { Any } else { Is(count) };
    let mut call = Call::default();
    let source = [source_rows, Any, Is(2), Any, Is(dim)];
    let address = call.0.strided("kv", &kv.get()?, Dtype::Bf16, &source, VECTOR, Read)?;
    if heads > 1 && kv.stride(3) != dim as i64 {
        return Err(invalid(
            "kv",
            format!("a stride of {} from head to head", kv.stride(3)),
            format!("{dim}, heads next to each other"),
        ));
    }
    let shape = [Any, Is(heads), Is(dim)];
    // One cache stands for all: the kernel reads their addresses from device memory.
    let (_, cache_strides) = call.heads("cache", &cache, shape, Write)?;
    let parameters = KvInjectParams {
        kv: address,
        k_norm: call.dense("k_norm", &k_norm, Dtype::Bf16, &[Is(layers), Is(dim)])?,
        cos_sin: call.dense("cos_sin", &cos_sin, Dtype::F32, &[AtLeast(1), Is(rotary)])?,
        rows: call.optional("rows", rows.as_ref(), Dtype::I64, &[Is(count)], Read)?,
        positions: call.dense("positions", &positions, Dtype::I64, &[Any])?,
        slots: call.dense("slots", &slots, Dtype::I64, &[Is(count)])?,
        k_caches: call.dense("k_caches", &k_caches, Dtype::I64, &[Is(layers)])?,
        v_caches: call.dense("v_caches", &v_caches, Dtype::I64, &[Is(layers)])?,
        row_stride: kv.stride(0),
        layer_stride: kv.stride(1),
        v_offset: kv.stride(2),
        slot_stride: cache_strides[0],
        head_stride: cache_strides[1],
        max_rows: int32("positions", count)?,
        num_layers: int32("kv", layers)?,
        num_heads: int32("kv", heads)?,
        rotary_dim: int32("cos_sin", rotary)?,
        eps,
        reserved: 0,
    };
    if !parameters.k_norm.is_multiple_of(VECTOR as u64) {
        return Err(Error::MisalignedPointer {
            name: "k_norm",
            address: k_norm.0,
            alignment: VECTOR,
        }
        .into());
    }
    call.finish()?;
    Ok(launch(
        &KV_INJECT[instance],
        parameters.launch(dim as u32),
        stream,
        &parameters,
    )?)
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
    let r = requests(&query_starts)?;
    let (tokens, heads, dim) = (q.extent(0), q.extent(1), q.extent(2));
    let kv_heads = k.extent(1);
    let instance = width(dim)?;
    let mode = match mask {
        "causal" => Mask::Causal,
        "block" => Mask::Block,
        "ancestors" => Mask::Ancestors,
        other => return Err(invalid("mask", other, "'causal', 'block' or 'ancestors'")),
    };
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || heads / kv_heads > 64 {
        return Err(invalid(
            "q",
            format!("{heads} heads over {kv_heads} key heads"),
            "1..64 query heads for every key head",
        ));
    }
    if !scale.is_finite() {
        return Err(invalid("scale", scale.to_string(), "a finite number"));
    }
    if window == Some(0) {
        return Err(invalid("window", "0", "at least 1, or None"));
    }
    if let Some(softcap) = softcap
        && !(softcap.is_finite() && softcap > 0.0)
    {
        return Err(invalid("softcap", softcap.to_string(), "a positive number, or None"));
    }
    if max_block_len > tokens {
        return Err(invalid(
            "max_block_len",
            max_block_len.to_string(),
            format!("at most {tokens}, the rows of q"),
        ));
    }
    if split_keys == 0 || !split_keys.is_multiple_of(64) {
        return Err(invalid("split_keys", split_keys.to_string(), "a multiple of 64"));
    }
    let needed = max_keys.div_ceil(split_keys).max(1);
    if num_splits < needed || num_splits > 65535 {
        return Err(invalid(
            "num_splits",
            num_splits.to_string(),
            format!("{needed}..65535: {split_keys} keys each for requests of up to {max_keys} keys"),
        ));
    }
    if (mode == Mask::Ancestors) != ancestors.is_some() {
        let got = if ancestors.is_some() { "a tensor" } else { "None" };
        return Err(invalid(
            "ancestors",
            got,
            "a tensor with mask='ancestors', None otherwise",
        ));
    }
    let words = ancestors.as_ref().map_or(0, |ancestors| ancestors.extent(1));
    if ancestors.is_some() && max_block_len > words * 64 {
        return Err(invalid(
            "ancestors",
            format!("{words} words per token"),
            format!(
                "{} for requests of up to {max_block_len} tokens",
                max_block_len.div_ceil(64)
            ),
        ));
    }
    if num_splits > 1 && (partial_out.is_none() || partial_stats.is_none()) {
        return Err(invalid(
            "partial_out, partial_stats",
            "None",
            format!("workspaces for {num_splits} splits"),
        ));
    }
    let mut call = Call::default();
    let (q_address, q_stride) = call.heads("q", &q, [Any, Any, Any], Read)?;
    let own = [Is(tokens), Is(kv_heads), Is(dim)];
    let (k_address, k_stride) = call.heads("k", &k, own, Read)?;
    let (v_address, v_stride) = call.heads("v", &v, own, Read)?;
    let access = if slots.is_some() { Write } else { Read };
    let (k_cache_address, k_cache_stride) = call.heads("k_cache", &k_cache, [Any, Is(kv_heads), Is(dim)], access)?;
    let cache = [Is(k_cache.extent(0)), Is(kv_heads), Is(dim)];
    let (v_cache_address, v_cache_stride) = call.heads("v_cache", &v_cache, cache, access)?;
    let (out_address, out_stride) = call.heads("out", &out, [Is(tokens), Is(heads), Is(dim)], Write)?;
    // Node masks are words of 64 bits, whatever their sign is called.
    let mask_type = match ancestors.as_ref().map(Tensor::get).transpose()? {
        Some(tensor) if tensor.dtype == Dtype::I64 => Dtype::I64,
        _ => Dtype::U64,
    };
    let parameters = BlockAttentionParams {
        q: q_address,
        k: k_address,
        v: v_address,
        k_cache: k_cache_address,
        v_cache: v_cache_address,
        out: out_address,
        query_starts: call.dense("query_starts", &query_starts, Dtype::I32, &[Is(r + 1)])?,
        context_lens: call.dense("context_lens", &context_lens, Dtype::I32, &[Is(r)])?,
        valid_from: call.optional("valid_from", valid_from.as_ref(), Dtype::I32, &[Is(r)], Read)?,
        slots: call.optional("slots", slots.as_ref(), Dtype::I64, &[Is(tokens)], Read)?,
        ancestors: call.optional(
            "ancestors",
            ancestors.as_ref(),
            mask_type,
            &[Is(tokens), Is(words)],
            Read,
        )?,
        partial_out: call.optional(
            "partial_out",
            partial_out.as_ref(),
            Dtype::F32,
            &[AtLeast(num_splits), Is(tokens), Is(heads), Is(dim)],
            Write,
        )?,
        partial_stats: call.optional(
            "partial_stats",
            partial_stats.as_ref(),
            Dtype::F32,
            &[AtLeast(num_splits), Is(tokens), Is(heads), Is(2)],
            Write,
        )?,
        sinks: call.optional("sinks", sinks.as_ref(), Dtype::F32, &[Is(heads)], Read)?,
        table: call.table(&page_table, &row_ids, r, page_size)?,
        q_stride,
        k_stride,
        v_stride,
        out_stride,
        k_cache_stride,
        v_cache_stride,
        num_requests: int32("query_starts", r)?,
        q_heads: int32("q", heads)?,
        kv_heads: int32("k", kv_heads)?,
        max_tokens: int32("q", tokens)?,
        max_block_len: int32("max_block_len", max_block_len)?,
        num_splits: int32("num_splits", num_splits)?,
        split_keys: int32("split_keys", split_keys)?,
        mask: mode as i32,
        mask_words: int32("ancestors", words)?,
        window: int32("window", window.unwrap_or(0))?,
        scale,
        softcap: softcap.unwrap_or(0.0),
    };
    int32("query_starts", r.saturating_mul(kv_heads))?;
    call.finish()?;
    launch(
        &BLOCK_ATTENTION[instance],
        parameters.launch(dim as u32),
        stream,
        &parameters,
    )?;
    Ok(launch(
        &COMBINE[instance],
        parameters.combine_launch(),
        stream,
        &parameters,
    )?)
}

/// Bytes of scratch that `cuda_sample_rows` needs.
#[pyfunction]
pub(super) fn cuda_sample_scratch(rows: Count, vocab: Count) -> PyResult<u64> {
    let (rows, vocab): (u32, u32) = (rows.count("rows")?, vocab.count("vocab")?);
    Ok(SampleRowsParams::scratch_bytes(rows.into(), vocab.into()))
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
    let r = requests(&query_starts)?;
    let (rows, vocab, packed) = (logits.extent(0), logits.extent(1), token_ids.extent(0));
    let view = logits.get()?;
    let instance = logit_type("logits", view.dtype)?;
    let bytes = SampleRowsParams::scratch_bytes(rows as u64, vocab as u64) as usize;
    let mut call = Call::default();
    let parameters = SampleRowsParams {
        logits: call.0.strided(
            "logits",
            &view,
            view.dtype,
            &[Any, AtLeast(1)],
            view.dtype.bytes(),
            Read,
        )?,
        sampling: call.dense("sampling", &sampling, Dtype::U8, &[Is(r), Is(size_of::<SamplingRow>())])?,
        query_starts: call.dense("query_starts", &query_starts, Dtype::I32, &[Is(r + 1)])?,
        row_tokens: call.optional("row_tokens", row_tokens.as_ref(), Dtype::I32, &[Is(rows)], Read)?,
        token_ids: call.dense("token_ids", &token_ids, Dtype::I64, &[Any])?,
        positions: call.dense("positions", &positions, Dtype::I64, &[Is(packed)])?,
        parents: call.optional("parents", parents.as_ref(), Dtype::I32, &[Is(packed)], Read)?,
        history_tokens: call.dense("history_tokens", &history_tokens, Dtype::I32, &[Any])?,
        history_counts: call.dense(
            "history_counts",
            &history_counts,
            Dtype::I32,
            &[Is(history_tokens.extent(0))],
        )?,
        bias_tokens: call.dense("bias_tokens", &bias_tokens, Dtype::I32, &[Any])?,
        bias_values: call.dense("bias_values", &bias_values, Dtype::F32, &[Is(bias_tokens.extent(0))])?,
        tokens: call.written("tokens", &tokens, Dtype::I64, &[Is(rows)])?,
        logprobs: call.optional("logprobs", logprobs.as_ref(), Dtype::F32, &[Is(rows)], Write)?,
        status: call.written("status", &status, Dtype::I32, &[Is(rows)])?,
        scratch: call.written("scratch", &scratch, Dtype::U8, &[AtLeast(bytes)])?,
        row_stride: logits.stride(0),
        num_rows: int32("logits", rows)?,
        num_requests: int32("query_starts", r)?,
        vocab: at_most("logits (columns)", vocab, 1 << 20)?,
        reserved: 0,
    };
    for (name, tensor, alignment) in [("scratch", &scratch, VECTOR), ("sampling", &sampling, 8)] {
        if !tensor.0.is_multiple_of(alignment) {
            let address = tensor.0;
            return Err(Error::MisalignedPointer {
                name,
                address,
                alignment,
            }
            .into());
        }
    }
    if row_tokens.is_none() && rows > packed {
        return Err(invalid(
            "logits",
            format!("{rows} rows for {packed} packed tokens"),
            "row_tokens, which says whose row is whose, or no more rows than tokens",
        ));
    }
    call.finish()?;
    let [scan, mass, pick, finish] = &SAMPLE;
    launch(&scan[instance], parameters.chunk_launch(), stream, &parameters)?;
    if filters || logprobs.is_some() {
        launch(&mass[instance], parameters.chunk_launch(), stream, &parameters)?;
    }
    if filters {
        launch(&pick[instance], parameters.chunk_launch(), stream, &parameters)?;
    }
    Ok(launch(
        &finish[instance],
        parameters.finish_launch(),
        stream,
        &parameters,
    )?)
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
    let (r, packed) = (requests(&query_starts)?, token_ids.extent(0));
    let max_nodes_checked = at_most("max_nodes", max_nodes, ACCEPT_MAX_NODES)?;
    if max_nodes == 0 && r > 0 {
        return Err(invalid("max_nodes", "0", "the largest number of tokens of one request"));
    }
    let mut call = Call::default();
    // Lengths may be advanced in place.
    let in_place = new_context_lens.0 == context_lens.0;
    let rows = if logit_starts.is_some() { Any } else { Is(packed) };
    let parameters = AcceptParams {
        query_starts: call.dense("query_starts", &query_starts, Dtype::I32, &[Is(r + 1)])?,
        logit_starts: call.optional("logit_starts", logit_starts.as_ref(), Dtype::I32, &[Is(r + 1)], Read)?,
        context_lens: if in_place {
            context_lens.0 as u64
        } else {
            call.dense("context_lens", &context_lens, Dtype::I32, &[Is(r)])?
        },
        node_counts: call.optional("node_counts", node_counts.as_ref(), Dtype::I32, &[Is(r)], Read)?,
        token_ids: call.dense("token_ids", &token_ids, Dtype::I64, &[Any])?,
        parents: call.optional("parents", parents.as_ref(), Dtype::I32, &[Is(packed)], Read)?,
        sampled: call.dense("sampled", &sampled, Dtype::I64, &[rows])?,
        table: call.table(&page_table, &row_ids, r, page_size)?,
        accepted: call.written("accepted", &accepted, Dtype::I32, &[Is(r)])?,
        out_tokens: call.written("out_tokens", &out_tokens, Dtype::I64, &[Is(r), AtLeast(max_nodes)])?,
        out_lens: call.written("out_lens", &out_lens, Dtype::I32, &[Is(r)])?,
        new_context_lens: call.written("new_context_lens", &new_context_lens, Dtype::I32, &[Is(r)])?,
        next_anchors: call.written("next_anchors", &next_anchors, Dtype::I64, &[Is(r)])?,
        path: call.optional("path", path.as_ref(), Dtype::I32, &[Is(r), AtLeast(max_nodes)], Write)?,
        commit_rows: call.optional("commit_rows", commit_rows.as_ref(), Dtype::I64, &[Is(packed)], Write)?,
        commit_positions: call.optional(
            "commit_positions",
            commit_positions.as_ref(),
            Dtype::I64,
            &[Is(packed)],
            Write,
        )?,
        commit_slots: call.optional("commit_slots", commit_slots.as_ref(), Dtype::I64, &[Is(packed)], Write)?,
        out_stride: out_tokens.extent(1) as i64,
        path_stride: path.as_ref().map_or(0, |path| path.extent(1) as i64),
        num_requests: int32("query_starts", r)?,
        max_nodes: max_nodes_checked,
    };
    call.finish()?;
    Ok(launch(&ACCEPT, parameters.launch(), stream, &parameters)?)
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
    let (rows, vocab, k) = (values.extent(0), values.extent(1), tokens.extent(1));
    let view = values.get()?;
    let instance = logit_type("values", view.dtype)?;
    let mut call = Call::default();
    let parameters = TreeTopKParams {
        values: call.0.strided(
            "values",
            &view,
            view.dtype,
            &[Any, AtLeast(k.max(1))],
            view.dtype.bytes(),
            Read,
        )?,
        tokens: call.written("tokens", &tokens, Dtype::I64, &[Is(rows), Any])?,
        log_probs: call.written("log_probs", &log_probs, Dtype::F32, &[Is(rows), Is(k)])?,
        row_stride: values.stride(0),
        num_rows: int32("values", rows)?,
        vocab: int32("values", vocab)?,
        k: at_most("tokens (columns)", k, TREE_MAX_K)?,
        normalise: i32::from(normalise),
    };
    call.finish()?;
    Ok(launch(&TREE_TOP_K[instance], parameters.launch(), stream, &parameters)?)
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
    let r = anchors.extent(0);
    let (depth, k, nodes) = (top_tokens.extent(1), top_tokens.extent(2), tokens.extent(1));
    if nodes == 0 {
        return Err(invalid("tokens", format!("shape {:?}", tokens.3), "[R, max_nodes + 1]"));
    }
    let shape = [Is(r), Is(nodes)];
    let mask_type = match masks.as_ref().map(Tensor::get).transpose()? {
        Some(tensor) if tensor.dtype == Dtype::I64 => Dtype::I64,
        _ => Dtype::U64,
    };
    let mut call = Call::default();
    let parameters = TreeBuildParams {
        anchors: call.dense("anchors", &anchors, Dtype::I64, &[Any])?,
        top_tokens: call.dense("top_tokens", &top_tokens, Dtype::I64, &[Is(r), Any, Any])?,
        top_log_probs: call.dense("top_log_probs", &top_log_probs, Dtype::F32, &[Is(r), Is(depth), Is(k)])?,
        budgets: call.optional("budgets", budgets.as_ref(), Dtype::I32, &[Is(r)], Read)?,
        tokens: call.written("tokens", &tokens, Dtype::I64, &shape)?,
        parents: call.written("parents", &parents, Dtype::I32, &shape)?,
        depths: call.written("depths", &depths, Dtype::I32, &shape)?,
        scores: call.optional("scores", scores.as_ref(), Dtype::F32, &shape, Write)?,
        first_child: call.optional("first_child", first_child.as_ref(), Dtype::I32, &shape, Write)?,
        next_sibling: call.optional("next_sibling", next_sibling.as_ref(), Dtype::I32, &shape, Write)?,
        masks: call.optional(
            "masks",
            masks.as_ref(),
            mask_type,
            &[Is(r), Is(nodes), Is(nodes.div_ceil(64))],
            Write,
        )?,
        counts: call.written("counts", &counts, Dtype::I32, &[Is(r)])?,
        num_requests: int32("anchors", r)?,
        max_depth: at_most("top_tokens (depths)", depth, 255)?,
        k: at_most("top_tokens (columns)", k, 1023)?,
        max_nodes: at_most("tokens (nodes without the anchor)", nodes - 1, TREE_MAX_NODES)?,
    };
    call.finish()?;
    Ok(launch(&TREE_BUILD, parameters.launch(), stream, &parameters)?)
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
    let (r, layers) = (path.extent(0), k_caches.extent(0));
    let (heads, dim) = (cache.extent(1), cache.extent(2));
    if !dim.is_multiple_of(8) {
        return Err(invalid("head_dim", dim.to_string(), "a multiple of 8"));
    }
    let mut call = Call::default();
    let (_, cache_strides) = call.heads("cache", &cache, [Any, Any, Any], Write)?;
    let parameters = CompactKvParams {
        path: call.dense("path", &path, Dtype::I32, &[Any, Any])?,
        context_lens: call.dense("context_lens", &context_lens, Dtype::I32, &[Is(r)])?,
        k_caches: call.dense("k_caches", &k_caches, Dtype::I64, &[Any])?,
        v_caches: call.dense("v_caches", &v_caches, Dtype::I64, &[Is(layers)])?,
        table: call.table(&page_table, &row_ids, r, page_size)?,
        path_stride: path.extent(1) as i64,
        slot_stride: cache_strides[0],
        head_stride: cache_strides[1],
        num_requests: int32("path", r)?,
        num_layers: int32("k_caches", layers)?,
        num_heads: int32("cache", heads)?,
        head_dim: int32("cache", dim)?,
    };
    call.finish()?;
    Ok(launch(&COMPACT_KV, parameters.launch(), stream, &parameters)?)
}
