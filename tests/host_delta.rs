//! The gated delta rule on the host against a float64 reference, and the promise that a token does not depend on its surroundings.

use dflash_rs::device::host::{Bf16, DeltaRule, DeltaTensors, Element, HostKernels, Isa, Layout, Rows, RowsMut, Span};
use dflash_rs::error::Result;
use proptest::prelude::*;

const BETA_SCALE: f32 = 1.5;

#[derive(Clone, Copy, Debug)]
struct Shape {
    key_heads: usize,
    group: usize,
    key_dim: usize,
    value_dim: usize,
    taps: usize,
}

impl Shape {
    fn heads(&self) -> usize {
        self.key_heads * self.group
    }
    fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.heads() * self.value_dim
    }
    fn state(&self) -> usize {
        self.heads() * self.key_dim * self.value_dim
    }
}

/// A small deterministic generator.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn values<E: Element>(&mut self, n: usize) -> Vec<E> {
        let wide: Vec<f32> = (0..n).map(|_| (self.next() % 4001) as f32 / 1000.0 - 2.0).collect();
        let mut narrow = vec![E::default(); n];
        E::narrow(&wide, &mut narrow);
        narrow
    }
}

fn wide<E: Element>(x: &[E]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    E::widen(x, &mut out);
    out
}

struct Layer {
    shape: Shape,
    weight: Vec<f32>,
    decay: Vec<f32>,
    dt_bias: Vec<f32>,
}

impl Layer {
    fn new(shape: Shape, numbers: &mut Numbers) -> Self {
        Self {
            shape,
            weight: numbers.values(shape.taps * shape.channels()),
            decay: numbers
                .values::<f32>(shape.heads())
                .iter()
                .map(|x| -0.05 - x.abs())
                .collect(),
            dt_bias: numbers.values(shape.heads()),
        }
    }

    fn rule(&self) -> DeltaRule {
        let Shape {
            key_heads,
            key_dim,
            value_dim,
            ..
        } = self.shape;
        DeltaRule::new(
            &self.weight,
            &self.decay,
            &self.dt_bias,
            key_heads,
            key_dim,
            value_dim,
            BETA_SCALE,
        )
        .unwrap()
    }

    /// Outputs `[n, Hv, dv]` and the state after the tokens, in double precision, straight from the definition.
    fn reference(&self, mixed: &[f32], gates: &[f32]) -> (Vec<f64>, Vec<f64>) {
        let shape = self.shape;
        let (channels, heads) = (shape.channels(), shape.heads());
        let (dk, dv, keys) = (shape.key_dim, shape.value_dim, shape.key_heads * shape.key_dim);
        let count = mixed.len() / channels;
        let (mut state, mut out) = (vec![0.0; shape.state()], vec![]);
        for t in 0..count {
            let made: Vec<f64> = (0..channels)
                .map(|c| {
                    let sum: f64 = (0..shape.taps)
                        .filter(|j| t + j + 1 >= shape.taps)
                        .map(|j| {
                            f64::from(self.weight[j * channels + c])
                                * f64::from(mixed[(t + j + 1 - shape.taps) * channels + c])
                        })
                        .sum();
                    sum / (1.0 + (-sum).exp())
                })
                .collect();
            let unit = |at: usize| -> Vec<f64> {
                let row = &made[at..at + dk];
                let length = (row.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                row.iter().map(|x| x / length).collect()
            };
            for head in 0..heads {
                let key_head = head / shape.group;
                let (q, k) = (unit(key_head * dk), unit(keys + key_head * dk));
                let v = &made[2 * keys + head * dv..][..dv];
                let (b, a) = (
                    f64::from(gates[t * 2 * heads + head]),
                    f64::from(gates[t * 2 * heads + heads + head] + self.dt_bias[head]),
                );
                let beta = f64::from(BETA_SCALE) / (1.0 + (-b).exp());
                let decay = (f64::from(self.decay[head]) * a.exp().ln_1p()).exp();
                let s = &mut state[head * dk * dv..][..dk * dv];
                for x in s.iter_mut() {
                    *x *= decay;
                }
                for j in 0..dv {
                    let read: f64 = (0..dk).map(|i| s[i * dv + j] * k[i]).sum();
                    let delta = (v[j] - read) * beta;
                    for i in 0..dk {
                        s[i * dv + j] += k[i] * delta;
                    }
                    out.push((0..dk).map(|i| s[i * dv + j] * q[i]).sum::<f64>() / (dk as f64).sqrt());
                }
            }
        }
        (out, state)
    }
}

/// Everything that a layer remembers, of a few rows.
struct Memory<E> {
    rows: usize,
    block: usize,
    memory: Vec<f32>,
    window: Vec<E>,
    kept: Vec<E>,
    kept_gates: Vec<E>,
    pending: Vec<i32>,
}

/// Outputs, and the states after long requests.
type Given<E> = (Vec<E>, Vec<f32>, Vec<E>);

impl<E: Element> Memory<E> {
    fn new(shape: Shape, rows: usize, block: usize) -> Self {
        let stale = |n: usize| {
            let mut x = vec![E::default(); n];
            E::narrow(&vec![7.5; n], &mut x);
            x
        };
        Self {
            rows,
            block,
            // Whatever was there before is nothing to a text that begins.
            memory: vec![3.5; rows * shape.state()],
            window: stale(rows * (shape.taps - 1) * shape.channels()),
            kept: stale(rows * block * shape.channels()),
            kept_gates: stale(rows * block * 2 * shape.heads()),
            pending: vec![0; rows],
        }
    }

