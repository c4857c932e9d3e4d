//! Recurrent layers on torch tensors; what keeps raw addresses safe is said in [`super::host`], and for those of a GPU in [`super::cuda`].

use super::cuda::{self, Passed};
use super::host::{Checked, Pointer, contiguous, unknown};
use crate::device::cuda::launch;
use crate::device::host::{self, Bf16, DeltaTensors, Element, HostKernels, Span};
use crate::py::arrays::{Given, array, array_mut, named};
use numpy::PyUntypedArrayMethods;
use numpy::ndarray::{Ix1, Ix2};
use pyo3::prelude::*;

/// Multiply-adds below which the interpreter lock is kept: handing it over costs more.
const DETACH_WORK: usize = 1 << 20;

/// The weights of a layer with the gated delta rule.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct DeltaRule(host::DeltaRule);

/// Addresses of a call's arrays.
struct Places {
    memory: Pointer,
    window: Pointer,
    kept: [Pointer; 2],
    fed: [Pointer; 2],
    out: Pointer,
    ends: [Pointer; 2],
}

#[pymethods]
impl DeltaRule {
    #[new]
    #[pyo3(signature = (weight, decay, dt_bias, key_heads, key_dim, value_dim, beta_scale=Given::new(1.0)),
           text_signature = "(weight, decay, dt_bias, key_heads, key_dim, value_dim, beta_scale=1.0)")]
    fn new(
        weight: &Bound<'_, PyAny>,
        decay: &Bound<'_, PyAny>,
        dt_bias: &Bound<'_, PyAny>,
        key_heads: Given<usize>,
        key_dim: Given<usize>,
        value_dim: Given<usize>,
        beta_scale: Given<f32>,
    ) -> PyResult<Self> {
        named!(key_heads, key_dim, value_dim, beta_scale);
        let weight = array::<f32, Ix2>("weight", weight, "[taps, channels]")?;
        let decay = array::<f32, Ix1>("decay", decay, "[heads]")?;
        let dt_bias = array::<f32, Ix1>("dt_bias", dt_bias, "[heads]")?;
        let shape = weight.shape().to_vec();
        let values = weight.as_slice().map_err(|_| super::host::not_contiguous("weight"))?;
        let rule = host::DeltaRule::new(
            values,
            contiguous("decay", &decay)?,
            contiguous("dt_bias", &dt_bias)?,
            key_heads,
            key_dim,
            value_dim,
            beta_scale,
        )?;
        if rule.channels() != shape[1] {
            let expected = format!("[taps, {}]", rule.channels());
            return Err(unknown("weight", &format!("{shape:?}"), &expected));
        }
        Ok(Self(rule))
    }

    /// One layer of a pass.
    #[pyo3(signature = (pending, rows, starts, fresh, slots, block, memory, window, kept, kept_gates, mixed, gates, out, end_memory,
                        end_window, dtype, threads=Given::new(1)),
           text_signature = "($self, pending, rows, starts, fresh, slots, block, memory, window, kept, kept_gates, mixed, gates, out, end_memory, \
                         end_window, dtype, threads=1)")]
    #[allow(clippy::too_many_arguments, reason = "one crossing per layer")]
    fn run(
        &self,
        py: Python<'_>,
        pending: &Bound<'_, PyAny>,
        rows: &Bound<'_, PyAny>,
        starts: &Bound<'_, PyAny>,
        fresh: &Bound<'_, PyAny>,
        slots: Given<usize>,
        block: Given<usize>,
        memory: Given<Pointer>,
        window: Given<Pointer>,
        kept: Given<Pointer>,
        kept_gates: Given<Pointer>,
        mixed: Given<Pointer>,
        gates: Given<Pointer>,
        out: Given<Pointer>,
        end_memory: Given<Pointer>,
        end_window: Given<Pointer>,
        dtype: Given<String>,
        threads: Given<usize>,
    ) -> PyResult<()> {
        named!(
            slots, block, memory, window, kept, kept_gates, mixed, gates, out, end_memory, end_window, threads
        );
        let rows = array::<i32, Ix1>("rows", rows, "[R]")?;
        let starts = array::<i32, Ix1>("starts", starts, "[R + 1]")?;
        let fresh = array::<i32, Ix1>("fresh", fresh, "[R]")?;
        let spans = spans(
            contiguous("rows", &rows)?,
            contiguous("starts", &starts)?,
            contiguous("fresh", &fresh)?,
        )?;
        let tokens = spans.last().map_or(0, |span| span.end);
        let mut pending = array_mut::<i32>("pending", pending)?;
        let pending = pending
            .as_slice_mut()
            .map_err(|_| super::host::not_contiguous("pending"))?;
        let places = Places {
            memory,
            window,
            kept: [kept, kept_gates],
            fed: [mixed, gates],
            out,
            ends: [end_memory, end_window],
        };
        let kernels = HostKernels::new()?.with_threads(threads);
        let sizes = (slots, block, tokens);
        const DTYPES: &str = "'float32' or 'bfloat16'";
        match dtype.of("dtype", DTYPES)?.as_str() {
            "float32" => self.call::<f32>(py, &kernels, &places, pending, &spans, sizes),
            "bfloat16" => self.call::<Bf16>(py, &kernels, &places, pending, &spans, sizes),
            other => Err(unknown("dtype", other, DTYPES)),
        }
    }
}

