//! Products with a weight as somebody else stores it, row after row: `y = x W^T + b` without a packed copy.
//!
//! Where a weight belongs to a model whose own code reads it as well, a second copy would be most of the model again. A row of `W` meets a row
//! of `x` along both: sixteen sums side by side, which a tree adds up.
//!
//! Promise: of f32, lane i of element `(row, n)` is `sum over k = i, i + 16, ... of x[row][k] * W[n][k]`, one fused multiply-add each; of bfloat16,
//! over k = 2i + 1, 2i, 2i + 33, 2i + 32, ..., whose products are exact. The lanes end in a tree over distances 8, 4, 2, 1, then `+ b[n]`, then one
//! rounding to what is stored. It depends on its own row only, bit for bit: not on the other rows, the threads, or the instruction set.

use super::super::HostKernels;
use super::super::simd::{Lanes, Routine, dispatch};
use super::super::team;
use super::super::view::{Bf16, Element, LANES, Layout, Rows, RowsMut};
use super::{LINE, WORK_PER_PART, check_bias};
use crate::error::{Error, Result};

/// Bytes of a weight that are on their way while others are multiplied.
const AHEAD: usize = 1 << 14;

/// What inputs and weights may be stored as.
#[allow(private_bounds, reason = "how they meet is the kernels' own")]
pub trait Stored: Chunked {}

impl Stored for f32 {}
impl Stored for Bf16 {}

/// Elements that meet several at a time.
trait Chunked: Element {
    type Chunk: Copy + Default;
    type Vector<L: Lanes>: Copy;
    /// Elements as chunks, and what is left over.
    fn chunks(elements: &[Self]) -> (&[Self::Chunk], &[Self]);
    /// Fewer elements than a chunk has, and zeros.
    fn last(elements: &[Self]) -> Self::Chunk;
    fn vector<L: Lanes>(chunk: &Self::Chunk) -> Self::Vector<L>;
    /// Adds the products of two chunks to sixteen sums.
    fn add<L: Lanes>(sums: L, x: Self::Vector<L>, w: Self::Vector<L>) -> L;
}

impl Chunked for f32 {
    type Chunk = [Self; LANES];
    type Vector<L: Lanes> = L;
    #[inline(always)]
    fn chunks(elements: &[Self]) -> (&[Self::Chunk], &[Self]) {
        elements.as_chunks()
    }
    #[inline(always)]
    fn last(elements: &[Self]) -> Self::Chunk {
        let mut chunk = [0.0; LANES];
        chunk[..elements.len()].copy_from_slice(elements);
        chunk
    }
    #[inline(always)]
    fn vector<L: Lanes>(chunk: &Self::Chunk) -> L {
        L::load(chunk)
    }
    #[inline(always)]
    fn add<L: Lanes>(sums: L, x: L, w: L) -> L {
        x.mul_add(w, sums)
    }
}

impl Chunked for Bf16 {
    type Chunk = [[Self; 2]; LANES];
    type Vector<L: Lanes> = L::Pairs;
    #[inline(always)]
    fn chunks(elements: &[Self]) -> (&[Self::Chunk], &[Self]) {
        let chunks = elements.as_chunks().0.as_chunks().0;
        (chunks, &elements[2 * LANES * chunks.len()..])
    }
    #[inline(always)]
    fn last(elements: &[Self]) -> Self::Chunk {
        let mut chunk = [[Self::default(); 2]; LANES];
        chunk.as_flattened_mut()[..elements.len()].copy_from_slice(elements);
        chunk
    }
    #[inline(always)]
    fn vector<L: Lanes>(chunk: &Self::Chunk) -> L::Pairs {
        L::load_pairs(chunk)
    }
    #[inline(always)]
    fn add<L: Lanes>(sums: L, x: L::Pairs, w: L::Pairs) -> L {
        sums.add_pairs(x, w)
    }
}

