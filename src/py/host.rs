//! Host kernels on torch tensors: raw addresses and strides in, nothing copied.
//!
//! # Safety, stated once
//! An array arrives as `(address, row stride, head stride)` in elements. Before a view is made of it ([`Pointer::layout`]), it is not
//! null, aligned, its strides are not negative and do not make heads overlap, its extent fits the address space, and what is
//! written overlaps nothing else. Rows are token or slot counts of a checked [`AttentionBatch`], whose indices are all below them.
//! What no check can see is left to the caller, `dflash_rs.attention`, which reads every number from a live CPU tensor:
//! the memory is as large as its shape says, and the tensor outlives the call and is not resized by another thread.

use crate::device::host::{
    self, AttentionTensors, BatchArrays, Bf16, Element, HostKernels, Isa, Layout, Precision, Rows, RowsMut, Stored,
};
use crate::device::{AttentionParams, Mask};
use crate::error::Error;
use crate::py::arrays::{Given, Kind, Object, array, named};
use numpy::ndarray::{Ix1, Ix2};
use numpy::{PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::prelude::*;
use std::sync::Arc;

/// Query-key products below which the interpreter lock is kept: handing it over costs more.
const DETACH_WORK: usize = 1 << 20;

/// Types of the tensors that kernels read in place.
const DTYPES: &str = "'float32' or 'bfloat16'";

/// Address and strides of a tensor.
#[derive(Clone, Copy, FromPyObject)]
pub(super) struct Pointer(usize, i64, i64);

impl Kind for Pointer {
    fn expected() -> String {
        "an address, a row stride and a head stride".into()
    }
}

impl Pointer {
    /// The checked layout of `rows x heads x dim` elements of `E`.
    fn layout<E>(&self, name: &'static str, rows: usize, heads: usize, dim: usize) -> Result<Layout, Error> {
        let stride = |stride: i64| {
            usize::try_from(stride).map_err(|_| Error::InvalidArgument {
                name,
                got: format!("stride {stride}"),
                expected: "strides of at least 0 elements".into(),
            })
        };
        let layout = Layout {
            rows,
            heads,
            dim,
            row_stride: stride(self.1)?,
            head_stride: stride(self.2)?,
        };
        let elements = layout.span(name)?;
        if elements == 0 {
            return Ok(layout);
        }
        if self.0 == 0 {
            return Err(Error::NullPointer { name, elements });
        }
        let alignment = align_of::<E>();
        if !self.0.is_multiple_of(alignment) {
            return Err(Error::MisalignedPointer {
                name,
                address: self.0,
                alignment,
            });
        }
        if self.0.checked_add(elements * size_of::<E>()).is_none() {
            return Err(Error::InvalidArgument {
                name,
                got: format!("{elements} elements at {:#x}", self.0),
                expected: "an extent within the address space".into(),
            });
        }
        Ok(layout)
    }

    fn address<E>(&self, layout: &Layout) -> *mut E {
        // An empty tensor's address may be null; a view of nothing needs one that is not.
        let address = if layout.span("").is_ok_and(|elements| elements > 0) {
            self.0
        } else {
            align_of::<E>()
        };
        std::ptr::with_exposed_provenance_mut(address)
    }
}

/// A view in the making: a pointer whose layout was checked.
#[derive(Clone, Copy)]
pub(super) struct Checked<E> {
    name: &'static str,
    address: *mut E,
    layout: Layout,
}

impl<E: Element> Checked<E> {
    pub(super) fn new(
        name: &'static str,
        pointer: Pointer,
        rows: usize,
        heads: usize,
        dim: usize,
    ) -> Result<Self, Error> {
        let layout = pointer.layout::<E>(name, rows, heads, dim)?;
        Ok(Self {
            name,
            address: pointer.address(&layout),
            layout,
        })
    }

    fn bytes(&self) -> std::ops::Range<usize> {
        let start = self.address.addr();
        start..start + self.layout.span(self.name).unwrap_or(0) * size_of::<E>()
    }

    /// Refuses memory shared with `others`.
    pub(super) fn alone(&self, others: &[&Self]) -> Result<(), Error> {
        let own = self.bytes();
        for other in others {
            let theirs = other.bytes();
            if own.start < theirs.end && theirs.start < own.end {
                return Err(Error::AliasedPointer {
                    name: self.name,
                    other: other.name,
                });
            }
        }
        Ok(())
    }

    pub(super) fn rows<'a>(&self) -> Rows<'a, E> {
        // SAFETY: see the module.
        unsafe { Rows::from_raw(self.address, self.layout) }
    }

    /// All elements, of an array without gaps.
    pub(super) fn elements<'a>(&self) -> Result<&'a [E], Error> {
        let Layout { rows, heads, dim, .. } = self.layout;
        let elements = self.layout.span(self.name)?;
        if elements > 0 && self.layout != Layout::contiguous(rows, heads, dim) {
            return Err(not_contiguous(self.name));
        }
        // SAFETY: see the module.
        Ok(unsafe { std::slice::from_raw_parts(self.address, elements) })
    }

    pub(super) fn rows_mut<'a>(&self) -> RowsMut<'a, E> {
        // SAFETY: see the module.
        unsafe { RowsMut::from_raw(self.address, self.layout) }
    }
}

pub(super) fn contiguous<'a, T: numpy::Element>(
    name: &'static str,
    array: &'a PyReadonlyArray1<'_, T>,
) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|_| not_contiguous(name).into())
}

