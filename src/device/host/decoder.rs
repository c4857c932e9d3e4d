//! A run of pre-norm decoder layers (RMSNorm, rotary attention, SwiGLU) in one call.
//!
//! A small model with few rows spends its time between operations, not in them: one call for the whole run leaves nothing in
//! between. Drafting a block and injecting its context are such calls.
//!
//! ```text
//!   tokens -> embedding -> [ norm - q k v - head norm - rotate - attend - out (+) - norm - gate up - silu - down (+) ] x layers
//!                                                                                              |
//!                                                                  rows of the result -> norm -> head -> logits -> drafts
//! ```
//! Promise: a row's result depends on its own token, position and visible keys only, bit for bit. Products and attention
//! promise it, and everything here works on one row at a time, in an order that is the same for every instruction set.

use std::sync::Arc;

use super::linear::PackedWeight;
pub use super::rowwise::{Guess, candidates};
use super::rowwise::{RotateHead, SwiGlu, rms_norm, rotate_head};
use super::simd::{Lanes, Routine, dispatch};
use super::view::{Layout, Rows, RowsMut};
use super::{AttentionBatch, AttentionTensors, HostKernels, attention};
use crate::device::AttentionParams;
use crate::error::{Error, Result, indices};

/// Weights of one layer. `H` is the hidden size, `Hq` and `Hkv` the numbers of query and key heads of `D` elements.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `[H]` scale of the norm before attention.
    pub attention_norm: Vec<f32>,
    /// `[(Hq + 2 Hkv) * D, H]`: queries, keys, values.
    pub qkv: Arc<PackedWeight>,
    /// `[D]` scale of the norm of every query head and of every key head, if the model has them.
    pub head_norms: Option<(Vec<f32>, Vec<f32>)>,
    /// `[H, Hq * D]`.
    pub out: Arc<PackedWeight>,
    /// `[H]` scale of the norm before the MLP.
    pub mlp_norm: Vec<f32>,
    /// `[2 I, H]`: gate, then up.
    pub gate_up: Arc<PackedWeight>,
    /// `[H, I]`.
    pub down: Arc<PackedWeight>,
}

/// How a layer attends.
#[derive(Clone, Copy, Debug)]
pub struct LayerShape {
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Scale, mask and window.
    pub attention: AttentionParams,
}

/// A run of layers over one residual stream.
#[derive(Clone, Debug)]
pub struct Decoder {
    hidden: usize,
    eps: f32,
    layers: Vec<(LayerWeights, LayerShape)>,
}

/// What a pass reads, beside the weights.
#[derive(Debug)]
pub struct DecoderInputs<'a> {
    /// `[T]` tokens.
    pub tokens: &'a [i64],
    /// `[T]` positions.
    pub positions: &'a [i64],
    /// `[V, 1, H]` embedding rows.
    pub embedding: Rows<'a, f32>,
    /// `[P, 2, D]`: cos and signed sin (its first half negated) of every position.
    pub rotary: Rows<'a, f32>,
    /// `[num_slots, Hkv, D]` keys and values, per layer.
    pub caches: Vec<(RowsMut<'a, f32>, RowsMut<'a, f32>)>,
}

/// Buffers of a pass, kept between calls: `x` is the residual stream, `[T, H]`.
#[derive(Debug, Default)]
pub struct Scratch {
    /// `[T, H]` output of the last layer, not normalised.
    pub x: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    gate_up: Vec<f32>,
    inner: Vec<f32>,
}

fn invalid<T>(name: &'static str, got: impl ToString, expected: impl Into<String>) -> Result<T> {
    Err(Error::InvalidArgument {
        name,
        got: got.to_string(),
        expected: expected.into(),
    })
}

fn check_len(name: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Length { name, got, expected })
}

fn check_weight(name: &'static str, weight: &PackedWeight, outputs: usize, inputs: usize) -> Result<()> {
    if (weight.outputs(), weight.inputs()) == (outputs, inputs) {
        return Ok(());
    }
    invalid(
        name,
        format!("[{}, {}]", weight.outputs(), weight.inputs()),
        format!("[{outputs}, {inputs}]"),
    )
}

fn resized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

fn rows_of<'a>(name: &'static str, data: &'a [f32], rows: usize, width: usize) -> Result<Rows<'a, f32>> {
    Rows::from_slice(name, data, Layout::contiguous(rows, 1, width))
}