impl HostKernels {
    /// Writes `x W^T + b` to `out`. `x` is `[M, 1, K]`, `weight` `[N, 1, K]`, `bias` `[N]`, `out` `[M, 1, N]`.
    ///
    /// # Errors
    /// `InvalidArgument` naming the array whose shape does not fit, `Length` for a bias of another size.
    pub fn linear<E: Stored>(
        &self,
        x: Rows<'_, E>,
        weight: Rows<'_, E>,
        bias: Option<&[E]>,
        out: RowsMut<'_, E>,
    ) -> Result<()> {
        let (rows, outputs, inputs) = (x.layout().rows, weight.layout().rows, weight.layout().dim);
        let shapes = [
            ("x", *x.layout(), inputs),
            (
                "weight",
                Layout {
                    rows,
                    ..*weight.layout()
                },
                inputs,
            ),
            ("out", *out.layout(), outputs),
        ];
        for (name, layout, width) in shapes {
            if (layout.rows, layout.heads, layout.dim) != (rows, 1, width) {
                return Err(Error::InvalidArgument {
                    name,
                    got: format!("[{}, {}, {}]", layout.rows, layout.heads, layout.dim),
                    expected: format!("[{rows}, 1, {width}]"),
                });
            }
        }
        check_bias(bias, outputs)?;
        if rows == 0 || outputs == 0 {
            return Ok(());
        }
        let groups = outputs.div_ceil(LANES);
        let work = rows.saturating_mul(inputs).saturating_mul(outputs);
        let parts = (work / WORK_PER_PART).clamp(1, 4 * self.threads).min(groups);
        let each = groups.div_ceil(parts) * LANES;
        let parts = (0..).step_by(each).zip(out.split_columns(each)).collect();
        team::each(self.threads, parts, |(first, out): (usize, _)| {
            let share = Share {
                x,
                weight,
                bias,
                first,
                out,
            };
            dispatch(self.isa, share);
        });
        Ok(())
    }
}

/// The outputs from `first` on, of all rows.
struct Share<'a, E> {
    x: Rows<'a, E>,
    weight: Rows<'a, E>,
    bias: Option<&'a [E]>,
    first: usize,
    out: RowsMut<'a, E>,
}

impl<E: Stored> Routine for Share<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let (rows, outputs) = (self.out.layout().rows, self.out.layout().dim);
        for group in (0..outputs).step_by(LANES) {
            let width = LANES.min(outputs - group);
            for row in (0..rows).step_by(L::DOT_ROWS) {
                match L::DOT_ROWS.min(rows - row) {
                    4 => self.block::<L, 4>(row, group, width),
                    3 => self.block::<L, 3>(row, group, width),
                    2 => self.block::<L, 2>(row, group, width),
                    _ => self.block::<L, 1>(row, group, width),
                }
            }
        }
    }
}

