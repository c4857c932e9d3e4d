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
//!   W [N, K]  -->  panels of 32 outputs, each [K, 32]        x rows, eight at a time
//!                  acc[8][2] += x[r][k] * panel[k][0..32]     16 sums and 2 weight vectors live in registers
//! ```

use super::simd::{Isa, Lanes, Routine, dispatch};
use super::team;
use super::view::{Bf16, Element, LANES, Rows, RowsMut};
use crate::error::{Error, Result};
use std::ops::Range;

/// Vectors, and outputs, of a panel.
const VECTORS: usize = 2;
const PANEL: usize = VECTORS * LANES;
/// Multiply-adds that are worth handing out: some microseconds of work.
const WORK_PER_PART: usize = 1 << 17;

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
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [Self::Input];
    fn vector<L: Lanes>(w: &[Self; LANES]) -> Self::Vector<L>;
    fn add<L: Lanes>(sum: L, x: Self::Input, w: Self::Vector<L>) -> L;
}

impl Weight for f32 {
    type Input = f32;
    type Vector<L: Lanes> = L;
    #[inline(always)]
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [f32] {
        job.x.row(row, 0)
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
    #[inline(always)]
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [f32] {
        job.x.row(row, 0)
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
    #[inline(always)]
    fn inputs<'a>(job: &'a Job<'_>, row: usize) -> &'a [Self] {
        let width = job.weight.inputs.next_multiple_of(2);
        job.rounded[row * width..(row + 1) * width].as_chunks().0
    }
    #[inline(always)]
    fn vector<L: Lanes>(w: &[Self; LANES]) -> L::Pairs {
        L::load_pairs(w)
    }
    #[inline(always)]
    fn add<L: Lanes>(sum: L, x: Self, w: L::Pairs) -> L {
        sum.add_pairs(x, w)
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
        if let Some(bias) = bias
            && bias.len() != outputs
        {
            return Err(Error::Length {
                name: "bias",
                got: bias.len(),
                expected: outputs,
            });
        }
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
        let mut rounded = Vec::new();
        if let Panels::Pairs(_) = self.panels {
            rounded.resize(rows * self.inputs.next_multiple_of(2), Bf16::default());
            dispatch(
                isa,
                Round {
                    x: &x,
                    out: &mut rounded,
                },
            );
        }
        let job = Job {
            weight: self,
            x,
            rounded,
            residual,
        };
        // Parts are runs of panels: every one needs all rows, so each weight is read by one thread only.
        let panels = self.outputs.div_ceil(PANEL);
        let work = rows * self.inputs * self.outputs;
        let parts = (work / WORK_PER_PART).clamp(1, 4 * threads.max(1)).min(panels);
        let each = panels.div_ceil(parts);
        let parts = (0..).step_by(each).zip(out.split_columns(each * PANEL)).collect();
        team::each(threads, parts, |(first, out): (usize, _)| {
            job.run(isa, first..panels.min(first + each), out);
        });
        Ok(())
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

/// What a call reads. Threads share it and take disjoint panels.
struct Job<'a> {
    weight: &'a PackedWeight,
    x: Rows<'a, f32>,
    /// The rows of `x` in bfloat16, if the weight is stored in pairs.
    rounded: Vec<Bf16>,
    residual: Option<Rows<'a, f32>>,
}

impl Job<'_> {
    /// All rows of the outputs in `panels`, to `out`, which holds these columns.
    fn run(&self, isa: Isa, panels: Range<usize>, out: RowsMut<'_, f32>) {
        match &self.weight.panels {
            Panels::F32(all) => self.share(isa, all, panels, out),
            Panels::Bf16(all) => self.share(isa, all, panels, out),
            Panels::Pairs(all) => self.share(isa, all, panels, out),
        }
    }

    fn share<W: Weight>(&self, isa: Isa, all: &[W], panels: Range<usize>, out: RowsMut<'_, f32>) {
        let size = all.len() / self.weight.outputs.div_ceil(PANEL);
        let share = Share {
            job: self,
            panels: &all[panels.start * size..panels.end * size],
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
        let rows = self.job.x.layout().rows;
        for begin in (0..rows).step_by(PASS) {
            let end = rows.min(begin + PASS);
            for (index, panel) in (self.first..).zip(self.panels.chunks_exact(self.size)) {
                let mut row = begin;
                while row < end {
                    let size = (end - row).min(L::PRODUCT_ROWS);
                    match size {
                        8 => self.block::<L, 8>(index, panel, row),
                        7 => self.block::<L, 7>(index, panel, row),
                        6 => self.block::<L, 6>(index, panel, row),
                        5 => self.block::<L, 5>(index, panel, row),
                        4 => self.block::<L, 4>(index, panel, row),
                        3 => self.block::<L, 3>(index, panel, row),
                        2 => self.block::<L, 2>(index, panel, row),
                        _ => self.block::<L, 1>(index, panel, row),
                    }
                    row += size;
                }
            }
        }
    }
}

impl<W: Weight> Share<'_, W> {
    /// `R` rows times one panel.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "see the loops")]
    fn block<L: Lanes, const R: usize>(&mut self, index: usize, panel: &[W], row: usize) {
        let mut acc = [[L::splat(0.0); VECTORS]; R];
        let weights = panel.as_chunks::<LANES>().0.as_chunks::<VECTORS>().0;
        let mut x = [&[][..]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &W::inputs(self.job, row + r)[..weights.len()];
        }
        for (k, w) in weights.iter().enumerate() {
            // Counted loops: these unroll early enough for the sums to live in registers.
            let mut lanes = [W::vector::<L>(&w[0]); VECTORS];
            for v in 1..VECTORS {
                lanes[v] = W::vector::<L>(&w[v]);
            }
            for r in 0..R {
                for v in 0..VECTORS {
                    acc[r][v] = W::add(acc[r][v], x[r][k], lanes[v]);
                }
            }
        }
        let first = index * PANEL;
        let width = PANEL.min(self.job.weight.outputs - first);
        let own = (index - self.first) * PANEL;
        for (r, sums) in acc.iter().enumerate() {
            let mut y = [[0.0; LANES]; VECTORS];
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
mod tests {
    use super::super::view::Layout;
    use super::*;
    use proptest::prelude::*;

    fn numbers(count: usize, seed: u64, halves: bool) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let x = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * 2.0;
            if halves { f32::from(Bf16::from(x)) } else { x }
        };
        (0..count).map(|_| next()).collect()
    }

    struct Case {
        rows: usize,
        outputs: usize,
        inputs: usize,
        x: Vec<f32>,
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        residual: Option<Vec<f32>>,
    }

    impl Case {
        fn new(rows: usize, outputs: usize, inputs: usize, halves: bool, seed: u64) -> Self {
            Self {
                rows,
                outputs,
                inputs,
                x: numbers(rows * inputs, seed, false),
                weight: numbers(outputs * inputs, seed + 1, halves),
                bias: seed.is_multiple_of(2).then(|| numbers(outputs, seed + 2, false)),
                residual: seed.is_multiple_of(3).then(|| numbers(rows * outputs, seed + 3, false)),
            }
        }

        fn run(&self, isa: Isa, threads: usize) -> Vec<f32> {
            self.run_in(Precision::Highest, isa, threads)
        }

        fn run_in(&self, precision: Precision, isa: Isa, threads: usize) -> Vec<f32> {
            let bias = self.bias.as_deref();
            let weight = PackedWeight::new(&self.weight, self.outputs, self.inputs, bias, precision).unwrap();
            let mut out = vec![f32::NAN; self.rows * self.outputs];
            let layout = |width| Layout::contiguous(self.rows, 1, width);
            let x = Rows::from_slice("x", &self.x, layout(self.inputs)).unwrap();
            let residual = self
                .residual
                .as_ref()
                .map(|r| Rows::from_slice("residual", r, layout(self.outputs)).unwrap());
            let view = RowsMut::from_slice("out", &mut out, layout(self.outputs)).unwrap();
            weight.product(isa, threads, x, residual, view).unwrap();
            out
        }

        /// The promise, literally.
        fn expected(&self) -> Vec<f32> {
            self.expected_in(|x| x.to_vec())
        }

        /// The promise of `Medium`: rounded, and each pair the other way round.
        fn expected_medium(&self) -> Vec<f32> {
            self.expected_in(|x| {
                let mut rounded: Vec<f32> = x.iter().map(|&x| Bf16::from(x).into()).collect();
                rounded.chunks_mut(2).for_each(<[f32]>::reverse);
                rounded
            })
        }

        fn expected_in(&self, order: impl Fn(&[f32]) -> Vec<f32>) -> Vec<f32> {
            let mut out = Vec::new();
            for r in 0..self.rows {
                for n in 0..self.outputs {
                    let x = order(&self.x[r * self.inputs..][..self.inputs]);
                    let w = order(&self.weight[n * self.inputs..][..self.inputs]);
                    let mut sum = x.into_iter().zip(w).fold(0.0f32, |sum, (x, w)| x.mul_add(w, sum));
                    if let Some(bias) = &self.bias {
                        sum += bias[n];
                    }
                    if let Some(residual) = &self.residual {
                        sum += residual[r * self.outputs + n];
                    }
                    out.push(sum);
                }
            }
            out
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
        #[test]
        fn every_element_is_the_ascending_sum_to_the_bit(
            rows in 1usize..40, outputs in 1usize..100, inputs in 1usize..70, halves: bool, seed in 1u64..1000,
        ) {
            let case = Case::new(rows, outputs, inputs, halves, seed);
            let expected = case.expected();
            for isa in Isa::available() {
                prop_assert_eq!(&case.run(isa, 1), &expected, "{:?}", isa);
            }
        }

        #[test]
        fn products_of_pairs_are_those_of_rounded_inputs_to_the_bit(
            rows in 1usize..40, outputs in 1usize..100, inputs in 1usize..70, halves: bool, seed in 1u64..1000,
        ) {
            let case = Case::new(rows, outputs, inputs, halves, seed);
            let expected = case.expected_medium();
            for isa in Isa::available() {
                prop_assert_eq!(&case.run_in(Precision::Medium, isa, 1), &expected, "{:?}", isa);
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let case = Case::new(200, 300, 256, true, 6);
        for precision in [Precision::Highest, Precision::Medium] {
            let run = |threads| case.run_in(precision, Isa::detect(), threads);
            assert_eq!(run(1), run(3));
        }
    }

    #[test]
    fn more_rows_than_one_pass_holds_are_all_there() {
        let case = Case::new(600, 33, 5, false, 9);
        assert_eq!(case.run(Isa::detect(), 1), case.expected());
    }

    #[test]
    fn a_bfloat16_weight_takes_half_the_memory() {
        let halves = PackedWeight::new(&numbers(64 * 32, 1, true), 64, 32, None, Precision::Highest).unwrap();
        let whole = PackedWeight::new(&numbers(64 * 32, 1, false), 64, 32, None, Precision::Highest).unwrap();
        assert_eq!((halves.bytes(), whole.bytes()), (64 * 32 * 2, 64 * 32 * 4));
    }

    #[test]
    fn an_array_of_the_wrong_shape_is_named() {
        let weight = PackedWeight::new(&[1.0; 6], 2, 3, None, Precision::Highest).unwrap();
        let (x, mut out) = ([0.0; 4], [0.0; 2]);
        let x = Rows::from_slice("x", &x, Layout::contiguous(1, 1, 4)).unwrap();
        let view = RowsMut::from_slice("out", &mut out, Layout::contiguous(1, 1, 2)).unwrap();
        let error = weight.product(Isa::Portable, 1, x, None, view).unwrap_err().to_string();
        assert!(error.contains("x: got [1, 1, 4], expected [1, 1, 3]"), "{error}");
        assert!(PackedWeight::new(&[1.0; 5], 2, 3, None, Precision::Highest).is_err());
        assert!(PackedWeight::new(&[1.0; 6], 2, 3, Some(&[0.0]), Precision::Highest).is_err());
        assert!(PackedWeight::new(&[], 0, 3, None, Precision::Highest).is_err());
    }
}
