//! A run of pre-norm decoder layers (RMSNorm, rotary attention, SwiGLU) in one call.
//!
//! A small model with few rows spends its time between operations, not in them: one call for the whole run leaves nothing in
//! between. A pass of a target ([`Head::forward`]), drafting a block and injecting its context ([`Injector`]) are such calls.
//!
//! ```text
//!   tokens -> embedding -> [ norm - q k v - head norm - rotate - attend - out (+) - norm - gate up - silu - down (+) ] x layers
//!                                                                                              |         |
//!                                                                     features of layers that are tapped   |
//!                                                                                    norm, head of rows that are asked for -> logits
//! ```
//! Promise: a row's result depends on its own token, position and visible keys only, bit for bit. Products and attention
//! promise it, and everything here works on one row at a time, in an order that is the same for every instruction set.

mod head;
mod inject;
mod second;

use std::sync::Arc;

use super::linear::PackedWeight;
pub use super::rowwise::{Guess, candidates};
use super::rowwise::{SwiGlu, rms_norm, rotate_head};
use super::simd::{Lanes, Routine, dispatch};
use super::view::{Layout, Rows, RowsMut};
use super::{AttentionBatch, AttentionTensors, HostKernels, attention, team};
use crate::device::AttentionParams;
use crate::error::{Error, Result, indices};

pub use head::{Head, Outputs};
pub use inject::Injector;
pub use second::{BlockConv, Codebooks, Selector};

/// Elements of what is done to one row at a time that are worth a helper.
const ROWWISE_PART: usize = 1 << 13;

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
    /// Around attention and around the MLP, if the model has them.
    pub convs: Option<(BlockConv, BlockConv)>,
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
    /// Tokens of a block, which convolutions look at; 1 where there are none.
    pub block: usize,
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
    deltas: Vec<f32>,
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

/// `out = x W^T + b`, and `+ residual` where there is one, of `rows` rows without gaps.
fn multiply(
    kernels: HostKernels,
    weight: &PackedWeight,
    rows: usize,
    x: &[f32],
    residual: Option<&[f32]>,
    out: &mut [f32],
) -> Result<()> {
    let (inputs, outputs) = (weight.inputs(), weight.outputs());
    let residual = residual.map(|residual| rows_of("residual", residual, rows, outputs));
    let out = rows_mut_of("out", out, rows, outputs)?;
    weight.product(
        kernels.isa,
        kernels.threads,
        rows_of("x", x, rows, inputs)?,
        residual.transpose()?,
        out,
    )
}

/// `work` on rows of `from` and of `to`, `widths` elements each: a share of them at a time.
fn by_rows(
    threads: usize,
    widths: (usize, usize),
    from: &[f32],
    to: &mut [f32],
    work: impl Fn(&[f32], &mut [f32]) + Sync,
) {
    let rows = (ROWWISE_PART / widths.0.max(widths.1)).max(1);
    let shares = from.chunks(rows * widths.0).zip(to.chunks_mut(rows * widths.1));
    if shares.len() < 2 {
        return work(from, to);
    }
    team::each(threads, shares.collect(), |(from, to)| work(from, to));
}

/// Where outputs of layers go.
#[derive(Debug)]
pub struct Taps<'a> {
    /// The layers, from 0; as many as there are layers stands for what the head reads.
    pub layers: &'a [usize],
    /// `[T, taps, H]`.
    pub features: RowsMut<'a, f32>,
}

impl Taps<'_> {
    /// Keeps `x` `[T, H]`, the output of `layer`.
    fn keep(&mut self, layer: usize, x: &[f32]) {
        let (tokens, hidden) = (self.features.layout().rows, self.features.layout().dim);
        for tap in (0..self.layers.len()).filter(|&tap| self.layers[tap] == layer) {
            for (row, x) in x.chunks_exact(hidden).take(tokens).enumerate() {
                self.features.row_mut(row, tap).copy_from_slice(x);
            }
        }
    }
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
        for conv in weights.convs.iter().flat_map(|(attention, mlp)| [attention, mlp]) {
            conv.check(self.hidden)?;
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

    /// Runs all layers and leaves the result in `scratch.x`. What the head reads is not tapped here, see [`Head::forward`].
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
        taps: &mut Taps<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.check(batch, &inputs)?;
        self.check_taps(batch, taps)?;
        let x = resized(&mut scratch.x, batch.tokens() * self.hidden);
        for (row, &token) in x.chunks_exact_mut(self.hidden).zip(inputs.tokens) {
            row.copy_from_slice(inputs.embedding.row(token as usize, 0));
        }
        for (index, ((weights, shape), caches)) in self.layers.iter().zip(inputs.caches).enumerate() {
            let layer = Layer {
                weights,
                shape,
                hidden: self.hidden,
                eps: self.eps,
                rotary: &inputs.rotary,
                positions: inputs.positions,
                block: inputs.block,
            };
            // The residual stream moves to `normed` and back: a product may not write what it reads.
            layer.attend(kernels, batch, caches, scratch)?;
            layer.feed_forward(kernels, scratch)?;
            taps.keep(index, &scratch.x);
        }
        Ok(())
    }

    fn check_taps(&self, batch: &AttentionBatch, taps: &Taps<'_>) -> Result<()> {
        if let Some(layer) = taps.layers.iter().find(|&&layer| layer > self.layers.len()) {
            return invalid("taps", layer, indices(self.layers.len() + 1));
        }
        let Layout { rows, heads, dim, .. } = *taps.features.layout();
        if (heads, dim) == (taps.layers.len(), self.hidden) && (rows == batch.tokens() || heads == 0) {
            return Ok(());
        }
        invalid(
            "features",
            format!("[{rows}, {heads}, {dim}]"),
            format!("[{}, {}, {}]", batch.tokens(), taps.layers.len(), self.hidden),
        )
    }

    fn check(&self, batch: &AttentionBatch, inputs: &DecoderInputs<'_>) -> Result<()> {
        let tokens = batch.tokens();
        check_len("token_ids", inputs.tokens.len(), tokens)?;
        check_len("positions", inputs.positions.len(), tokens)?;
        check_len("caches", inputs.caches.len(), self.layers.len())?;
        if inputs.block == 0 || !tokens.is_multiple_of(inputs.block) {
            return invalid("block", inputs.block, format!("a divisor of the {tokens} tokens"));
        }
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
    block: usize,
}

