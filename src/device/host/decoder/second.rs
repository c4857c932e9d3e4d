//! What a drafter of the second kind (DFlash 2) does beside a [`super::Decoder`]'s layers: convolutions over the tokens of a block, and a choice of
//! drafts that depend on the ones before them.

use std::sync::Arc;

use super::{Guess, HostKernels, Scratch, check_len, check_weight, invalid, multiply, resized};
use crate::device::host::Rows;
use crate::device::host::linear::PackedWeight;
use crate::error::{Result, indices};

/// A sublayer's two convolutions, of what goes in (side 0) and of what comes out (side 1), over the tokens of a block:
/// `y[n] = sum over t of (base[side, t] + delta[n, side, t]) * x[n - t]`, nothing before the block.
#[derive(Clone, Debug)]
pub struct BlockConv {
    /// `[2, taps, H]`: of every channel.
    pub base: Vec<f32>,
    /// `[2 * taps * groups, H]`: a delta for neighbouring channels together, made of what goes in.
    pub deltas: Arc<PackedWeight>,
    /// Tokens that are looked at, the own one first.
    pub taps: usize,
}

impl BlockConv {
    /// Checks the shapes for a residual stream of `hidden` channels.
    ///
    /// # Errors
    /// `InvalidArgument` or `Length` naming what does not fit.
    pub fn check(&self, hidden: usize) -> Result<()> {
        if self.taps == 0 {
            return invalid("taps", self.taps, "at least 1");
        }
        check_len("base_kernel", self.base.len(), 2 * self.taps * hidden)?;
        let outputs = self.deltas.outputs();
        let groups = outputs / (2 * self.taps);
        if groups == 0 || !outputs.is_multiple_of(2 * self.taps) || !hidden.is_multiple_of(groups) {
            let expected = format!("{} times a divisor of {hidden} rows", 2 * self.taps);
            return invalid("kernel_projection", outputs, expected);
        }
        check_weight("kernel_projection", &self.deltas, outputs, hidden)
    }

    /// What both sides want to have of the rows `x` `[T, H]` that go in, `[T, 2, taps, groups]` into `deltas`.
    pub(super) fn look(&self, kernels: HostKernels, tokens: usize, x: &[f32], deltas: &mut Vec<f32>) -> Result<()> {
        let deltas = resized(deltas, tokens * self.deltas.outputs());
        multiply(kernels, &self.deltas, tokens, x, None, deltas)
    }

    /// One side, in place: `x` `[T, H]` of blocks of `block` tokens.
    pub(super) fn over(&self, side: usize, block: usize, deltas: &[f32], x: &mut [f32]) {
        let hidden = self.base.len() / (2 * self.taps);
        let (wide, groups) = (self.deltas.outputs(), self.deltas.outputs() / (2 * self.taps));
        let of = |tap: usize| (side * self.taps + tap) * hidden;
        for (x, deltas) in x.chunks_mut(block * hidden).zip(deltas.chunks(block * wide)) {
            // From the last token on: what a token looks at is still as it came.
            for token in (0..x.len() / hidden).rev() {
                let (before, own) = x.split_at_mut(token * hidden);
                let own = &mut own[..hidden];
                let deltas = &deltas[token * wide + side * self.taps * groups..][..self.taps * groups];
                scaled(own, &self.base[of(0)..][..hidden], &deltas[..groups]);
                for tap in 1..self.taps.min(token + 1) {
                    let other = &before[(token - tap) * hidden..][..hidden];
                    let (base, deltas) = (&self.base[of(tap)..][..hidden], &deltas[tap * groups..][..groups]);
                    added(own, other, base, deltas);
                }
            }
        }
    }
}

/// `x *= base + delta`, a delta for each of as many neighbouring elements as there are.
fn scaled(x: &mut [f32], base: &[f32], deltas: &[f32]) {
    let size = x.len() / deltas.len();
    for ((x, base), delta) in x.chunks_mut(size).zip(base.chunks(size)).zip(deltas) {
        for (x, base) in x.iter_mut().zip(base) {
            *x *= base + delta;
        }
    }
}

/// `x += (base + delta) * other`, likewise.
fn added(x: &mut [f32], other: &[f32], base: &[f32], deltas: &[f32]) {
    let size = x.len() / deltas.len();
    let parts = x.chunks_mut(size).zip(other.chunks(size)).zip(base.chunks(size));
    for (((x, other), base), delta) in parts.zip(deltas) {
        for ((x, other), base) in x.iter_mut().zip(other).zip(base) {
            *x += (base + delta) * other;
        }
    }
}

