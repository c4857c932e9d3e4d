//! Whole runs of layers on the host: a block drafted, or its context injected, in one crossing.
//!
//! Arrays arrive as in [`super::host`], whose safety argument covers them.

use std::cell::RefCell;

use numpy::{PyArray1, PyArray3, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use super::arrays::{maybe_size, number, size};
use super::host::{AttentionBatch, Checked, PackedWeight, Pointer, contiguous, mask_named, unknown};
use crate::device::AttentionParams;
use crate::device::host::batch::checked_slots;
use crate::device::host::decoder::{
    Decoder, DecoderInputs, Guess, Head, Injector, LayerShape, LayerWeights, Scratch, candidates,
};
use crate::device::host::{self, HostKernels, Isa, RowsMut};
use crate::error::Error;

thread_local! {
    // Kept between calls: fresh buffers would be page faults in every step.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Takes this thread's buffers, runs, and puts them back.
fn with_scratch<R>(run: impl FnOnce(&mut Scratch) -> R) -> R {
    let mut scratch = SCRATCH.take();
    let result = run(&mut scratch);
    SCRATCH.set(scratch);
    result
}

fn floats(name: &'static str, values: &PyReadonlyArray1<'_, f32>) -> PyResult<Vec<f32>> {
    Ok(contiguous(name, values)?.to_vec())
}

/// `(k, v)` of every layer.
type Caches = Vec<(Pointer, Pointer)>;
/// The same, checked.
type CacheRows<'a> = Vec<(RowsMut<'a, f32>, RowsMut<'a, f32>)>;
/// Tokens and their probabilities.
type Drafts<'py> = (Bound<'py, PyArray3<i64>>, Bound<'py, PyArray3<f32>>);

fn caches_mut<'a>(caches: &Caches, slots: usize, shapes: &[(usize, usize)]) -> Result<CacheRows<'a>, Error> {
    if caches.len() != shapes.len() {
        return Err(Error::Length {
            name: "caches",
            got: caches.len(),
            expected: shapes.len(),
        });
    }
    let layer = |(&(k, v), &(heads, dim)): (&(Pointer, Pointer), &(usize, usize))| {
        let k = Checked::new("k_cache", k, slots, heads, dim)?;
        let v = Checked::new("v_cache", v, slots, heads, dim)?;
        v.alone(&[&k])?;
        Ok((k.rows_mut(), v.rows_mut()))
    };
    caches.iter().zip(shapes).map(layer).collect()
}

fn kernels(threads: usize) -> PyResult<HostKernels> {
    if threads == 0 {
        return Err(unknown("threads", "0", "at least 1"));
    }
    Ok(HostKernels::new()?.with_threads(threads))
}

/// Decoder layers and a head whose passes run in one call on the host, in f32.
#[pyclass(module = "dflash_rs._core")]
pub struct HostDecoder {
    decoder: Decoder,
    head: Head,
}

#[pymethods]
impl HostDecoder {
    #[new]
    fn new(norm: PyReadonlyArray1<'_, f32>, head: &PackedWeight, eps: f32) -> PyResult<Self> {
        let head = Head {
            norm: floats("norm", &norm)?,
            weight: head.weight.clone(),
            eps,
        };
        head.check()?;
        Ok(Self {
            decoder: Decoder::new(head.norm.len(), eps)?,
            head,
        })
    }

    /// Appends a layer.
    #[pyo3(signature = (*, attention_norm, qkv, out, mlp_norm, gate_up, down, heads, kv_heads, head_dim, scale, mask, window=None,
                        query_norm=None, key_norm=None))]
    #[allow(clippy::too_many_arguments, reason = "the weights of a layer, by keyword")]
    fn add_layer(
        &mut self,
        attention_norm: PyReadonlyArray1<'_, f32>,
        qkv: &PackedWeight,
        out: &PackedWeight,
        mlp_norm: PyReadonlyArray1<'_, f32>,
        gate_up: &PackedWeight,
        down: &PackedWeight,
        #[pyo3(from_py_with = size)] heads: usize,
        #[pyo3(from_py_with = size)] kv_heads: usize,
        #[pyo3(from_py_with = size)] head_dim: usize,
        #[pyo3(from_py_with = number)] scale: f32,
        mask: &str,
        #[pyo3(from_py_with = maybe_size)] window: Option<usize>,
        query_norm: Option<PyReadonlyArray1<'_, f32>>,
        key_norm: Option<PyReadonlyArray1<'_, f32>>,
    ) -> PyResult<()> {
        let head_norms = match (query_norm, key_norm) {
            (Some(queries), Some(keys)) => Some((floats("query_norm", &queries)?, floats("key_norm", &keys)?)),
            (None, None) => None,
            _ => return Err(unknown("key_norm", "one of query_norm and key_norm", "both or neither")),
        };
        let weights = LayerWeights {
            attention_norm: floats("attention_norm", &attention_norm)?,
            qkv: qkv.weight.clone(),
            head_norms,
            out: out.weight.clone(),
            mlp_norm: floats("mlp_norm", &mlp_norm)?,
            gate_up: gate_up.weight.clone(),
            down: down.weight.clone(),
        };
        let attention = AttentionParams {
            scale,
            mask: mask_named(mask)?,
            window,
            softcap: None,
        };
        let shape = LayerShape {
            heads,
            kv_heads,
            head_dim,
            attention,
        };
        Ok(self.decoder.push(weights, shape)?)
    }

    /// The `k` likeliest tokens `[n, block - 1, k]` and their probabilities: rows 1.. of every block of `block` tokens. Where a row has
    /// fewer, the rest has probability 0.
    #[pyo3(signature = (batch, token_ids, positions, embedding, rotary, caches, block, never=None, k=1, threads=1))]
    #[allow(clippy::too_many_arguments, reason = "one crossing per pass")]
    fn draft<'py>(
        &self,
        py: Python<'py>,
        batch: &Bound<'_, AttentionBatch>,
        token_ids: PyReadonlyArray1<'_, i64>,
        positions: PyReadonlyArray1<'_, i64>,
        embedding: (Pointer, usize),
        rotary: (Pointer, usize),
        caches: Caches,
        #[pyo3(from_py_with = size)] block: usize,
        #[pyo3(from_py_with = maybe_size)] never: Option<usize>,
        #[pyo3(from_py_with = size)] k: usize,
        #[pyo3(from_py_with = size)] threads: usize,
    ) -> PyResult<Drafts<'py>> {
        let batch = &batch.get().0;
        if block < 2 || !batch.tokens().is_multiple_of(block) {
            let expected = format!("at least 2, dividing the {} tokens", batch.tokens());
            return Err(unknown("block", &block.to_string(), &expected));
        }
        let vocabulary = self.head.weight.outputs();
        if k == 0 || k > vocabulary {
            return Err(unknown("k", &k.to_string(), &format!("1..{vocabulary}")));
        }
        let kernels = kernels(threads)?;
        let inputs = self.inputs(batch, &token_ids, &positions, embedding, rotary, &caches)?;
        let guesses =
            py.detach(|| with_scratch(|scratch| self.guesses(kernels, batch, inputs, (block, never, k), scratch)))?;
        let shape = [batch.tokens() / block, block - 1, k];
        let tokens: Vec<i64> = guesses.iter().map(|guess| guess.token as i64).collect();
        let probabilities: Vec<f32> = guesses.iter().map(|guess| guess.probability).collect();
        let tokens = PyArray1::from_vec(py, tokens).reshape(shape)?;
        Ok((tokens, PyArray1::from_vec(py, probabilities).reshape(shape)?))
    }
}

