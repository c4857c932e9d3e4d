//! The target's own token for one row of logits: transform, then a keyed Gumbel-max draw.
//!
//! Bit for bit, with `l` the logits after masks, penalties and bias ([`Sampling`]), every operation rounded to f32 on its own:
//!
//! ```text
//! temperature 0:  token = lowest column that holds max l
//! otherwise:      scale = 1 / temperature;  t[c] = l[c] * scale;  top = max t
//!                 min-p  keeps c iff t[c] - top >= ln(min_p)                          (rng::ln)
//!                 W[c]   = round(exp(t[c] - top) * 2^40), an integer                 (sums in any order)
//!                 top-p  keeps c iff the W of all tokens before it < ceil(top_p * sum W), f64
//!                 top-k  keeps the first top_k;  "before" = larger t, or equal t and lower id
//!                 token  = argmax over kept c of t[c] + gumbel(seed, position, c, Draw), lowest id wins ties
//! ```
//!
//! The draw needs no normalised probabilities, visits the columns in any order and skips blocks of columns that cannot
//! win, because a Gumbel number is bounded. None of this changes a bit of the result.

use crate::error::{Error, Result};
use crate::rng::{Domain, GUMBEL_MAX, Stream, gumbel_of_word, ln};
use crate::types::TokenId;
use crate::verify::filter::{self, Tempered};
use crate::verify::math::{BLOCK, block_max, first_of, log_sum_exp, order_key, scan};
use crate::verify::sampling::not_a_column;
use crate::verify::wide::{Routine, widest};
use crate::verify::{History, Sampling};

/// A drawn token with its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// log-softmax of the **raw** logits (before penalties, bias, temperature and filters) at the token, nats.
    pub logprob: f32,
}

/// Draws rows. Holds scratch only: a fresh sampler and a reused one give the same tokens.
#[derive(Clone, Debug, Default)]
pub struct Sampler {
    edited: Vec<f32>,
    maxima: Vec<f32>,
    packed: Vec<u64>,
    kept: Vec<u32>,
}

impl Sampler {
    /// No scratch yet; it grows to one row at the first use.
    pub fn new() -> Self {
        Self::default()
    }

    /// Draws the token of one row and scores it.
    ///
    /// `logits` are the target's raw logits, one per vocabulary column. `path` are the drafts accepted after `history` on this
    /// row's own path: they count as output for the penalties. `position` is the absolute position of the token drawn; with
    /// the seed it keys the random numbers.
    ///
    /// `sampling` is taken as validated. Errors: [`Error::BadLogit`] (NaN, +inf), [`Error::EmptyRow`] (all -inf),
    /// [`Error::InvalidArgument`] when a token of history, path or bias is not a column.
    pub fn sample_row(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        history: &History,
        path: &[TokenId],
        position: u64,
    ) -> Result<Sampled> {
        let token = self.draw_row(logits, sampling, history, path, position)?;
        let logprob = self.logprob(logits, token)?;
        Ok(Sampled { token, logprob })
    }

    /// [`Self::sample_row`] without the score, which costs a pass of its own over the row.
    pub fn draw_row(
        &mut self,
        logits: &[f32],
        sampling: &Sampling,
        history: &History,
        path: &[TokenId],
        position: u64,
    ) -> Result<TokenId> {
        let Self {
            edited,
            maxima,
            packed,
            kept,
        } = self;
        let row = if sampling.edits_logits(position) {
            sampling.edit(logits, history, path, position, edited)?;
            edited.as_slice()
        } else {
            logits
        };
        let top = scan(row, maxima)?;
        if sampling.temperature == 0.0 {
            return Ok(TokenId(first_of(row, maxima, top) as u32));
        }
        let scale = 1.0 / sampling.temperature;
        let tempered = Tempered {
            row,
            maxima,
            scale,
            top: top * scale,
        };
        if !tempered.top.is_finite() {
            return Err(Error::BadLogit {
                column: first_of(row, maxima, top),
                value: "an overflow of logit / temperature",
            });
        }
        let floor = if sampling.min_p > 0.0 {
            ln(sampling.min_p)
        } else {
            f32::NEG_INFINITY
        };
        let stream = Stream::new(sampling.seed, position, Domain::Draw);
        let id = if sampling.top_k == 0 && sampling.top_p >= 1.0 {
            widest(DrawAll {
                row: tempered,
                floor,
                stream,
            })
        } else {
            filter::keep(tempered, sampling.top_k as usize, sampling.top_p, floor, packed, kept);
            draw_kept(tempered, kept, &stream)
        };
        Ok(TokenId(id))
    }