fn rows_mut_of<'a>(name: &'static str, data: &'a mut [f32], rows: usize, width: usize) -> Result<RowsMut<'a, f32>> {
    RowsMut::from_slice(name, data, Layout::contiguous(rows, 1, width))
}

impl Decoder {
    /// No layers yet.
    ///
    /// # Errors
    /// `InvalidArgument` for a hidden size of 0 or an `eps` that is not positive.
    pub fn new(hidden: usize, eps: f32) -> Result<Self> {
        if hidden == 0 {
            return invalid("hidden", hidden, "at least 1");
        }
        if !eps.is_finite() || eps <= 0.0 {
            return invalid("eps", eps, "a positive number");
        }
        Ok(Self {
            hidden,
            eps,
            layers: Vec::new(),
        })
    }

    /// Appends a layer.
    ///
    /// # Errors
    /// `InvalidArgument` or `Length` naming the weight whose shape does not fit.
    pub fn push(&mut self, weights: LayerWeights, shape: LayerShape) -> Result<()> {
        let LayerShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = shape;
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return invalid("heads", heads, format!("a multiple of the {kv_heads} key heads"));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return invalid("head_dim", head_dim, "an even number");
        }
        // Numbers of heads that no weight has come to a width that none has, either.
        let stacked = heads.saturating_add(kv_heads.saturating_mul(2));
        check_len("attention_norm", weights.attention_norm.len(), self.hidden)?;
        check_len("mlp_norm", weights.mlp_norm.len(), self.hidden)?;
        check_weight("qkv", &weights.qkv, stacked.saturating_mul(head_dim), self.hidden)?;
        check_weight("out", &weights.out, self.hidden, heads.saturating_mul(head_dim))?;
        check_weight("gate_up", &weights.gate_up, 2 * weights.down.inputs(), self.hidden)?;
        check_weight("down", &weights.down, self.hidden, weights.down.inputs())?;
        if let Some((queries, keys)) = &weights.head_norms {
            check_len("query_norm", queries.len(), head_dim)?;
            check_len("key_norm", keys.len(), head_dim)?;
        }
        self.layers.push((weights, shape));
        Ok(())
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Key heads and elements per head of every layer: the shape of its cache.
    pub fn cache_shapes(&self) -> Vec<(usize, usize)> {
        self.layers.iter().map(|(_, s)| (s.kv_heads, s.head_dim)).collect()
    }

    /// Runs all layers and leaves the result in `scratch.x`.
    ///
    /// Keys and values are written to the batch's slots, if it has any; otherwise they serve this pass only.
    ///
    /// # Errors
    /// `InvalidArgument` or `Length` naming the input that does not fit; nothing is written then.
    pub fn run(
        &self,
        kernels: HostKernels,
        batch: &AttentionBatch,
        inputs: DecoderInputs<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.check(batch, &inputs)?;
        let x = resized(&mut scratch.x, batch.tokens() * self.hidden);
        for (row, &token) in x.chunks_exact_mut(self.hidden).zip(inputs.tokens) {
            row.copy_from_slice(inputs.embedding.row(token as usize, 0));
        }
        for ((weights, shape), caches) in self.layers.iter().zip(inputs.caches) {
            let layer = Layer {
                weights,
                shape,
                hidden: self.hidden,
                eps: self.eps,
                rotary: &inputs.rotary,
                positions: inputs.positions,
            };
            // The residual stream moves to `normed` and back: a product may not write what it reads.
            layer.attend(kernels, batch, caches, scratch)?;
            layer.feed_forward(kernels, scratch)?;
        }
        Ok(())
    }

    fn check(&self, batch: &AttentionBatch, inputs: &DecoderInputs<'_>) -> Result<()> {
        let tokens = batch.tokens();
        check_len("token_ids", inputs.tokens.len(), tokens)?;
        check_len("positions", inputs.positions.len(), tokens)?;
        check_len("caches", inputs.caches.len(), self.layers.len())?;
        let (embedding, rotary) = (inputs.embedding.layout(), inputs.rotary.layout());
        if (embedding.heads, embedding.dim) != (1, self.hidden) {
            return invalid(
                "embedding",
                format!("rows of {}", embedding.dim),
                self.hidden.to_string(),
            );
        }
        let bad = inputs.tokens.iter().find(|&&t| t < 0 || t as usize >= embedding.rows);
        if let Some(token) = bad {
            return invalid("token_ids", token, indices(embedding.rows));
        }
        let bad = inputs.positions.iter().find(|&&p| p < 0 || p as usize >= rotary.rows);
        if let Some(position) = bad {
            return invalid("positions", position, indices(rotary.rows));
        }
        if let Some((_, shape)) = self.layers.iter().find(|(_, s)| s.head_dim != rotary.dim) {
            return invalid("rotary", format!("rows of {}", rotary.dim), shape.head_dim.to_string());
        }
        Ok(())
    }
}