impl HostDecoder {
    fn inputs<'a>(
        &self,
        batch: &host::AttentionBatch,
        token_ids: &'a PyReadonlyArray1<'_, i64>,
        positions: &'a PyReadonlyArray1<'_, i64>,
        embedding: (Pointer, usize),
        rotary: (Pointer, usize),
        caches: &Caches,
    ) -> PyResult<DecoderInputs<'a>> {
        let shapes = self.decoder.cache_shapes();
        let head_dim = shapes.first().map_or(0, |&(_, dim)| dim);
        let vocabulary = Checked::new("embedding", embedding.0, embedding.1, 1, self.decoder.hidden())?;
        let angles = Checked::new("rotary", rotary.0, rotary.1, 2, head_dim)?;
        Ok(DecoderInputs {
            tokens: contiguous("token_ids", token_ids)?,
            positions: contiguous("positions", positions)?,
            embedding: vocabulary.rows(),
            rotary: angles.rows(),
            caches: caches_mut(caches, batch.num_slots(), &shapes)?,
        })
    }

    fn guesses(
        &self,
        kernels: HostKernels,
        batch: &host::AttentionBatch,
        inputs: DecoderInputs<'_>,
        (block, never, k): (usize, Option<usize>, usize),
        scratch: &mut Scratch,
    ) -> Result<Vec<Guess>, Error> {
        let tokens = batch.tokens();
        self.decoder.run(kernels, batch, inputs, scratch)?;
        let rows: Vec<i64> = (0..tokens as i64).filter(|row| row % block as i64 != 0).collect();
        let mut logits = self.head.logits(kernels, &rows, tokens, scratch)?;
        let isa = Isa::chosen()?;
        let mut guesses = Vec::with_capacity(rows.len() * k);
        for (row, logits) in logits.chunks_exact_mut(self.head.weight.outputs()).enumerate() {
            candidates(isa, logits, never, k, &mut guesses);
            let none = Guess {
                token: 0,
                probability: 0.0,
            };
            guesses.resize((row + 1) * k, none);
        }
        Ok(guesses)
    }
}

