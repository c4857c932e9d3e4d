//! The gated delta rule behind a short causal convolution, on states that stand at the committed length.
//!
//! One call is one layer for a whole pass. For every request it folds the kept tokens of the last pass into the state, then runs the new
//! ones from there without moving it:
//!
//! ```text
//! make    q, k, v, decay and beta of every token, kept ones included: a convolution, SiLU, unit lengths
//! run     state of one head, columns by columns in the first-level cache: fold, write back, run on
//! settle  windows move over what was folded, new inputs are kept, nothing is pending
//! ```
//!
//! One head, state `S[dk][dv]`, per token: `S *= decay; delta = (v - S^T k) * beta; S += k delta^T; out = S^T q`.
//!
//! Promises: a token's output and the state after it are the same bits in any block, chunk and company, on any number of threads and with
//! every instruction set: columns of a state never meet, and sums over its rows run in two interleaved halves, from the first row to the
//! last. States are f32; inputs are rounded to their own type where transformers rounds them.

mod walk;

use self::walk::Tokens;
use super::rowwise::silu;
use super::simd::{Lanes, Routine, dispatch};
use super::view::{Element, LANES, Rows, RowsMut};
use super::{HostKernels, team};
use crate::error::{Error, Result};

/// Vectors of columns that are taken at a time: 128 rows of them are 16 KiB.
const VECTORS: usize = 2;
const COLUMNS: usize = VECTORS * LANES;
/// Added to a sum of squares before its root is taken.
const NORM_EPS: f32 = 1e-6;
/// Multiply-adds that are worth a helper.
const WORK_PER_THREAD: usize = 1 << 17;
/// Tokens whose inputs are made in one part.
const TOKENS_PER_PART: usize = 4;

/// The weights of one layer.
#[derive(Debug)]
pub struct DeltaRule {
    /// `[taps, C]`
    weight: Vec<f32>,
    /// `[Hv]` each.
    decay: Vec<f32>,
    dt_bias: Vec<f32>,
    taps: usize,
    key_heads: usize,
    key_dim: usize,
    value_dim: usize,
    beta_scale: f32,
}

/// A request's tokens in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its slot.
    pub row: usize,
    /// Packed tokens `start..end`.
    pub start: usize,
    /// See `start`.
    pub end: usize,
    /// Its text begins with them, whatever its slot holds.
    pub fresh: bool,
}

/// The arrays of a pass. `T` packed tokens, `C = 2 Hk dk + Hv dv` channels, blocks of up to `B` tokens.
#[derive(Debug)]
pub struct DeltaTensors<'a, E> {
    /// `[slots, Hv, dk * dv]` states.
    pub memory: RowsMut<'a, f32>,
    /// `[slots, taps - 1, C]` the last inputs of the convolution.
    pub window: RowsMut<'a, E>,
    /// `[rows, B, C]` inputs of each row's last pass.
    pub kept: RowsMut<'a, E>,
    /// `[rows, B, 2 Hv]` its gates.
    pub kept_gates: RowsMut<'a, E>,
    /// `[rows]` how many of the kept tokens the state has yet to fold in.
    pub pending: &'a mut [i32],
    /// `[T, 1, C]` inputs.
    pub mixed: Rows<'a, E>,
    /// `[T, 1, 2 Hv]` gates, b and then a.
    pub gates: Rows<'a, E>,
    /// `[T, Hv, dv]` result.
    pub out: RowsMut<'a, E>,
    /// `[L, Hv, dk * dv]` and `[L, taps - 1, C]`: the states after the requests with more than `B` tokens, in their order.
    pub end_memory: RowsMut<'a, f32>,
    /// See `end_memory`.
    pub end_window: RowsMut<'a, E>,
}

/// A request, where its tokens lie among those that are made, and which of the ends is its own.
struct Work {
    span: Span,
    pending: usize,
    first: usize,
    end: Option<usize>,
}

impl Work {
    fn new_tokens(&self) -> usize {
        self.span.end - self.span.start
    }
    fn tokens(&self) -> usize {
        self.pending + self.new_tokens()
    }
}

