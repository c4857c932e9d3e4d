//! Layers of experts on torch tensors; what keeps raw addresses safe is said in [`super::host`].

use super::arrays::{Flag, Given, array, named, shaped};
use super::host::{Checked, Pointer, contiguous, precision_named, unknown};
use crate::device::host::{
    self, Activation, Between, Bf16, Choice, Element, ExpertWeights, HostKernels, Precision, Rows, SharedExpert,
};
use crate::error::Error;
use numpy::ndarray::{Ix1, Ix2};
use numpy::{PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

/// Multiply-adds below which the interpreter lock is kept: handing it over costs more.
const DETACH_WORK: usize = 1 << 20;

/// The experts of one layer, packed.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct Experts(host::Experts);

/// Where the weights of all experts are, and how many there are of what size.
struct Places {
    gate_up: Pointer,
    down: Pointer,
    sizes: (usize, usize, usize),
    between: Between,
}

impl Places {
    fn pack<E: Element>(
        &self,
        py: Python<'_>,
        biases: Option<[&[f32]; 2]>,
        precision: Precision,
        threads: usize,
    ) -> PyResult<host::Experts> {
        let (count, hidden, inner) = self.sizes;
        let rows = self.rows()?;
        let gate_up = Checked::<E>::new("gate_up", self.gate_up, count, rows, hidden)?;
        let down = Checked::<E>::new("down", self.down, count, hidden, inner)?;
        let weights = ExpertWeights {
            gate_up: gate_up.elements()?,
            down: down.elements()?,
            biases,
        };
        Ok(py.detach(|| host::Experts::new(weights, self.sizes, self.between, precision, threads.max(1)))?)
    }

    /// Rows of an expert's first weight.
    fn rows(&self) -> PyResult<usize> {
        let inner = self.sizes.2;
        let rows = inner.checked_mul(self.between.halves());
        rows.ok_or_else(|| unknown("inner", &inner.to_string(), "rows within the address space"))
    }
}

/// What stands between the products, as Python names it.
fn between(activation: &str, gated: bool, clamped: Option<(f32, f32)>) -> PyResult<Between> {
    let function = match activation {
        "silu" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        "relu2" => Activation::ReluSquared,
        other => return Err(unknown("activation", other, ACTIVATIONS)),
    };
    match clamped {
        None if gated => Ok(Between::Gated(function)),
        None => Ok(Between::Plain(function)),
        Some((alpha, limit)) if gated && function == Activation::Silu => Ok(Between::Clamped { alpha, limit }),
        Some(_) => {
            let got = format!("numbers with activation {activation:?}, gated {gated}");
            Err(unknown("clamped", &got, "None, or 'silu' with a gate"))
        }
    }
}

const ACTIVATIONS: &str = "'silu', 'gelu', 'gelu_tanh' or 'relu2'";

fn matrix<'a>(name: &'static str, matrix: &'a PyReadonlyArray2<'_, f32>) -> PyResult<&'a [f32]> {
    matrix.as_slice().map_err(|_| super::host::not_contiguous(name).into())
}

