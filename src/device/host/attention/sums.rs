//! Sums over keys and weights, sixteen lanes at a time, in the order that the module promises.

use super::super::simd::Lanes;
use super::super::view::{KeyChunk, LANES};
use std::ops::Range;

#[inline(always)]
pub(super) fn sixteen(x: &[f32], at: usize) -> &[f32; LANES] {
    x[at..at + LANES].try_into().expect("sixteen elements")
}

#[inline(always)]
pub(super) fn sixteen_mut(x: &mut [f32], at: usize) -> &mut [f32; LANES] {
    (&mut x[at..at + LANES]).try_into().expect("sixteen elements")
}

/// A soft cap on scores that are in units of log2.
pub(super) struct Cap<L> {
    /// From a score to the exponent of t, see [`Cap::of`].
    down: L,
    /// From the hyperbolic tangent back to a score.
    up: L,
}

impl<L: Lanes> Cap<L> {
    #[inline(always)]
    pub(super) fn new(softcap: f32) -> Self {
        Self {
            down: L::splat(-2.0 / softcap),
            up: L::splat(softcap * std::f32::consts::LOG2_E),
        }
    }

    /// `c * tanh(score / c)`. With t = e^(-2x) it is (1 - t) / (1 + t); beyond |x| = 10 that is 1 in f32.
    #[inline(always)]
    pub(super) fn of(&self, score: L) -> L {
        let zero = L::splat(0.0);
        let limit = L::splat(-10.0 * 2.0 * std::f32::consts::LOG2_E);
        let power = score.mul(self.down);
        // The smaller of two is minus the larger of both with the other sign.
        let power = zero.sub(zero.sub(power.max(limit)).max(limit));
        let (one, t) = (L::splat(1.0), power.exp2());
        // What is not a number stays so: the bounds above may have dropped it.
        one.sub(t).div(one.add(t)).mul_add(self.up, score.sub(score))
    }
}

/// Weights in place of scores, and their sum with that of the `sink`. Masked scores are minus infinity and become exactly 0.
#[inline(always)]
pub(super) fn softmax<L: Lanes>(scores: &mut [f32], sink: Option<f32>) -> f32 {
    let mut max = L::splat(sink.unwrap_or(f32::NEG_INFINITY));
    for at in (0..scores.len()).step_by(LANES) {
        max = max.max(L::load(sixteen(scores, at)));
    }
    let max = L::splat(max.max_lane());
    let mut sum = L::splat(0.0);
    for at in (0..scores.len()).step_by(LANES) {
        let weights = L::load(sixteen(scores, at)).sub(max).exp2();
        weights.store(sixteen_mut(scores, at));
        sum = sum.add(weights);
    }
    let Some(sink) = sink else { return sum.sum() };
    let mut weight = [0.0; LANES];
    L::splat(sink).sub(max).exp2().store(&mut weight);
    sum.sum() + weight[0]
}

/// `acc[row] += weights[row][key] * values[key]` for the keys in `seen`, `R` rows at once.
#[inline(always)]
pub(super) fn accumulate<L: Lanes, const R: usize>(
    weights: &[f32],
    stride: usize,
    values: &KeyChunk<'_>,
    seen: Range<usize>,
    acc: &mut [f32],
) {
    let weights: [&[f32; LANES]; R] = std::array::from_fn(|row| sixteen(weights, row * stride));
    let mut d = 0;
    while d + 4 <= values.vectors() && L::VECTORS >= 4 {
        accumulate_block::<L, R, 4>(weights, values, seen.clone(), acc, d);
        d += 4;
    }
    while d + 2 <= values.vectors() {
        accumulate_block::<L, R, 2>(weights, values, seen.clone(), acc, d);
        d += 2;
    }
    if d < values.vectors() {
        accumulate_block::<L, R, 1>(weights, values, seen, acc, d);
    }
}

/// The same for `D` vectors of the head from vector `first` on; `R * D` accumulators stay in registers.
#[inline(always)]
fn accumulate_block<L: Lanes, const R: usize, const D: usize>(
    weights: [&[f32; LANES]; R],
    values: &KeyChunk<'_>,
    seen: Range<usize>,
    acc: &mut [f32],
    first: usize,
) {
    let width = values.vectors() * LANES;
    let at = |row: usize, d: usize| row * width + (first + d) * LANES;
    let mut sums = [[L::splat(0.0); D]; R];
    for (row, sums) in sums.iter_mut().enumerate() {
        for (d, sum) in sums.iter_mut().enumerate() {
            *sum = L::load(sixteen(acc, at(row, d)));
        }
    }
    for key in seen.start..seen.end.min(LANES) {
        let mut value = [L::splat(0.0); D];
        for (d, value) in value.iter_mut().enumerate() {
            *value = L::load(values.vector(key, first + d));
        }
        for (sums, weights) in sums.iter_mut().zip(weights) {
            let weight = L::splat(weights[key]);
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = value.mul_add(weight, *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (d, sum) in sums.iter().enumerate() {
            sum.store(sixteen_mut(acc, at(row, d)));
        }
    }
}

#[inline(always)]
pub(super) fn add_scaled<L: Lanes>(weight: f32, values: &KeyChunk<'_>, key: usize, acc: &mut [f32]) {
    for d in 0..values.vectors() {
        let sum = L::load(values.vector(key, d)).mul_add(L::splat(weight), L::load(sixteen(acc, d * LANES)));
        sum.store(sixteen_mut(acc, d * LANES));
    }
}