/// One layer of one pass.
struct Layer<'a> {
    weights: &'a LayerWeights,
    shape: &'a LayerShape,
    hidden: usize,
    eps: f32,
    rotary: &'a Rows<'a, f32>,
    positions: &'a [i64],
}

impl Layer<'_> {
    /// `normed = x + out(attention(norm(x)))`.
    fn attend(
        &self,
        kernels: HostKernels,
        batch: &AttentionBatch,
        (k_cache, v_cache): (RowsMut<'_, f32>, RowsMut<'_, f32>),
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Self {
            weights, shape, hidden, ..
        } = *self;
        let (isa, threads, tokens) = (kernels.isa, kernels.threads, self.positions.len());
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        let (width, attended_width) = ((heads + 2 * kv_heads) * dim, heads * dim);
        let x = resized(&mut scratch.x, tokens * hidden);
        let normed = resized(&mut scratch.normed, tokens * hidden);
        let qkv = resized(&mut scratch.qkv, tokens * width);
        rms_norm(isa, x, &weights.attention_norm, self.eps, normed);
        weights.qkv.product(
            isa,
            threads,
            rows_of("x", normed, tokens, hidden)?,
            None,
            rows_mut_of("out", qkv, tokens, width)?,
        )?;
        dispatch(
            isa,
            Rotate {
                qkv,
                width,
                shape,
                norms: weights.head_norms.as_ref(),
                eps: self.eps,
                rotary: self.rotary,
                positions: self.positions,
            },
        );
        let attended = resized(&mut scratch.attended, tokens * attended_width);
        let part = |first: usize, heads: usize| {
            let layout = Layout {
                rows: tokens,
                heads,
                dim,
                row_stride: width,
                head_stride: dim,
            };
            Rows::from_slice("qkv", &qkv[(first * dim).min(qkv.len())..], layout)
        };
        let out = Layout::contiguous(tokens, heads, dim);
        let tensors = AttentionTensors {
            q: part(0, heads)?,
            k: part(heads, kv_heads)?,
            v: part(heads + kv_heads, kv_heads)?,
            k_cache,
            v_cache,
            out: RowsMut::from_slice("attended", attended, out)?,
            sinks: None,
        };
        attention::run(isa, threads, batch, &shape.attention, tensors)?;
        weights.out.product(
            isa,
            threads,
            rows_of("x", attended, tokens, attended_width)?,
            Some(rows_of("residual", x, tokens, hidden)?),
            rows_mut_of("out", normed, tokens, hidden)?,
        )
    }

    /// `x = normed + down(silu(gate) * up)` of `norm(normed)`.
    fn feed_forward(&self, kernels: HostKernels, scratch: &mut Scratch) -> Result<()> {
        let Self { weights, hidden, .. } = *self;
        let (isa, threads, tokens) = (kernels.isa, kernels.threads, self.positions.len());
        let width = weights.down.inputs();
        let x = resized(&mut scratch.x, tokens * hidden);
        let normed = resized(&mut scratch.normed, tokens * hidden);
        rms_norm(isa, normed, &weights.mlp_norm, self.eps, x);
        let gate_up = resized(&mut scratch.gate_up, tokens * 2 * width);
        weights.gate_up.product(
            isa,
            threads,
            rows_of("x", x, tokens, hidden)?,
            None,
            rows_mut_of("out", gate_up, tokens, 2 * width)?,
        )?;
        let inner = resized(&mut scratch.inner, tokens * width);
        dispatch(isa, SwiGlu { gate_up, width, inner });
        weights.down.product(
            isa,
            threads,
            rows_of("x", inner, tokens, width)?,
            Some(rows_of("residual", normed, tokens, hidden)?),
            rows_mut_of("out", x, tokens, hidden)?,
        )
    }
}

/// The last norm and the head.
#[derive(Clone, Debug)]
pub struct Head {
    /// `[H]`.
    pub norm: Vec<f32>,
    /// `[V, H]`.
    pub weight: Arc<PackedWeight>,
    /// Of the norm.
    pub eps: f32,
}