pub(super) fn not_contiguous(name: &'static str) -> Error {
    Error::InvalidArgument {
        name,
        got: "an array with gaps".into(),
        expected: "a C-contiguous array (numpy.ascontiguousarray makes one)".into(),
    }
}

impl Kind for AttentionBatch {
    fn expected() -> String {
        "an AttentionBatch".into()
    }
}

impl Kind for PackedWeight {
    fn expected() -> String {
        "a PackedWeight".into()
    }
}

/// The indices of one step, checked once for all its layers.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct AttentionBatch(pub(super) host::AttentionBatch);

#[pymethods]
impl AttentionBatch {
    #[new]
    #[pyo3(signature = (query_starts, context_lens, page_table, row_ids, page_size, num_slots, slots=None, valid_from=None,
                        ancestors=None))]
    #[allow(clippy::too_many_arguments, reason = "the arrays of a step, by keyword")]
    fn new(
        query_starts: &Bound<'_, PyAny>,
        context_lens: &Bound<'_, PyAny>,
        page_table: &Bound<'_, PyAny>,
        row_ids: &Bound<'_, PyAny>,
        page_size: Given<usize>,
        num_slots: Given<usize>,
        slots: Option<&Bound<'_, PyAny>>,
        valid_from: Option<&Bound<'_, PyAny>>,
        ancestors: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        named!(page_size, num_slots);
        let query_starts = array::<i32, Ix1>("query_starts", query_starts, "[R + 1]")?;
        let context_lens = array::<i32, Ix1>("context_lens", context_lens, "[R]")?;
        let page_table = array::<i32, Ix2>("page_table", page_table, "[rows, pages]")?;
        let row_ids = array::<i32, Ix1>("row_ids", row_ids, "[R]")?;
        let slots = slots.map(|s| array::<i64, Ix1>("slots", s, "[T]")).transpose()?;
        let valid_from = valid_from
            .map(|v| array::<i32, Ix1>("valid_from", v, "[R]"))
            .transpose()?;
        let ancestors = ancestors
            .map(|a| array::<u64, Ix2>("ancestors", a, "[T, words]"))
            .transpose()?;
        let masks = ancestors
            .as_ref()
            .map(|a| a.as_slice().map(|bits| (bits, a.shape()[1])))
            .transpose();
        let arrays = BatchArrays {
            query_starts: contiguous("query_starts", &query_starts)?,
            context_lens: contiguous("context_lens", &context_lens)?,
            page_table: page_table.as_slice().map_err(|_| not_contiguous("page_table"))?,
            table_width: page_table.shape()[1],
            row_ids: contiguous("row_ids", &row_ids)?,
            page_size,
            num_slots,
            slots: slots.as_ref().map(|s| contiguous("slots", s)).transpose()?,
            valid_from: valid_from.as_ref().map(|v| contiguous("valid_from", v)).transpose()?,
            ancestors: masks.map_err(|_| not_contiguous("ancestors"))?,
        };
        Ok(Self(host::AttentionBatch::new(arrays)?))
    }

    /// Packed tokens of the step.
    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens()
    }
}

