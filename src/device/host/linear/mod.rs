//! Products with a fixed weight and few rows: `y = x W^T + b + residual`.
//!
//! Verifying a block is a product of 8 or 16 rows where plain decoding has one. General libraries repack the weight on every call and
//! pick another order of summation for every number of rows. Here the weight is packed once, is read once for up to eight rows, and
//! takes half the memory where its values are bfloat16 (as stored in most checkpoints) although the arithmetic is f32.
//!
//! Promise: element `(row, n)` is `sum over k ascending of x[row][k] * W[n][k]`, one fused multiply-add each, then `+ b[n]`, then
//! `+ residual[row][n]`. It depends on its own row only, bit for bit: not on the other rows, the threads, or how W is stored.
//! In [`Precision::Medium`] x and W are rounded to bfloat16 first and k runs 1, 0, 3, 2, 5, 4, ...: products of bfloat16 values are
//! exact in f32, and that is the order of the instruction that adds two of them at once.
//!
//! ```text
//!   W [N, K]  -->  panels of 32 outputs, each [K, 32]        x rows, as many at a time as their sums fit the registers
//!                  acc[r][v] += x[r][k] * panel[k][v]         while the next panel is on its way from memory
//! ```
//!
//! One row is as fast as memory delivers the weight. Several rows multiply longer than that, but a panel's first rows would wait for it and
//! memory would idle during the others. So every pass over a panel asks for a share of the next one.

mod stored;

use super::simd::{Isa, Lanes, Routine, dispatch};
use super::team;
use super::view::{Bf16, Element, LANES, Rows, RowsMut};
use crate::error::{Error, Result};
use std::ops::Range;

pub use stored::Stored;

/// One value per output, where there is a bias.
fn check_bias<T>(bias: Option<&[T]>, outputs: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.len() != outputs => Err(Error::Length {
            name: "bias",
            got: bias.len(),
            expected: outputs,
        }),
        _ => Ok(()),
    }
}

/// Vectors, and outputs, of a panel.
const VECTORS: usize = 2;
pub(super) const PANEL: usize = VECTORS * LANES;
/// Inputs that are multiplied between two requests for the next panel, and the bytes that memory delivers at once.
const STRETCH: usize = 8;
const LINE: usize = 64;
/// Multiply-adds that are worth handing out: some microseconds of work.
pub(super) const WORK_PER_PART: usize = 1 << 17;

/// What is multiplied; sums are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Inputs and weights as they are.
    #[default]
    Highest,
    /// Both rounded to bfloat16. Twice the speed where the processor multiplies pairs of them ([`Isa::multiplies_bf16`]), the same
    /// bits where it does not.
    Medium,
}

/// Two inputs, or two weights of an output.
type Pair = [Bf16; 2];

/// How a packed weight is stored.
#[derive(Clone, Debug)]
enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<Bf16>),
    /// `[K / 2, 32]`, for [`Precision::Medium`].
    Pairs(Vec<Pair>),
}

/// A weight `[N, K]` and an optional bias `[N]`, packed for products with few rows.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    inputs: usize,
    outputs: usize,
    panels: Panels,
    bias: Option<Vec<f32>>,
}

/// A stored weight: sixteen of them, of as many outputs, meet one input at a time.
trait Weight: Copy + Send + Sync {
    type Input: Copy;
    type Vector<L: Lanes>: Copy;
    /// The panels, if they are stored so.
    fn stored(panels: &Panels) -> Option<&[Self]>;
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [Self::Input];
    fn vector<L: Lanes>(w: &[Self; LANES]) -> Self::Vector<L>;
    fn add<L: Lanes>(sum: L, x: Self::Input, w: Self::Vector<L>) -> L;
}

impl Weight for f32 {
    type Input = f32;
    type Vector<L: Lanes> = L;
    fn stored(panels: &Panels) -> Option<&[Self]> {
        match panels {
            Panels::F32(panels) => Some(panels),
            _ => None,
        }
    }
    #[inline(always)]
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [f32] {
        job.x.row(job.place(row), 0)
    }
    #[inline(always)]
    fn vector<L: Lanes>(w: &[Self; LANES]) -> L {
        L::load(w)
    }
    #[inline(always)]
    fn add<L: Lanes>(sum: L, x: f32, w: L) -> L {
        L::splat(x).mul_add(w, sum)
    }
}

impl Weight for Bf16 {
    type Input = f32;
    type Vector<L: Lanes> = L;
    fn stored(panels: &Panels) -> Option<&[Self]> {
        match panels {
            Panels::Bf16(panels) => Some(panels),
            _ => None,
        }
    }
    #[inline(always)]
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [f32] {
        job.x.row(job.place(row), 0)
    }
    #[inline(always)]
    fn vector<L: Lanes>(w: &[Self; LANES]) -> L {
        L::load_bf16(w)
    }
    #[inline(always)]
    fn add<L: Lanes>(sum: L, x: f32, w: L) -> L {
        L::splat(x).mul_add(w, sum)
    }
}