impl DeltaRule {
    /// `weight` `[taps, C]`, `decay` and `dt_bias` `[Hv]`: a token's decay is `exp(decay * softplus(a + dt_bias))`, its
    /// beta `beta_scale * sigmoid(b)`.
    ///
    /// # Errors
    /// `InvalidArgument` for sizes that do not fit each other.
    pub fn new(
        weight: &[f32],
        decay: &[f32],
        dt_bias: &[f32],
        key_heads: usize,
        key_dim: usize,
        value_dim: usize,
        beta_scale: f32,
    ) -> Result<Self> {
        let wrong = |name, got: usize, expected: String| {
            Err(Error::InvalidArgument {
                name,
                got: got.to_string(),
                expected,
            })
        };
        let heads = decay.len();
        if key_heads == 0 || heads == 0 || !heads.is_multiple_of(key_heads) {
            return wrong(
                "decay",
                heads,
                format!("a multiple of the {key_heads} key heads, at least one"),
            );
        }
        if key_dim == 0 || value_dim == 0 {
            return wrong("key_dim", key_dim.min(value_dim), "dimensions of at least 1".into());
        }
        if dt_bias.len() != heads {
            return wrong("dt_bias", dt_bias.len(), format!("{heads}, one for each head of decay"));
        }
        let channels = 2 * key_heads * key_dim + heads * value_dim;
        if weight.is_empty() || !weight.len().is_multiple_of(channels) {
            return wrong("weight", weight.len(), format!("taps of {channels} channels"));
        }
        Ok(Self {
            taps: weight.len() / channels,
            weight: weight.to_vec(),
            decay: decay.to_vec(),
            dt_bias: dt_bias.to_vec(),
            key_heads,
            key_dim,
            value_dim,
            beta_scale,
        })
    }

    /// Value heads.
    pub fn value_heads(&self) -> usize {
        self.decay.len()
    }

    /// Elements of a head's state.
    pub fn state(&self) -> usize {
        self.key_dim * self.value_dim
    }

    /// Elements of a head's output.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// Inputs that the convolution looks back.
    pub fn window(&self) -> usize {
        self.taps - 1
    }

    /// Inputs of a token.
    pub fn channels(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.value_heads() * self.value_dim
    }

    fn check<E: Element>(&self, tensors: &DeltaTensors<'_, E>, spans: &[Span]) -> Result<Vec<Work>> {
        let (heads, state, channels) = (self.value_heads(), self.state(), self.channels());
        let (slots, rows) = (tensors.memory.layout().rows, tensors.pending.len());
        let (block, tokens) = (tensors.kept.layout().heads, tensors.mixed.layout().rows);
        let ends = tensors.end_memory.layout().rows;
        let shape = |l: &super::Layout| (l.rows, l.heads, l.dim);
        for (name, got, expected) in [
            ("memory", shape(tensors.memory.layout()), (slots, heads, state)),
            (
                "window",
                shape(tensors.window.layout()),
                (slots, self.window(), channels),
            ),
            ("kept", shape(tensors.kept.layout()), (rows, block, channels)),
            (
                "kept_gates",
                shape(tensors.kept_gates.layout()),
                (rows, block, 2 * heads),
            ),
            ("mixed", shape(tensors.mixed.layout()), (tokens, 1, channels)),
            ("gates", shape(tensors.gates.layout()), (tokens, 1, 2 * heads)),
            ("out", shape(tensors.out.layout()), (tokens, heads, self.value_dim)),
            ("end_memory", shape(tensors.end_memory.layout()), (ends, heads, state)),
            (
                "end_window",
                shape(tensors.end_window.layout()),
                (ends, self.window(), channels),
            ),
        ] {
            if got != expected {
                return Err(Error::InvalidArgument {
                    name,
                    got: format!("{got:?}"),
                    expected: format!("{expected:?}"),
                });
            }
        }
        let refuse = |name, got: String, expected: String| Err(Error::InvalidArgument { name, got, expected });
        let mut seen = vec![false; rows];
        let (mut at, mut first, mut long) = (0, 0, 0);
        let mut works = Vec::with_capacity(spans.len());
        for &span in spans {
            if span.row >= rows.min(slots) || seen[span.row] {
                let expected = format!("rows below {} and each once", rows.min(slots));
                return refuse("rows", span.row.to_string(), expected);
            }
            seen[span.row] = true;
            if span.start != at || span.end <= span.start || span.end > tokens {
                let expected = format!("tokens from {at} on, up to {tokens}");
                return refuse("starts", format!("{}..{}", span.start, span.end), expected);
            }
            let waiting = tensors.pending[span.row];
            let pending = usize::try_from(waiting).ok().filter(|&count| count <= block);
            let Some(pending) = pending else {
                return refuse("pending", waiting.to_string(), format!("0..{block}"));
            };
            let work = Work {
                span,
                pending: if span.fresh { 0 } else { pending },
                first,
                end: (span.end - span.start > block).then_some(long),
            };
            at = span.end;
            first += work.tokens();
            long += usize::from(work.end.is_some());
            works.push(work);
        }
        if at != tokens {
            return refuse("starts", format!("{at} tokens"), format!("all {tokens}"));
        }
        if long != ends {
            return refuse(
                "end_memory",
                format!("{ends} rows"),
                format!("{long}, those of more than {block} tokens"),
            );
        }
        Ok(works)
    }
}

