//! What is computed of a token, and of one head over its tokens.

use super::{DeltaRule, Work};
use crate::device::host::rowwise::silu;
use crate::device::host::simd::{Lanes, Routine};
use crate::device::host::view::{Element, LANES, RowsMut};

/// Vectors of columns that are taken at a time: 128 rows of them are 16 KiB.
const VECTORS: usize = 2;
const COLUMNS: usize = VECTORS * LANES;
/// Added to a sum of squares before its root is taken.
const NORM_EPS: f32 = 1e-6;

impl DeltaRule {
    /// `given` is b and a of every head; `made` gets beta and decay. One number per head and token: the library's exponentials will do.
    pub(super) fn gates<E: Element>(&self, given: &[E], made: &mut [f32]) {
        let heads = self.value_heads();
        let mut values = vec![0.0; 2 * heads];
        E::widen(given, &mut values);
        let (b, a) = values.split_at(heads);
        let (beta, decay) = made.split_at_mut(heads);
        for head in 0..heads {
            let b = f64::from(b[head]);
            beta[head] = rounded::<E>((1.0 / (1.0 + (-b).exp())) as f32);
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
pub(super) struct Make<'a, E> {
    pub rule: &'a DeltaRule,
    pub inputs: Vec<&'a [E]>,
    pub made: &'a mut [f32],
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
pub(super) struct Head<'a, 'b, E> {
    pub rule: &'a DeltaRule,
    pub head: usize,
    pub work: &'a Work,
    pub made: &'a [f32],
    pub gates: &'a [f32],
    pub memory: &'a mut [f32],
    pub end: Option<&'a mut [f32]>,
    pub out: &'a RowsMut<'b, E>,
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

/// What was made of a request's tokens, seen from one head.
struct Tokens<'a> {
    made: &'a [f32],
    gates: &'a [f32],
    channels: usize,
    heads: usize,
    head: usize,
    query: usize,
    key: usize,
    value: usize,
    rows: usize,
}

impl Tokens<'_> {
    fn made(&self, token: usize, at: usize, count: usize) -> &[f32] {
        &self.made[token * self.channels + at..][..count]
    }

    fn beta(&self, token: usize) -> f32 {
        self.gates[token * 2 * self.heads + self.head]
    }

    fn decay(&self, token: usize) -> f32 {
        self.gates[token * 2 * self.heads + self.heads + self.head]
    }

    /// Moves `state`, `[dk, COLUMNS]` of the columns, over the tokens; `write` gets the outputs of each, where they are wanted.
    ///
    /// Writing a token's key and reading the next one's is one walk over the state: what the next token decays and reads is what this one
    /// left, element by element, so the bits are those of two walks.
    #[inline(always)]
    fn advance<L: Lanes, const WANTED: bool>(
        &self,
        tokens: std::ops::Range<usize>,
        state: &mut [f32],
        columns: std::ops::Range<usize>,
        write: impl Fn(usize, &[f32]),
    ) {
        let Some(mut token) = (!tokens.is_empty()).then_some(tokens.start) else {
            return;
        };
        let (state, _) = state.as_chunks_mut::<COLUMNS>();
        let state = &mut state[..self.rows];
        let zero = [L::splat(0.0); VECTORS];
        let nothing = &[][..];
        let first = (self.made(token, self.key, self.rows), L::splat(self.decay(token)));
        let (_, mut read) = walk::<L, false, false, true>(state, (nothing, nothing, zero), first);
        loop {
            let value = self.made(token, self.value + columns.start, columns.len());
            let beta = L::splat(self.beta(token));
            let mut delta = zero;
            for (v, delta) in delta.iter_mut().enumerate() {
                let value = if v * LANES < value.len() {
                    some::<L>(value, v * LANES)
                } else {
                    L::splat(0.0)
                };
                *delta = value.sub(read[v]).mul(beta);
            }
            let next = (token + 1 < tokens.end).then_some(token + 1);
            let own = (
                self.made(token, self.key, self.rows),
                self.made(token, self.query, self.rows),
                delta,
            );
            let outs;
            if let Some(next) = next {
                let next = (self.made(next, self.key, self.rows), L::splat(self.decay(next)));
                (outs, read) = walk::<L, true, WANTED, true>(state, own, next);
            } else {
                (outs, _) = walk::<L, true, WANTED, false>(state, own, (nothing, L::splat(0.0)));
            }
            if WANTED {
                let mut values = [0.0; COLUMNS];
                for (v, part) in values.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    outs[v].store(part);
                }
                write(token, &values[..columns.len()]);
            }
            let Some(next) = next else {
                return;
            };
            token = next;
        }
    }
}

/// One walk over the columns of a state, `[dk]`: with `WRITE` a token's key is written, times `delta`; with `WANTED` what its query then
/// reads is the first result; with `READ` the next token decays the state, and what its key then reads is the second.
#[inline(always)]
fn walk<L: Lanes, const WRITE: bool, const WANTED: bool, const READ: bool>(
    state: &mut [[f32; COLUMNS]],
    (key, query, delta): (&[f32], &[f32], [L; VECTORS]),
    (next, decay): (&[f32], L),
) -> ([L; VECTORS], [L; VECTORS]) {
    // Even and odd rows have sums of their own, so that one addition need not wait for the last.
    let zero = [L::splat(0.0); VECTORS];
    let (mut outs, mut read) = ([zero; 2], [zero; 2]);
    let rows = state.len();
    let (key, query, next) = (
        if WRITE { &key[..rows] } else { key },
        if WANTED { &query[..rows] } else { query },
        if READ { &next[..rows] } else { next },
    );
    let (pairs, rest) = state.as_chunks_mut::<2>();
    for (pair, two) in pairs.iter_mut().enumerate() {
        for half in 0..2 {
            let row = 2 * pair + half;
            for v in 0..VECTORS {
                let part = part_of(&mut two[half], v);
                let mut s = L::load(part);
                if WRITE {
                    s = L::splat(key[row]).mul_add(delta[v], s);
                }
                if WANTED {
                    outs[half][v] = s.mul_add(L::splat(query[row]), outs[half][v]);
                }
                if READ {
                    s = s.mul(decay);
                    read[half][v] = s.mul_add(L::splat(next[row]), read[half][v]);
                }
                s.store(part);
            }
        }
    }
    if let [last] = rest {
        let row = rows - 1;
        for v in 0..VECTORS {
            let part = part_of(last, v);
            let mut s = L::load(part);
            if WRITE {
                s = L::splat(key[row]).mul_add(delta[v], s);
            }
            if WANTED {
                outs[0][v] = s.mul_add(L::splat(query[row]), outs[0][v]);
            }
            if READ {
                s = s.mul(decay);
                read[0][v] = s.mul_add(L::splat(next[row]), read[0][v]);
            }
            s.store(part);
        }
    }
    let (mut out, mut found) = (zero, zero);
    for v in 0..VECTORS {
        out[v] = outs[0][v].add(outs[1][v]);
        found[v] = read[0][v].add(read[1][v]);
    }
    (out, found)
}

#[inline(always)]
fn part_of(row: &mut [f32; COLUMNS], v: usize) -> &mut [f32; LANES] {
    &mut row.as_chunks_mut::<LANES>().0[v]
}
