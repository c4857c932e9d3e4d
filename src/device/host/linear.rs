//! Products with a fixed weight and few rows: `y = x W^T + b + residual`.
//!
//! Verifying a block is a product of 8 or 16 rows where plain decoding has one. General libraries repack the weight on every call and
//! pick another order of summation for every number of rows. Here the weight is packed once, is read once for up to eight rows, and
//! takes half the memory where its values are bfloat16 (as stored in most checkpoints) although the arithmetic is f32.
//!
//! Promise: element `(row, n)` is `sum over k ascending of x[row][k] * W[n][k]`, one fused multiply-add each, then `+ b[n]`, then
//! `+ residual[row][n]`. It depends on its own row only, bit for bit: not on the other rows, the threads, or how W is stored.
//!
//! ```text
//!   W [N, K]  -->  panels of 32 outputs, each [K, 32]        x rows, eight at a time
//!                  acc[8][2] += x[r][k] * panel[k][0..32]     16 sums and 2 weight vectors live in registers
//! ```

use super::simd::{Isa, LANES, Lanes, Routine, dispatch};
use super::team;
use super::view::{Bf16, Rows, RowsMut};
use crate::error::{Error, Result};
use std::ops::Range;

/// Vectors, and outputs, of a panel.
const VECTORS: usize = 2;
const PANEL: usize = VECTORS * LANES;
/// Multiply-adds that are worth handing out: some microseconds of work.
const WORK_PER_PART: usize = 1 << 17;

/// How a packed weight is stored.
#[derive(Clone, Debug)]
enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<Bf16>),
}

/// A weight `[N, K]` and an optional bias `[N]`, packed for products with few rows.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    inputs: usize,
    outputs: usize,
    panels: Panels,
    bias: Option<Vec<f32>>,
}

/// A stored weight that a vector can be made of.
trait Weight: Copy + Send + Sync {
    fn lanes<L: Lanes>(x: &[Self; LANES]) -> L;
}

impl Weight for f32 {
    #[inline(always)]
    fn lanes<L: Lanes>(x: &[Self; LANES]) -> L {
        L::load(x)
    }
}

impl Weight for Bf16 {
    #[inline(always)]
    fn lanes<L: Lanes>(x: &[Self; LANES]) -> L {
        L::load_bf16(x)
    }
}

