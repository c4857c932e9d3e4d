//! The draft context of committed tokens.

use std::sync::Arc;

use super::{Scratch, check_len, check_weight, invalid, multiply, resized};
use crate::device::host::linear::PackedWeight;
use crate::device::host::rowwise::{RotateHead, rms_norm};
use crate::device::host::simd::dispatch;
use crate::device::host::{HostKernels, Rows, RowsMut};
use crate::error::{Result, indices};

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
        let isa = kernels.isa;
        let picked = resized(&mut scratch.gate_up, count * wide);
        for (to, &row) in picked.chunks_exact_mut(wide.max(1)).zip(rows) {
            to.copy_from_slice(features.row(row as usize, 0));
        }
        let x = resized(&mut scratch.x, count * hidden);
        multiply(kernels, &self.fc, count, picked, None, x)?;
        let normed = resized(&mut scratch.normed, count * hidden);
        rms_norm(isa, x, &self.norm, self.eps, normed);
        let outputs = self.key_values.outputs();
        let kv = resized(&mut scratch.qkv, count * outputs);
        multiply(kernels, &self.key_values, count, normed, None, kv)?;
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