impl<E: Stored> Share<'_, E> {
    /// `R` rows times `width` outputs, at most sixteen, of which the first is `group` in these.
    #[inline(always)]
    fn block<L: Lanes, const R: usize>(&mut self, row: usize, group: usize, width: usize) {
        let mut sums = [[L::splat(0.0); LANES]; R];
        for at in (0..width).step_by(L::DOT_OUTPUTS) {
            if L::DOT_OUTPUTS == 4 {
                self.dots::<L, R, 4>(row, group + at, at, &mut sums);
            } else {
                self.dots::<L, R, 2>(row, group + at, at, &mut sums);
            }
        }
        let bias = self.bias.map(|bias| &bias[self.first + group..][..width]);
        for (r, sums) in sums.iter().enumerate() {
            let mut y = [0.0; LANES];
            L::sums(sums).store(&mut y);
            let y = &mut y[..width];
            if let Some(bias) = bias {
                let mut wide = [0.0; LANES];
                E::widen(bias, &mut wide[..width]);
                super::add(y, &wide);
            }
            E::narrow(y, &mut self.out.row_mut(row + r, 0)[group..group + width]);
        }
    }

    /// Sums of `R` rows and the `V` outputs from `output` on, to places `at` and further.
    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "counted loops unroll early enough for the sums to live in registers"
    )]
    fn dots<L: Lanes, const R: usize, const V: usize>(
        &self,
        row: usize,
        output: usize,
        at: usize,
        sums: &mut [[L; LANES]; R],
    ) {
        let outputs = self.weight.layout().rows;
        // What stands behind the last output is the last once more, which nobody reads; what is ahead is asked for while this is multiplied.
        let weight = |output: usize| self.weight.row((self.first + output).min(outputs - 1), 0);
        let (mut x, mut w, mut ahead) = ([&[][..]; R], [&[][..]; V], [&[][..]; V]);
        let (chunks, rest) = E::chunks(weight(output));
        let far = V * (AHEAD / (V * LINE * chunks.len().max(1))).max(1);
        for r in 0..R {
            x[r] = &E::chunks(self.x.row(row + r, 0)).0[..chunks.len()];
        }
        for v in 0..V {
            w[v] = &E::chunks(weight(output + v)).0[..chunks.len()];
            ahead[v] = &E::chunks(weight(output + far + v)).0[..chunks.len()];
        }
        let mut acc = [[L::splat(0.0); V]; R];
        for k in 0..chunks.len() {
            let mut weights = [E::vector::<L>(&w[0][k]); V];
            for v in 1..V {
                weights[v] = E::vector::<L>(&w[v][k]);
            }
            if row == 0 {
                for v in 0..V {
                    L::fetch_far(&ahead[v][k]);
                }
            }
            for r in 0..R {
                let x = E::vector::<L>(&x[r][k]);
                for v in 0..V {
                    acc[r][v] = E::add(acc[r][v], x, weights[v]);
                }
            }
        }
        if !rest.is_empty() {
            let whole = self.x.layout().dim - rest.len();
            for v in 0..V {
                let w = E::vector::<L>(&E::last(&weight(output + v)[whole..]));
                for r in 0..R {
                    let x = E::vector::<L>(&E::last(&self.x.row(row + r, 0)[whole..]));
                    acc[r][v] = E::add(acc[r][v], x, w);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                sums[r][at + v] = acc[r][v];
            }
        }
    }
}

// A chunk is what memory delivers at once.
const _: () = assert!(LINE == size_of::<<f32 as Chunked>::Chunk>() && LINE == size_of::<<Bf16 as Chunked>::Chunk>());

#[cfg(test)]
mod tests {
    use super::super::super::made_up::numbers;
    use super::super::super::simd::Isa;
    use super::*;
    use proptest::prelude::*;

    struct Case {
        rows: usize,
        outputs: usize,
        inputs: usize,
        seed: u64,
    }

    impl Case {
        fn layout(&self, rows: usize, width: usize) -> Layout {
            // Rows with gaps.
            Layout {
                row_stride: width + self.seed as usize % 3,
                ..Layout::contiguous(rows, 1, width)
            }
        }

        fn made<E: Stored>(&self, count: usize, seed: u64) -> Vec<E> {
            let wide = numbers(count, self.seed + seed, false);
            let mut narrow = vec![E::default(); count];
            E::narrow(&wide, &mut narrow);
            narrow
        }

        /// x, W and b.
        fn arrays<E: Stored>(&self) -> [Vec<E>; 3] {
            let width = self.inputs + 2;
            [
                self.made(self.rows * width, 0),
                self.made(self.outputs * width, 1),
                self.made(if self.seed.is_multiple_of(2) { self.outputs } else { 0 }, 2),
            ]
        }

        /// The outputs of `count` rows, from `first` on.
        fn run<E: Stored>(&self, isa: Isa, threads: usize, (first, count): (usize, usize)) -> Vec<f32> {
            let [x, w, b] = self.arrays::<E>();
            let layout = self.layout(count, self.inputs);
            let x = Rows::from_slice("x", &x[first * layout.row_stride..], layout).unwrap();
            let w = Rows::from_slice("weight", &w, self.layout(self.outputs, self.inputs)).unwrap();
            let mut out = vec![E::default(); count * self.outputs];
            let view = RowsMut::from_slice("out", &mut out, Layout::contiguous(count, 1, self.outputs)).unwrap();
            let bias = (!b.is_empty()).then_some(&b[..]);
            let kernels = HostKernels::default().with_threads(threads).with_isa(isa);
            kernels.linear(x, w, bias, view).unwrap();
            let mut wide = vec![0.0; out.len()];
            E::widen(&out, &mut wide);
            wide
        }