    fn run(
        &mut self,
        layer: &Layer,
        kernels: &HostKernels,
        mixed: &[E],
        gates: &[E],
        spans: &[Span],
    ) -> Result<Given<E>> {
        let shape = layer.shape;
        let (heads, channels, window) = (shape.heads(), shape.channels(), shape.taps - 1);
        let tokens = mixed.len() / channels;
        let long = spans.iter().filter(|s| s.end - s.start > self.block).count();
        let mut out = vec![E::default(); tokens * heads * shape.value_dim];
        let mut end_memory = vec![f32::NAN; long * shape.state()];
        let mut end_window = vec![E::default(); long * window * channels];
        let state = shape.key_dim * shape.value_dim;
        let at = Layout::contiguous;
        kernels.delta_rule(
            &layer.rule(),
            DeltaTensors {
                memory: RowsMut::from_slice("memory", &mut self.memory, at(self.rows, heads, state))?,
                window: RowsMut::from_slice("window", &mut self.window, at(self.rows, window, channels))?,
                kept: RowsMut::from_slice("kept", &mut self.kept, at(self.rows, self.block, channels))?,
                kept_gates: RowsMut::from_slice(
                    "kept_gates",
                    &mut self.kept_gates,
                    at(self.rows, self.block, 2 * heads),
                )?,
                pending: &mut self.pending,
                mixed: Rows::from_slice("mixed", mixed, at(tokens, 1, channels))?,
                gates: Rows::from_slice("gates", gates, at(tokens, 1, 2 * heads))?,
                out: RowsMut::from_slice("out", &mut out, at(tokens, heads, shape.value_dim))?,
                end_memory: RowsMut::from_slice("end_memory", &mut end_memory, at(long, heads, state))?,
                end_window: RowsMut::from_slice("end_window", &mut end_window, at(long, window, channels))?,
            },
            spans,
        )?;
        Ok((out, end_memory, end_window))
    }
}

/// A text of `mixed` and `gates`, cut anyhow: outputs, state and window after it. In every pass row 1 has it, between neighbours.
fn in_pieces<E: Element>(
    layer: &Layer,
    mixed: &[E],
    gates: &[E],
    numbers: &mut Numbers,
    block: usize,
) -> (Vec<E>, Vec<f32>, Vec<E>) {
    let shape = layer.shape;
    let (channels, heads, window) = (shape.channels(), shape.heads(), shape.taps - 1);
    let count = mixed.len() / channels;
    let mut memory = Memory::<E>::new(shape, 3, block);
    let (mut at, mut outs) = (0, vec![]);
    while at < count {
        let isas = Isa::available();
        let kernels = HostKernels::new()
            .unwrap()
            .with_isa(isas[numbers.below(isas.len())])
            .with_threads(1 + numbers.below(3));
        let kept = (1 + numbers.below(block + 3)).min(count - at);
        let rejected = if kept > block {
            0
        } else {
            numbers.below(block - kept + 1)
        };
        let (before, after) = (numbers.below(4), numbers.below(2));
        let own = kept + rejected;
        let mut fed = (
            numbers.values::<E>(before * channels),
            numbers.values::<E>(before * 2 * heads),
        );
        fed.0.extend_from_slice(&mixed[at * channels..(at + kept) * channels]);
        fed.1.extend_from_slice(&gates[at * 2 * heads..(at + kept) * 2 * heads]);
        fed.0.extend(numbers.values::<E>((rejected + after) * channels));
        fed.1.extend(numbers.values::<E>((rejected + after) * 2 * heads));
        let all = [
            (2, 0, before, true),
            (1, before, before + own, at == 0),
            (0, before + own, before + own + after, true),
        ];
        let spans: Vec<Span> = all
            .into_iter()
            .filter(|&(_, start, end, _)| end > start)
            .map(|(row, start, end, fresh)| Span { row, start, end, fresh })
            .collect();
        let (out, end_memory, end_window) = memory.run(layer, &kernels, &fed.0, &fed.1, &spans).unwrap();
        let width = heads * shape.value_dim;
        outs.extend_from_slice(&out[before * width..(before + kept) * width]);
        if kept > block {
            let mine = spans
                .iter()
                .take_while(|s| s.row != 1)
                .filter(|s| s.end - s.start > block)
                .count();
            memory.memory[shape.state()..2 * shape.state()]
                .copy_from_slice(&end_memory[mine * shape.state()..(mine + 1) * shape.state()]);
            let size = window * channels;
            memory.window[size..2 * size].copy_from_slice(&end_window[mine * size..(mine + 1) * size]);
        } else {
            memory.pending[1] = kept as i32;
        }
        at += kept;
    }
    // One more token, so that the last ones are folded in.
    let (more, gate) = (numbers.values::<E>(channels), numbers.values::<E>(2 * heads));
    let span = [Span {
        row: 1,
        start: 0,
        end: 1,
        fresh: false,
    }];
    memory
        .run(layer, &HostKernels::new().unwrap(), &more, &gate, &span)
        .unwrap();
    assert_eq!(memory.pending, [0; 3]);
    let size = window * channels;
    (
        outs,
        memory.memory[shape.state()..2 * shape.state()].to_vec(),
        memory.window[size..2 * size].to_vec(),
    )
}

fn shapes() -> impl Strategy<Value = Shape> {
    (1usize..3, 1usize..4, 1usize..21, 1usize..40, 1usize..6).prop_map(
        |(key_heads, group, key_dim, value_dim, taps)| Shape {
            key_heads,
            group,
            key_dim,
            value_dim,
            taps,
        },
    )
}

fn bits<E: Element>(x: &[E]) -> Vec<u32> {
    wide(x).into_iter().map(f32::to_bits).collect()
}

fn same_in_any_pieces<E: Element>(shape: Shape, count: usize, seed: u64) {
    let mut numbers = Numbers(seed);
    let layer = Layer::new(shape, &mut numbers);
    let mixed = numbers.values::<E>(count * shape.channels());
    let gates = numbers.values::<E>(count * 2 * shape.heads());
    // A block as long as the text, no neighbours to speak of: the plainest way.
    let first = in_pieces(&layer, &mixed, &gates, &mut Numbers(1), count.max(4));
    for turn in 0..3 {
        let mut cuts = Numbers(seed ^ (turn + 2));
        let block = 1 + cuts.below(6);
        let found = in_pieces(&layer, &mixed, &gates, &mut cuts, block);
        assert_eq!(bits(&found.0), bits(&first.0), "outputs");
        assert_eq!(bits(&found.1), bits(&first.1), "state");
        assert_eq!(bits(&found.2), bits(&first.2), "window");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_text_gives_the_outputs_and_the_state_of_its_definition(shape in shapes(), count in 1usize..14, seed: u64) {
        let mut numbers = Numbers(seed);
        let layer = Layer::new(shape, &mut numbers);
        let mixed = numbers.values::<f32>(count * shape.channels());
        let gates = numbers.values::<f32>(count * 2 * shape.heads());
        let (out, state, _) = in_pieces(&layer, &mixed, &gates, &mut numbers, 5);
        let (expected, end) = layer.reference(&mixed, &gates);
        for (got, expected) in out.iter().zip(&expected).chain(state.iter().zip(&end)) {
            prop_assert!((f64::from(*got) - expected).abs() < 2e-4 * expected.abs().max(1.0), "{got} for {expected}");
        }
    }

    #[test]
    fn a_token_is_the_same_bits_in_any_block_and_company(shape in shapes(), count in 1usize..14, seed: u64) {
        same_in_any_pieces::<f32>(shape, count, seed);
        same_in_any_pieces::<Bf16>(shape, count, seed);
    }
}

#[test]
fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
    let shape = Shape {
        key_heads: 2,
        group: 2,
        key_dim: 128,
        value_dim: 128,
        taps: 4,
    };
    let mut numbers = Numbers(3);
    let layer = Layer::new(shape, &mut numbers);
    let (mixed, gates) = (
        numbers.values::<f32>(6 * shape.channels()),
        numbers.values::<f32>(6 * 2 * shape.heads()),
    );
    let spans = [
        Span {
            row: 1,
            start: 0,
            end: 4,
            fresh: true,
        },
        Span {
            row: 0,
            start: 4,
            end: 6,
            fresh: true,
        },
    ];
    let run = |isa, threads| {
        let mut memory = Memory::<f32>::new(shape, 2, 4);
        let kernels = HostKernels::new().unwrap().with_isa(isa).with_threads(threads);
        let mut outs = memory.run(&layer, &kernels, &mixed, &gates, &spans).unwrap().0;
        memory.pending = vec![1, 3];
        let on = spans.map(|span| Span { fresh: false, ..span });
        outs.extend(memory.run(&layer, &kernels, &mixed, &gates, &on).unwrap().0);
        (bits(&outs), bits(&memory.memory))
    };
    let first = run(Isa::Portable, 1);
    for isa in Isa::available() {
        for threads in [1, 2, 3] {
            assert_eq!(run(isa, threads), first, "{isa:?}, {threads}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_changes_nothing() {
    let shape = Shape {
        key_heads: 1,
        group: 2,
        key_dim: 4,
        value_dim: 3,
        taps: 3,
    };
    let mut numbers = Numbers(9);
    let layer = Layer::new(shape, &mut numbers);
    let kernels = HostKernels::new().unwrap();
    let (mixed, gates) = (
        numbers.values::<f32>(3 * shape.channels()),
        numbers.values::<f32>(3 * 4),
    );
    let one = |row, start, end| Span {
        row,
        start,
        end,
        fresh: false,
    };
    let refused = |spans: &[Span], pending: i32| {
        let mut memory = Memory::<f32>::new(shape, 2, 2);
        memory.pending[0] = pending;
        let before = memory.memory.clone();
        let error = memory
            .run(&layer, &kernels, &mixed, &gates, spans)
            .unwrap_err()
            .to_string();
        assert_eq!(memory.memory, before);
        error
    };
    assert_eq!(
        refused(&[one(2, 0, 3)], 0),
        "rows: got 2, expected rows below 2 and each once"
    );
    assert_eq!(
        refused(&[one(0, 0, 1), one(0, 1, 3)], 0),
        "rows: got 0, expected rows below 2 and each once"
    );
    assert_eq!(
        refused(&[one(0, 1, 3)], 0),
        "starts: got 1..3, expected tokens from 0 on, up to 3"
    );
    assert_eq!(refused(&[one(0, 0, 2)], 0), "starts: got 2 tokens, expected all 3");
    assert_eq!(refused(&[one(0, 0, 3)], 3), "pending: got 3, expected 0..2");
    assert_eq!(refused(&[one(0, 0, 3)], -1), "pending: got -1, expected 0..2");
    let wrong = DeltaRule::new(&layer.weight[1..], &layer.decay, &layer.dt_bias, 1, 4, 3, 1.0).unwrap_err();
    assert_eq!(wrong.to_string(), "weight: got 41, expected taps of 14 channels");
    assert!(DeltaRule::new(&layer.weight, &layer.decay, &layer.dt_bias[1..], 1, 4, 3, 1.0).is_err());
    assert!(DeltaRule::new(&layer.weight, &layer.decay, &layer.dt_bias, 3, 4, 3, 1.0).is_err());
    assert!(DeltaRule::new(&layer.weight, &layer.decay, &layer.dt_bias, 1, 0, 3, 1.0).is_err());
}