impl Weight for Pair {
    type Input = Self;
    type Vector<L: Lanes> = L::Pairs;
    fn stored(panels: &Panels) -> Option<&[Self]> {
        match panels {
            Panels::Pairs(panels) => Some(panels),
            _ => None,
        }
    }
    #[inline(always)]
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [Self] {
        let (row, width) = (job.place(row), job.weight.inputs.next_multiple_of(2));
        job.rounded[row * width..(row + 1) * width].as_chunks().0
    }
    #[inline(always)]
    fn vector<L: Lanes>(w: &[Self; LANES]) -> L::Pairs {
        L::load_pairs(w)
    }
    #[inline(always)]
    fn add<L: Lanes>(sum: L, x: Self, w: L::Pairs) -> L {
        sum.add_pairs(L::splat_pair(x), w)
    }
}

impl PackedWeight {
    /// Packs `weight`, row-major `[outputs, inputs]`.
    ///
    /// # Errors
    /// `Length` for a weight or bias of another size, `InvalidArgument` for an empty one.
    pub fn new(
        weight: &[f32],
        outputs: usize,
        inputs: usize,
        bias: Option<&[f32]>,
        precision: Precision,
    ) -> Result<Self> {
        if outputs == 0 || inputs == 0 {
            return Err(Error::InvalidArgument {
                name: "weight",
                got: format!("[{outputs}, {inputs}]"),
                expected: "at least one output and one input".into(),
            });
        }
        if weight.len() != outputs * inputs {
            return Err(Error::Length {
                name: "weight",
                got: weight.len(),
                expected: outputs * inputs,
            });
        }
        check_bias(bias, outputs)?;
        let halves = weight.iter().all(|w| w.to_bits() & 0xffff == 0);
        let panels = match precision {
            Precision::Medium => Panels::Pairs(pack_pairs(weight, outputs, inputs)),
            Precision::Highest if halves => Panels::Bf16(pack(weight, outputs, inputs, Bf16::from)),
            Precision::Highest => Panels::F32(pack(weight, outputs, inputs, |w| w)),
        };
        Ok(Self {
            inputs,
            outputs,
            panels,
            bias: bias.map(<[f32]>::to_vec),
        })
    }

    /// Columns of the weight, K.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Rows of the weight, N.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Bytes the packed weight takes.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(&panels[..]),
            Panels::Bf16(panels) => size_of_val(&panels[..]),
            Panels::Pairs(panels) => size_of_val(&panels[..]),
        }
    }

    /// Writes `x W^T + b + residual` to `out`. `x` is `[M, K]`, `residual` and `out` `[M, N]`, one head each.
    ///
    /// # Errors
    /// `InvalidArgument` naming the array whose shape does not fit.
    pub fn product(
        &self,
        isa: Isa,
        threads: usize,
        x: Rows<'_, f32>,
        residual: Option<Rows<'_, f32>>,
        out: RowsMut<'_, f32>,
    ) -> Result<()> {
        let rows = x.layout().rows;
        let shapes = [
            ("x", Some(*x.layout()), self.inputs),
            ("residual", residual.as_ref().map(|r| *r.layout()), self.outputs),
            ("out", Some(*out.layout()), self.outputs),
        ];
        for (name, layout, width) in shapes {
            if let Some(layout) = layout
                && (layout.rows, layout.heads, layout.dim) != (rows, 1, width)
            {
                return Err(Error::InvalidArgument {
                    name,
                    got: format!("[{}, {}, {}]", layout.rows, layout.heads, layout.dim),
                    expected: format!("[{rows}, 1, {width}]"),
                });
            }
        }
        let rounded = self.rounded(isa, &x);
        let job = Job {
            weight: self,
            x,
            picked: None,
            rounded: &rounded,
            residual,
        };
        // Parts are runs of panels: every one needs all rows, so each weight is read by one thread only.
        let panels = self.panels();
        let work = rows * self.inputs * self.outputs;
        let parts = (work / WORK_PER_PART).clamp(1, 4 * threads.max(1)).min(panels);
        let each = panels.div_ceil(parts);
        let parts = (0..).step_by(each).zip(out.split_columns(each * PANEL)).collect();
        team::each(threads, parts, |(first, out): (usize, _)| {
            // The parts between are the other threads'.
            let then = first + each * threads.clamp(1, panels);
            job.run(isa, first..panels.min(first + each), Some((self, then)), out);
        });
        Ok(())
    }

    /// Panels of its outputs.
    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// What a [`Job`] takes beside the rows `x`: the same in bfloat16 if the weight is stored in pairs, else nothing.
    pub(super) fn rounded(&self, isa: Isa, x: &Rows<'_, f32>) -> Vec<Bf16> {
        let mut out = Vec::new();
        if let Panels::Pairs(_) = self.panels {
            out.resize(x.layout().rows * self.inputs.next_multiple_of(2), Bf16::default());
            dispatch(isa, Round { x, out: &mut out });
        }
        out
    }
}