fn spans(rows: &[i32], starts: &[i32], fresh: &[i32]) -> PyResult<Vec<Span>> {
    if starts.len() != rows.len() + 1 || fresh.len() != rows.len() {
        let got = format!("{} and {} entries", starts.len(), fresh.len());
        let expected = format!("{} and {} (rows)", rows.len() + 1, rows.len());
        return Err(unknown("starts, fresh", &got, &expected));
    }
    let number = |x: i32| usize::try_from(x).map_err(|_| unknown("rows, starts", &x.to_string(), "at least 0"));
    (0..rows.len())
        .map(|r| {
            Ok(Span {
                row: number(rows[r])?,
                start: number(starts[r])?,
                end: number(starts[r + 1])?,
                fresh: fresh[r] != 0,
            })
        })
        .collect()
}

impl DeltaRule {
    fn call<E: Element>(
        &self,
        py: Python<'_>,
        kernels: &HostKernels,
        places: &Places,
        pending: &mut [i32],
        spans: &[Span],
        (slots, block, tokens): (usize, usize, usize),
    ) -> PyResult<()> {
        let rule = &self.0;
        let (heads, window, channels) = (rule.value_heads(), rule.window(), rule.channels());
        let rows = pending.len();
        let long = spans
            .iter()
            .filter(|span| span.end - span.start.min(span.end) > block)
            .count();
        let memory = Checked::<f32>::new("memory", places.memory, slots, heads, rule.state())?;
        let end_memory = Checked::<f32>::new("end_memory", places.ends[0], long, heads, rule.state())?;
        let inputs = Checked::<E>::new("window", places.window, slots, window, channels)?;
        let kept = Checked::<E>::new("kept", places.kept[0], rows, block, channels)?;
        let kept_gates = Checked::<E>::new("kept_gates", places.kept[1], rows, block, 2 * heads)?;
        let mixed = Checked::<E>::new("mixed", places.fed[0], tokens, 1, channels)?;
        let gates = Checked::<E>::new("gates", places.fed[1], tokens, 1, 2 * heads)?;
        let out = Checked::<E>::new("out", places.out, tokens, heads, rule.value_dim())?;
        let end_window = Checked::<E>::new("end_window", places.ends[1], long, window, channels)?;
        memory.alone(&[&end_memory])?;
        out.alone(&[&inputs, &kept, &kept_gates, &mixed, &gates, &end_window])?;
        inputs.alone(&[&kept, &kept_gates, &mixed, &gates, &end_window])?;
        end_window.alone(&[&kept, &kept_gates, &mixed, &gates])?;
        kept.alone(&[&kept_gates, &mixed, &gates])?;
        kept_gates.alone(&[&mixed, &gates])?;
        let tensors = DeltaTensors {
            memory: memory.rows_mut(),
            window: inputs.rows_mut(),
            kept: kept.rows_mut(),
            kept_gates: kept_gates.rows_mut(),
            pending,
            mixed: mixed.rows(),
            gates: gates.rows(),
            out: out.rows_mut(),
            end_memory: end_memory.rows_mut(),
            end_window: end_window.rows_mut(),
        };
        if tokens * heads * rule.state() < DETACH_WORK {
            kernels.delta_rule(rule, tensors, spans)?;
        } else {
            py.detach(|| kernels.delta_rule(rule, tensors, spans))?;
        }
        Ok(())
    }
}

/// One layer of a pass of the gated delta rule, for states that stand at the committed length.
#[pyfunction]
#[pyo3(signature = (*, mixed, gates, weight, decay, dt_bias, query_starts, context_lens, slots, memory, window, kept, kept_gates, stands, out,
                    made, scales, pending, longest, beta_scale, stream, into=None, ends=None, end_memory=None, end_window=None))]
#[allow(clippy::too_many_arguments, reason = "the kernel's arguments, by keyword")]
pub(super) fn cuda_delta_rule(
    mixed: Passed,
    gates: Passed,
    weight: Passed,
    decay: Passed,
    dt_bias: Passed,
    query_starts: Passed,
    context_lens: Passed,
    slots: Passed,
    memory: Passed,
    window: Passed,
    kept: Passed,
    kept_gates: Passed,
    stands: Passed,
    out: Passed,
    made: Passed,
    scales: Passed,
    pending: Passed,
    longest: Given<usize>,
    beta_scale: Given<f32>,
    stream: Given<usize>,
    into: Option<Passed>,
    ends: Option<Passed>,
    end_memory: Option<Passed>,
    end_window: Option<Passed>,
) -> PyResult<()> {
    named!(
        mixed,
        gates,
        weight,
        decay,
        dt_bias,
        query_starts,
        context_lens,
        slots,
        memory,
        window,
        kept,
        kept_gates,
        stands,
        out,
        made,
        scales,
        pending,
        longest,
        beta_scale,
        stream,
        into,
        ends,
        end_memory,
        end_window
    );
    let call = launch::DeltaRule {
        mixed,
        gates,
        weight,
        decay,
        dt_bias,
        query_starts,
        context_lens,
        slots,
        memory,
        window,
        kept,
        kept_gates,
        stands,
        out,
        made,
        scales,
        pending,
        longest,
        beta_scale,
        into,
        ends,
        end_memory,
        end_window,
    };
    cuda::launch(call.check(), stream)
}