/// One layer's attention, with this step's K and V written to the cache first.
#[pyfunction]
#[pyo3(signature = (batch, q, k, v, k_cache, v_cache, out, dtype, num_q_heads, num_kv_heads, head_dim, scale, mask=Given::new("causal".into()),
                    window=None, threads=Given::new(1), softcap=None, sinks=None),
       text_signature = "(batch, q, k, v, k_cache, v_cache, out, dtype, num_q_heads, num_kv_heads, head_dim, scale, mask='causal', \
                         window=None, threads=1, softcap=None, sinks=None)")]
#[allow(clippy::too_many_arguments, reason = "one crossing per layer")]
pub(super) fn paged_attention(
    py: Python<'_>,
    batch: Object<'_, AttentionBatch>,
    q: Given<Pointer>,
    k: Given<Pointer>,
    v: Given<Pointer>,
    k_cache: Given<Pointer>,
    v_cache: Given<Pointer>,
    out: Given<Pointer>,
    dtype: Given<String>,
    num_q_heads: Given<usize>,
    num_kv_heads: Given<usize>,
    head_dim: Given<usize>,
    scale: Given<f32>,
    mask: Given<String>,
    window: Option<Given<usize>>,
    threads: Given<usize>,
    softcap: Option<Given<f32>>,
    sinks: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    named!(
        batch,
        q,
        k,
        v,
        k_cache,
        v_cache,
        out,
        num_q_heads,
        num_kv_heads,
        head_dim,
        scale,
        window,
        threads,
        softcap
    );
    let mask = mask_named(mask)?;
    let sinks = sinks
        .map(|s| array::<f32, Ix1>("sinks", s, "[num_q_heads]"))
        .transpose()?;
    if threads == 0 {
        return Err(unknown("threads", "0", "at least 1"));
    }
    let call = Call {
        batch: &batch.get().0,
        arrays: [q, k, v, k_cache, v_cache, out],
        heads: (num_q_heads, num_kv_heads, head_dim),
        params: AttentionParams {
            scale,
            mask,
            window,
            softcap,
        },
        sinks: sinks.as_ref().map(|s| contiguous("sinks", s)).transpose()?,
        kernels: HostKernels::new()?.with_threads(threads),
    };
    match dtype.of("dtype", DTYPES)?.as_str() {
        "float32" => call.run::<f32>(py),
        "bfloat16" => call.run::<Bf16>(py),
        other => Err(unknown("dtype", other, DTYPES)),
    }
}

pub(super) fn mask_named(name: Given<String>) -> PyResult<Mask> {
    const MASKS: &str = "'causal', 'block' or 'ancestors'";
    match name.of("mask", MASKS)?.as_str() {
        "causal" => Ok(Mask::Causal),
        "block" => Ok(Mask::Block),
        "ancestors" => Ok(Mask::Ancestors),
        other => Err(unknown("mask", other, MASKS)),
    }
}

pub(super) fn precision_named(name: Given<String>) -> PyResult<Precision> {
    const PRECISIONS: &str = "'highest' or 'medium'";
    match name.of("precision", PRECISIONS)?.as_str() {
        "highest" => Ok(Precision::Highest),
        "medium" => Ok(Precision::Medium),
        other => Err(unknown("precision", other, PRECISIONS)),
    }
}

pub(super) fn unknown(name: &'static str, got: &str, expected: &str) -> PyErr {
    Error::InvalidArgument {
        name,
        got: got.into(),
        expected: expected.into(),
    }
    .into()
}

struct Call<'a> {
    batch: &'a host::AttentionBatch,
    /// q, k, v, k_cache, v_cache, out.
    arrays: [Pointer; 6],
    heads: (usize, usize, usize),
    params: AttentionParams,
    sinks: Option<&'a [f32]>,
    kernels: HostKernels,
}