fn pack<W: Copy + Default>(weight: &[f32], outputs: usize, inputs: usize, store: impl Fn(f32) -> W) -> Vec<W> {
    let mut panels = vec![W::default(); outputs.div_ceil(PANEL) * PANEL * inputs];
    for (n, row) in weight.chunks_exact(inputs).enumerate() {
        let panel = &mut panels[n / PANEL * PANEL * inputs..];
        for (k, &w) in row.iter().enumerate() {
            panel[k * PANEL + n % PANEL] = store(w);
        }
    }
    panels
}

/// Rows of f32 as rows of bfloat16, with room for an even number of them; an odd last one meets zero.
struct Round<'a, 'x> {
    x: &'a Rows<'x, f32>,
    out: &'a mut [Bf16],
}

impl Routine for Round<'_, '_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let width = self.x.layout().dim;
        for (row, out) in self.out.chunks_exact_mut(width.next_multiple_of(2)).enumerate() {
            Bf16::narrow(self.x.row(row, 0), &mut out[..width]);
        }
    }
}

fn pack_pairs(weight: &[f32], outputs: usize, inputs: usize) -> Vec<Pair> {
    let depth = inputs.div_ceil(2);
    let mut panels = vec![Pair::default(); outputs.div_ceil(PANEL) * PANEL * depth];
    for (n, row) in weight.chunks_exact(inputs).enumerate() {
        let panel = &mut panels[n / PANEL * PANEL * depth..];
        for (k, &w) in row.iter().enumerate() {
            panel[k / 2 * PANEL + n % PANEL][k % 2] = w.into();
        }
    }
    panels
}

/// What a product reads. Threads share it and take disjoint panels.
pub(super) struct Job<'a> {
    pub weight: &'a PackedWeight,
    /// `[_, 1, K]`.
    pub x: Rows<'a, f32>,
    /// Which rows of `x` are multiplied; without, all are.
    pub picked: Option<&'a [usize]>,
    /// [`PackedWeight::rounded`] of all of `x`.
    pub rounded: &'a [Bf16],
    pub residual: Option<Rows<'a, f32>>,
}

impl Job<'_> {
    fn rows(&self) -> usize {
        self.picked.map_or(self.x.layout().rows, <[usize]>::len)
    }

    /// The row of `x` that is the product's row `row`.
    #[inline(always)]
    fn place(&self, row: usize) -> usize {
        self.picked.map_or(row, |picked| picked[row])
    }

    /// All rows of the outputs in `panels`, to `out`, which holds these columns. `then` is the panel that this thread will need next, most
    /// likely, and whose it is.
    pub(super) fn run(
        &self,
        isa: Isa,
        panels: Range<usize>,
        then: Option<(&PackedWeight, usize)>,
        out: RowsMut<'_, f32>,
    ) {
        match &self.weight.panels {
            Panels::F32(all) => self.share(isa, all, panels, then, out),
            Panels::Bf16(all) => self.share(isa, all, panels, then, out),
            Panels::Pairs(all) => self.share(isa, all, panels, then, out),
        }
    }

    fn share<W: Weight>(
        &self,
        isa: Isa,
        all: &[W],
        panels: Range<usize>,
        then: Option<(&PackedWeight, usize)>,
        out: RowsMut<'_, f32>,
    ) {
        let size = all.len() / self.weight.panels();
        let then = then.and_then(|(weight, panel)| {
            let all = W::stored(&weight.panels)?;
            let size = all.len() / weight.panels();
            all.get(panel * size..(panel + 1) * size)
        });
        let share = Share {
            job: self,
            panels: &all[panels.start * size..panels.end * size],
            then: then.unwrap_or(&[]),
            size,
            first: panels.start,
            out,
        };
        dispatch(isa, share);
    }
}

struct Share<'a, W> {
    job: &'a Job<'a>,
    panels: &'a [W],
    /// The panel behind them.
    then: &'a [W],
    /// Weights of a panel.
    size: usize,
    /// Index of the first of them.
    first: usize,
    /// Their outputs of all rows.
    out: RowsMut<'a, f32>,
}

/// Rows that stay in cache while the weight passes by once.
const PASS: usize = 256;

