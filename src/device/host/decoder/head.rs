//! What reads the result of the layers: the last norm and the head.

use std::sync::Arc;

use super::{Decoder, DecoderInputs, Scratch, Taps, check_weight, invalid, norm_rows, resized, rows_mut_of, rows_of};
use crate::device::host::linear::PackedWeight;
use crate::device::host::{AttentionBatch, HostKernels, RowsMut};
use crate::error::{Result, indices};

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

/// What a pass hands over.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// `[N]`: the rows that are asked for.
    pub logit_rows: &'a [i64],
    /// `[N, 1, V]`.
    pub logits: RowsMut<'a, f32>,
    /// Features beside them.
    pub taps: Taps<'a>,
}

impl Head {
    /// Checks the shapes.
    ///
    /// # Errors
    /// `InvalidArgument` for a head of another width than its norm.
    pub fn check(&self) -> Result<()> {
        check_weight("head", &self.weight, self.weight.outputs(), self.norm.len())
    }

    /// A pass of a whole model: the layers of `decoder`, then this.
    ///
    /// # Errors
    /// `InvalidArgument` or `Length` naming what does not fit; nothing is written then.
    pub fn forward(
        &self,
        decoder: &Decoder,
        kernels: HostKernels,
        batch: &AttentionBatch,
        inputs: DecoderInputs<'_>,
        outputs: Outputs<'_>,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (tokens, hidden) = (batch.tokens(), self.norm.len());
        let Outputs {
            logit_rows,
            logits,
            mut taps,
        } = outputs;
        self.check_rows(logit_rows, tokens)?;
        let (got, expected) = (*logits.layout(), [logit_rows.len(), 1, self.weight.outputs()]);
        if [got.rows, got.heads, got.dim] != expected {
            let got = format!("[{}, {}, {}]", got.rows, got.heads, got.dim);
            return invalid("logits", got, format!("{expected:?}"));
        }
        decoder.run(kernels, batch, inputs, &mut taps, scratch)?;
        if taps.layers.contains(&decoder.layers.len()) {
            let normed = resized(&mut scratch.normed, tokens * hidden);
            norm_rows(kernels, &scratch.x[..tokens * hidden], &self.norm, self.eps, normed);
            taps.keep(decoder.layers.len(), normed);
        }
        self.score(kernels, logit_rows, scratch, logits)
    }

    /// Logits `[rows.len(), V]` of the rows `rows` of what a [`Decoder`] left in `scratch.x`, which holds `tokens` rows.
    ///
    /// # Errors
    /// `InvalidArgument` for a row beyond them.
    pub fn logits(&self, kernels: HostKernels, rows: &[i64], tokens: usize, scratch: &mut Scratch) -> Result<Vec<f32>> {
        self.check_rows(rows, tokens)?;
        let outputs = self.weight.outputs();
        let mut logits = vec![0.0; rows.len() * outputs];
        let out = rows_mut_of("logits", &mut logits, rows.len(), outputs)?;
        self.score(kernels, rows, scratch, out)?;
        Ok(logits)
    }

    fn check_rows(&self, rows: &[i64], tokens: usize) -> Result<()> {
        match rows.iter().find(|&&row| row < 0 || row as usize >= tokens) {
            Some(row) => invalid("logit_rows", row, indices(tokens)),
            None => Ok(()),
        }
    }

    /// Logits of rows that were checked.
    fn score(&self, kernels: HostKernels, rows: &[i64], scratch: &mut Scratch, out: RowsMut<'_, f32>) -> Result<()> {
        let hidden = self.norm.len();
        let Scratch { x, normed, inner, .. } = scratch;
        let picked = resized(inner, rows.len() * hidden);
        for (to, &row) in picked.chunks_exact_mut(hidden).zip(rows) {
            to.copy_from_slice(&x[row as usize * hidden..][..hidden]);
        }
        let normed = resized(normed, rows.len() * hidden);
        norm_rows(kernels, picked, &self.norm, self.eps, normed);
        let x = rows_of("x", normed, rows.len(), hidden)?;
        self.weight.product(kernels.isa, kernels.threads, x, None, out)
    }
}
