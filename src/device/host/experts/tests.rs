//! Every element to the bit, whatever stands beside it.

use super::super::made_up::numbers;
use super::super::simd::Isa;
use super::super::view::Bf16;
use super::*;
use proptest::prelude::*;

/// A layer of random experts, rows, and what they chose.
#[derive(Debug)]
struct Case {
    rows: usize,
    hidden: usize,
    inner: usize,
    count: usize,
    top_k: usize,
    between: Between,
    /// Of both products.
    biases: Option<[Vec<f32>; 2]>,
    x: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
    indices: Vec<i64>,
    weights: Vec<f32>,
}

impl Case {
    fn new(
        (rows, hidden, inner): (usize, usize, usize),
        (count, top_k): (usize, usize),
        halves: bool,
        seed: u64,
    ) -> Self {
        let picks = numbers(rows * count, seed + 4, false);
        // Of every row the experts with the largest numbers: distinct ones, in an order of their own.
        let indices = picks.chunks(count).flat_map(|row| {
            let mut order: Vec<i64> = (0..count as i64).collect();
            order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]));
            order.truncate(top_k);
            order
        });
        Self {
            rows,
            hidden,
            inner,
            count,
            top_k,
            between: Between::Gated(Activation::Silu),
            biases: None,
            x: numbers(rows * hidden, seed, false),
            gate_up: numbers(count * 2 * inner * hidden, seed + 1, halves),
            down: numbers(count * inner * hidden, seed + 2, halves),
            indices: indices.collect(),
            weights: numbers(rows * top_k, seed + 3, false),
        }
    }

    /// The same with something else between the products, and with biases or without.
    fn with(mut self, between: Between, biased: bool, seed: u64) -> Self {
        let (count, rows) = (self.count, between.halves() * self.inner);
        self.between = between;
        self.gate_up.truncate(count * rows * self.hidden);
        self.biases = biased.then(|| {
            [
                numbers(count * rows, seed + 9, false),
                numbers(count * self.hidden, seed + 10, false),
            ]
        });
        self
    }

    fn sizes(&self) -> (usize, usize, usize) {
        (self.count, self.hidden, self.inner)
    }

    fn packed(&self, precision: Precision) -> Experts {
        let weights = ExpertWeights {
            gate_up: &self.gate_up[..],
            down: &self.down[..],
            biases: self.biases.as_ref().map(|both| both.each_ref().map(|bias| &bias[..])),
        };
        Experts::new(weights, self.sizes(), self.between, precision, 1).unwrap()
    }

    /// The rows `rows` through the experts that they chose.
    fn run(&self, experts: &Experts, kernels: HostKernels, rows: Range<usize>) -> Vec<f32> {
        let picked = rows.start * self.top_k..rows.end * self.top_k;
        let choice = Choice::new(
            self.count,
            self.top_k,
            &self.indices[picked.clone()],
            &self.weights[picked],
        )
        .unwrap();
        let mut out = vec![f32::NAN; rows.len() * self.hidden];
        let layout = Layout::contiguous(rows.len(), 1, self.hidden);
        let x = Rows::from_slice("x", &self.x[rows.start * self.hidden..rows.end * self.hidden], layout).unwrap();
        let view = RowsMut::from_slice("out", &mut out, layout).unwrap();
        kernels.experts(experts, x, &choice, view).unwrap();
        out
    }

    /// The promise, literally.
    fn expected(&self, precision: Precision) -> Vec<f32> {
        let mut out = Vec::new();
        for row in 0..self.rows {
            let x = &self.x[row * self.hidden..][..self.hidden];
            let mut sums = vec![0.0f32; self.hidden];
            let mut chosen: Vec<usize> = (row * self.top_k..(row + 1) * self.top_k).collect();
            chosen.sort_by_key(|&at| self.indices[at]);
            for at in chosen {
                let (expert, each) = (self.indices[at] as usize, self.inner * self.hidden);
                let all = self.between.halves() * each;
                let mut up = product(&self.gate_up[all * expert..][..all], x, precision);
                self.add_bias(0, expert, &mut up);
                let inner = between(self.between, &up);
                let mut y = product(&self.down[each * expert..][..each], &inner, precision);
                self.add_bias(1, expert, &mut y);
                for (sum, y) in sums.iter_mut().zip(y) {
                    *sum = self.weights[at].mul_add(y, *sum);
                }
            }
            out.extend(sums);
        }
        out
    }
}