impl Head {
    /// Checks the shapes.
    ///
    /// # Errors
    /// `InvalidArgument` for a head of another width than its norm.
    pub fn check(&self) -> Result<()> {
        check_weight("head", &self.weight, self.weight.outputs(), self.norm.len())
    }

    /// Logits `[rows.len(), V]` of the rows `rows` of what a [`Decoder`] left in `scratch.x`, which holds `tokens` rows.
    ///
    /// # Errors
    /// `InvalidArgument` for a row beyond them.
    pub fn logits(&self, kernels: HostKernels, rows: &[i64], tokens: usize, scratch: &mut Scratch) -> Result<Vec<f32>> {
        let (hidden, outputs) = (self.norm.len(), self.weight.outputs());
        let Scratch { x, normed, inner, .. } = scratch;
        let picked = resized(inner, rows.len() * hidden);
        for (to, &row) in picked.chunks_exact_mut(hidden).zip(rows) {
            let Some(from) = usize::try_from(row).ok().filter(|&row| row < tokens) else {
                return invalid("logit_rows", row, indices(tokens));
            };
            to.copy_from_slice(&x[from * hidden..(from + 1) * hidden]);
        }
        let normed = resized(normed, rows.len() * hidden);
        rms_norm(kernels.isa, picked, &self.norm, self.eps, normed);
        let mut logits = vec![0.0; rows.len() * outputs];
        let x = rows_of("x", normed, rows.len(), hidden)?;
        let out = rows_mut_of("logits", &mut logits, rows.len(), outputs)?;
        self.weight.product(kernels.isa, kernels.threads, x, None, out)?;
        Ok(logits)
    }
}

/// Keys and values of committed context for all layers of a drafter: one product each, no block.
///
/// `features [M, K*H] -> fc -> norm -> k v of every layer -> head norm, rotate -> the cache of each layer, at slots`.
#[derive(Clone, Debug)]
pub struct Injector {
    /// `[H, K*H]` projection of the concatenated taps.
    pub fc: Arc<PackedWeight>,
    /// `[H]` scale of the norm after it.
    pub norm: Vec<f32>,
    /// `[layers * 2 * Hkv * D, H]`: keys, then values, layer after layer.
    pub key_values: Arc<PackedWeight>,
    /// `[layers][D]` scale of the norm of every key head; `None` for a layer without one.
    pub key_norms: Vec<Option<Vec<f32>>>,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Of both norms.
    pub eps: f32,
}

impl Injector {
    /// Checks the shapes.
    ///
    /// # Errors
    /// `InvalidArgument` or `Length` naming the weight that does not fit.
    pub fn check(&self) -> Result<()> {
        let hidden = self.norm.len();
        check_weight("fc", &self.fc, hidden, self.fc.inputs())?;
        let layers = self.key_norms.len() * 2;
        let outputs = layers.saturating_mul(self.kv_heads).saturating_mul(self.head_dim);
        check_weight("key_values", &self.key_values, outputs, hidden)?;
        for norm in self.key_norms.iter().flatten() {
            check_len("key_norm", norm.len(), self.head_dim)?;
        }
        Ok(())
    }

    fn check_inputs(
        &self,
        features: &Rows<'_, f32>,
        rows: &[i64],
        positions: &[i64],
        slots: &[usize],
        rotary: &Rows<'_, f32>,
        caches: &[(RowsMut<'_, f32>, RowsMut<'_, f32>)],
    ) -> Result<()> {
        let (count, dim) = (positions.len(), self.head_dim);
        check_len("slots", slots.len(), count)?;
        check_len("rows", rows.len(), count)?;
        check_len("caches", caches.len(), self.key_norms.len())?;
        let wide = self.fc.inputs();
        let layout = *features.layout();
        if (layout.heads, layout.dim) != (1, wide) {
            return invalid("features", format!("rows of {}", layout.dim), wide.to_string());
        }
        if let Some(row) = rows.iter().find(|&&row| row < 0 || row as usize >= layout.rows) {
            return invalid("rows", row, indices(layout.rows));
        }
        if rotary.layout().dim != dim {
            return invalid("rotary", format!("rows of {}", rotary.layout().dim), dim.to_string());
        }
        let limit = rotary.layout().rows;
        if let Some(position) = positions.iter().find(|&&p| p < 0 || p as usize >= limit) {
            return invalid("positions", position, indices(limit));
        }
        for (k_cache, v_cache) in caches {
            for layout in [k_cache.layout(), v_cache.layout()] {
                if (layout.heads, layout.dim) != (self.kv_heads, dim) {
                    let got = format!("[{}, {}, {}]", layout.rows, layout.heads, layout.dim);
                    return invalid("caches", got, format!("[num_slots, {}, {dim}]", self.kv_heads));
                }
                if let Some(slot) = slots.iter().find(|&&slot| slot >= layout.rows) {
                    return invalid("slots", slot, indices(layout.rows));
                }
            }
        }
        Ok(())
    }