impl<W: Weight> Routine for Share<'_, W> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let rows = self.job.rows();
        for begin in (0..rows).step_by(PASS) {
            let end = rows.min(begin + PASS);
            let passes = (end - begin).div_ceil(L::PRODUCT_ROWS);
            let calls = passes * VECTORS / L::PRODUCT_VECTORS;
            for (at, panel) in self.panels.chunks_exact(self.size).enumerate() {
                let next = self.panels.get((at + 1) * self.size..).unwrap_or(&[]);
                let next = if next.is_empty() { self.then } else { &next[..self.size] };
                let mut shares = next.chunks(next.len().div_ceil(calls).max(1));
                for pass in 0..passes {
                    let rows = begin + (end - begin) * pass / passes..begin + (end - begin) * (pass + 1) / passes;
                    for vector in (0..VECTORS).step_by(L::PRODUCT_VECTORS) {
                        let ahead = shares.next().unwrap_or(&[]);
                        if L::PRODUCT_VECTORS == 1 {
                            self.rows::<L, 1>(at, panel, rows.clone(), vector, ahead);
                        } else {
                            self.rows::<L, VECTORS>(at, panel, rows.clone(), vector, ahead);
                        }
                    }
                }
            }
        }
    }
}

impl<W: Weight> Share<'_, W> {
    /// Up to eight rows times `V` vectors of the panel that is `at` in these, from `vector` on.
    #[inline(always)]
    fn rows<L: Lanes, const V: usize>(
        &mut self,
        at: usize,
        panel: &[W],
        rows: Range<usize>,
        vector: usize,
        ahead: &[W],
    ) {
        match rows.len() {
            8 => self.block::<L, 8, V>(at, panel, rows.start, vector, ahead),
            7 => self.block::<L, 7, V>(at, panel, rows.start, vector, ahead),
            6 => self.block::<L, 6, V>(at, panel, rows.start, vector, ahead),
            5 => self.block::<L, 5, V>(at, panel, rows.start, vector, ahead),
            4 => self.block::<L, 4, V>(at, panel, rows.start, vector, ahead),
            3 => self.block::<L, 3, V>(at, panel, rows.start, vector, ahead),
            2 => self.block::<L, 2, V>(at, panel, rows.start, vector, ahead),
            _ => self.block::<L, 1, V>(at, panel, rows.start, vector, ahead),
        }
    }

    /// `R` rows, from `row` on, times `V` vectors. Meanwhile `ahead` is brought near.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "see the loops")]
    fn block<L: Lanes, const R: usize, const V: usize>(
        &mut self,
        at: usize,
        panel: &[W],
        row: usize,
        vector: usize,
        ahead: &[W],
    ) {
        let first = (self.first + at) * PANEL + vector * LANES;
        let width = (V * LANES).min(self.job.weight.outputs.saturating_sub(first));
        if width == 0 {
            return; // the last panel is half empty
        }
        let mut acc = [[L::splat(0.0); V]; R];
        let weights = panel.as_chunks::<LANES>().0.as_chunks::<VECTORS>().0;
        let mut x = [&[][..]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &W::inputs(self.job, row + r)[..weights.len()];
        }
        let stretches = weights.len().div_ceil(STRETCH);
        let mut ahead = ahead.chunks(
            ahead
                .len()
                .div_ceil(stretches)
                .next_multiple_of(LINE / size_of::<W>())
                .max(1),
        );
        for (stretch, weights) in weights.chunks(STRETCH).enumerate() {
            if let Some(ahead) = ahead.next() {
                for line in ahead.chunks(LINE / size_of::<W>()) {
                    L::fetch(&line[0]);
                }
            }
            for (k, w) in (stretch * STRETCH..).zip(weights) {
                // Counted loops: these unroll early enough for the sums to live in registers.
                let mut lanes = [W::vector::<L>(&w[vector]); V];
                for v in 1..V {
                    lanes[v] = W::vector::<L>(&w[vector + v]);
                }
                for r in 0..R {
                    for v in 0..V {
                        acc[r][v] = W::add(acc[r][v], x[r][k], lanes[v]);
                    }
                }
            }
        }
        let own = at * PANEL + vector * LANES;
        for (r, sums) in acc.iter().enumerate() {
            let mut y = [[0.0; LANES]; V];
            for (y, sum) in y.iter_mut().zip(sums) {
                sum.store(y);
            }
            let y = &mut y.as_flattened_mut()[..width];
            if let Some(bias) = &self.job.weight.bias {
                add(y, &bias[first..first + width]);
            }
            if let Some(residual) = &self.job.residual {
                add(y, &residual.row(row + r, 0)[first..first + width]);
            }
            self.out.row_mut(row + r, 0)[own..own + width].copy_from_slice(y);
        }
    }
}

#[inline(always)]
fn add(y: &mut [f32], other: &[f32]) {
    for (y, other) in y.iter_mut().zip(other) {
        *y += other;
    }
}

#[cfg(test)]
mod tests;
