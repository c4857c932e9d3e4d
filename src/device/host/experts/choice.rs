//! Which experts a row goes to, and what each counts for it.

use super::super::linear::{PackedWeight, Precision};
use super::super::simd::{Isa, Lanes, Routine, dispatch};
use super::super::view::{LANES, Layout, Rows, RowsMut};
use super::invalid;
use crate::error::{Error, Result};

/// The experts of some rows, grouped by expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Rows that chose an expert, ascending, are `rows[starts[e]..starts[e + 1]]`; the shared expert's come last.
    starts: Vec<usize>,
    rows: Vec<usize>,
    weights: Vec<f32>,
    /// Rows altogether, and experts, the shared one aside.
    sizes: (usize, usize),
}

impl Choice {
    /// Row r goes to the experts `indices[r * top_k..][..top_k]`, which count as much as `weights` at the same place. An index `experts`
    /// stands for none.
    ///
    /// # Errors
    /// `Length` for arrays that are no whole rows or differ in length, `InvalidArgument` for an index beyond `experts`.
    pub fn new(experts: usize, top_k: usize, indices: &[i64], weights: &[f32]) -> Result<Self> {
        let rows = indices.len().checked_div(top_k).unwrap_or(0);
        if indices.len() != rows * top_k {
            return Err(Error::Length {
                name: "indices",
                got: indices.len(),
                expected: rows * top_k,
            });
        }
        if weights.len() != indices.len() {
            return Err(Error::Length {
                name: "weights",
                got: weights.len(),
                expected: indices.len(),
            });
        }
        if let Some(bad) = indices.iter().find(|&&index| index < 0 || index as usize > experts) {
            return invalid("indices", bad, format!("0..{experts}, or {experts} for none"));
        }
        Ok(Self::grouped(rows, experts, top_k, indices, weights, &[]))
    }

    /// `indices` within bounds; `shared`: what the shared expert counts for each row, if there is one.
    fn grouped(rows: usize, experts: usize, top_k: usize, indices: &[i64], weights: &[f32], shared: &[f32]) -> Self {
        let mut starts = vec![0; experts + 2];
        for &index in indices {
            starts[index as usize + 1] += 1;
        }
        let all = indices.len() - starts[experts + 1] + shared.len();
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        starts[experts + 1] = all;
        let (mut chosen, mut counts) = (vec![0; all], vec![0.0; all]);
        let mut ends = starts.clone();
        for (at, (&index, &weight)) in indices.iter().zip(weights).enumerate() {
            let expert = index as usize;
            if expert < experts {
                chosen[ends[expert]] = at / top_k;
                counts[ends[expert]] = weight;
                ends[expert] += 1;
            }
        }
        for (row, &weight) in shared.iter().enumerate() {
            chosen[starts[experts] + row] = row;
            counts[starts[experts] + row] = weight;
        }
        Self {
            starts,
            rows: chosen,
            weights: counts,
            sizes: (rows, experts),
        }
    }

    /// Rows altogether.
    pub fn rows(&self) -> usize {
        self.sizes.0
    }

    /// Experts that there are, the shared one aside.
    pub(super) fn experts(&self) -> usize {
        self.sizes.1
    }

    /// Whether rows go to the shared expert.
    pub(super) fn has_shared(&self) -> bool {
        self.starts[self.sizes.1] < self.rows.len()
    }

    /// Every expert that a row goes to (None: the shared one), ascending: its rows, and what it counts for each.
    pub(super) fn groups(&self) -> impl Iterator<Item = (Option<usize>, &[usize], &[f32])> {
        let ends = self.starts.windows(2).enumerate().filter(|(_, ends)| ends[0] < ends[1]);
        ends.map(|(expert, ends)| {
            let range = ends[0]..ends[1];
            let index = (expert < self.sizes.1).then_some(expert);
            (index, &self.rows[range.clone()], &self.weights[range])
        })
    }
}

/// The product whose softmax says which experts a row goes to, and behind it one row for the gate of the shared expert.
#[derive(Clone, Debug)]
pub(super) struct Router {
    experts: usize,
    top_k: usize,
    normalised: bool,
    weight: PackedWeight,
}

impl Router {
    /// `rows` `[experts, H]`, `gate` `[H]`.
    pub(super) fn new(
        rows: &[f32],
        gate: Option<&[f32]>,
        (experts, hidden): (usize, usize),
        top_k: usize,
        normalised: bool,
    ) -> Result<Self> {
        if top_k == 0 || top_k > experts {
            return invalid("top_k", top_k, format!("1..={experts}"));
        }
        let rows = [rows, gate.unwrap_or(&[])].concat();
        let outputs = experts + usize::from(gate.is_some());
        Ok(Self {
            experts,
            top_k,
            normalised,
            weight: PackedWeight::new(&rows, outputs, hidden, None, Precision::Highest)?,
        })
    }