impl Case {
    fn add_bias(&self, of: usize, expert: usize, y: &mut [f32]) {
        if let Some(biases) = &self.biases {
            let bias = &biases[of][expert * y.len()..][..y.len()];
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
}

/// What stands between the products, a row at a time and alone.
fn between(between: Between, up: &[f32]) -> Vec<f32> {
    let width = up.len() / between.halves();
    let padded = between.halves() * width.next_multiple_of(PANEL / between.halves());
    let mut from = vec![0.0; padded];
    up.iter()
        .enumerate()
        .for_each(|(row, &x)| from[between.place(row, width)] = x);
    let mut inner = vec![f32::NAN; padded / between.halves()];
    let layout = Layout::contiguous(1, 1, inner.len());
    let mut view = RowsMut::from_slice("inner", &mut inner, layout).unwrap();
    let activate = Activate {
        between,
        from: &from,
        width: padded,
        inner: &mut view,
    };
    dispatch(Isa::Portable, activate);
    inner.truncate(width);
    inner
}

const BETWEEN: [Between; 9] = [
    Between::Gated(Activation::Silu),
    Between::Gated(Activation::Gelu),
    Between::Gated(Activation::GeluTanh),
    Between::Gated(Activation::ReluSquared),
    Between::Clamped {
        alpha: 1.702,
        limit: 0.5,
    },
    Between::Plain(Activation::Silu),
    Between::Plain(Activation::Gelu),
    Between::Plain(Activation::GeluTanh),
    Between::Plain(Activation::ReluSquared),
];

/// `weight x`, an element at a time, as `linear` promises it.
fn product(weight: &[f32], x: &[f32], precision: Precision) -> Vec<f32> {
    let order = |values: &[f32]| match precision {
        Precision::Highest => values.to_vec(),
        Precision::Medium => {
            let mut rounded: Vec<f32> = values.iter().map(|&x| Bf16::from(x).into()).collect();
            rounded.chunks_mut(2).for_each(<[f32]>::reverse);
            rounded
        }
    };
    let x = order(x);
    weight
        .chunks(x.len())
        .map(|row| x.iter().zip(order(row)).fold(0.0f32, |sum, (x, w)| x.mul_add(w, sum)))
        .collect()
}

fn swiglu(gate_up: &[f32]) -> Vec<f32> {
    let width = gate_up.len() / 2;
    let mut inner = vec![0.0; width];
    let from = Rows::from_slice("gate_up", gate_up, Layout::contiguous(1, 1, 2 * width)).unwrap();
    let to = RowsMut::from_slice("inner", &mut inner, Layout::contiguous(1, 1, width)).unwrap();
    HostKernels::default().with_isa(Isa::Portable).swiglu(from, to).unwrap();
    inner
}

fn everywhere() -> impl Iterator<Item = HostKernels> {
    Isa::available()
        .into_iter()
        .map(|isa| HostKernels::default().with_isa(isa))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_element_is_the_sum_over_its_own_experts_to_the_bit(
        sizes in (1usize..20, 1usize..80, 1usize..70),
        (count, top_k) in (1usize..9).prop_flat_map(|count| (Just(count), 1..=count)),
        halves: bool, medium: bool, what in 0..BETWEEN.len(), biased: bool, seed in 1u64..1000,
    ) {
        let precision = if medium { Precision::Medium } else { Precision::Highest };
        let case = Case::new(sizes, (count, top_k), halves, seed).with(BETWEEN[what], biased, seed);
        let (experts, expected) = (case.packed(precision), case.expected(precision));
        for kernels in everywhere() {
            prop_assert_eq!(&case.run(&experts, kernels, 0..case.rows), &expected, "{:?}", kernels);
        }
    }

    #[test]
    fn a_row_is_the_same_bits_in_any_company_and_for_any_number_of_threads(
        rows in 2usize..40, cut in 0.0f64..1.0, threads in 1usize..5, medium: bool, what in 0..BETWEEN.len(), biased: bool,
        seed in 1u64..1000,
    ) {
        let precision = if medium { Precision::Medium } else { Precision::Highest };
        let case = Case::new((rows, 160, 72), (6, 3), false, seed).with(BETWEEN[what], biased, seed);
        let experts = case.packed(precision);
        let together = case.run(&experts, HostKernels::default(), 0..rows);
        let cut = (cut * rows as f64) as usize;
        let kernels = HostKernels::default().with_threads(threads);
        let mut parts = case.run(&experts, kernels, 0..cut);
        parts.extend(case.run(&experts, kernels, cut..rows));
        prop_assert_eq!(&parts, &together);
        for row in 0..rows {
            let alone = case.run(&experts, kernels, row..row + 1);
            prop_assert_eq!(&alone[..], &together[row * 160..(row + 1) * 160]);
        }
    }

    #[test]
    fn the_router_takes_the_largest_of_the_softmax(
        (count, top_k) in (1usize..40).prop_flat_map(|count| (Just(count), 1..=count)),
        rows in 1usize..12, normalised: bool, with_shared: bool, seed in 1u64..1000,
    ) {
        let (hidden, inner) = (24, 20);
        let case = Case::new((rows, hidden, inner), (count, top_k), false, seed);
        let weight: Vec<f32> = numbers(count * hidden, seed + 5, false).iter().map(|x| 2.0 * x).collect();
        let (gate, shared_up, shared_down) =
            (numbers(hidden, seed + 6, false), numbers(2 * 40 * hidden, seed + 7, false), numbers(40 * hidden, seed + 8, false));
        let shared = SharedExpert {
            weights: ExpertWeights { gate_up: &shared_up[..], down: &shared_down[..], biases: None },
            inner: 40,
            gate: &gate,
        };
        let experts = case.packed(Precision::Highest);
        let experts = experts.with_router(&weight, top_k, normalised, with_shared.then_some(shared)).unwrap();
        let run = |kernels: HostKernels| {
            let layout = Layout::contiguous(rows, 1, hidden);
            let x = Rows::from_slice("x", &case.x, layout).unwrap();
            let choice = kernels.choose(&experts, x).unwrap();
            let mut out = vec![f32::NAN; rows * hidden];
            kernels.experts(&experts, x, &choice, RowsMut::from_slice("out", &mut out, layout).unwrap()).unwrap();
            (choice, out)
        };
        let first = run(HostKernels::default().with_isa(Isa::Portable));
        for (row, out) in first.1.chunks(hidden).enumerate() {
            let x = &case.x[row * hidden..][..hidden];
            let logits = product(&weight, x, Precision::Highest);
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            let sum = |of: &[usize]| of.iter().map(|&e| f64::from(logits[e]).exp()).sum::<f64>();
            let all = sum(if normalised { &order[..top_k] } else { &order });
            let mut expected = vec![0.0f64; hidden];
            let mut add = |gate_up: &[f32], down: &[f32], weight: f64| {
                let inner = swiglu(&product(gate_up, x, Precision::Highest));
                for (sum, y) in expected.iter_mut().zip(product(down, &inner, Precision::Highest)) {
                    *sum += weight * f64::from(y);
                }
            };
            let each = inner * hidden;
            for &e in &order[..top_k] {
                add(&case.gate_up[2 * each * e..][..2 * each], &case.down[each * e..][..each], f64::from(logits[e]).exp() / all);
            }
            if with_shared {
                let score = f64::from(product(&gate, x, Precision::Highest)[0]);
                add(&shared_up, &shared_down, 1.0 / (1.0 + (-score).exp()));
            }
            for (got, expected) in out.iter().zip(expected) {
                prop_assert!((f64::from(*got) - expected).abs() < 1e-4, "{got} for {expected}");
            }
        }
        for kernels in everywhere() {
            prop_assert_eq!(&run(kernels.with_threads(2)), &first, "{:?}", kernels);
        }
    }
}

/// By Simpson's rule over the density, from far below.
fn normal_distribution(x: f64) -> f64 {
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let (steps, low) = (4000, -12.0);
    let step = (x - low) / f64::from(steps);
    (0..=steps)
        .map(|i| {
            let weight = if i == 0 || i == steps {
                1.0
            } else {
                f64::from(2 + 2 * (i % 2))
            };
            weight * density(low + step * f64::from(i))
        })
        .sum::<f64>()
        * step
        / 3.0
}

#[test]
fn what_stands_between_is_the_plain_formula() {
    let values: Vec<f32> = (-40..=40).map(|i| 0.23 * i as f32).collect();
    let of = |activation: Activation, x: f64| match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * normal_distribution(x),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::ReluSquared => x.max(0.0).powi(2),
    };
    for what in BETWEEN {
        let gates: Vec<f32> = values.iter().flat_map(|&gate| [gate; 3]).collect();
        let ups: Vec<f32> = values.iter().flat_map(|_| [-3.7, 0.31, 2.0]).collect();
        let got = match what.halves() {
            1 => between(what, &gates),
            _ => between(what, &[&gates[..], &ups].concat()),
        };
        for ((&gate, &up), &got) in gates.iter().zip(&ups).zip(&got) {
            let (x, up) = (f64::from(gate), f64::from(up));
            let expected = match what {
                Between::Gated(activation) => of(activation, x) * up,
                Between::Plain(activation) => of(activation, x),
                Between::Clamped { alpha, limit } => {
                    let (alpha, limit) = (f64::from(alpha), f64::from(limit));
                    let x = x.min(limit);
                    x / (1.0 + (-alpha * x).exp()) * (up.clamp(-limit, limit) + 1.0)
                }
            };
            let error = (f64::from(got) - expected).abs() / (1e-3 + expected.abs().max(x.abs() * up.abs()));
            assert!(error < 1e-6, "{what:?} of {gate}, {up}: {got}, {expected}");
        }
        let lost = vec![f32::NAN; 32];
        assert!(between(what, &lost).iter().all(|y| y.is_nan()), "{what:?}");
    }
}

#[test]
fn more_rows_than_one_pass_holds_are_all_there() {
    let case = Case::new((600, 33, 17), (2, 1), false, 5);
    let experts = case.packed(Precision::Highest);
    assert_eq!(
        case.run(&experts, HostKernels::default().with_threads(2), 0..600),
        case.expected(Precision::Highest)
    );
}

#[test]
fn bfloat16_weights_are_those_of_their_values() {
    let case = Case::new((5, 40, 24), (4, 2), true, 3);
    let halves = |values: &[f32]| values.iter().map(|&x| Bf16::from(x)).collect::<Vec<_>>();
    let (gate_up, down) = (halves(&case.gate_up), halves(&case.down));
    let weights = ExpertWeights {
        gate_up: &gate_up[..],
        down: &down[..],
        biases: None,
    };
    let experts = Experts::new(weights, case.sizes(), case.between, Precision::Highest, 2).unwrap();
    let same = case.packed(Precision::Highest);
    let kernels = HostKernels::default();
    assert_eq!(case.run(&experts, kernels, 0..5), case.run(&same, kernels, 0..5));
    // Two bytes a weight, in whole panels.
    assert_eq!(
        (experts.bytes(), same.bytes()),
        (2 * 4 * 40 * (64 + 24) + 2 * 4 * 24 * 24, same.bytes())
    );
}

#[test]
fn an_index_behind_the_last_expert_is_none_and_one_beyond_that_is_refused() {
    let case = Case::new((2, 8, 8), (3, 1), false, 7);
    let experts = case.packed(Precision::Highest);
    let choice = Choice::new(3, 1, &[3, 2], &[1.0, 1.0]).unwrap();
    let mut out = vec![f32::NAN; 16];
    let layout = Layout::contiguous(2, 1, 8);
    let (x, view) = (
        Rows::from_slice("x", &case.x, layout).unwrap(),
        RowsMut::from_slice("out", &mut out, layout).unwrap(),
    );
    HostKernels::default().experts(&experts, x, &choice, view).unwrap();
    assert!(out[..8].iter().all(|&y| y == 0.0) && out[8..].iter().any(|&y| y != 0.0));
    for bad in [4, -1] {
        let refused = Choice::new(3, 1, &[bad], &[1.0]).unwrap_err().to_string();
        assert_eq!(refused, format!("indices: got {bad}, expected 0..3, or 3 for none"));
    }
}

#[test]
fn a_row_that_is_no_number_stays_none_and_spoils_no_other() {
    let case = Case::new((3, 32, 16), (5, 2), false, 9);
    let experts = case
        .packed(Precision::Highest)
        .with_router::<f32>(&numbers(5 * 32, 4, false), 2, true, None)
        .unwrap();
    let layout = Layout::contiguous(3, 1, 32);
    let run = |x: &[f32]| {
        let x = Rows::from_slice("x", x, layout).unwrap();
        let kernels = HostKernels::default();
        let choice = kernels.choose(&experts, x).unwrap();
        let mut out = vec![0.0; 96];
        kernels
            .experts(
                &experts,
                x,
                &choice,
                RowsMut::from_slice("out", &mut out, layout).unwrap(),
            )
            .unwrap();
        out
    };
    let (fine, mut x) = (run(&case.x), case.x.clone());
    x[40] = f32::NAN;
    let spoilt = run(&x);
    assert!(spoilt[32..64].iter().all(|y| y.is_nan()));
    assert_eq!((&spoilt[..32], &spoilt[64..]), (&fine[..32], &fine[64..]));
}

#[test]
fn what_does_not_fit_is_named() {
    let case = Case::new((1, 8, 4), (2, 1), false, 1);
    let weights = |gate_up: usize, down: usize| ExpertWeights {
        gate_up: &case.gate_up[..gate_up],
        down: &case.down[..down],
        biases: None,
    };
    let new = |weights, count, hidden, inner| {
        Experts::new(weights, (count, hidden, inner), case.between, Precision::Highest, 1)
    };
    let refused = |result: Result<Experts>| result.unwrap_err().to_string();
    assert_eq!(
        refused(new(weights(127, 64), 2, 8, 4)),
        "gate_up: got 127 elements, expected 128"
    );
    assert_eq!(
        refused(new(weights(128, 63), 2, 8, 4)),
        "down: got 63 elements, expected 64"
    );
    let biased = |up: usize, down: usize| {
        let mut weights = weights(128, 64);
        weights.biases = Some([&case.gate_up[..up], &case.gate_up[..down]]);
        refused(new(weights, 2, 8, 4))
    };
    assert_eq!(biased(15, 16), "gate_up_bias: got 15 elements, expected 16");
    assert_eq!(biased(16, 15), "down_bias: got 15 elements, expected 16");
    for (alpha, limit) in [(1.0, 0.0), (1.0, f32::NAN), (f32::INFINITY, 1.0)] {
        let clamped = Between::Clamped { alpha, limit };
        let error = refused(Experts::new(
            weights(128, 64),
            (2, 8, 4),
            clamped,
            Precision::Highest,
            1,
        ));
        assert!(error.starts_with("clamped: got"), "{error}");
    }
    assert!(refused(new(weights(0, 0), 0, 8, 4)).starts_with("gate_up: got [0, 8, 8]"));
    assert!(refused(new(weights(128, 64), usize::MAX, 8, 4)).starts_with("gate_up: got 128"));
    let experts = || case.packed(Precision::Highest);
    let routed = |router: usize, top_k, gate: usize, inner, gate_up| {
        let zeros = [0.0; 16];
        let shared = SharedExpert {
            weights: weights(gate_up, 32),
            inner,
            gate: &zeros[..gate],
        };
        refused(experts().with_router(&zeros[..router], top_k, true, Some(shared)))
    };
    assert_eq!(routed(15, 1, 8, 4, 64), "router: got 15 elements, expected 16");
    assert_eq!(routed(16, 3, 8, 4, 64), "top_k: got 3, expected 1..=2");
    assert_eq!(routed(16, 1, 7, 4, 64), "shared_gate: got 7 elements, expected 8");
    assert_eq!(routed(16, 1, 8, 4, 63), "shared_gate_up: got 63 elements, expected 64");
    assert!(routed(16, 1, 8, 0, 0).starts_with("shared_gate_up: got [0, H]"));
    let kernels = HostKernels::default();
    let x = Rows::from_slice("x", &case.x, Layout::contiguous(1, 1, 8)).unwrap();
    assert!(
        kernels
            .choose(&experts(), x)
            .unwrap_err()
            .to_string()
            .contains("no router")
    );
    let choice = Choice::new(3, 1, &[0], &[1.0]).unwrap();
    let mut out = [0.0; 8];
    let view = RowsMut::from_slice("out", &mut out, Layout::contiguous(1, 1, 8)).unwrap();
    assert!(
        kernels
            .experts(&experts(), x, &choice, view)
            .unwrap_err()
            .to_string()
            .starts_with("choice")
    );
}
