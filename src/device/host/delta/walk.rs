//! A walk of a state's columns over tokens, and the arithmetic that its bits are made of.

use super::super::simd::Lanes;
use super::super::view::LANES;
use super::{COLUMNS, VECTORS, some};

/// What was made of a request's tokens, seen from one head.
pub(super) struct Tokens<'a> {
    pub made: &'a [f32],
    pub gates: &'a [f32],
    pub channels: usize,
    pub heads: usize,
    pub head: usize,
    pub query: usize,
    pub key: usize,
    pub value: usize,
    pub rows: usize,
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
    pub fn advance<L: Lanes, const WANTED: bool>(
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
