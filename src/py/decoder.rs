//! Whole runs of layers on the host: a block drafted, or its context injected, in one crossing.
//!
//! Arrays arrive as in [`super::host`], whose safety argument covers them.

use std::cell::RefCell;

use numpy::ndarray::Ix1;
use numpy::{PyArray1, PyArray3, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use super::arrays::{Given, Kind, Object, array, named};
use super::host::{AttentionBatch, Checked, PackedWeight, Pointer, contiguous, mask_named, unknown};
use crate::device::AttentionParams;
use crate::device::host::batch::checked_slots;
use crate::device::host::decoder::{
    BlockConv, Codebooks, Decoder, DecoderInputs, Guess, Head, Injector, LayerShape, LayerWeights, Outputs, Scratch,
    Selector, Taps, candidates,
};
use crate::device::host::{self, HostKernels, Isa, Layout, RowsMut};
use crate::error::Error;

/// Far beyond every drafter's.
const MOST_BLOCK: usize = 1 << 16;

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

fn floats(name: &'static str, values: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    Ok(array::<f32, Ix1>(name, values, "[n]")?.as_slice()?.to_vec())
}

fn integers<'py>(name: &'static str, values: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArray1<'py, i64>> {
    array(name, values, "[n]")
}

/// `(k, v)` of every layer.
type Caches = Vec<(Pointer, Pointer)>;
/// An array and its number of rows.
type Table = (Pointer, usize);
/// The same, checked.
type CacheRows<'a> = Vec<(RowsMut<'a, f32>, RowsMut<'a, f32>)>;
/// A selector and what it reads.
type Path<'a> = (&'a Selector, Codebooks<'a>);
/// Tokens and their probabilities.
type Drafts<'py> = (Bound<'py, PyArray3<i64>>, Bound<'py, PyArray3<f32>>);

impl Kind for Caches {
    fn expected() -> String {
        format!("a list of pairs for K and V, each {}", Pointer::expected())
    }
}

impl Kind for (Table, Table) {
    fn expected() -> String {
        format!("a pair, each {}", Table::expected())
    }
}

impl Kind for Table {
    fn expected() -> String {
        format!("{}, and the number of rows", Pointer::expected())
    }
}

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

/// The two convolutions around a sublayer of a DFlash 2.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct HostConv(BlockConv);

impl Kind for HostConv {
    fn expected() -> String {
        "a HostConv".into()
    }
}

#[pymethods]
impl HostConv {
    #[new]
    fn new(base: &Bound<'_, PyAny>, deltas: Object<'_, PackedWeight>, taps: Given<usize>) -> PyResult<Self> {
        named!(deltas, taps);
        Ok(Self(BlockConv {
            base: floats("base", base)?,
            deltas: deltas.get().weight.clone(),
            taps,
        }))
    }
}

/// What chooses the drafts of a DFlash 2.
#[pyclass(frozen, module = "dflash_rs._core")]
pub struct HostSelector(Selector);

impl Kind for HostSelector {
    fn expected() -> String {
        "a HostSelector".into()
    }
}

