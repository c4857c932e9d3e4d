//! The gated delta rule of the GPU against that of the host: the same bits in outputs, states, windows and what is kept.

use dflash_host_check as _;
use dflash_rs::device::cuda::params::DeltaRuleParams;
use dflash_rs::device::host::{Bf16, DeltaRule, DeltaTensors, HostKernels, Layout, Rows, RowsMut, Span};

use super::numbers::{Numbers, address, address_mut, share, starts};

unsafe extern "C" {
    fn dflash_host_delta_inputs(p: *const DeltaRuleParams);
    fn dflash_host_delta_rule(p: *const DeltaRuleParams, key_dim: i32);
    fn dflash_emulated_delta_inputs(p: *const DeltaRuleParams);
    fn dflash_emulated_delta_rule(p: *const DeltaRuleParams, key_dim: i32);
}

/// The two launches.
type Kernels = (
    unsafe extern "C" fn(*const DeltaRuleParams),
    unsafe extern "C" fn(*const DeltaRuleParams, i32),
);
const HOST: Kernels = (dflash_host_delta_inputs, dflash_host_delta_rule);
const EMULATED: Kernels = (dflash_emulated_delta_inputs, dflash_emulated_delta_rule);
const POISON: Bf16 = Bf16(0xdede);

struct Layer {
    key_heads: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    taps: usize,
    block: usize,
    weight: Vec<f32>,
    decay: Vec<f32>,
    dt_bias: Vec<f32>,
    beta_scale: f32,
}

impl Layer {
    fn new(numbers: &mut Numbers, key_dim: usize, wide: bool) -> Self {
        let key_heads = numbers.within(1, 2);
        let heads = key_heads * numbers.within(1, 3);
        let value_dim = if wide { 128 } else { numbers.within(1, 40) };
        let taps = numbers.within(1, 6);
        let channels = 2 * key_heads * key_dim + heads * value_dim;
        Self {
            key_heads,
            heads,
            key_dim,
            value_dim,
            taps,
            block: numbers.within(1, 5),
            weight: singles(numbers, taps * channels),
            decay: singles(numbers, heads).iter().map(|x| -x.exp()).collect(),
            dt_bias: singles(numbers, heads),
            beta_scale: numbers.pick(&[1.0, 2.0]),
        }
    }

    fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.heads * self.value_dim
    }

    fn rule(&self) -> DeltaRule {
        DeltaRule::new(
            &self.weight,
            &self.decay,
            &self.dt_bias,
            self.key_heads,
            self.key_dim,
            self.value_dim,
            self.beta_scale,
        )
        .unwrap()
    }
}

fn singles(numbers: &mut Numbers, n: usize) -> Vec<f32> {
    (0..n).map(|_| (numbers.unit() * 4.0 - 2.0) as f32).collect()
}

fn halves(numbers: &mut Numbers, n: usize) -> Vec<Bf16> {
    singles(numbers, n).into_iter().map(Bf16::from).collect()
}

/// What a layer remembers of all requests, once for the host and once for the GPU.
#[derive(Clone, PartialEq)]
struct Memory {
    memory: Vec<f32>,
    window: Vec<Bf16>,
    kept: Vec<Bf16>,
    kept_gates: Vec<Bf16>,
}

impl Memory {
    /// Stale, as slots are whose requests have left.
    fn new(layer: &Layer, rows: usize, slots: usize) -> Self {
        Self {
            memory: vec![3.5; slots * layer.heads * layer.key_dim * layer.value_dim],
            window: vec![Bf16::from(7.5); slots * (layer.taps - 1) * layer.channels()],
            kept: vec![Bf16::from(-7.5); rows * layer.block * layer.channels()],
            kept_gates: vec![Bf16::from(5.5); rows * layer.block * 2 * layer.heads],
        }
    }

    fn bits(&self) -> Vec<u32> {
        let halves = [&self.window, &self.kept, &self.kept_gates];
        let wide = self.memory.iter().map(|x| x.to_bits());
        wide.chain(halves.into_iter().flatten().map(|x| u32::from(x.0)))
            .collect()
    }
}

/// A request in a pass: its slot, the tokens before it, how many of its last pass are to be folded in, its own.
#[derive(Clone, Copy, Debug)]
struct Part {
    slot: usize,
    context: usize,
    pending: usize,
    tokens: usize,
}

struct Pass {
    parts: Vec<Part>,
    mixed: Vec<Bf16>,
    gates: Vec<Bf16>,
    /// Packed tokens that are nobody's.
    padding: usize,
}

/// Outputs and the states after long requests.
struct Given {
    out: Vec<Bf16>,
    end_memory: Vec<f32>,
    end_window: Vec<Bf16>,
}