/// The inputs of one token's convolution: place `k` of what a request's convolution sees, its window first.
fn input<'a, E: Element>(
    tensors: &'a DeltaTensors<'_, E>,
    window: usize,
    nothing: &'a [E],
    work: &Work,
    k: usize,
) -> &'a [E] {
    let (row, pending) = (work.span.row, work.pending);
    match k.checked_sub(window) {
        None if work.span.fresh => nothing,
        None => tensors.window.as_rows().row(row, k),
        Some(k) if k < pending => tensors.kept.as_rows().row(row, k),
        Some(k) => tensors.mixed.row(work.span.start + k - pending, 0),
    }
}

impl HostKernels {
    /// One layer of a pass, see the module. Nothing has changed where it is an error.
    ///
    /// # Errors
    /// `InvalidArgument` for shapes and spans that do not fit each other.
    pub fn delta_rule<E: Element>(
        &self,
        rule: &DeltaRule,
        mut tensors: DeltaTensors<'_, E>,
        spans: &[Span],
    ) -> Result<()> {
        let works = rule.check(&tensors, spans)?;
        let (heads, channels, window) = (rule.value_heads(), rule.channels(), rule.window());
        let total: usize = works.iter().map(Work::tokens).sum();
        let nothing = vec![E::default(); channels];
        let (mut made, mut gates) = (vec![0.0; total * channels], vec![0.0; total * 2 * heads]);

        let threads = self.threads.min(1 + total * heads * rule.state() / WORK_PER_THREAD);
        let places: Vec<(usize, usize)> = works
            .iter()
            .enumerate()
            .flat_map(|(w, work)| (0..work.tokens()).map(move |k| (w, k)))
            .collect();
        let parts = places
            .chunks(TOKENS_PER_PART)
            .zip(made.chunks_mut(TOKENS_PER_PART * channels))
            .zip(gates.chunks_mut(TOKENS_PER_PART * 2 * heads))
            .collect();
        let seen = &tensors;
        team::each(
            threads,
            parts,
            |((places, made), gates): ((&[(usize, usize)], _), _)| {
                let rows = <[f32]>::chunks_mut(made, channels).zip(<[f32]>::chunks_mut(gates, 2 * heads));
                for (&(w, k), (made, gates)) in places.iter().zip(rows) {
                    let work = &works[w];
                    let inputs: Vec<&[E]> = (k..=k + window)
                        .map(|k| input(seen, window, &nothing, work, k))
                        .collect();
                    dispatch(self.isa, Make { rule, inputs, made });
                    let given = match k.checked_sub(work.pending) {
                        None => seen.kept_gates.as_rows().row(work.span.row, k),
                        Some(k) => seen.gates.row(work.span.start + k, 0),
                    };
                    rule.gates(given, gates);
                }
            },
        );

        let parts: Vec<(usize, usize)> = (0..works.len())
            .flat_map(|w| (0..heads).map(move |head| (w, head)))
            .collect();
        team::each(threads, parts, |(w, head)| {
            let work = &works[w];
            // SAFETY: each part has the state of its own row and head (rows are distinct, as was checked), and the end that is its own.
            let (memory, end) = unsafe {
                (
                    seen.memory.row(work.span.row, head),
                    work.end.map(|end| seen.end_memory.row(end, head)),
                )
            };
            let tokens = work.first..work.first + work.tokens();
            let head = Head {
                rule,
                head,
                work,
                made: &made[tokens.start * channels..tokens.end * channels],
                gates: &gates[tokens.start * 2 * heads..tokens.end * 2 * heads],
                memory,
                end,
                out: &seen.out,
            };
            dispatch(self.isa, head);
        });
        settle(rule, &mut tensors, &works, &nothing);
        Ok(())
    }
}