#[pymethods]
impl Experts {
    #[new]
    #[pyo3(signature = (gate_up, down, count, hidden, inner, dtype, precision=Given::new("highest".into()), threads=Given::new(1), *,
                        activation=Given::new("silu".into()), gated=Flag::TRUE, clamped=None, gate_up_bias=None, down_bias=None, router=None, top_k=Given::new(0), normalised=Flag::TRUE, shared_gate_up=None, shared_down=None, shared_gate=None),
           text_signature = "(gate_up, down, count, hidden, inner, dtype, precision='highest', threads=1, *, activation='silu', \
                             gated=True, clamped=None, gate_up_bias=None, down_bias=None, router=None, top_k=0, normalised=True, \
                             shared_gate_up=None, shared_down=None, shared_gate=None)")]
    #[allow(clippy::too_many_arguments, reason = "the weights of a layer")]
    fn new(
        py: Python<'_>,
        gate_up: Given<Pointer>,
        down: Given<Pointer>,
        count: Given<usize>,
        hidden: Given<usize>,
        inner: Given<usize>,
        dtype: Given<String>,
        precision: Given<String>,
        threads: Given<usize>,
        activation: Given<String>,
        gated: Flag,
        clamped: Option<Given<(f32, f32)>>,
        gate_up_bias: Option<&Bound<'_, PyAny>>,
        down_bias: Option<&Bound<'_, PyAny>>,
        router: Option<&Bound<'_, PyAny>>,
        top_k: Given<usize>,
        normalised: Flag,
        shared_gate_up: Option<&Bound<'_, PyAny>>,
        shared_down: Option<&Bound<'_, PyAny>>,
        shared_gate: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        named!(gate_up, down, count, hidden, inner, threads, gated, top_k, normalised);
        const DTYPES: &str = "'float32' or 'bfloat16'";
        let precision = precision_named(precision)?;
        let clamped = clamped.map(|c| c.of("clamped", "(alpha, limit)")).transpose()?;
        let places = Places {
            gate_up,
            down,
            sizes: (count, hidden, inner),
            between: between(&activation.of("activation", ACTIVATIONS)?, gated, clamped)?,
        };
        let gate_up_bias = gate_up_bias
            .map(|b| array::<f32, Ix2>("gate_up_bias", b, "[count, rows of gate_up]"))
            .transpose()?;
        let down_bias = down_bias
            .map(|b| array::<f32, Ix2>("down_bias", b, "[count, hidden]"))
            .transpose()?;
        let biases = match (&gate_up_bias, &down_bias) {
            (Some(up), Some(down)) => {
                shaped(
                    "gate_up_bias",
                    up.shape(),
                    &[count, places.rows()?],
                    "(count, rows of gate_up)",
                )?;
                shaped("down_bias", down.shape(), &[count, hidden], "(count, hidden)")?;
                Some([matrix("gate_up_bias", up)?, matrix("down_bias", down)?])
            }
            (None, None) => None,
            _ => {
                let got = "one of gate_up_bias and down_bias";
                return Err(unknown("down_bias", got, "both or neither"));
            }
        };
        let router = router
            .map(|r| array::<f32, Ix2>("router", r, "[count, hidden]"))
            .transpose()?;
        let shared_gate_up = shared_gate_up
            .map(|s| array::<f32, Ix2>("shared_gate_up", s, "[2 * shared, hidden]"))
            .transpose()?;
        let shared_down = shared_down
            .map(|s| array::<f32, Ix2>("shared_down", s, "[hidden, shared]"))
            .transpose()?;
        let shared_gate = shared_gate
            .map(|s| array::<f32, Ix1>("shared_gate", s, "[hidden]"))
            .transpose()?;
        let mut experts = match dtype.of("dtype", DTYPES)?.as_str() {
            "float32" => places.pack::<f32>(py, biases, precision, threads)?,
            "bfloat16" => places.pack::<Bf16>(py, biases, precision, threads)?,
            other => return Err(unknown("dtype", other, DTYPES)),
        };
        let shared = match (&shared_gate_up, &shared_down, &shared_gate) {
            (Some(gate_up), Some(down), Some(gate)) if router.is_some() => {
                let inner = down.shape()[1];
                shaped("shared_down", down.shape(), &[hidden, inner], "(hidden, shared)")?;
                shaped(
                    "shared_gate_up",
                    gate_up.shape(),
                    &[places.between.halves() * inner, hidden],
                    "(2 * shared, hidden), or (shared, hidden) without gates",
                )?;
                Some(SharedExpert {
                    weights: ExpertWeights {
                        gate_up: matrix("shared_gate_up", gate_up)?,
                        down: matrix("shared_down", down)?,
                        biases: None,
                    },
                    inner,
                    gate: contiguous("shared_gate", gate)?,
                })
            }
            (None, None, None) => None,
            _ => {
                let got = "some of router, shared_gate_up, shared_down and shared_gate";
                return Err(unknown("shared_gate", got, "a router, and all of these or none"));
            }
        };
        if let Some(router) = &router {
            shaped("router", router.shape(), &[count, hidden], "(count, hidden)")?;
            experts = experts.with_router(matrix("router", router)?, top_k, normalised, shared)?;
        }
        Ok(Self(experts))
    }

    /// Bytes they take: two per weight of an expert whose weights are all bfloat16 values, or in medium precision, else four.
    #[getter]
    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    /// `rows` rows of f32 through their experts.
    #[pyo3(signature = (x, rows, out, indices=None, weights=None, threads=Given::new(1)),
           text_signature = "($self, x, rows, out, indices=None, weights=None, threads=1)")]
    #[allow(clippy::too_many_arguments, reason = "one crossing per layer")]
    fn run(
        &self,
        py: Python<'_>,
        x: Given<Pointer>,
        rows: Given<usize>,
        out: Given<Pointer>,
        indices: Option<&Bound<'_, PyAny>>,
        weights: Option<&Bound<'_, PyAny>>,
        threads: Given<usize>,
    ) -> PyResult<()> {
        named!(x, rows, out, threads);
        let experts = &self.0;
        let indices = indices
            .map(|i| array::<i64, Ix2>("indices", i, "[rows, top_k]"))
            .transpose()?;
        let weights = weights
            .map(|w| array::<f32, Ix2>("weights", w, "[rows, top_k]"))
            .transpose()?;
        let x = Checked::<f32>::new("x", x, rows, 1, experts.hidden())?;
        let out = Checked::<f32>::new("out", out, rows, 1, experts.hidden())?;
        out.alone(&[&x])?;
        let (x, out) = (x.rows(), out.rows_mut());
        let kernels = HostKernels::new()?.with_threads(threads);
        let (given, visits) = match (&indices, &weights) {
            (Some(indices), Some(weights)) => {
                let top_k = indices.shape()[1];
                shaped("indices", indices.shape(), &[rows, top_k], "(rows, top_k)")?;
                shaped("weights", weights.shape(), &[rows, top_k], "(rows, top_k)")?;
                let indices = indices.as_slice().map_err(|_| super::host::not_contiguous("indices"))?;
                let choice = Choice::new(experts.count(), top_k, indices, matrix("weights", weights)?)?;
                (Some(choice), rows.saturating_mul(top_k))
            }
            (None, None) => (None, rows.saturating_mul(experts.top_k())),
            _ => return Err(unknown("weights", "one of indices and weights", "both or neither")),
        };
        let run = || -> Result<(), Error> {
            let chosen = |x: Rows<'_, f32>| given.map_or_else(|| kernels.choose(experts, x), Ok);
            kernels.experts(experts, x, &chosen(x)?, out)
        };
        if experts.work(rows, visits) < DETACH_WORK {
            run()?;
        } else {
            py.detach(run)?;
        }
        Ok(())
    }
}