impl Call<'_> {
    fn run<E: Element>(self, py: Python<'_>) -> PyResult<()> {
        let (q_heads, kv_heads, dim) = self.heads;
        let (tokens, slots) = (self.batch.tokens(), self.batch.num_slots());
        let [q, k, v, k_cache, v_cache, out] = self.arrays;
        let q = Checked::<E>::new("q", q, tokens, q_heads, dim)?;
        let k = Checked::new("k", k, tokens, kv_heads, dim)?;
        let v = Checked::new("v", v, tokens, kv_heads, dim)?;
        let k_cache = Checked::new("k_cache", k_cache, slots, kv_heads, dim)?;
        let v_cache = Checked::new("v_cache", v_cache, slots, kv_heads, dim)?;
        let out = Checked::new("out", out, tokens, q_heads, dim)?;
        out.alone(&[&q, &k, &v, &k_cache, &v_cache])?;
        k_cache.alone(&[&q, &k, &v, &v_cache])?;
        v_cache.alone(&[&q, &k, &v])?;
        let tensors = AttentionTensors {
            q: q.rows(),
            k: k.rows(),
            v: v.rows(),
            k_cache: k_cache.rows_mut(),
            v_cache: v_cache.rows_mut(),
            out: out.rows_mut(),
            sinks: self.sinks,
        };
        let Self {
            batch, params, kernels, ..
        } = self;
        let work = batch.pairs() * q_heads * dim;
        if work < DETACH_WORK {
            kernels.block_attention(batch, &params, tensors)?;
        } else {
            py.detach(|| kernels.block_attention(batch, &params, tensors))?;
        }
        Ok(())
    }
}

/// `out = silu(gate) * up`; `gate_up` `[rows, 2 * width]` f32 is gate, then up.
#[pyfunction]
#[pyo3(signature = (gate_up, rows, width, out, threads=Given::new(1)),
       text_signature = "(gate_up, rows, width, out, threads=1)")]
pub fn swiglu(
    py: Python<'_>,
    gate_up: Given<Pointer>,
    rows: Given<usize>,
    width: Given<usize>,
    out: Given<Pointer>,
    threads: Given<usize>,
) -> PyResult<()> {
    named!(gate_up, rows, width, out, threads);
    let too_wide = || unknown("width", &width.to_string(), "rows within the address space");
    let gate_up = Checked::<f32>::new("gate_up", gate_up, rows, 1, width.checked_mul(2).ok_or_else(too_wide)?)?;
    let out = Checked::<f32>::new("out", out, rows, 1, width)?;
    out.alone(&[&gate_up])?;
    let (gate_up, out) = (gate_up.rows(), out.rows_mut());
    let kernels = HostKernels::new()?.with_threads(threads);
    let run = || kernels.swiglu(gate_up, out);
    if rows.saturating_mul(width) < DETACH_WORK {
        run()?;
    } else {
        py.detach(run)?;
    }
    Ok(())
}

/// `out = x W^T + bias` of weights as they are stored.
#[pyfunction]
#[pyo3(signature = (x, rows, weight, outputs, inputs, out, dtype, bias=None, threads=Given::new(1)),
       text_signature = "(x, rows, weight, outputs, inputs, out, dtype, bias=None, threads=1)")]
#[allow(clippy::too_many_arguments, reason = "one crossing per product")]
pub(super) fn linear(
    py: Python<'_>,
    x: Given<Pointer>,
    rows: Given<usize>,
    weight: Given<Pointer>,
    outputs: Given<usize>,
    inputs: Given<usize>,
    out: Given<Pointer>,
    dtype: Given<String>,
    bias: Option<Given<Pointer>>,
    threads: Given<usize>,
) -> PyResult<()> {
    named!(x, rows, weight, outputs, inputs, out, bias, threads);
    let call = Linear {
        arrays: [x, weight, out],
        sizes: (rows, outputs, inputs),
        bias,
        kernels: HostKernels::new()?.with_threads(threads),
    };
    match dtype.of("dtype", DTYPES)?.as_str() {
        "float32" => call.run::<f32>(py),
        "bfloat16" => call.run::<Bf16>(py),
        other => Err(unknown("dtype", other, DTYPES)),
    }
}

struct Linear {
    /// x, weight, out.
    arrays: [Pointer; 3],
    /// Rows, outputs, inputs.
    sizes: (usize, usize, usize),
    bias: Option<Pointer>,
    kernels: HostKernels,
}