        /// The promise, literally: `order` says at which place the t-th addition of a lane finds its product.
        fn expected<E: Stored>(&self, chunk: usize, order: impl Fn(usize, usize) -> usize) -> Vec<f32> {
            let widened = |x: Vec<E>| {
                let mut wide = vec![0.0; x.len()];
                E::widen(&x, &mut wide);
                wide
            };
            let [x, w, b] = self.arrays::<E>().map(widened);
            let stride = self.layout(1, self.inputs).row_stride;
            let mut out = Vec::new();
            for r in 0..self.rows {
                for n in 0..self.outputs {
                    let get = |of: &[f32], row: usize, k| if k < self.inputs { of[row * stride + k] } else { 0.0 };
                    let mut lanes = [0.0f32; LANES];
                    for (i, lane) in lanes.iter_mut().enumerate() {
                        for t in 0..self.inputs.div_ceil(chunk) * chunk / LANES {
                            let k = order(i, t);
                            *lane = get(&x, r, k).mul_add(get(&w, n, k), *lane);
                        }
                    }
                    for distance in [8, 4, 2, 1] {
                        for i in 0..distance {
                            lanes[i] += lanes[i + distance];
                        }
                    }
                    out.push(lanes[0] + b.get(n).copied().unwrap_or(0.0));
                }
            }
            let mut narrow = vec![E::default(); out.len()];
            E::narrow(&out, &mut narrow);
            widened(narrow)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]
        #[test]
        fn every_element_is_the_sum_that_is_promised_to_the_bit(
            rows in 1usize..14, outputs in 1usize..70, inputs in 1usize..150, seed in 1u64..1000,
        ) {
            let case = Case { rows, outputs, inputs, seed };
            let plain = case.expected::<f32>(LANES, |i, t| LANES * t + i);
            let pairs = case.expected::<Bf16>(2 * LANES, |i, t| 2 * LANES * (t / 2) + 2 * i + (1 - t % 2));
            for isa in Isa::available() {
                prop_assert_eq!(&case.run::<f32>(isa, 1, (0, rows)), &plain, "{:?}", isa);
                prop_assert_eq!(&case.run::<Bf16>(isa, 1, (0, rows)), &pairs, "{:?}", isa);
            }
        }
    }

    #[test]
    fn neither_threads_nor_other_rows_change_a_bit() {
        let case = Case {
            rows: 67,
            outputs: 300,
            inputs: 260,
            seed: 6,
        };
        let whole = case.run::<Bf16>(Isa::detect(), 1, (0, 67));
        assert_eq!(case.run::<Bf16>(Isa::detect(), 3, (0, 67)), whole);
        for (first, count) in [(0, 1), (7, 1), (3, 2), (66, 1), (10, 17)] {
            let part = case.run::<Bf16>(Isa::detect(), 2, (first, count));
            assert_eq!(part, whole[first * 300..(first + count) * 300]);
        }
    }

    #[test]
    fn an_array_of_the_wrong_shape_is_named() {
        let (x, w, mut out) = ([0.0f32; 4], [1.0f32; 6], [0.0f32; 2]);
        let rows = |data, rows, dim| Rows::from_slice("x", data, Layout::contiguous(rows, 1, dim)).unwrap();
        let mut run = |x, bias, width: usize| {
            let view = RowsMut::from_slice("out", &mut out[..width], Layout::contiguous(1, 1, width)).unwrap();
            let done = HostKernels::default().linear(x, rows(&w, 2, 3), bias, view);
            done.map_err(|error| error.to_string())
        };
        let error = run(rows(&x, 1, 4), None, 2).unwrap_err();
        assert!(error.contains("x: got [1, 1, 4], expected [1, 1, 3]"), "{error}");
        let error = run(rows(&x[..3], 1, 3), None, 1).unwrap_err();
        assert!(error.contains("out: got [1, 1, 1], expected [1, 1, 2]"), "{error}");
        assert!(run(rows(&x[..3], 1, 3), Some(&[0.0]), 2).is_err());
        assert!(run(rows(&x[..3], 1, 3), Some(&[0.0, 1.0]), 2).is_ok());
    }
}