impl Pass {
    fn new(numbers: &mut Numbers, layer: &Layer, parts: Vec<Part>) -> Self {
        let padding = numbers.below(3);
        let tokens = parts.iter().map(|part| part.tokens).sum::<usize>() + padding;
        Self {
            mixed: halves(numbers, tokens * layer.channels()),
            gates: halves(numbers, tokens * 2 * layer.heads),
            parts,
            padding,
        }
    }

    fn long(&self, layer: &Layer) -> usize {
        self.parts.iter().filter(|part| part.tokens > layer.block).count()
    }

    fn room(&self, layer: &Layer) -> Given {
        let tokens = self.gates.len() / (2 * layer.heads);
        let ends = self.long(layer);
        Given {
            out: vec![POISON; tokens * layer.heads * layer.value_dim],
            end_memory: vec![f32::NAN; ends * layer.heads * layer.key_dim * layer.value_dim],
            end_window: vec![POISON; ends * (layer.taps - 1) * layer.channels()],
        }
    }

    /// By the host's kernel, which is told of those with tokens only.
    fn on_host(&self, layer: &Layer, known: &mut Memory) -> Given {
        let (heads, channels, window) = (layer.heads, layer.channels(), layer.taps - 1);
        let slots = known.memory.len() / (heads * layer.key_dim * layer.value_dim);
        let rows = known.kept.len() / (layer.block * channels);
        let mut given = self.room(layer);
        let tokens = self.gates.len() / (2 * heads) - self.padding;
        let mut pending = vec![0; rows];
        let (mut spans, mut at) = (vec![], 0);
        for part in self.parts.iter().filter(|part| part.tokens > 0) {
            pending[part.slot] = part.pending as i32;
            spans.push(Span {
                row: part.slot,
                start: at,
                end: at + part.tokens,
                fresh: part.context == 0,
            });
            at += part.tokens;
        }
        let (plain, ends) = (Layout::contiguous, self.long(layer));
        let state = layer.key_dim * layer.value_dim;
        let own = &mut given.out[..tokens * heads * layer.value_dim];
        let tensors = DeltaTensors {
            memory: RowsMut::from_slice("memory", &mut known.memory, plain(slots, heads, state)).unwrap(),
            window: RowsMut::from_slice("window", &mut known.window, plain(slots, window, channels)).unwrap(),
            kept: RowsMut::from_slice("kept", &mut known.kept, plain(rows, layer.block, channels)).unwrap(),
            kept_gates: RowsMut::from_slice("kept_gates", &mut known.kept_gates, plain(rows, layer.block, 2 * heads))
                .unwrap(),
            pending: &mut pending,
            mixed: Rows::from_slice("mixed", &self.mixed[..tokens * channels], plain(tokens, 1, channels)).unwrap(),
            gates: Rows::from_slice("gates", &self.gates[..tokens * 2 * heads], plain(tokens, 1, 2 * heads)).unwrap(),
            out: RowsMut::from_slice("out", own, plain(tokens, heads, layer.value_dim)).unwrap(),
            end_memory: RowsMut::from_slice("end_memory", &mut given.end_memory, plain(ends, heads, state)).unwrap(),
            end_window: RowsMut::from_slice("end_window", &mut given.end_window, plain(ends, window, channels))
                .unwrap(),
        };
        HostKernels::new()
            .unwrap()
            .delta_rule(&layer.rule(), tensors, &spans)
            .unwrap();
        given
    }