impl Linear {
    fn run<E: Stored>(self, py: Python<'_>) -> PyResult<()> {
        let ([x, weight, out], (rows, outputs, inputs)) = (self.arrays, self.sizes);
        let x = Checked::<E>::new("x", x, rows, 1, inputs)?;
        let weight = Checked::<E>::new("weight", weight, outputs, 1, inputs)?;
        let out = Checked::<E>::new("out", out, rows, 1, outputs)?;
        let bias = self
            .bias
            .map(|bias| Checked::<E>::new("bias", bias, 1, 1, outputs))
            .transpose()?;
        out.alone(&[&x, &weight])?;
        if let Some(bias) = &bias {
            out.alone(&[bias])?;
        }
        let bias = bias.map(|bias| bias.elements()).transpose()?;
        let (x, weight, out) = (x.rows(), weight.rows(), out.rows_mut());
        let run = || self.kernels.linear(x, weight, bias, out);
        if rows.saturating_mul(inputs).saturating_mul(outputs) < DETACH_WORK {
            run()?;
        } else {
            py.detach(run)?;
        }
        Ok(())
    }
}

/// Whether the host kernels multiply pairs of bfloat16 in one instruction.
#[pyfunction]
pub fn multiplies_bf16() -> PyResult<bool> {
    Ok(Isa::chosen()?.multiplies_bf16())
}

/// The instruction set of the host kernels.
#[pyfunction]
pub fn cpu_isa() -> PyResult<&'static str> {
    Ok(Isa::chosen()?.name())
}

/// Every instruction set this processor can run them with, narrowest first.
#[pyfunction]
pub fn cpu_isas() -> Vec<&'static str> {
    Isa::available().into_iter().map(Isa::name).collect()
}

/// A weight packed for products with few rows.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct PackedWeight {
    pub(super) weight: Arc<host::PackedWeight>,
    isa: Isa,
}

#[pymethods]
impl PackedWeight {
    #[new]
    #[pyo3(signature = (weight, bias=None, precision=Given::new("highest".into())),
           text_signature = "(weight, bias=None, precision='highest')")]
    fn new(weight: &Bound<'_, PyAny>, bias: Option<&Bound<'_, PyAny>>, precision: Given<String>) -> PyResult<Self> {
        let weight = array::<f32, Ix2>("weight", weight, "[outputs, inputs]")?;
        let bias = bias.map(|b| array::<f32, Ix1>("bias", b, "[outputs]")).transpose()?;
        let values = weight.as_slice().map_err(|_| not_contiguous("weight"))?;
        let bias = bias.as_ref().map(|b| contiguous("bias", b)).transpose()?;
        let precision = precision_named(precision)?;
        let weight = host::PackedWeight::new(values, weight.shape()[0], weight.shape()[1], bias, precision)?;
        Ok(Self {
            weight: Arc::new(weight),
            isa: Isa::chosen()?,
        })
    }

    /// Bytes it takes: two per weight where all of them are bfloat16 values, else four.
    #[getter]
    fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    /// `out = x W^T + bias + residual` for `rows` rows of f32.
    #[pyo3(signature = (x, rows, out, residual=None, threads=Given::new(1)),
           text_signature = "($self, x, rows, out, residual=None, threads=1)")]
    fn product(
        &self,
        py: Python<'_>,
        x: Given<Pointer>,
        rows: Given<usize>,
        out: Given<Pointer>,
        residual: Option<Given<Pointer>>,
        threads: Given<usize>,
    ) -> PyResult<()> {
        named!(x, rows, out, residual, threads);
        let weight = &self.weight;
        let x = Checked::<f32>::new("x", x, rows, 1, weight.inputs())?;
        let out = Checked::<f32>::new("out", out, rows, 1, weight.outputs())?;
        let residual = residual
            .map(|residual| Checked::<f32>::new("residual", residual, rows, 1, weight.outputs()))
            .transpose()?;
        out.alone(&[&x])?;
        if let Some(residual) = &residual {
            out.alone(&[residual])?;
        }
        let (x, residual, out) = (x.rows(), residual.map(|r| r.rows()), out.rows_mut());
        let run = || weight.product(self.isa, threads.max(1), x, residual, out);
        if rows * weight.inputs() * weight.outputs() < DETACH_WORK {
            run()?;
        } else {
            py.detach(run)?;
        }
        Ok(())
    }
}
