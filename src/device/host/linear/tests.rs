//! Every element to the bit, whatever stands beside it.

use super::super::made_up::numbers;
use super::super::view::Layout;
use super::*;
use proptest::prelude::*;

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