/// What a place proposes, given what was chosen for the one before it: `score(c) = log p(c) + <A[last] * (W h), B[c]>`.
#[derive(Clone, Debug)]
pub struct Selector {
    /// `W`, `[R, H]`.
    pub projection: Arc<PackedWeight>,
    /// Candidates of a place.
    pub top_k: usize,
    /// Tokens of the logits' columns; none where these are the tokens.
    pub names: Option<Vec<usize>>,
}

/// A selector's codebooks, `[V, 1, R]` each.
#[derive(Debug)]
pub struct Codebooks<'a> {
    /// `A`, of the token before.
    pub predecessor: Rows<'a, f32>,
    /// `B`, of a candidate.
    pub successor: Rows<'a, f32>,
}

impl Selector {
    /// Checks the shapes against a head of `columns` rows over `hidden` channels, and `books`.
    ///
    /// # Errors
    /// `InvalidArgument` or `Length` naming what does not fit.
    pub fn check(&self, columns: usize, hidden: usize, books: &Codebooks<'_>) -> Result<()> {
        let rank = self.projection.outputs();
        check_weight("projection", &self.projection, rank, hidden)?;
        if !(1..=columns).contains(&self.top_k) {
            return invalid("top_k", self.top_k, format!("1..{columns}"));
        }
        let (first, second) = (*books.predecessor.layout(), *books.successor.layout());
        for (name, layout) in [("predecessor", first), ("successor", second)] {
            if (layout.heads, layout.dim) != (1, rank) {
                return invalid(name, format!("rows of {}", layout.dim), rank.to_string());
            }
        }
        let tokens = first.rows.min(second.rows);
        match &self.names {
            None if columns > tokens => {
                invalid("successor", tokens, format!("at least the {columns} rows of the head"))
            }
            None => Ok(()),
            Some(names) => {
                check_len("names", names.len(), columns)?;
                match names.iter().find(|&&token| token >= tokens) {
                    Some(token) => invalid("names", token, indices(tokens)),
                    None => Ok(()),
                }
            }
        }
    }

    /// Walks blocks greedily. `likeliest`: `top_k` guesses of every row behind an anchor, `block - 1` of them a block; `hidden` `[rows, H]`:
    /// what the head read there, normalised; `anchors`: a token for each block. Gives the `k` best of every row, the chosen one first.
    ///
    /// # Errors
    /// `InvalidArgument` for an anchor without a row, and for more than `top_k` wanted.
    #[allow(clippy::too_many_arguments, reason = "the arrays of a stage")]
    pub fn walk(
        &self,
        kernels: HostKernels,
        books: &Codebooks<'_>,
        likeliest: &[Guess],
        anchors: &[i64],
        block: usize,
        k: usize,
        scratch: &mut Scratch,
    ) -> Result<Vec<Guess>> {
        if k > self.top_k {
            return invalid("k", k, format!("at most {}, the drafter's selector_top_k", self.top_k));
        }
        let known = books.predecessor.layout().rows;
        if let Some(anchor) = anchors.iter().find(|&&token| token < 0 || token as usize >= known) {
            return invalid("token_ids", anchor, indices(known));
        }
        let (rows, rank) = (likeliest.len() / self.top_k, self.projection.outputs());
        let Scratch { normed, inner, .. } = scratch;
        let state = resized(inner, rows * rank);
        multiply(
            kernels,
            &self.projection,
            rows,
            &normed[..rows * self.projection.inputs()],
            None,
            state,
        )?;
        let mut chosen = Vec::with_capacity(rows * k);
        let mut scored = Vec::with_capacity(self.top_k);
        let mut last = 0;
        let places = likeliest.chunks_exact(self.top_k).zip(state.chunks_exact_mut(rank));
        for (row, (among, state)) in places.enumerate() {
            if row.is_multiple_of(block - 1) {
                last = anchors[row / (block - 1)] as usize;
            }
            for (state, own) in state.iter_mut().zip(books.predecessor.row(last, 0)) {
                *state *= own;
            }
            scored.clear();
            scored.extend(among.iter().map(|guess| (self.score(books, state, guess), guess.token)));
            // What is no candidate counts with its own probability.
            let rest = 1.0 - among.iter().map(|guess| guess.probability).sum::<f32>();
            let most = scored
                .iter()
                .fold(f32::NEG_INFINITY, |most, &(score, _)| most.max(score));
            let top = if most.is_finite() { most } else { 0.0 };
            let sum = scored.iter().map(|&(score, _)| (score - top).exp()).sum::<f32>() + rest.max(1e-6) * (-top).exp();
            // Of equals the likelier by itself, which came first.
            scored.sort_by(|a, b| b.0.total_cmp(&a.0));
            chosen.extend(scored[..k].iter().map(|&(score, token)| Guess {
                token,
                probability: (score - top).exp() / sum,
            }));
            last = self.named(scored[0].1);
        }
        Ok(chosen)
    }