    /// By the GPU's; `stands` is where its states stand.
    fn on_gpu(
        &self,
        layer: &Layer,
        known: &mut Memory,
        stands: &mut [i32],
        into: Option<&[i64]>,
        kernels: Kernels,
    ) -> Given {
        let mut given = self.room(layer);
        let tokens: Vec<usize> = self.parts.iter().map(|part| part.tokens).collect();
        let query_starts = starts(&tokens);
        let context_lens: Vec<i32> = self.parts.iter().map(|part| part.context as i32).collect();
        let slots: Vec<i64> = self.parts.iter().map(|part| part.slot as i64).collect();
        let mut next = 0..;
        let ends: Vec<i32> = tokens
            .iter()
            .map(|&n| if n > layer.block { next.next().unwrap() } else { -1 })
            .collect();
        let rows = self.gates.len() / (2 * layer.heads) + tokens.len() * layer.block;
        let mut made = vec![POISON; rows * layer.channels()];
        let mut scales = vec![f32::NAN; rows * 2 * (layer.key_heads + layer.heads)];
        let mut pending = vec![-7; tokens.len()];
        let p = DeltaRuleParams {
            mixed: address(&self.mixed),
            gates: address(&self.gates),
            weight: address(&layer.weight),
            decay: address(&layer.decay),
            dt_bias: address(&layer.dt_bias),
            query_starts: address(&query_starts),
            context_lens: address(&context_lens),
            slots: address(&slots),
            into: into.map_or(0, address),
            ends: if given.end_memory.is_empty() { 0 } else { address(&ends) },
            memory: address_mut(&mut known.memory),
            window: address_mut(&mut known.window),
            kept: address_mut(&mut known.kept),
            kept_gates: address_mut(&mut known.kept_gates),
            stands: address_mut(stands),
            end_memory: address_mut(&mut given.end_memory),
            end_window: address_mut(&mut given.end_window),
            out: address_mut(&mut given.out),
            made: address_mut(&mut made),
            scales: address_mut(&mut scales),
            pending: address_mut(&mut pending),
            num_requests: tokens.len() as i32,
            num_tokens: (self.gates.len() / (2 * layer.heads)) as i32,
            longest: tokens.iter().max().map_or(0, |&n| n as i32),
            block: layer.block as i32,
            key_heads: layer.key_heads as i32,
            value_heads: layer.heads as i32,
            key_dim: layer.key_dim as i32,
            value_dim: layer.value_dim as i32,
            taps: layer.taps as i32,
            beta_scale: layer.beta_scale,
        };
        // SAFETY: the arrays outlive the calls and have the lengths that params.h asks for.
        unsafe {
            kernels.0(&raw const p);
            kernels.1(&raw const p, layer.key_dim as i32);
        }
        given
    }
}

/// A request between two passes: what is committed, and the tokens of its last pass.
#[derive(Clone, Copy, Default)]
struct Row {
    context: usize,
    last: usize,
}

/// Passes over requests that come, go on, are cut anyhow and lose their drafts. Both sides after each of them.
fn live(numbers: &mut Numbers, layer: &Layer, passes: usize, kernels: Kernels) {
    let rows = numbers.within(1, 4);
    let mut known = [(); 2].map(|()| Memory::new(layer, rows, rows + 1));
    let (mut stands, mut all) = (vec![9i32; rows + 1], vec![Row::default(); rows]);
    for _ in 0..passes {
        let mut parts = vec![];
        for slot in numbers.shuffled(rows) {
            let row = &mut all[slot];
            if numbers.chance(0.1) {
                *row = Row::default();
            }
            // Of its last pass some tokens were kept; a long one has brought its end along.
            let pending = std::mem::take(&mut row.last);
            let tokens = match numbers.below(6) {
                0 => 0,
                1 => layer.block + numbers.within(1, 4),
                2 => layer.block + numbers.within(10, 70),
                _ => numbers.within(1, layer.block),
            };
            parts.push(Part {
                slot,
                context: row.context,
                pending,
                tokens,
            });
        }
        let pass = Pass::new(numbers, layer, parts);
        let [ours, theirs] = &mut known;
        let expected = pass.on_host(layer, ours);
        let got = pass.on_gpu(layer, theirs, &mut stands, None, kernels);
        let single = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(got.out == expected.out, "outputs of {:?}", pass.parts);
        assert!(single(&got.end_memory) == single(&expected.end_memory), "ends");
        assert!(got.end_window == expected.end_window, "windows of ends");
        assert!(ours.bits() == theirs.bits(), "states after {:?}", pass.parts);
        commit(numbers, layer, &pass, &got, &mut known, &mut stands, &mut all);
    }
}

/// Decides what is kept of a pass.
fn commit(
    numbers: &mut Numbers,
    layer: &Layer,
    pass: &Pass,
    given: &Given,
    known: &mut [Memory; 2],
    stands: &mut [i32],
    all: &mut [Row],
) {
    let (state, window) = (
        layer.heads * layer.key_dim * layer.value_dim,
        (layer.taps - 1) * layer.channels(),
    );
    let mut end = 0;
    for part in &pass.parts {
        let row = &mut all[part.slot];
        if part.tokens == 0 {
            // It had no part in the pass: what was to be folded in still is.
            row.last = part.pending;
            continue;
        }
        assert_eq!(stands[part.slot] as usize, part.context);
        if part.tokens <= layer.block {
            row.last = numbers.within(usize::from(part.context == 0), part.tokens);
            row.context += row.last;
            continue;
        }
        if numbers.chance(0.8) || part.context == 0 {
            for side in &mut *known {
                side.memory[part.slot * state..][..state].copy_from_slice(&given.end_memory[end * state..][..state]);
                side.window[part.slot * window..][..window]
                    .copy_from_slice(&given.end_window[end * window..][..window]);
            }
            row.context += part.tokens;
            stands[part.slot] = row.context as i32;
        }
        end += 1;
    }
}