    /// log-softmax of `logits` at `token`, nats.
    pub fn logprob(&mut self, logits: &[f32], token: TokenId) -> Result<f32> {
        let Some(&logit) = logits.get(token.0 as usize) else {
            return Err(not_a_column("token", token, logits.len()));
        };
        let top = scan(logits, &mut self.maxima)?;
        Ok((f64::from(logit) - log_sum_exp(logits, &self.maxima, top)) as f32)
    }
}

/// The `n` likeliest tokens of a raw row with their log-softmax (nats), falling, lowest id first among equals.
pub fn top_logprobs(logits: &[f32], n: usize) -> Result<Vec<(TokenId, f32)>> {
    let mut maxima = Vec::new();
    let top = scan(logits, &mut maxima)?;
    let norm = log_sum_exp(logits, &maxima, top);
    let mut packed: Vec<u64> = logits
        .iter()
        .enumerate()
        .map(|(id, &x)| u64::from(order_key(x)) << 32 | u64::from(!(id as u32)))
        .collect();
    let n = n.min(packed.len());
    if n == 0 {
        return Ok(Vec::new());
    }
    if n < packed.len() {
        packed.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
        packed.truncate(n);
    }
    packed.sort_unstable_by(|a, b| b.cmp(a));
    Ok(packed
        .into_iter()
        .map(|p| {
            let id = !(p as u32);
            (TokenId(id), (f64::from(logits[id as usize]) - norm) as f32)
        })
        .collect())
}

struct Best {
    score: f32,
    id: u32,
}

impl Best {
    fn offer(&mut self, score: f32, id: u32) {
        if score > self.score || (score == self.score && id < self.id) {
            *self = Self { score, id };
        }
    }
}

fn draw_kept(row: Tempered, kept: &[u32], stream: &Stream) -> u32 {
    let mut best = Best {
        score: f32::NEG_INFINITY,
        id: u32::MAX,
    };
    for &id in kept {
        best.offer(row.row[id as usize] * row.scale + stream.gumbel(id), id);
    }
    best.id
}

// The draw over all columns at or above the floor.
struct DrawAll<'a> {
    row: Tempered<'a>,
    floor: f32,
    stream: Stream,
}

impl Routine for DrawAll<'_> {
    type Output = u32;

    #[inline(always)]
    fn run(self) -> u32 {
        let Self { row, floor, stream } = self;
        let mut best = Best {
            score: f32::NEG_INFINITY,
            id: u32::MAX,
        };
        // The likeliest block first: its winner is a bar that most other blocks cannot reach.
        let first = row.maxima.iter().position(|&m| m * row.scale == row.top).unwrap_or(0);
        for b in std::iter::once(first).chain(0..row.maxima.len()) {
            let max = row.maxima[b] * row.scale;
            // Strictly below, so that a tie with a lower id is still seen. Rounding is monotone, so the bound is exact.
            if max + GUMBEL_MAX < best.score || max - row.top < floor {
                continue;
            }
            draw_block(row, b, floor, &stream, &mut best);
        }
        best.id
    }
}

// Above twice the error of a Gumbel number: a smaller word has no larger number than this beyond that of a larger word.
const SLACK: f32 = 1e-5;

#[inline(always)]
fn draw_block(row: Tempered, b: usize, floor: f32, stream: &Stream, best: &mut Best) {
    let start = b * BLOCK;
    let logits = &row.row[start..row.row.len().min(start + BLOCK)];
    let words = stream.lanes::<{ BLOCK / 4 }>(start as u32);
    // Two logarithms per column cost several times what its word does, and few blocks can win once their words are known.
    let mut largest = words[0];
    for lane in &words[1..] {
        for (a, &b) in largest.iter_mut().zip(lane) {
            *a = if b > *a { b } else { *a };
        }
    }
    let largest = largest.iter().fold(0, |a, &b| if b > a { b } else { a });
    if row.maxima[b] * row.scale + (gumbel_of_word(largest) + SLACK) < best.score {
        return;
    }
    let mut scores = [f32::NEG_INFINITY; BLOCK];
    for (score, &x) in scores.iter_mut().zip(logits) {
        let t = x * row.scale;
        *score = if t - row.top >= floor { t } else { f32::NEG_INFINITY };
    }
    let numbers = words.map(|lane| lane.map(gumbel_of_word));
    for (i, score) in scores.iter_mut().enumerate() {
        *score += numbers[i & 3][i >> 2];
    }
    let (max, _) = block_max(&scores);
    if max >= best.score
        && max > f32::NEG_INFINITY
        && let Some(at) = scores.iter().position(|&s| s == max)
    {
        best.offer(max, (start + at) as u32);
    }
}