    /// The token of a column.
    fn named(&self, column: usize) -> usize {
        self.names.as_ref().map_or(column, |names| names[column])
    }

    fn score(&self, books: &Codebooks<'_>, state: &[f32], guess: &Guess) -> f32 {
        let own = books.successor.row(self.named(guess.token), 0);
        let sway: f32 = state.iter().zip(own).map(|(state, own)| state * own).sum();
        let score = guess.probability.ln() + sway;
        // What is no number is no reason to take a candidate.
        if score.is_nan() { f32::NEG_INFINITY } else { score }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::rows_of;
    use super::*;
    use crate::device::host::linear::Precision;
    use crate::device::host::made_up::numbers;

    fn packed(outputs: usize, inputs: usize, seed: u64) -> Arc<PackedWeight> {
        let weight = numbers(outputs * inputs, seed, false);
        Arc::new(PackedWeight::new(&weight, outputs, inputs, None, Precision::Highest).unwrap())
    }

    fn conv(taps: usize, groups: usize, hidden: usize) -> BlockConv {
        BlockConv {
            base: numbers(2 * taps * hidden, 1, false),
            deltas: packed(2 * taps * groups, hidden, 2),
            taps,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn a_token_is_the_sum_over_those_before_it_in_its_block(
            taps in 1usize..5, groups in 1usize..4, size in 1usize..5, block in 1usize..6, blocks in 1usize..4, side in 0usize..2,
        ) {
            let hidden = groups * size;
            let conv = conv(taps, groups, hidden);
            conv.check(hidden).unwrap();
            let tokens = blocks * block;
            let x = numbers(tokens * hidden, 3, false);
            let mut deltas = Vec::new();
            conv.look(HostKernels::new().unwrap(), tokens, &x, &mut deltas).unwrap();
            let mut got = x.clone();
            conv.over(side, block, &deltas, &mut got);
            for token in 0..tokens {
                for channel in 0..hidden {
                    let terms = (0..taps.min(token % block + 1)).map(|tap| {
                        let base = conv.base[(side * taps + tap) * hidden + channel];
                        let delta = deltas[((token * 2 + side) * taps + tap) * groups + channel / size];
                        (base + delta) * x[(token - tap) * hidden + channel]
                    });
                    let expected: f32 = terms.sum();
                    prop_assert!((got[token * hidden + channel] - expected).abs() < 1e-5);
                }
            }
        }

        #[test]
        fn a_path_takes_the_best_behind_the_one_before(
            blocks in 1usize..3, block in 2usize..5, top_k in 1usize..6, wanted in 1usize..6, part in any::<bool>(), seed in 0u64..1000,
        ) {
            let (hidden, rank, tokens, columns) = (6, 3, 30, 12);
            let k = wanted.min(top_k);
            let selector = Selector {
                projection: packed(rank, hidden, seed),
                top_k,
                names: part.then(|| (0..columns).map(|column| column * 2 + 1).collect()),
            };
            let (first, second) = (numbers(tokens * rank, seed + 1, false), numbers(tokens * rank, seed + 2, false));
            let books = Codebooks {
                predecessor: rows_of("predecessor", &first, tokens, rank).unwrap(),
                successor: rows_of("successor", &second, tokens, rank).unwrap(),
            };
            selector.check(columns, hidden, &books).unwrap();
            let rows = blocks * (block - 1);
            let name = |column: usize| if part { column * 2 + 1 } else { column };
            let likeliest: Vec<Guess> = (0..rows * top_k)
                .map(|i| Guess { token: (i * 5 + i / top_k) % columns, probability: 0.5 / (1 + i % top_k) as f32 / top_k as f32 })
                .collect();
            let anchors: Vec<i64> = (0..blocks as i64).map(|b| b * 7 + 3).collect();
            let mut scratch = Scratch { normed: numbers(rows * hidden, seed + 3, false), ..Scratch::default() };
            let states = scratch.normed.clone();
            let kernels = HostKernels::new().unwrap();
            let got = selector.walk(kernels, &books, &likeliest, &anchors, block, k, &mut scratch).unwrap();
            prop_assert_eq!(got.len(), rows * k);
            let weight = numbers(rank * hidden, seed, false);
            let mut last = 0;
            for row in 0..rows {
                if row % (block - 1) == 0 {
                    last = anchors[row / (block - 1)] as usize;
                }
                let state: Vec<f32> = (0..rank)
                    .map(|r| (0..hidden).map(|h| weight[r * hidden + h] * states[row * hidden + h]).sum::<f32>())
                    .collect();
                let among = &likeliest[row * top_k..][..top_k];
                let score = |guess: &Guess| {
                    let sway: f32 =
                        (0..rank).map(|r| first[last * rank + r] * state[r] * second[name(guess.token) * rank + r]).sum();
                    guess.probability * sway.exp()
                };
                let scores: Vec<f32> = among.iter().map(score).collect();
                let rest = 1.0 - among.iter().map(|guess| guess.probability).sum::<f32>();
                let sum = scores.iter().sum::<f32>() + rest.max(1e-6);
                let own = &got[row * k..][..k];
                for (place, guess) in own.iter().enumerate() {
                    let index = among.iter().position(|other| other.token == guess.token).unwrap();
                    prop_assert!((guess.probability - scores[index] / sum).abs() < 1e-4);
                    let better = scores.iter().filter(|&&score| score > scores[index] * (1.0 + 1e-4)).count();
                    prop_assert!(better <= place);
                }
                last = name(own[0].token);
            }
        }
    }

    #[test]
    fn candidates_that_are_no_numbers_are_not_taken_before_others() {
        let selector = Selector {
            projection: packed(1, 1, 5),
            top_k: 2,
            names: None,
        };
        let (first, second) = ([1.0; 3], [f32::NAN, 0.0, 0.0]);
        let books = Codebooks {
            predecessor: rows_of("predecessor", &first, 3, 1).unwrap(),
            successor: rows_of("successor", &second, 3, 1).unwrap(),
        };
        let likeliest = [(0, 0.6), (1, 0.3)].map(|(token, probability)| Guess { token, probability });
        let mut scratch = Scratch {
            normed: vec![1.0],
            ..Scratch::default()
        };
        let kernels = HostKernels::new().unwrap();
        let got = selector
            .walk(kernels, &books, &likeliest, &[2], 2, 2, &mut scratch)
            .unwrap();
        assert_eq!(got.iter().map(|guess| guess.token).collect::<Vec<_>>(), [1, 0]);
        assert!((got[0].probability - 0.3 / 0.4).abs() < 1e-5 && got[1].probability == 0.0);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused =
            |result: Result<()>, told: &str| assert!(result.unwrap_err().to_string().contains(told), "{told}");
        refused(
            BlockConv {
                taps: 0,
                ..conv(1, 1, 4)
            }
            .check(4),
            "taps",
        );
        refused(
            BlockConv {
                base: vec![0.0; 7],
                ..conv(1, 1, 4)
            }
            .check(4),
            "base_kernel",
        );
        refused(
            BlockConv {
                deltas: packed(6, 4, 1),
                ..conv(1, 1, 4)
            }
            .check(4),
            "kernel_projection",
        );
        refused(
            BlockConv {
                deltas: packed(2, 5, 1),
                ..conv(1, 1, 4)
            }
            .check(4),
            "kernel_projection",
        );
        let book = [0.0; 12];
        let books = |rows: usize, rank: usize| Codebooks {
            predecessor: rows_of("predecessor", &book, rows, rank).unwrap(),
            successor: rows_of("successor", &book, rows, rank).unwrap(),
        };
        let selector = Selector {
            projection: packed(2, 4, 1),
            top_k: 3,
            names: None,
        };
        selector.check(6, 4, &books(6, 2)).unwrap();
        refused(selector.check(6, 5, &books(6, 2)), "projection");
        refused(selector.check(2, 4, &books(6, 2)), "top_k");
        refused(selector.check(6, 4, &books(4, 3)), "predecessor");
        refused(selector.check(6, 4, &books(5, 2)), "successor");
        let part = |names: &[usize]| Selector {
            names: Some(names.to_vec()),
            ..selector.clone()
        };
        part(&[0, 1, 5]).check(3, 4, &books(6, 2)).unwrap();
        refused(part(&[0, 1]).check(3, 4, &books(6, 2)), "names");
        refused(part(&[0, 1, 6]).check(3, 4, &books(6, 2)), "names");
        let mut scratch = Scratch {
            normed: vec![0.0; 4],
            ..Scratch::default()
        };
        let (kernels, none) = (
            HostKernels::new().unwrap(),
            [Guess {
                token: 0,
                probability: 0.1,
            }; 3],
        );
        let mut walk = |anchor, k| {
            selector
                .walk(kernels, &books(6, 2), &none, &[anchor], 2, k, &mut scratch)
                .map(|_| ())
        };
        walk(5, 3).unwrap();
        refused(walk(6, 3), "token_ids");
        refused(walk(-1, 3), "token_ids");
        refused(walk(5, 4), "k: got 4");
    }
}