#[test]
fn passes_leave_the_bits_that_the_host_leaves() {
    let mut numbers = Numbers(21);
    for turn in 0..share(30) {
        let layer = Layer::new(&mut numbers, [32, 64, 96, 128, 192, 256][turn % 6], turn % 5 == 0);
        live(&mut numbers, &layer, 6, HOST);
    }
}

#[test]
fn the_kernels_as_they_stand_leave_the_same() {
    let mut numbers = Numbers(121);
    for key_dim in [32, 64, 96, 128, 192, 256] {
        let mut layer = Layer::new(&mut numbers, key_dim, key_dim == 32);
        layer.block = layer.block.max(2);
        live(&mut numbers, &layer, if key_dim < 100 { 3 } else { 2 }, EMULATED);
    }
}

#[test]
fn a_copy_of_a_state_is_that_of_the_next_pass_and_moves_nothing() {
    for (seed, kernels) in [(5, HOST), (6, EMULATED)] {
        let mut numbers = Numbers(seed);
        let mut layer = Layer::new(&mut numbers, 32, false);
        layer.block = 4;
        let mut known = Memory::new(&layer, 2, 4);
        let mut stands = vec![0; 4];
        let part = |slot, context, pending, tokens| Part {
            slot,
            context,
            pending,
            tokens,
        };
        let first = Pass::new(&mut numbers, &layer, vec![part(1, 0, 0, 4), part(0, 0, 0, 3)]);
        first.on_gpu(&layer, &mut known, &mut stands, None, kernels);
        let before = known.clone();
        let empty = Pass {
            parts: vec![part(1, 3, 3, 0), part(0, 0, 0, 0)],
            mixed: vec![],
            gates: vec![],
            padding: 0,
        };
        // Nothing is folded into the other one: its copy is the state of a text that begins.
        empty.on_gpu(&layer, &mut known, &mut stands, Some(&[2, 3]), kernels);
        let (state, window) = (
            layer.heads * layer.key_dim * layer.value_dim,
            (layer.taps - 1) * layer.channels(),
        );
        assert!(known.memory[..2 * state] == before.memory[..2 * state] && stands == [0, 0, 3, 0]);
        assert!(known.window[..2 * window] == before.window[..2 * window]);
        assert!(known.kept == before.kept && known.kept_gates == before.kept_gates);
        let (memory, moved) = (known.memory[2 * state..].to_vec(), known.window[2 * window..].to_vec());
        assert!(memory[state..].iter().all(|&x| x == 0.0) && moved[window..].iter().all(|x| x.0 == 0));
        let next = Pass::new(&mut numbers, &layer, vec![part(1, 3, 3, 1)]);
        next.on_gpu(&layer, &mut known, &mut stands, None, kernels);
        assert_eq!(stands, [0, 3, 3, 0]);
        assert!(
            known.memory[state..2 * state] == memory[..state] && known.window[window..2 * window] == moved[..window]
        );
        assert!(memory[..state].iter().any(|&x| x != 0.0));
    }
}

#[test]
fn a_context_out_of_reach_of_its_state_gives_nan_and_changes_nothing() {
    for (seed, kernels) in [(7, HOST), (8, EMULATED)] {
        let mut numbers = Numbers(seed);
        let mut layer = Layer::new(&mut numbers, 32, false);
        layer.block = 2;
        let mut known = Memory::new(&layer, 3, 3);
        let before = known.clone();
        let mut stands = vec![5, 9, 5];
        let part = |slot, context, pending| Part {
            slot,
            context,
            pending,
            tokens: 2,
        };
        let pass = Pass::new(&mut numbers, &layer, vec![part(0, 8, 0), part(1, 8, 0), part(2, 7, 2)]);
        let given = pass.on_gpu(&layer, &mut known, &mut stands, None, kernels);
        let width = layer.heads * layer.value_dim;
        let nan = |x: &[Bf16]| x.iter().all(|&x| f32::from(x).is_nan());
        assert!(
            nan(&given.out[..4 * width]) && !given.out[4 * width..6 * width].iter().any(|&x| f32::from(x).is_nan())
        );
        let state = layer.heads * layer.key_dim * layer.value_dim;
        assert!(known.memory[..2 * state] == before.memory[..2 * state]);
        assert!(known.memory[2 * state..] != before.memory[2 * state..]);
        assert_eq!(stands, [5, 9, 7]);
    }
}