/// Windows move over what was folded in, and what came in is kept.
fn settle<E: Element>(rule: &DeltaRule, tensors: &mut DeltaTensors<'_, E>, works: &[Work], nothing: &[E]) {
    let window = rule.window();
    for work in works {
        let row = work.span.row;
        let at = |first: usize, tensors: &DeltaTensors<'_, E>| -> Vec<Vec<E>> {
            (first..first + window)
                .map(|k| input(tensors, window, nothing, work, k).to_vec())
                .collect()
        };
        if let Some(end) = work.end {
            for (k, inputs) in at(work.tokens(), tensors).iter().enumerate() {
                tensors.end_window.row_mut(end, k).copy_from_slice(inputs);
            }
        }
        if work.span.fresh || work.pending > 0 {
            for (k, inputs) in at(work.pending, tensors).iter().enumerate() {
                tensors.window.row_mut(row, k).copy_from_slice(inputs);
            }
        }
        if work.end.is_none() {
            for (k, token) in (work.span.start..work.span.end).enumerate() {
                tensors
                    .kept
                    .row_mut(row, k)
                    .copy_from_slice(tensors.mixed.row(token, 0));
                tensors
                    .kept_gates
                    .row_mut(row, k)
                    .copy_from_slice(tensors.gates.row(token, 0));
            }
        }
        tensors.pending[row] = 0;
    }
}

impl DeltaRule {
    /// `given` is b and a of every head; `made` gets beta and decay. One number per head and token: the library's exponentials will do.
    fn gates<E: Element>(&self, given: &[E], made: &mut [f32]) {
        let heads = self.value_heads();
        let mut values = vec![0.0; 2 * heads];
        E::widen(given, &mut values);
        let (b, a) = values.split_at(heads);
        let (beta, decay) = made.split_at_mut(heads);
        for head in 0..heads {
            let b = f64::from(b[head]);
            beta[head] = rounded::<E>(rounded::<E>((1.0 / (1.0 + (-b).exp())) as f32) * self.beta_scale);
            let x = f64::from(a[head] + self.dt_bias[head]);
            // As torch has it: a sum that exp would not change any more is left as it is.
            let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
            let g = self.decay[head] * softplus as f32;
            decay[head] = f64::from(g).exp() as f32;
        }
    }
}

/// What is left of a number in the type `E`.
fn rounded<E: Element>(x: f32) -> f32 {
    let (mut narrow, mut wide) = ([E::default()], [0.0]);
    E::narrow(&[x], &mut narrow);
    E::widen(&narrow, &mut wide);
    wide[0]
}

/// Sixteen elements, or as many as there are and zeros.
#[inline(always)]
fn some<L: Lanes>(x: &[f32], at: usize) -> L {
    if let Some(x) = x.get(at..at + LANES) {
        return L::load(x.try_into().expect("sixteen elements"));
    }
    let mut padded = [0.0; LANES];
    padded[..x.len() - at].copy_from_slice(&x[at..]);
    L::load(&padded)
}

/// Query, key and value of one token out of its inputs: `made` `[C]`.
struct Make<'a, E> {
    rule: &'a DeltaRule,
    inputs: Vec<&'a [E]>,
    made: &'a mut [f32],
}