    /// Writes the context of `positions.len()` tokens. `features` is `[M, 1, K*H]`; `rows[i]` is the row of token `i` in it.
    ///
    /// # Errors
    /// `InvalidArgument` or `Length` naming the input that does not fit; nothing is written then.
    #[allow(clippy::too_many_arguments, reason = "the arrays of a stage")]
    pub fn run(
        &self,
        kernels: HostKernels,
        features: Rows<'_, f32>,
        rows: &[i64],
        positions: &[i64],
        slots: &[usize],
        rotary: Rows<'_, f32>,
        caches: Vec<(RowsMut<'_, f32>, RowsMut<'_, f32>)>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.check_inputs(&features, rows, positions, slots, &rotary, &caches)?;
        let (count, hidden, dim) = (positions.len(), self.norm.len(), self.head_dim);
        let wide = self.fc.inputs();
        let (isa, threads) = (kernels.isa, kernels.threads);
        let picked = resized(&mut scratch.gate_up, count * wide);
        for (to, &row) in picked.chunks_exact_mut(wide.max(1)).zip(rows) {
            to.copy_from_slice(features.row(row as usize, 0));
        }
        let x = resized(&mut scratch.x, count * hidden);
        self.fc.product(
            isa,
            threads,
            rows_of("x", picked, count, wide)?,
            None,
            rows_mut_of("out", x, count, hidden)?,
        )?;
        let normed = resized(&mut scratch.normed, count * hidden);
        rms_norm(isa, x, &self.norm, self.eps, normed);
        let outputs = self.key_values.outputs();
        let kv = resized(&mut scratch.qkv, count * outputs);
        self.key_values.product(
            isa,
            threads,
            rows_of("x", normed, count, hidden)?,
            None,
            rows_mut_of("out", kv, count, outputs)?,
        )?;
        let half = self.kv_heads * dim;
        for (layer, ((mut k_cache, mut v_cache), norm)) in caches.into_iter().zip(&self.key_norms).enumerate() {
            for (token, row) in kv.chunks_exact_mut(outputs).enumerate() {
                let (keys, values) = row[layer * 2 * half..(layer + 1) * 2 * half].split_at_mut(half);
                let position = positions[token] as usize;
                let (cos, sin) = (rotary.row(position, 0), rotary.row(position, 1));
                for (head, (key, value)) in keys.chunks_exact_mut(dim).zip(values.chunks_exact(dim)).enumerate() {
                    dispatch(
                        isa,
                        RotateHead {
                            head: key,
                            norm: norm.as_deref(),
                            eps: self.eps,
                            cos,
                            sin,
                        },
                    );
                    k_cache.row_mut(slots[token], head).copy_from_slice(key);
                    v_cache.row_mut(slots[token], head).copy_from_slice(value);
                }
            }
        }
        Ok(())
    }
}

struct Rotate<'a> {
    qkv: &'a mut [f32],
    width: usize,
    shape: &'a LayerShape,
    norms: Option<&'a (Vec<f32>, Vec<f32>)>,
    eps: f32,
    rotary: &'a Rows<'a, f32>,
    positions: &'a [i64],
}

impl Routine for Rotate<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let dim = self.shape.head_dim;
        for (row, &position) in self.qkv.chunks_exact_mut(self.width).zip(self.positions) {
            let (cos, sin) = (
                self.rotary.row(position as usize, 0),
                self.rotary.row(position as usize, 1),
            );
            let turned = self.shape.heads + self.shape.kv_heads;
            for (index, head) in row.chunks_exact_mut(dim).take(turned).enumerate() {
                let norm = self.norms.map(|(queries, keys)| {
                    if index < self.shape.heads {
                        &queries[..]
                    } else {
                        &keys[..]
                    }
                });
                rotate_head::<L>(head, norm, self.eps, cos, sin);
            }
        }
    }
}