impl Layer<'_> {
    /// `normed = x + out(attention(norm(x)))`, between convolutions where there are some.
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
        norm_rows(kernels, x, &weights.attention_norm, self.eps, normed);
        let conv = weights.convs.as_ref().map(|(attention, _)| attention);
        self.enter(kernels, conv, normed, &mut scratch.deltas)?;
        multiply(kernels, &weights.qkv, tokens, normed, None, qkv)?;
        let rows = (ROWWISE_PART / width).max(1);
        let rotate = |(qkv, positions): (&mut [f32], &[i64])| {
            let turn = Rotate {
                qkv,
                width,
                shape,
                norms: weights.head_norms.as_ref(),
                eps: self.eps,
                rotary: self.rotary,
                positions,
            };
            dispatch(isa, turn);
        };
        if tokens <= rows {
            rotate((qkv, self.positions));
        } else {
            let shares = qkv.chunks_mut(rows * width).zip(self.positions.chunks(rows));
            team::each(threads, shares.collect(), rotate);
        }
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
        self.leave(kernels, conv, (&weights.out, attended), &scratch.deltas, x, normed)
    }

    /// What goes into a sublayer, in place.
    fn enter(
        &self,
        kernels: HostKernels,
        conv: Option<&BlockConv>,
        x: &mut [f32],
        deltas: &mut Vec<f32>,
    ) -> Result<()> {
        let Some(conv) = conv else { return Ok(()) };
        conv.look(kernels, self.positions.len(), x, deltas)?;
        conv.over(0, self.block, deltas, x);
        Ok(())
    }

    /// `out = residual + ` what comes out of a sublayer: its last product, through the convolution if there is one.
    fn leave(
        &self,
        kernels: HostKernels,
        conv: Option<&BlockConv>,
        (weight, given): (&PackedWeight, &[f32]),
        deltas: &[f32],
        residual: &[f32],
        out: &mut [f32],
    ) -> Result<()> {
        let tokens = self.positions.len();
        let Some(conv) = conv else {
            return multiply(kernels, weight, tokens, given, Some(residual), out);
        };
        multiply(kernels, weight, tokens, given, None, out)?;
        conv.over(1, self.block, deltas, out);
        for (out, residual) in out.iter_mut().zip(residual) {
            *out += residual;
        }
        Ok(())
    }

    /// `x = normed + down(silu(gate) * up)` of `norm(normed)`, likewise.
    fn feed_forward(&self, kernels: HostKernels, scratch: &mut Scratch) -> Result<()> {
        let Self { weights, hidden, .. } = *self;
        let (isa, threads, tokens) = (kernels.isa, kernels.threads, self.positions.len());
        let width = weights.down.inputs();
        let x = resized(&mut scratch.x, tokens * hidden);
        let normed = resized(&mut scratch.normed, tokens * hidden);
        norm_rows(kernels, normed, &weights.mlp_norm, self.eps, x);
        let conv = weights.convs.as_ref().map(|(_, mlp)| mlp);
        self.enter(kernels, conv, x, &mut scratch.deltas)?;
        let gate_up = resized(&mut scratch.gate_up, tokens * 2 * width);
        multiply(kernels, &weights.gate_up, tokens, x, None, gate_up)?;
        let inner = resized(&mut scratch.inner, tokens * width);
        by_rows(threads, (2 * width, width), gate_up, inner, |gate_up, inner| {
            dispatch(isa, SwiGlu { gate_up, width, inner });
        });
        self.leave(kernels, conv, (&weights.down, inner), &scratch.deltas, normed, x)
    }
}

/// [`rms_norm`] of many rows.
fn norm_rows(kernels: HostKernels, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    by_rows(kernels.threads, (width, width), x, out, |x, out| {
        rms_norm(kernels.isa, x, weight, eps, out)
    });
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