impl<E: Element> Routine for Make<'_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { rule, inputs, made } = self;
        let channels = made.len();
        let mut at = 0;
        while at < channels {
            let count = LANES.min(channels - at);
            let (mut narrow, mut wide) = ([E::default(); LANES], [0.0; LANES]);
            let mut sum = L::splat(0.0);
            for (tap, input) in inputs.iter().enumerate() {
                E::widen(&input[at..at + count], &mut wide[..count]);
                let weight = &rule.weight[tap * channels..(tap + 1) * channels];
                sum = L::load(&wide).mul_add(some::<L>(weight, at), sum);
            }
            sum.store(&mut wide);
            E::narrow(&wide, &mut narrow);
            E::widen(&narrow, &mut wide);
            silu(L::load(&wide)).store(&mut wide);
            E::narrow(&wide, &mut narrow);
            E::widen(&narrow, &mut wide);
            made[at..at + count].copy_from_slice(&wide[..count]);
            at += count;
        }
        let keys = rule.key_heads * rule.key_dim;
        let scale = 1.0 / (rule.key_dim as f32).sqrt();
        for (head, rows) in made[..2 * keys].chunks_exact_mut(rule.key_dim).enumerate() {
            let mut sums = L::splat(0.0);
            for at in (0..rows.len()).step_by(LANES) {
                let x = some::<L>(rows, at);
                sums = x.mul_add(x, sums);
            }
            let inverse = 1.0 / (sums.sum() + NORM_EPS).sqrt();
            let scale = if head < rule.key_heads { scale } else { 1.0 };
            for x in rows {
                *x = *x * inverse * scale;
            }
        }
    }
}

/// One head of one request.
struct Head<'a, 'b, E> {
    rule: &'a DeltaRule,
    head: usize,
    work: &'a Work,
    made: &'a [f32],
    gates: &'a [f32],
    memory: &'a mut [f32],
    end: Option<&'a mut [f32]>,
    out: &'a RowsMut<'b, E>,
}

impl<E: Element> Routine for Head<'_, '_, E> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self {
            rule,
            head,
            work,
            made,
            gates,
            memory,
            mut end,
            out,
        } = self;
        let (rows, width) = (rule.key_dim, rule.value_dim);
        let heads = rule.value_heads();
        let keys = rule.key_heads * rows;
        let key_head = head / (heads / rule.key_heads);
        let tokens = Tokens {
            made,
            gates,
            channels: rule.channels(),
            heads,
            head,
            query: key_head * rows,
            key: keys + key_head * rows,
            value: 2 * keys + head * width,
            rows,
        };
        let mut state = vec![0.0; rows * COLUMNS];
        for first in (0..width).step_by(COLUMNS) {
            let columns = COLUMNS.min(width - first);
            state.fill(0.0);
            if !work.span.fresh {
                for (state, memory) in state.chunks_exact_mut(COLUMNS).zip(memory.chunks_exact(width)) {
                    state[..columns].copy_from_slice(&memory[first..first + columns]);
                }
            }
            tokens.advance::<L, false>(0..work.pending, &mut state, first..first + columns, |_, _| ());
            if work.span.fresh || work.pending > 0 {
                for (memory, state) in memory.chunks_exact_mut(width).zip(state.chunks_exact(COLUMNS)) {
                    memory[first..first + columns].copy_from_slice(&state[..columns]);
                }
            }
            let write = |token: usize, values: &[f32]| {
                // SAFETY: this part alone has this head of its request's tokens.
                let row = unsafe { out.row(work.span.start + token - work.pending, head) };
                E::narrow(values, &mut row[first..first + columns]);
            };
            tokens.advance::<L, true>(work.pending..work.tokens(), &mut state, first..first + columns, write);
            if let Some(end) = end.as_deref_mut() {
                for (end, state) in end.chunks_exact_mut(width).zip(state.chunks_exact(COLUMNS)) {
                    end[first..first + columns].copy_from_slice(&state[..columns]);
                }
            }
        }
    }
}