/// Writes the context of committed tokens into the caches of a drafter's layers, in one call.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct HostInjector(Injector);

#[pymethods]
impl HostInjector {
    #[new]
    #[pyo3(signature = (*, fc, norm, key_values, key_norms, kv_heads, head_dim, eps))]
    fn new(
        fc: &PackedWeight,
        norm: PyReadonlyArray1<'_, f32>,
        key_values: &PackedWeight,
        key_norms: Vec<Option<PyReadonlyArray1<'_, f32>>>,
        #[pyo3(from_py_with = size)] kv_heads: usize,
        #[pyo3(from_py_with = size)] head_dim: usize,
        #[pyo3(from_py_with = number)] eps: f32,
    ) -> PyResult<Self> {
        let key_norms = key_norms
            .iter()
            .map(|norm| norm.as_ref().map(|norm| floats("key_norms", norm)).transpose());
        let injector = Injector {
            fc: fc.weight.clone(),
            norm: floats("norm", &norm)?,
            key_values: key_values.weight.clone(),
            key_norms: key_norms.collect::<PyResult<_>>()?,
            kv_heads,
            head_dim,
            eps,
        };
        injector.check()?;
        Ok(Self(injector))
    }

    /// Token `i` is row `rows[i]` of `features` (`feature_rows` of them), at `positions[i]`; it goes to `slots[i]`.
    #[pyo3(signature = (features, feature_rows, rows, positions, slots, rotary, caches, num_slots, threads=1))]
    #[allow(clippy::too_many_arguments, reason = "one crossing per step")]
    fn inject(
        &self,
        py: Python<'_>,
        features: Pointer,
        #[pyo3(from_py_with = size)] feature_rows: usize,
        rows: PyReadonlyArray1<'_, i64>,
        positions: PyReadonlyArray1<'_, i64>,
        slots: PyReadonlyArray1<'_, i64>,
        rotary: (Pointer, usize),
        caches: Caches,
        #[pyo3(from_py_with = size)] num_slots: usize,
        #[pyo3(from_py_with = size)] threads: usize,
    ) -> PyResult<()> {
        let injector = &self.0;
        let kernels = kernels(threads)?;
        let features = Checked::new("features", features, feature_rows, 1, injector.fc.inputs())?.rows();
        let rotary = Checked::new("rotary", rotary.0, rotary.1, 2, injector.head_dim)?.rows();
        let shapes = vec![(injector.kv_heads, injector.head_dim); injector.key_norms.len()];
        let caches = caches_mut(&caches, num_slots, &shapes)?;
        let (rows, positions) = (contiguous("rows", &rows)?, contiguous("positions", &positions)?);
        let slots = contiguous("slots", &slots)?;
        let slots = checked_slots(slots, slots.len(), num_slots)?;
        py.detach(|| {
            with_scratch(|scratch| injector.run(kernels, features, rows, positions, &slots, rotary, caches, scratch))
        })?;
        Ok(())
    }
}