#[pymethods]
impl HostSelector {
    #[new]
    #[pyo3(signature = (projection, top_k, names=None))]
    fn new(
        projection: Object<'_, PackedWeight>,
        top_k: Given<usize>,
        names: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        named!(projection, top_k);
        let names = names.map(|names| integers("names", names)).transpose()?;
        let names = names.map(|names| {
            let names = contiguous("names", &names)?.iter();
            // A negative one is beyond every vocabulary.
            Ok::<_, PyErr>(
                names
                    .map(|&token| usize::try_from(token).unwrap_or(usize::MAX))
                    .collect(),
            )
        });
        Ok(Self(Selector {
            projection: projection.get().weight.clone(),
            top_k,
            names: names.transpose()?,
        }))
    }
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
    fn new(norm: &Bound<'_, PyAny>, head: Object<'_, PackedWeight>, eps: Given<f32>) -> PyResult<Self> {
        named!(head, eps);
        let head = Head {
            norm: floats("norm", norm)?,
            weight: head.get().weight.clone(),
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
                        query_norm=None, key_norm=None, attention_conv=None, mlp_conv=None))]
    #[allow(clippy::too_many_arguments, reason = "the weights of a layer, by keyword")]
    fn add_layer(
        &mut self,
        attention_norm: &Bound<'_, PyAny>,
        qkv: Object<'_, PackedWeight>,
        out: Object<'_, PackedWeight>,
        mlp_norm: &Bound<'_, PyAny>,
        gate_up: Object<'_, PackedWeight>,
        down: Object<'_, PackedWeight>,
        heads: Given<usize>,
        kv_heads: Given<usize>,
        head_dim: Given<usize>,
        scale: Given<f32>,
        mask: Given<String>,
        window: Option<Given<usize>>,
        query_norm: Option<&Bound<'_, PyAny>>,
        key_norm: Option<&Bound<'_, PyAny>>,
        attention_conv: Option<Object<'_, HostConv>>,
        mlp_conv: Option<Object<'_, HostConv>>,
    ) -> PyResult<()> {
        named!(
            qkv,
            out,
            gate_up,
            down,
            heads,
            kv_heads,
            head_dim,
            scale,
            window,
            attention_conv,
            mlp_conv
        );
        let convs = match (attention_conv, mlp_conv) {
            (Some(attention), Some(mlp)) => Some((attention.get().0.clone(), mlp.get().0.clone())),
            (None, None) => None,
            _ => {
                return Err(unknown(
                    "mlp_conv",
                    "one of attention_conv and mlp_conv",
                    "both or neither",
                ));
            }
        };
        let head_norms = match (query_norm, key_norm) {
            (Some(queries), Some(keys)) => Some((floats("query_norm", queries)?, floats("key_norm", keys)?)),
            (None, None) => None,
            _ => return Err(unknown("key_norm", "one of query_norm and key_norm", "both or neither")),
        };
        let weights = LayerWeights {
            attention_norm: floats("attention_norm", attention_norm)?,
            qkv: qkv.get().weight.clone(),
            head_norms,
            out: out.get().weight.clone(),
            mlp_norm: floats("mlp_norm", mlp_norm)?,
            gate_up: gate_up.get().weight.clone(),
            down: down.get().weight.clone(),
            convs,
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

    /// A pass of the model: `logits` `[logit_rows.len(), V]` and, of the layers `taps`, `features` `[T, taps.len() * hidden]`.
    #[pyo3(signature = (batch, token_ids, positions, embedding, rotary, caches, logit_rows, logits, taps, features, threads=Given::new(1)),
           text_signature = "($self, batch, token_ids, positions, embedding, rotary, caches, logit_rows, logits, taps, features, threads=1)")]
    #[allow(clippy::too_many_arguments, reason = "one crossing per pass")]
    fn forward(
        &self,
        py: Python<'_>,
        batch: Object<'_, AttentionBatch>,
        token_ids: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        embedding: Given<Table>,
        rotary: Given<Table>,
        caches: Given<Caches>,
        logit_rows: &Bound<'_, PyAny>,
        logits: Given<Pointer>,
        taps: Given<Vec<usize>>,
        features: Given<Pointer>,
        threads: Given<usize>,
    ) -> PyResult<()> {
        named!(batch, embedding, rotary, caches, logits, features, threads);
        let layers = taps.of("taps", "a list of layers")?;
        let (token_ids, positions) = (integers("token_ids", token_ids)?, integers("positions", positions)?);
        let logit_rows = integers("logit_rows", logit_rows)?;
        let logit_rows = contiguous("logit_rows", &logit_rows)?;
        let batch = &batch.get().0;
        let kernels = kernels(threads)?;
        let logits = Checked::new("logits", logits, logit_rows.len(), 1, self.head.weight.outputs())?;
        let features = Checked::new(
            "features",
            features,
            batch.tokens(),
            layers.len(),
            self.decoder.hidden(),
        )?;
        features.alone(&[&logits])?;
        let inputs = self.inputs(batch, &token_ids, &positions, embedding, rotary, &caches, 1)?;
        let taps = Taps {
            layers: &layers,
            features: features.rows_mut(),
        };
        let logits = logits.rows_mut();
        let outputs = Outputs {
            logit_rows,
            logits,
            taps,
        };
        py.detach(|| {
            with_scratch(|scratch| {
                self.head
                    .forward(&self.decoder, kernels, batch, inputs, outputs, scratch)
            })
        })?;
        Ok(())
    }

    /// The `k` likeliest tokens `[n, block - 1, k]` and their probabilities: rows 1.. of every block of `block` tokens. Where a row has
    /// fewer, the rest has probability 0. With a selector and its two codebooks, those beside the path that it takes.
    #[pyo3(signature = (batch, token_ids, positions, embedding, rotary, caches, block, never=None, k=Given::new(1), threads=Given::new(1),
                        selector=None, codebooks=None),
           text_signature = "($self, batch, token_ids, positions, embedding, rotary, caches, block, never=None, k=1, threads=1, selector=None, codebooks=None)")]
    #[allow(clippy::too_many_arguments, reason = "one crossing per pass")]
    fn draft<'py>(
        &self,
        py: Python<'py>,
        batch: Object<'_, AttentionBatch>,
        token_ids: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        embedding: Given<Table>,
        rotary: Given<Table>,
        caches: Given<Caches>,
        block: Given<usize>,
        never: Option<Given<usize>>,
        k: Given<usize>,
        threads: Given<usize>,
        selector: Option<Object<'_, HostSelector>>,
        codebooks: Option<Given<(Table, Table)>>,
    ) -> PyResult<Drafts<'py>> {
        named!(
            batch, embedding, rotary, caches, block, never, k, threads, selector, codebooks
        );
        let (token_ids, positions) = (integers("token_ids", token_ids)?, integers("positions", positions)?);
        let batch = &batch.get().0;
        if !(2..=MOST_BLOCK).contains(&block) || !batch.tokens().is_multiple_of(block) {
            let expected = format!("2..{MOST_BLOCK}, dividing the {} tokens", batch.tokens());
            return Err(unknown("block", &block.to_string(), &expected));
        }
        let vocabulary = self.head.weight.outputs();
        if k == 0 || k > vocabulary {
            return Err(unknown("k", &k.to_string(), &format!("1..{vocabulary}")));
        }
        let kernels = kernels(threads)?;
        let inputs = self.inputs(batch, &token_ids, &positions, embedding, rotary, &caches, block)?;
        let path = match (&selector, codebooks) {
            (Some(selector), Some(books)) => Some(self.path(&selector.get().0, books)?),
            (None, None) => None,
            _ => return Err(unknown("codebooks", "one of selector and codebooks", "both or neither")),
        };
        let guesses = py.detach(|| {
            with_scratch(|scratch| self.guesses(kernels, batch, inputs, (never, k), path.as_ref(), scratch))
        })?;
        let shape = [batch.tokens() / block, block - 1, k];
        let tokens: Vec<i64> = guesses.iter().map(|guess| guess.token as i64).collect();
        let probabilities: Vec<f32> = guesses.iter().map(|guess| guess.probability).collect();
        let tokens = PyArray1::from_vec(py, tokens).reshape(shape)?;
        Ok((tokens, PyArray1::from_vec(py, probabilities).reshape(shape)?))
    }
}