impl PackedWeight {
    /// Packs `weight`, row-major `[outputs, inputs]`.
    ///
    /// # Errors
    /// `Length` for a weight or bias of another size, `InvalidArgument` for an empty one.
    pub fn new(weight: &[f32], outputs: usize, inputs: usize, bias: Option<&[f32]>) -> Result<Self> {
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
        let panels = if halves {
            Panels::Bf16(pack(weight, outputs, inputs, |w| Bf16((w.to_bits() >> 16) as u16)))
        } else {
            Panels::F32(pack(weight, outputs, inputs, |w| w))
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
        let job = Job {
            weight: self,
            x,
            residual,
            out,
        };
        // Parts are runs of panels: every one needs all rows, so each weight is read by one thread only.
        let panels = self.outputs.div_ceil(PANEL);
        let work = rows * self.inputs * self.outputs;
        let parts = (work / WORK_PER_PART).clamp(1, 4 * threads.max(1)).min(panels);
        let each = panels.div_ceil(parts);
        team::run(threads, panels.div_ceil(each), |part| {
            job.run(isa, part * each..panels.min((part + 1) * each));
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

/// One call's arrays. Threads share it and take disjoint panels.
struct Job<'a> {
    weight: &'a PackedWeight,
    x: Rows<'a, f32>,
    residual: Option<Rows<'a, f32>>,
    out: RowsMut<'a, f32>,
}

impl Job<'_> {
    /// All rows of the outputs in `panels`.
    fn run(&self, isa: Isa, panels: Range<usize>) {
        let at = panels.start * PANEL * self.weight.inputs..panels.end * PANEL * self.weight.inputs;
        let first = panels.start;
        match &self.weight.panels {
            Panels::F32(all) => dispatch(
                isa,
                Share {
                    job: self,
                    panels: &all[at],
                    first,
                },
            ),
            Panels::Bf16(all) => dispatch(
                isa,
                Share {
                    job: self,
                    panels: &all[at],
                    first,
                },
            ),
        }
    }
}

struct Share<'a, W> {
    job: &'a Job<'a>,
    panels: &'a [W],
    /// Index of the first of them.
    first: usize,
}

/// Rows that stay in cache while the weight passes by once.
const PASS: usize = 256;

impl<W: Weight> Routine for Share<'_, W> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let rows = self.job.x.layout().rows;
        for begin in (0..rows).step_by(PASS) {
            let end = rows.min(begin + PASS);
            for (index, panel) in (self.first..).zip(self.panels.chunks_exact(PANEL * self.job.weight.inputs)) {
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
    fn block<L: Lanes, const R: usize>(&self, index: usize, panel: &[W], row: usize) {
        let mut acc = [[L::splat(0.0); VECTORS]; R];
        let weights = panel.as_chunks::<LANES>().0.as_chunks::<VECTORS>().0;
        let mut x = [&[][..]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.job.x.row(row + r, 0)[..weights.len()];
        }
        for (k, w) in weights.iter().enumerate() {
            // Counted loops: these unroll early enough for the sums to live in registers.
            let mut lanes = [L::splat(0.0); VECTORS];
            for v in 0..VECTORS {
                lanes[v] = W::lanes::<L>(&w[v]);
            }
            for r in 0..R {
                let x = L::splat(x[r][k]);
                for v in 0..VECTORS {
                    acc[r][v] = x.mul_add(lanes[v], acc[r][v]);
                }
            }
        }
        let first = index * PANEL;
        let width = PANEL.min(self.job.weight.outputs - first);
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
            // SAFETY: a panel belongs to one share, one thread runs a share, and a panel's outputs are its own.
            let out = unsafe { self.job.out.part(row + r, 0, first..first + width) };
            out.copy_from_slice(y);
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
            let weight = PackedWeight::new(&self.weight, self.outputs, self.inputs, self.bias.as_deref()).unwrap();
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
            let mut out = Vec::new();
            for r in 0..self.rows {
                for n in 0..self.outputs {
                    let x = &self.x[r * self.inputs..][..self.inputs];
                    let w = &self.weight[n * self.inputs..][..self.inputs];
                    let mut sum = x.iter().zip(w).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum));
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
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let case = Case::new(200, 300, 256, true, 6);
        assert_eq!(case.run(Isa::detect(), 1), case.run(Isa::detect(), 3));
    }

    #[test]
    fn more_rows_than_one_pass_holds_are_all_there() {
        let case = Case::new(600, 33, 5, false, 9);
        assert_eq!(case.run(Isa::detect(), 1), case.expected());
    }

    #[test]
    fn a_bfloat16_weight_takes_half_the_memory() {
        let halves = PackedWeight::new(&numbers(64 * 32, 1, true), 64, 32, None).unwrap();
        let whole = PackedWeight::new(&numbers(64 * 32, 1, false), 64, 32, None).unwrap();
        assert_eq!((halves.bytes(), whole.bytes()), (64 * 32 * 2, 64 * 32 * 4));
    }

    #[test]
    fn an_array_of_the_wrong_shape_is_named() {
        let weight = PackedWeight::new(&[1.0; 6], 2, 3, None).unwrap();
        let (x, mut out) = ([0.0; 4], [0.0; 2]);
        let x = Rows::from_slice("x", &x, Layout::contiguous(1, 1, 4)).unwrap();
        let view = RowsMut::from_slice("out", &mut out, Layout::contiguous(1, 1, 2)).unwrap();
        let error = weight.product(Isa::Portable, 1, x, None, view).unwrap_err().to_string();
        assert!(error.contains("x: got [1, 1, 4], expected [1, 1, 3]"), "{error}");
        assert!(PackedWeight::new(&[1.0; 5], 2, 3, None).is_err());
        assert!(PackedWeight::new(&[1.0; 6], 2, 3, Some(&[0.0])).is_err());
        assert!(PackedWeight::new(&[], 0, 3, None).is_err());
    }
}