    pub(super) fn top_k(&self) -> usize {
        self.top_k
    }

    pub(super) fn bytes(&self) -> usize {
        self.weight.bytes()
    }

    /// The experts of the rows `x`. Of equal ones the lowest is taken; a row that is not a number stays none.
    pub(super) fn choose(&self, isa: Isa, threads: usize, x: Rows<'_, f32>) -> Result<Choice> {
        let (rows, width) = (x.layout().rows, self.weight.outputs());
        let mut logits = vec![0.0; rows * width];
        let out = RowsMut::from_slice("logits", &mut logits, Layout::contiguous(rows, 1, width))?;
        self.weight.product(isa, threads, x, None, out)?;
        let (mut indices, mut weights) = (Vec::new(), Vec::new());
        let mut shared = Vec::new();
        dispatch(
            isa,
            Choose {
                router: self,
                logits: &mut logits,
                indices: &mut indices,
                weights: &mut weights,
                shared: &mut shared,
            },
        );
        Ok(Choice::grouped(
            rows,
            self.experts,
            self.top_k,
            &indices,
            &weights,
            &shared,
        ))
    }
}

/// Softmax and its largest, row by row.
struct Choose<'a> {
    router: &'a Router,
    logits: &'a mut [f32],
    indices: &'a mut Vec<i64>,
    weights: &'a mut Vec<f32>,
    shared: &'a mut Vec<f32>,
}

impl Routine for Choose<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Router {
            experts,
            top_k,
            normalised,
            ref weight,
        } = *self.router;
        let mut best = Vec::with_capacity(top_k + 1);
        for row in self.logits.chunks_exact_mut(weight.outputs()) {
            let (logits, gate) = row.split_at_mut(experts);
            largest(logits, top_k, &mut best);
            let sum = exponentials::<L>(logits, best.first().map_or(f32::NAN, |&(most, _)| most));
            let first = self.weights.len();
            self.indices.extend(best.iter().map(|&(_, index)| index as i64));
            self.weights.extend(best.iter().map(|&(_, index)| logits[index] / sum));
            self.indices.resize(first + top_k, 0);
            self.weights.resize(first + top_k, f32::NAN);
            if normalised {
                let chosen = &mut self.weights[first..];
                let sum = chosen.iter().fold(0.0, |sum, weight| sum + weight);
                chosen.iter_mut().for_each(|weight| *weight /= sum);
            }
            if let [gate] = gate {
                self.shared.push(sigmoid::<L>(*gate));
            }
        }
    }
}

/// The `k` largest numbers and where they are, falling, the first of equal ones first.
#[inline(always)]
fn largest(row: &[f32], k: usize, best: &mut Vec<(f32, usize)>) {
    best.clear();
    for (index, &x) in row.iter().enumerate() {
        if best.len() == k && !best.last().is_some_and(|&(worst, _)| x > worst) {
            continue;
        }
        // What does not compare, a NaN, is behind everything and then dropped.
        if x.is_nan() {
            continue;
        }
        let place = best.iter().position(|&(other, _)| x > other).unwrap_or(best.len());
        best.insert(place, (x, index));
        best.truncate(k);
    }
}

/// Makes `exp(x - most)` of a row, and gives the sum.
#[inline(always)]
fn exponentials<L: Lanes>(row: &mut [f32], most: f32) -> f32 {
    let (top, scale) = (L::splat(most), L::splat(std::f32::consts::LOG2_E));
    let mut sums = L::splat(0.0);
    for chunk in row.chunks_mut(LANES) {
        let mut x = [f32::NEG_INFINITY; LANES];
        x[..chunk.len()].copy_from_slice(chunk);
        let e = L::load(&x).sub(top).mul(scale).exp2();
        sums = sums.add(e);
        e.store(&mut x);
        chunk.copy_from_slice(&x[..chunk.len()]);
    }
    sums.sum()
}

/// `1 / (1 + exp(-x))`, the exponential taken of `-|x|`.
#[inline(always)]
fn sigmoid<L: Lanes>(x: f32) -> f32 {
    let (x, one, zero) = (L::splat(x), L::splat(1.0), L::splat(0.0));
    let negative = zero.sub(x.max(zero.sub(x)));
    let e = negative.mul(L::splat(std::f32::consts::LOG2_E)).exp2();
    let top = e.add(one.sub(e).zero_where_below(x, 0.0));
    let mut all = [0.0; LANES];
    top.div(one.add(e)).store(&mut all);
    all[0]
}