impl HostDecoder {
    #[allow(clippy::too_many_arguments, reason = "the arrays of a pass")]
    fn inputs<'a>(
        &self,
        batch: &host::AttentionBatch,
        token_ids: &'a PyReadonlyArray1<'_, i64>,
        positions: &'a PyReadonlyArray1<'_, i64>,
        embedding: Table,
        rotary: Table,
        caches: &Caches,
        block: usize,
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
            block,
        })
    }

    /// A selector with its codebooks, which fit this head.
    fn path<'a>(&self, selector: &'a Selector, (predecessor, successor): (Table, Table)) -> PyResult<Path<'a>> {
        let rank = selector.projection.outputs();
        let books = Codebooks {
            predecessor: Checked::new("predecessor", predecessor.0, predecessor.1, 1, rank)?.rows(),
            successor: Checked::new("successor", successor.0, successor.1, 1, rank)?.rows(),
        };
        selector.check(self.head.weight.outputs(), self.decoder.hidden(), &books)?;
        Ok((selector, books))
    }

    fn guesses(
        &self,
        kernels: HostKernels,
        batch: &host::AttentionBatch,
        inputs: DecoderInputs<'_>,
        (never, k): (Option<usize>, usize),
        path: Option<&Path<'_>>,
        scratch: &mut Scratch,
    ) -> Result<Vec<Guess>, Error> {
        let (tokens, block) = (batch.tokens(), inputs.block);
        let anchors: Vec<i64> = inputs.tokens.iter().copied().step_by(block).collect();
        let mut none = [];
        let features = RowsMut::from_slice("features", &mut none, Layout::contiguous(0, 0, self.decoder.hidden()))?;
        let mut taps = Taps { layers: &[], features };
        self.decoder.run(kernels, batch, inputs, &mut taps, scratch)?;
        let rows: Vec<i64> = (0..tokens as i64).filter(|row| row % block as i64 != 0).collect();
        let mut logits = self.head.logits(kernels, &rows, tokens, scratch)?;
        let isa = Isa::chosen()?;
        let each = path.map_or(k, |(selector, _)| selector.top_k);
        let mut guesses = Vec::with_capacity(rows.len() * each);
        for (row, logits) in logits.chunks_exact_mut(self.head.weight.outputs()).enumerate() {
            candidates(isa, logits, never, each, &mut guesses);
            let none = Guess {
                token: 0,
                probability: 0.0,
            };
            guesses.resize((row + 1) * each, none);
        }
        match path {
            Some((selector, books)) => selector.walk(kernels, books, &guesses, &anchors, block, k, scratch),
            None => Ok(guesses),
        }
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
        fc: Object<'_, PackedWeight>,
        norm: &Bound<'_, PyAny>,
        key_values: Object<'_, PackedWeight>,
        key_norms: Given<Vec<Option<Bound<'_, PyAny>>>>,
        kv_heads: Given<usize>,
        head_dim: Given<usize>,
        eps: Given<f32>,
    ) -> PyResult<Self> {
        named!(fc, key_values, kv_heads, head_dim, eps);
        let key_norms = key_norms.of("key_norms", "a list of arrays or None, one per layer")?;
        let key_norms = key_norms
            .iter()
            .map(|norm| norm.as_ref().map(|norm| floats("key_norms", norm)).transpose());
        let injector = Injector {
            fc: fc.get().weight.clone(),
            norm: floats("norm", norm)?,
            key_values: key_values.get().weight.clone(),
            key_norms: key_norms.collect::<PyResult<_>>()?,
            kv_heads,
            head_dim,
            eps,
        };
        injector.check()?;
        Ok(Self(injector))
    }

    /// Token `i` is row `rows[i]` of `features` (`feature_rows` of them), at `positions[i]`; it goes to `slots[i]`.
    #[pyo3(signature = (features, feature_rows, rows, positions, slots, rotary, caches, num_slots, threads=Given::new(1)),
           text_signature = "($self, features, feature_rows, rows, positions, slots, rotary, caches, num_slots, threads=1)")]
    #[allow(clippy::too_many_arguments, reason = "one crossing per step")]
    fn inject(
        &self,
        py: Python<'_>,
        features: Given<Pointer>,
        feature_rows: Given<usize>,
        rows: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        slots: &Bound<'_, PyAny>,
        rotary: Given<Table>,
        caches: Given<Caches>,
        num_slots: Given<usize>,
        threads: Given<usize>,
    ) -> PyResult<()> {
        named!(features, feature_rows, rotary, caches, num_slots, threads);
        let (rows, positions) = (integers("rows", rows)?, integers("positions", positions)?);
        let slots = integers("slots", slots)?;
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
